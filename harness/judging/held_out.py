"""The evaluation of a policy on held-out prompts: its answers, judged, their log-probs, duels.

evaluation.py makes the numbers of the rows that are written here.
Test: pytest tests/test_train_loop.py.
"""

from dataclasses import replace

import torch

import data
from harness.judging import duel
from harness.judging.evaluation import evaluation
from harness.models import weights
from model import Policy


def evaluate(run, here, policy_path, start, s, sample_responses):
    """Adds a row to metrics.jsonl: the policy on held-out prompts, against the start policy. The
    start is its own opponent, and is evaluated once for all arms of a seed. sample_responses: the
    phase that samples."""
    if start.held_out:
        owner = start.run if policy_path == start.policy else run
        judge, one_each = start.judging(here, True), replace(s, responses_per_prompt=1)
        # One random stream, "eval", for all policies.
        ys = [owner.rows(here / "answers.jsonl", sample_responses, start.held_out, policy_path,
                         start, one_each, "eval")]
        if start.also_samples(s.temperature):
            ys.append(owner.rows(here / "answers_at_temperature_1.jsonl", sample_responses,
                                 start.held_out, policy_path, start,
                                 replace(one_each, temperature=1.0), "eval"))
        answers = owner.rows(here / "eval.jsonl", judge_answers, start.held_out, ys, policy_path,
                             start, s, judge)
        duels = owner.rows(here / "duels.jsonl", duel.judge_duels, answers,
                           duel.opponents(start.run.path, here, s), judge)
        metrics = evaluation(answers, duels)
        if start.true_measures:
            [truth] = owner.rows(here / "true.jsonl", measure_truth, [policy_path], start, s)
            metrics |= truth
        run.log([{"iteration": s.iteration, "phase": "eval", **metrics}])
    start.forget_scores(here)


def judge_answers(records, ys, policy, start, s, judge):
    """The rows of eval.jsonl: the policy's answer to each held-out prompt, judged beside the data's
    responses; log-probs of all under this and the start policy. ys: the rows of answers.jsonl, and
    where it is cheap those of an answer at temperature 1, judged likewise."""
    records, chat = list(records), start.chat
    own, *at_1 = [[rows.of(record["prompt_id"])["samples"][0] for record in records] for rows in ys]
    trees = [data.Tree(prompt, [*responses, y["ids"]], 0, 1, [2], prompt_id=record["prompt_id"])
             for (record, prompt, responses), y in
             zip(data.encode(records, chat, s.max_prompt_length, s.max_length), own)]
    prompts, ids = [r["prompt"] for r in records], [r["prompt_id"] for r in records]
    texts = [chat.texts(tree.responses) for tree in trees]
    # Scores of PairRM compare within one list: every iteration must meet the same opponents.
    scores, hot = judge(prompts, texts, ids), [{}] * len(own)
    for other in at_1:
        lists = [[*given, y["text"]] for y, (*given, _) in zip(other, texts)]
        hot = [{"response_at_temperature_1": y, "score_at_temperature_1": score}
               for (*_, y), (*_, score) in zip(lists, judge(prompts, lists, ids))]
    policy_logps, start_logps = (logps_of(path, trees, s) for path in (policy, start.policy))
    for i, y in enumerate(own):
        yield {"prompt_id": ids[i], "prompt": prompts[i], "response": y["text"], "ids": y["ids"],
               "finished": y["finished"], "scores": scores[i],
               "policy_logps": policy_logps[ids[i]], "start_logps": start_logps[ids[i]], **hot[i]}


@torch.no_grad()
def logps_of(path, trees, s):
    """{prompt_id: log-probs of its tree's responses} under the policy at `path`, in the form that
    samples."""
    policy = Policy(weights.load_frozen(path, s.compute, s.compute.attention))
    make, logps = data.pad if s.plain_rows else data.pack, {}
    for micro_batch in data.plan_micro_batches(trees, s.batching):
        flat = policy(make(micro_batch).to(policy.device)).tolist()
        for tree in micro_batch:
            logps[tree.prompt_id], flat = flat[:len(tree.responses)], flat[len(tree.responses):]
    return logps


def measure_truth(paths, start, s):
    """What no real run can know of the policies at `paths`: the toy's true measures."""
    for path in paths:
        measures = start.true_measures(*(weights.load_frozen(name, s.compute, start.attention)
                                         for name in (path, start.policy)))
        yield {f"true_{name}": value for name, value in measures.items()}

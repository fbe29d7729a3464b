"""What the evaluation of a policy writes: its answers judged, their log-probs, the toy's truth.

train_loop.evaluate samples the answers and calls these; evaluate.py makes numbers of the rows.
Test: pytest tests/test_train_loop.py.
"""

import torch

import data
from harness.models import weights
from model import Policy


def judge_answers(records, ys, policy, start, s, judge):
    """The rows of eval.jsonl: the policy's answer to each held-out prompt, judged beside the data's
    responses; log-probs of all under this and the start policy. ys: the rows of answers.jsonl, and
    where it is cheap those of an answer at temperature 1, judged likewise."""
    records, chat = list(records), start.chat
    own, *at_1 = [[rows.of(record["prompt_id"])["samples"][0] for record in records] for rows in ys]
    trees = [data.Tree(prompt, [*responses, y["ids"]], 0, 1, [2]) for (_, prompt, responses), y in
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
               "finished": y["finished"], "scores": scores[i], "policy_logps": policy_logps[i],
               "start_logps": start_logps[i], **hot[i]}


@torch.no_grad()
def logps_of(path, trees, s):
    """Log-probs of the trees' responses under the policy at `path`, in the form that samples."""
    policy = Policy(weights.load_frozen(path, s.compute, s.compute.attention))
    make = data.pad if s.plain_rows else data.pack
    logps = [None] * len(trees)
    for micro_batch in data.plan_micro_batches([tree.size for tree in trees], s.batching):
        flat = policy(make([trees[i] for i in micro_batch]).to(policy.device)).tolist()
        for i in micro_batch:
            logps[i], flat = flat[:len(trees[i].responses)], flat[len(trees[i].responses):]
    return logps


def measure_truth(paths, start, s):
    """What no real run can know of the policies at `paths`: the toy's true measures."""
    for path in paths:
        measures = start.true_measures(*(weights.load_frozen(name, s.compute, start.attention)
                                         for name in (path, start.policy)))
        yield {f"true_{name}": value for name, value in measures.items()}

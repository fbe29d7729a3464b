"""Duels: whose answer does a judge prefer? A run's policies on held-out prompts, each against the
ones before it; and, from the command line, one file of AlpacaEval outputs against another:

    python sample.py --model FOLDER --alpaca-eval alpaca_eval.json --output mine.json
    python -m harness.judging.duel --outputs mine.json --reference theirs.json --ranker reward:ORG/NAME

A duel is a list of two for the judge, because scores of different lists need not compare (PairRM's
never do). Equal scores are a tie, and half a win for each.

Test: pytest tests/test_duel.py.
"""

from harness.runs import exits

exits.before(__name__, "nothing had begun")  # Ctrl-C is one line while libraries load, too

import argparse
import statistics
from collections import Counter

import torch

from harness.runs.sample_command import read_instructions, user_turn
from harness.judging.evaluation import half_for_ties, length_controlled, wilson
from harness.judging.judges import SPECS, load_judge, parse_spec
from harness.runs.output_files import Rows, check_scores
from harness.runs.settings import as_judge, as_path
from harness.inputs.chat_template import strip_thought

NEAR = 4  # iterations: in a run of many, only policies so near to each other meet

# ----------------------------------------------------------------------------------------------
# 1. The policies of a run
# ----------------------------------------------------------------------------------------------


def opponents(home, here, s):
    """{name: folder with an eval.jsonl} of the policies that the one evaluated in `here` meets: the
    start, what an earlier arm made, and its own arm's before it. home: the seed's folder, below
    which a path is a name ("start", "iter_2", "baseline/iter_1"); s: the iteration's settings."""
    end = s.first + s.iterations
    arms = {home: end} | {here.parent: s.iteration}  # in `home` itself, only the earlier ones
    folders = [home / "start"] + [arm / f"iter_{k}" for arm, last in arms.items()
                                  for k in range(s.first, last) if abs(k - s.iteration) <= NEAR]
    return {folder.relative_to(home).as_posix(): folder for folder in folders}


def judge_duels(answers, opponents, judge):
    """The rows of duels.jsonl, from rows of eval.jsonl: {prompt_id, duels: {opponent's name: [score
    of our answer, of theirs]}, at_temperature_1: the same against the start where both were
    sampled, or null; characters: [of ours, of the start's]}."""
    answers = list(answers)
    ids, prompts = ([row[name] for row in answers] for name in ("prompt_id", "prompt"))
    found = [{"prompt_id": prompt_id, "duels": {}} for prompt_id in ids]

    def duels(theirs, name):
        return judge(prompts, [[a[name], b[name]] for a, b in zip(answers, theirs)], ids)
    for opponent, folder in opponents.items():
        rows = Rows(folder / "eval.jsonl")
        theirs = [rows.of(prompt_id) for prompt_id in ids]
        for row, scores in zip(found, duels(theirs, "response")):
            row["duels"][opponent] = scores
        if opponent == "start":
            sampled = [None] * len(ids)
            if all("response_at_temperature_1" in row for row in answers):
                sampled = duels(theirs, "response_at_temperature_1")
            for row, scores, a, b in zip(found, sampled, answers, theirs):
                row |= {"at_temperature_1": scores,
                        "characters": [len(a["response"]), len(b["response"])]}
    yield from found


# ----------------------------------------------------------------------------------------------
# 2. Two files of outputs
# ----------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m harness.judging.duel", description="How often a judge prefers the outputs of one "
        "model to those of another; both files as AlpacaEval has them: a JSON list of objects with "
        "'instruction' and 'output'. Thoughts (<think>...</think>) are taken off before judging.")
    add = parser.add_argument
    add("--outputs", type=as_path, required=True, metavar="FILE", help="whose win rate is wanted")
    add("--reference", type=as_path, required=True, metavar="FILE", help="against whom")
    add("--ranker", type=as_judge, default="pairrm",
        help=f"{SPECS} (default pairrm = llm-blender/PairRM-hf)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--tokens-per-forward", type=int, default=8192, help="halve it when memory runs out")
    add("--scores", type=as_path, metavar="FILE", help="keeps finished scores; the same command "
        "resumes from them (default: they are not kept)")
    print(compare(parser.parse_args(argv)))


def compare(args):
    """The lines to print: win rate, the one at equal lengths, and what they rest on."""
    pairs = matched(args.outputs, args.reference)
    if args.scores:
        check_scores(args.scores, [("--outputs", args.outputs), ("--reference", args.reference),
                                   ("--ranker", parse_spec(args.ranker).path)])
    judge = load_judge(args.ranker, args.device, args.tokens_per_forward, progress=True)
    prompts, ids = [user_turn(text) for text, _ in pairs], [f"{text[:60]!r}" for text, _ in pairs]
    scores = judge(prompts, list(pairs.values()), ids, args.scores)
    wins = [half_for_ties(*duel) for duel in scores]
    n, ties, rate = len(wins), wins.count(0.5), statistics.fmean(wins)
    interval = "{:.3f}  (95 % interval {:.3f} to {:.3f})".format
    lengths = [statistics.fmean(len(pair[side]) for pair in pairs.values()) for side in (0, 1)]
    return "\n".join([
        f"{args.outputs} against {args.reference}, judged by {args.ranker}",
        f"win rate                    {interval(rate, *wilson(rate, n))}",
        "length-controlled win rate  " + interval(*length_controlled(
            wins, [len(ours) - len(theirs) for ours, theirs in pairs.values()])),
        f"{n} instructions, {ties} ties; {lengths[0]:.0f} characters an output against "
        f"{lengths[1]:.0f}"])


def matched(outputs, reference):
    """{(instruction, how often it came before): [ours, theirs]}, joined by the instruction, in the
    order of `outputs`. ValueError that quotes an instruction which one file lacks."""
    ours, theirs = read_outputs("--outputs", outputs), read_outputs("--reference", reference)
    for have, lack, path in ((ours, theirs, reference), (theirs, ours, outputs)):
        missing = [key[0] for key in have if key not in lack]
        if missing:
            raise ValueError(f"{path} has no output for {len(missing)} of the other file's "
                             f"instructions, the first is {missing[0][:200]!r}; both files must "
                             "answer the same ones")
    return {key: [ours[key], theirs[key]] for key in ours}


def read_outputs(flag, path):
    """{(instruction, how often it came before): output without a thought}. ValueError."""
    seen, found = Counter(), {}
    for i, row in enumerate(read_instructions(path, flag)):
        if not isinstance(row.get("output"), str):
            raise ValueError(f"{flag} {path}: entry {i} has no string 'output'")
        found[row["instruction"], seen[row["instruction"]]] = strip_thought(row["output"])
        seen[row["instruction"]] += 1
    return found


if __name__ == "__main__":
    exits.run(main, "with --scores, the same command resumes after the last finished score")

"""A judge by hand: it asks you in the terminal for the best and the worst answer. Copy it.

    python train_loop.py --ranker examples/by_hand.py:judge --prompts-per-iteration 10 \
        --eval-prompts 0 ...
    python rank.py --ranker examples/by_hand.py:judge --input some.jsonl --output ranked.jsonl

Each answer is on disk before the next question. After `q` or Ctrl-C the same command asks only what
is still open. The order on the screen is random, so it does not show where an answer comes from.

Without --eval-prompts 0 or an --eval-ranker, you judge the held-out answers as well. After rank.py
has finished it deletes the answers, unless --scores FILE names a file for them.
"""

import json
import os
import random

from harness.runs.output_files import printable  # removes characters that control a terminal

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    raise ValueError("a person judges in a single process; run without torchrun")


def judge(prompts, candidates):
    """The best answer scores 1, the worst -1, all others 0."""
    return [compare(prompt, texts) for prompt, texts in zip(prompts, candidates)]


judge.prompts_a_call = 1  # the scores of a call are written to disk before the next call
judge.try_first = False  # no trial with two prompts of the data before the run


def compare(prompt, texts):
    if len(texts) == 1:
        return [0.0]
    shown = sorted(texts)
    random.Random(json.dumps([prompt, shown])).shuffle(shown)  # the same order each time
    print(f"\n{'=' * 80}\n")
    for turn in prompt:
        print(printable(f"[{turn['role']}] {turn['content']}"))
    for number, text in enumerate(shown, 1):
        print(f"\n--- {number} {'-' * 70}\n{printable(text)}")
    best = choose("best", shown, None)
    if len(shown) == 2:
        worst = 1 - best
    else:
        worst = choose("worst", shown, best)
    scores = {shown[best]: 1.0, shown[worst]: -1.0}
    return [scores.get(text, 0.0) for text in texts]


def choose(what, shown, taken):
    """Asks for a number from 1 to len(shown), and returns it minus 1."""
    while True:
        try:
            reply = input(f"\n{what} (1-{len(shown)}, q stops)? ").strip().lower()
        except EOFError:  # no terminal, or Ctrl-D
            reply = "q"
        if reply == "q":  # KeyboardInterrupt ends the run; its text is printed
            raise KeyboardInterrupt("your answers are kept; the same command asks the other "
                                    "questions")
        if reply.isdecimal() and 1 <= int(reply) <= len(shown) and int(reply) - 1 != taken:
            return int(reply) - 1
        print(f"Type a number from 1 to {len(shown)} that is not taken.")

"""What the experiments on the toy world share: a world in a folder, its arms, statistics.

A world is made once a seed and shared by its arms, which differ in their settings alone and meet
the same prompts, the same data and the same random streams: differences are taken within seeds.
It is the world of `train_loop.py --model toy`, and its numbers (tests/test_experiments.py), without
the evaluation that a real run has: here the truth is measured.

Legend: the course of an arm is a list of measures, after iteration 1, 2, ...
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train_loop  # noqa: E402
from harness.inputs import chat_template, preferences, toy  # noqa: E402
from harness.judging import judges  # noqa: E402
from harness.judging.evaluation import mean_interval  # noqa: E402
from harness.models import weights  # noqa: E402
from harness.runs import output_files, run_folder, settings, setup  # noqa: E402

SEEDS = range(10)  # named before the first run, used throughout, all reported
SAMPLES = 32  # replies to each of the 48 test prompts in every measure
ITERATIONS = 3  # of an arm
MEASURES = {"reward": "true reward", "share_good": "rewards > 0.75", "coverage": "words in use",
            "entropy": "entropy, nats", "kl": "KL, nats", "greedy_reward": "greedy reward",
            "invalid": "invalid", "rare": "rare first words", "rare_good": "of them good",
            "share": "share of the gradient"}

# ----------------------------------------------------------------------------------------------
# 1. A world and its arms
# ----------------------------------------------------------------------------------------------


class World:
    """A toy world of one seed. home: a folder where worlds share their base models.

    variant: of harness/inputs/toy.py; width: of the model; rows: preference rows an iteration;
    second_turn: every prompt asks for a second answer.
    """

    def __init__(self, home, seed, variant="neutral", *, width=64, rows=512, iterations=None,
                 second_turn=False):
        iterations = iterations or ITERATIONS
        self.home, self.seed, self.variant = Path(home), seed, variant
        train, self.test = toy.split_prompts()
        every = train + self.test
        if second_turn:
            count = max(1, iterations * rows // len(train))
            train = toy.second_turns(train, count, f"train {seed}")
            self.test = toy.second_turns(self.test, 1, f"test {seed}")
            every = toy.second_turns(every, 16, f"sft {seed}")
        else:
            train, self.test = ([toy.question(*p) for p in part] for part in (train, self.test))
        base = self.home / f"base_{seed}_{width}_{second_turn}"
        if not base.exists():
            model, tokenizer = toy.train_base(seed, False, width, second_turn and every)
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        self.base, tokenizer = weights.load_model(base), chat_template.load_tokenizer(base)
        name, prompts = f"toy {variant} {seed} train", toy.repeated(train, iterations * rows, seed)
        records = [{"prompt_id": row["prompt_id"], "prompt": row["chosen"][:-1],
                    "data_chosen": row["chosen"][-1]["content"],
                    "data_rejected": row["rejected"][-1]["content"]}
                   for row in toy.preference_rows(prompts, variant, name)]
        judge = judges.load_judge("oracle", oracle=toy.oracle(variant))
        self.start = setup.Start(
            run_folder.Run(self.home), str(base), chat_template.ChatFormat(tokenizer), sample.serve,
            "selm_tree", judge, preferences.split_portions(records, iterations, rows, seed), [])

    def policies(self, folder, start=None, **changes):
        """Algorithm 1 with these changes of the toy's settings -> the policies' folders."""
        start = start or self.start
        s = settings.read(["--model", "toy", "--run-dir", str(folder), "--eval-prompts", "0",
                           "--iterations", str(len(start.portions)), "--seed", str(self.seed)])
        # A constant rate, so that all iterations of an experiment are trained alike.
        changes["lr"] = (changes.get("lr", 6e-3),) * len(start.portions)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), (
                contextlib.redirect_stderr(nowhere)):
            train_loop.self_explore(run_folder.Run(folder), start, replace(s, **changes))
        return [folder / f"iter_{k}/policy" for k in range(1, len(start.portions) + 1)]

    def course(self, **changes):
        """The same -> the measures after each iteration."""
        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            policies = self.policies(Path(folder), **changes)
            shares = {row["iteration"]: row["optimism_share"] for _, row in output_files.read_jsonl(
                Path(folder) / "metrics.jsonl") if "optimism_share" in row}
            return [self.measure(policy) | {"share": shares.get(k, 0.0)}
                    for k, policy in enumerate(policies, 1)]

    def measure(self, policy=None):
        """The truth about the policy of a folder (the start's): toy.true_measures, and

        greedy_reward  true reward of the most likely replies, the habit
        rare           probability that the first word is of the rarer half of its family's words
        rare_good      the share of that probability that lies on good words (taste >= 0.75)
        """
        model = weights.load_model(policy) if policy else self.base
        tokenizer = self.start.chat.tokenizer
        measures = toy.true_measures(model, self.base, tokenizer, self.test, variant=self.variant,
                                     samples=SAMPLES, seed=self.seed)
        rewards = self.start.judge(self.test, [[reply] for reply in self.greedy(model)])
        return measures | rare_words(model, tokenizer, self.test, self.variant) | {
            "greedy_reward": sum(reward for [reward] in rewards) / len(rewards)}

    def greedy(self, model):
        """The greedy replies to the test prompts."""
        chat = self.start.chat
        return [chat.text(ids) for ids in sample.generate(
            model, chat.prompts_ids(self.test), stop_ids=chat.stop_ids,
            max_new_tokens=toy.MAX_REPLY_TOKENS, slots=64, progress=False)]


@torch.no_grad()
def rare_words(model, tokenizer, prompts, variant):
    logits = model(toy.render(tokenizer, prompts), logits_to_keep=1).logits[:, -1]
    rare, rare_good = 0.0, 0.0
    for messages, chances in zip(prompts, logits.float().softmax(-1)):
        family = toy.family_of(messages)
        for word in toy.ranked_adjectives(family)[len(toy.ADJECTIVES) // 2:]:
            chance = chances[tokenizer.convert_tokens_to_ids(word)].item()
            rare += chance
            rare_good += chance * (toy.tastes(variant, family)[word] >= 0.75)
    return {"rare": rare / len(prompts), "rare_good": rare_good / rare}


# ----------------------------------------------------------------------------------------------
# 2. Seeds side by side
# ----------------------------------------------------------------------------------------------


class Workers:
    """`map(work, seeds)` -> [work(home, seed) for each seed], each seed in one process at a time;
    counts their CPU seconds. home: a folder that all of them share."""

    def __init__(self, home, jobs):
        self.home, self.jobs, self.cpu_seconds = home, jobs, 0.0

    def map(self, work, seeds):
        timed, work = functools.partial(_timed, work, self.home), getattr(work, "func", work)
        with contextlib.ExitStack() as stack:
            run = map if self.jobs == 1 else stack.enter_context(ProcessPoolExecutor(
                self.jobs, multiprocessing.get_context("spawn"))).map
            done = list(tqdm(run(timed, seeds), work.__name__, len(seeds), unit="seed"))
        self.cpu_seconds += sum(seconds for _, seconds in done)
        return [result for result, _ in done]


def _timed(work, home, seed):
    torch.set_num_threads(1)  # on matrices this small a second thread only waits for the first
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = time.process_time()
    return work(home, seed), time.process_time() - before


# ----------------------------------------------------------------------------------------------
# 3. Statistics
# ----------------------------------------------------------------------------------------------


def cell(values, paired=True):
    """Values of the seeds -> "mean ± half of the 95 % interval"; a paired difference has a sign,
    and is bold where the interval excludes zero."""
    mean, width = mean_interval(values)
    digits = 3 if not width else max(0, min(6, 1 - math.floor(math.log10(width))))
    text = f"{mean:{'+' if paired else ''}.{digits}f} ± {width:.{digits}f}"
    return f"**{text}**" if paired and abs(mean) > width else text


def minus(courses, base, measure, k):
    """[a - b for each seed] after iteration k. courses, base: of a seed each."""
    return [a[k - 1][measure] - b[k - 1][measure] for a, b in zip(courses, base, strict=True)]


def differences(courses, base, measure, ks):
    """The same as text, after each of the iterations ks."""
    return " / ".join(cell(minus(courses, base, measure, k)) for k in ks)


def after(ks):
    """The head of a column of `differences`: "after 1 / 2 / 3"."""
    return f"after {' / '.join(map(str, ks))}"


def jackknife(statistic, rows):
    """(statistic of all rows, half of its 95 % interval), rows being left out one at a time."""
    left_out = [statistic(rows[:i] + rows[i + 1:]) for i in range(len(rows))]
    # Values that share all rows but one differ n - 1 times less than independent ones would.
    return statistic(rows), (len(rows) - 1) * mean_interval(left_out)[1]


def draw_panels(axes, panels, results):
    """Each panel draws itself on its axis and returns its caption, a sentence."""
    for axis, panel in zip(axes, panels):
        axis.set_title(panel(axis, results), fontsize=9, loc="left")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, handlelength=3)  # long enough to tell a dashed line


def errorbars(axis, xs, lists, label=None, **style):
    """Mean and 95 % interval of each list."""
    means, widths = zip(*map(mean_interval, lists))
    axis.errorbar(xs, means, yerr=widths, label=label, marker="o", markersize=4, capsize=3, **style)


def plain_logs(*axes):
    """Ticks of logarithmic axes as 0.01: harness/runs/plots.py has turned matplotlib's math off."""
    for axis in axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |"
                     for row in (head, ["---"] * len(head), *rows))


# ----------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------


def command(file, measure, draw, table, argv=None):
    """The command line of an experiment: measure(quick, workers) -> results, a dict that JSON can
    hold; draw(results, path); table(results, full) -> text."""
    parser = argparse.ArgumentParser(description=Path(file).stem)
    parser.add_argument("--quick", action="store_true", help="a few seconds, no evidence")
    parser.add_argument("--draw", action="store_true", help="from the numbers that are there")
    parser.add_argument("--full", action="store_true", help="print the table with all columns")
    parser.add_argument("--out", type=Path, help="folder for the numbers and the figure")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, a process each")
    args = parser.parse_args(argv)
    name = Path(file).stem
    out = args.out or ROOT / (f"runs/{name}_quick" if args.quick else "experiments/results")
    out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        if args.quick:  # in this process alone, which is why there is but one
            globals().update(SAMPLES=4, ITERATIONS=1)
            toy.SFT_STEPS, args.jobs = 60, 1
        with tempfile.TemporaryDirectory() as home:
            workers = Workers(home, args.jobs)
            results = measure(args.quick, workers)
        results = shorten({"cpu_seconds": round(workers.cpu_seconds), **results})
        lines = [f'"{key}": {json.dumps(value)}' for key, value in results.items()]
        (out / f"{name}.json").write_text("{" + ",\n".join(lines) + "}\n")
    results = json.loads((out / f"{name}.json").read_text())
    draw(results, out / f"{name}.png")
    print(table(results, args.full))


def shorten(value):
    """Numbers of a JSON value to five digits."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shorten(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

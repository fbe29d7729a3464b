"""The paper's open questions, small: which alpha for which size, second turns, or an ensemble?

    python experiments/evidence/open_questions.py            14 CPU minutes
    python experiments/evidence/open_questions.py --quick    seconds, no evidence

1. WHICH ALPHA. Three widths by three amounts of data, the default world (its habit is bad, so that
   there is an alpha to find), greedy y, one iteration: the alpha of the grid with the highest true
   reward. If the best alpha followed the term's share of the gradient (mechanism.py), the best
   share would be the same everywhere.
2. SECOND TURNS. Every prompt asks a second time, and words of the first answer pay nothing: the
   best second answer depends on the first. The neutral world, with and without second turns.
3. AN ENSEMBLE. Eight reward heads (small networks on the start model's hidden states) learn from
   every label so far: the data's own pairs, and the rankings of the iterations before. For each
   prompt one head is drawn at random and picks y, the one of eight samples that it likes best:
   Thompson sampling of which response to label. Then Algorithm 1 with alpha = 0. One ranking of
   {y, y_w, y_l} a prompt, as for SELM: the numbers of labels are equal, those of samples not.
   Controls: one sample at temperature 1 (no choice), and the favourite of the heads' mean (choice
   without uncertainty). The neutral world, and "rare", whose best words the model hardly says.

PREDICTIONS (committed before seeds 0..4 were run)
1a. At equal alpha the share differs by less than two between widths, and not with the data.
1b. The best alpha falls as the data grow (more updates add up), so the best share is no constant:
    the share says what an alpha does at first, not which is best.
2.  Optimism gains nothing here either, and says words of the first answer no less than alpha = 0.
3a. The heads' favourite gains reward over one sample at temperature 1, Thompson sampling a little
    less; SELM does not. In "rare" Thompson sampling finds more than the mean's favourite.
3b. It costs eight times the samples and about twice the time of an iteration.

WHAT CAME OUT (five seeds)
1a. Held: the share is 1.4 to 1.7 alpha in all nine sizes.
1b. Held: with 128 or 512 rows the best alpha is 0.3 to 1 (1 is the end of the grid), with 2048 it
    is 0.03 to 0.06, at the same share an alpha. At 2048 rows alpha = 0.1 gains nothing at any
    width, and at width 128 even 0.03 loses, -.019 +- .018. The share of one update does not know
    how many follow.
2.  Refuted: with a second turn optimism gains, +.031 +- .004 / +.032 +- .020 / +.043 +- .012 after
    iterations 1 / 2 / 3, and at the end 24 % of its replies repeat a word of the first answer,
    against 42 %. A likely reason, not measured: mechanism.py (b), for the commonest words are often
    said, which makes the habit bad here.
3a. Refuted: neither choice by the heads beats one sample at temperature 1, in neither world (the
    largest mean is +.014 +- .015), though the heads are right about 81 % and 86 % of held-out
    pairs. In "rare" SELM loses .026 +- .017, and Thompson sampling finds no good word either.
3b. Eight times the samples, as built, and 5.5 times the CPU time, not twice.

Five seeds, for the budget of 25 minutes of one core. +- is a 95 % interval over the seeds
(Student's t), of paired differences.
Test: pytest tests/test_experiments.py.
"""

import functools
import math
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import softplus  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample  # noqa: E402
from experiments.evidence import common  # noqa: E402
from experiments.evidence.common import (  # noqa: E402
    World, after, cell, command, differences, draw_panels, errorbars, markdown, mean_interval,
    minus)
from harness.inputs import toy  # noqa: E402
from harness.models import weights  # noqa: E402
from harness.runs import output_files  # noqa: E402
from harness.runs.settings import stream  # noqa: E402

HEADS, CHOICES, STEPS = 8, 8, 300
FULL = dict(seeds=range(5), widths=(32, 64, 128), rows=(128, 512, 2048),
            alphas=(0.03, 0.1, 0.3, 1), usual=512, worlds=("neutral", "rare"))
QUICK = dict(seeds=(0, 1), widths=(16, 32), rows=(32,), alphas=(0.1, 1), usual=32,
             worlds=("neutral",))


def main(argv=None):
    command(__file__, measure, draw, table, argv)


# ----------------------------------------------------------------------------------------------
# 1. The measurements
# ----------------------------------------------------------------------------------------------


def measure(quick, workers):
    sizes = QUICK if quick else FULL
    seeds, rows = sizes["seeds"], sizes["usual"]
    return {"seeds": list(seeds), "alphas": sizes["alphas"],
            "sizes": workers.map(functools.partial(
                alphas_by_size, sizes["widths"], sizes["rows"], sizes["alphas"]), seeds),
            "turns": workers.map(functools.partial(turns, rows), seeds),
            "ensemble": {world: workers.map(functools.partial(explorers, world, rows), seeds)
                         for world in sizes["worlds"]}}


def alphas_by_size(widths, rows, alphas, home, seed):
    """width x rows -> alpha -> measures after the one iteration."""
    result = {}
    for width in widths:
        for n in rows:
            world = World(home, seed, "default", width=width, rows=n, iterations=1)
            result[f"{width} x {n}"] = {f"{alpha:g}": world.course(alpha=alpha)[0]
                                        for alpha in (0.0, *alphas)}
    return result


def turns(rows, home, seed):
    """Arm -> course, with `repeats`: share of the replies with a word of the first answer."""
    result = {}
    for name, second in (("one turn", False), ("second turn", True)):
        world = World(home, seed, rows=rows, second_turn=second)
        for alpha in (0.0, 0.3):
            with tempfile.TemporaryDirectory(dir=home) as folder:
                result[f"{name}, alpha {alpha:g}"] = [
                    world.measure(policy) | {"repeats": repeats(world, policy)}
                    for policy in world.policies(Path(folder), alpha=alpha)]
    return result


def repeats(world, policy):
    chat, prompts = world.start.chat, world.test * (common.SAMPLES // 2)
    ys = sample.generate(
        weights.load_model(policy), chat.prompts_ids(prompts), stop_ids=chat.stop_ids,
        max_new_tokens=toy.MAX_REPLY_TOKENS, slots=128, progress=False, temperature=1.0,
        seeds=[stream(world.seed, "repeats", i) for i in range(len(prompts))])
    return sum(bool(toy.said_before(messages) & set(chat.text(y).split()))
               for messages, y in zip(prompts, ys)) / len(ys)


def explorers(variant, rows, home, seed):
    """Arm -> course, with CPU seconds of the policies; the heads' accuracy at the end."""
    # At least two iterations: from the second on, the heads learn from rankings of the first.
    world = World(home, seed, variant, rows=rows, iterations=max(2, common.ITERATIONS))
    result = {}
    arms = {"alpha 0, greedy y": dict(alpha=0.0), "SELM, alpha 0.3": dict(alpha=0.3),
            "one sample": dict(alpha=0.0, temperature=1.0),
            "Thompson": dict(thompson=True), "heads' mean": dict(thompson=False)}
    for name, changes in arms.items():
        with tempfile.TemporaryDirectory(dir=home) as folder:
            before = time.process_time()
            how = ensemble if "thompson" in changes else world.policies
            policies = how(*[world] * (how is ensemble), Path(folder), **changes)
            seconds = time.process_time() - before
            result[name] = [world.measure(p) | {"seconds": seconds} for p in policies]
    heads = Heads(world, [])
    heads.learn([pair for portion in world.start.portions for pair in data_pairs(world, portion)])
    result["accuracy"] = heads.accuracy([
        as_ids(world, row["chosen"][:-1], row["chosen"][-1]["content"],
               row["rejected"][-1]["content"])
        for row in toy.preference_rows(world.test * 4, variant, f"heads {seed}")])
    return result


# ----------------------------------------------------------------------------------------------
# 2. The ensemble
# ----------------------------------------------------------------------------------------------


def ensemble(world, folder, thompson):
    """Algorithm 1 with alpha = 0 and the heads' choice of y -> the policies' folders."""
    policy, policies, labels = world.start.policy, [], []
    for k, portion in enumerate(world.start.portions):
        heads = Heads(world, labels + data_pairs(world, portion))
        start = replace(world.start, policy=policy, portions=[portion], serve=functools.partial(
            choose, heads, thompson))
        [policy] = map(str, world.policies(folder / str(k), start, alpha=0.0, temperature=1.0))
        policies.append(policy)
        for row in output_files.Rows(folder / f"{k}/iter_1/pairs.jsonl"):
            if not row["dropped"] and row["chosen"] != row["rejected"]:
                best, worst = (row["candidates"][row[role]]["ids"] for role in ("chosen",
                                                                                "rejected"))
                labels.append((row["prompt_ids"], best, worst))
    return policies


def choose(heads, thompson, model, requests, **options):
    """Stands in for sample.serve: of CHOICES samples the one that a head likes best."""
    prompts, limits, seeds = zip(*requests)
    prompts, limits = ([x for x in xs for _ in range(CHOICES)] for xs in (prompts, limits))
    streams = [stream(seed, j) for seed in seeds for j in range(CHOICES)]
    many = [y for _, y in sorted(sample.serve(model, zip(prompts, limits, streams), **options))]
    scores = heads.scores(prompts, many)
    picked = []
    for i, seed in enumerate(seeds):
        theirs = scores[:, i * CHOICES:(i + 1) * CHOICES]  # (heads, choices)
        liked = theirs[random.Random(seed).randrange(HEADS)] if thompson else theirs.mean(0)
        picked.append((i, many[i * CHOICES + liked.argmax().item()]))
    return picked


class Heads:
    """Reward heads that differ in their first weights and in the pairs that they have seen: each
    pair has weight 2 for a random half of the heads and 0 for the others. pairs: (prompt ids, ids
    of the better one, ids of the worse one)."""

    def __init__(self, world, pairs):
        self.base, width = world.base, world.base.config.hidden_size
        self.random = torch.Generator().manual_seed(world.seed)
        draw = lambda *shape: torch.randn(*shape, generator=self.random)  # noqa: E731
        self.weights = [(draw(HEADS, width, 64) / width ** 0.5).requires_grad_(),
                        torch.zeros(HEADS, 1, 64, requires_grad=True),
                        (draw(HEADS, 64, 1) / 8).requires_grad_()]
        if pairs:
            self.learn(pairs)

    def learn(self, pairs):
        prompts, better, worse = map(list, zip(*pairs))
        better, worse = self.features(prompts, better), self.features(prompts, worse)
        seen = 2.0 * torch.randint(2, (HEADS, len(pairs)), generator=self.random)
        optimizer = torch.optim.AdamW(self.weights, lr=1e-2, weight_decay=1e-2)
        for _ in range(STEPS):
            margins = self.of_features(better) - self.of_features(worse)  # (heads, pairs)
            (softplus(-margins) * seen).mean(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def of_features(self, features):
        first, bias, second = self.weights
        return (torch.relu(features @ first + bias) @ second).squeeze(2)  # (heads, n)

    @torch.no_grad()
    def features(self, prompts, responses):
        """Mean of the last hidden states over each response, (n, width)."""
        rows = [x + y for x, y in zip(prompts, responses)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        hidden = self.base.model(ids, use_cache=False).last_hidden_state
        return torch.stack([h[len(x):len(x) + len(y)].mean(0)
                            for h, x, y in zip(hidden, prompts, responses)])

    @torch.no_grad()
    def scores(self, prompts, responses):
        return self.of_features(self.features(prompts, responses))  # (heads, n)

    def accuracy(self, pairs):
        """Share of the pairs that the heads' mean has right."""
        prompts, better, worse = map(list, zip(*pairs))
        return (self.scores(prompts, better).mean(0)
                > self.scores(prompts, worse).mean(0)).float().mean().item()


def as_ids(world, prompt, better, worse):
    chat = world.start.chat
    return (list(chat.prompt_ids(prompt)), list(chat.response_ids(prompt, better)),
            list(chat.response_ids(prompt, worse)))


def data_pairs(world, portion):
    """The labels that the data bring along."""
    return [as_ids(world, r["prompt"], r["data_chosen"], r["data_rejected"]) for r in portion]


# ----------------------------------------------------------------------------------------------
# 3. What came out
# ----------------------------------------------------------------------------------------------


def best_alpha(seed, size, alphas):
    """The alpha of the grid with the highest true reward after the one iteration."""
    return max(alphas, key=lambda alpha: seed[size][f"{alpha:g}"]["reward"])


def gains(results, size, alpha):
    return [seed[size][f"{alpha:g}"]["reward"] - seed[size]["0"]["reward"]
            for seed in results["sizes"]]


def unit_shares(results, size):
    """The share of the gradient that an alpha of 1 would have, if it stayed as small as the least
    alpha of the grid is."""
    least = results["alphas"][0]
    return [seed[size][f"{least:g}"]["share"] / least for seed in results["sizes"]]


def best_shares(results, size):
    """The share of the gradient that the best alpha would have, of each seed."""
    best = [best_alpha(seed, size, results["alphas"]) for seed in results["sizes"]]
    return [alpha * share for alpha, share in zip(best, unit_shares(results, size))]


def geometric(values):
    """(geometric mean, factor of its 95 % interval)"""
    return tuple(map(math.exp, mean_interval([math.log(value) for value in values])))


def table(results, full):
    """Three Markdown tables, one a question."""
    alphas, rows = results["alphas"], []
    for size in results["sizes"][0]:
        best = [best_alpha(seed, size, alphas) for seed in results["sizes"]]
        rows.append([size, cell(unit_shares(results, size), paired=False),
                     *(cell(gains(results, size, alpha)) for alpha in alphas),
                     "{:.2g} (x or / {:.2g})".format(*geometric(best)),
                     "{:.2g} (x or / {:.2g})".format(*geometric(best_shares(results, size)))])
    sizes = markdown(["width x rows", "share / alpha", *(f"gain at alpha {a:g}" for a in alphas),
                      "best alpha", "its share"], rows)
    return "\n\n".join([sizes, turn_table(results), ensemble_table(results)])


def turn_table(results):
    ks = range(1, len(results["turns"][0]["one turn, alpha 0"]) + 1)
    rows = []
    for name in ("one turn", "second turn"):
        arms = [[seed[f"{name}, alpha {a}"] for seed in results["turns"]] for a in ("0.3", "0")]
        ends = [cell([course[-1]["repeats"] for course in arm], paired=False) for arm in arms]
        rows.append([name, *(differences(*arms, m, ks) for m in ("reward", "entropy", "repeats")),
                     *ends[::-1]])
    return markdown([f"alpha 0.3 minus alpha 0 {after(ks)}", "true reward", "entropy, nats",
                     "replies that repeat the first answer", "at the end: alpha 0", "alpha 0.3"],
                    rows)


EXPLORERS = ("alpha 0, greedy y", "SELM, alpha 0.3", "Thompson", "heads' mean")


def ensemble_table(results):
    """Each explorer minus alpha = 0 with one sample at temperature 1."""
    rows = []
    for world, seeds in results["ensemble"].items():
        for name in EXPLORERS:
            arm, base = ([seed[n] for seed in seeds] for n in (name, "one sample"))
            ks = range(1, len(arm[0]) + 1)
            rows.append([world, name, *(differences(arm, base, m, at) for m, at in (
                ("reward", ks), ("share_good", ks[-1:]), ("entropy", ks[-1:]), ("kl", ks[-1:]))),
                cell([a[0]["seconds"] / b[0]["seconds"] for a, b in zip(arm, base)],
                     paired=False)])
    accuracy = ", ".join(f"{world} {cell([s['accuracy'] for s in seeds], paired=False)}"
                         for world, seeds in results["ensemble"].items())
    return markdown(["world", "y, minus one sample at temperature 1", f"true reward {after(ks)}",
                     "rewards > 0.75, end", "entropy, end", "KL, end", "CPU time, ratio"], rows
                    ) + f"\n\nThe heads' mean is right about held-out pairs: {accuracy}."


COLOURS = ("#30638e", "#d1495b", "#edae49", "#8a8a8a")


def draw(results, path):
    figure, axes = plt.subplots(1, 3, figsize=(17, 5))
    draw_panels(axes, (draw_sizes, draw_turns, draw_ensemble), results)
    for axis in axes:
        axis.axhline(0, color="grey", linewidth=0.7)
    figure.suptitle(f"Open questions on the toy world: means and 95 % intervals of "
                    f"{len(results['seeds'])} seeds, paired", fontsize=11)
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=100)


def draw_sizes(axis, results):
    for i, size in enumerate(results["sizes"][0]):
        shares = [mean_interval(unit_shares(results, size))[0] * a for a in results["alphas"]]
        errorbars(axis, shares, [gains(results, size, a) for a in results["alphas"]], size,
             color=COLOURS[i // 3], linestyle=("-", "--", ":")[i % 3])
    axis.set(xscale="log", xlabel="alpha times (share / alpha); legend: width x rows",
             ylabel="gain in true reward after one iteration")
    axis.xaxis.set_major_formatter("{x:g}")
    shares = [geometric(best_shares(results, size))[0] for size in results["sizes"][0]]
    return ("1. The best share of the gradient, by size, is "
            f"{min(shares):.2g} to {max(shares):.2g}:\n"
            "it does not say which alpha is best.")


def draw_turns(axis, results):
    for name, colour in (("one turn", COLOURS[0]), ("second turn", COLOURS[1])):
        arms = [[seed[f"{name}, alpha {a}"] for seed in results["turns"]] for a in ("0.3", "0")]
        ks = range(1, len(arms[0][0]) + 1)
        for measure, style in (("reward", "-"), ("repeats", ":")):
            errorbars(axis, ks, [minus(*arms, measure, k) for k in ks], f"{name}: {measure}",
                 color=colour, linestyle=style)
    axis.set_xticks(ks)
    axis.set(xlabel="after iteration", ylabel="alpha = 0.3 minus alpha = 0")
    return ("2. Where words of the first answer pay nothing, optimism gains, and\n"
            "repeats fewer of them; with one turn it does not.")


def draw_ensemble(axis, results):
    for (world, seeds), style in zip(results["ensemble"].items(), ("-", ":")):
        for name, colour in zip(EXPLORERS, (COLOURS[3], COLOURS[1], COLOURS[0], COLOURS[2])):
            arm, base = ([seed[n] for seed in seeds] for n in (name, "one sample"))
            ks = range(1, len(arm[0]) + 1)
            errorbars(axis, ks, [minus(arm, base, "reward", k) for k in ks], f"{world}: {name}",
                 color=colour, linestyle=style)
    axis.set_xticks(ks)
    axis.set(xlabel="after iteration", ylabel="true reward, minus one sample at temperature 1")
    return ("3. Neither an ensemble that chooses y nor SELM beats one sample at\n"
            "temperature 1; in \"rare\" (dotted) SELM loses.")


if __name__ == "__main__":
    main()

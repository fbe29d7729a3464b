"""Is optimism more than slower or faster learning, and which term, alpha and y does what?

    python experiments/evidence/ablation.py            23 CPU minutes
    python experiments/evidence/ablation.py --quick    seconds, no evidence; writes to
                                                       runs/ablation_quick/
    python experiments/evidence/ablation.py --draw --full    all measures, from the stored numbers

WORLDS (harness/inputs/toy.py): "neutral", where the commonest word is of average taste, is the one
to judge by. In "default" it is poor, which suits optimism; in "rare" the best words are the rarest.
ARMS: alpha 0, 1e-4 .. 1; y greedy, as the authors' code samples, and at temperature 1, as the paper
writes; SELM's term; POPO's at four times SELM's alpha, for its slope at the start is a quarter; and
XPO, whose pairs are its own. XPO's term alpha log pi(y) has SELM's gradient at alpha / beta: with
SELM's pairs it would be the same arm again. Every arm minus the arm that differs in alpha
alone, within seeds.

CONTROLS (neutral world). The path: alpha = 0 goes on for five iterations and is stopped after each
quarter of one (a quarter of the prompts, with its own schedule). Where the path has the KL from the
start that an optimistic arm has, or, the last time, its entropy, the two are compared. Rare words:
how much of the first word's probability is on the rarer half of the words, good or bad (retention),
and which share of that on good ones (discovery). The long run: 24 iterations of 4 prompts with 16
rows each.

PREDICTIONS (committed before seeds 0..9 were run; first looks of 3 to 5 seeds were known)
1. alpha <= 1e-3 changes the reward by less than 1e-3, whatever y is.
2. Greedy y in the neutral world: entropy and words in use rise with alpha; no gain in reward.
3. y at temperature 1: KL rises, entropy falls, no gain in reward.
4. POPO at 4 alpha is SELM at alpha while y is near its reference, and milder where it is not.
5. XPO's term, on samples of the first model, adds KL and no reward.
6. At equal KL, alpha = 0 has more reward than greedy optimism; at equal entropy, less.
7. Greedy optimism retains rare words; it does not discover which of them are good.
8. In the long run the greedy answers of alpha = 0 cease to change, those of greedy optimism less
   so; the reward of the neutral world does not profit.

WHAT CAME OUT (ten seeds; after iterations 1 / 2 / 3)
1. Held: the largest of the twelve differences is 4.5e-4 +- 5.9e-4. The share of the gradient is
   0.2 % there.
2. Half: entropy rises (+.05, +.43, +.70, +1.7 nats from alpha = 0.01 to 1), words in use as well.
   But alpha = 0.1 gains: +.0019 +- .0018 / -.002 +- .006 / +.016 +- .008. At 0.3 there is no gain
   (+.015 +- .025), at 1 the loss is -.18 +- .05.
3. Held at the end, not before: at alpha = 0.3 KL +.81, entropy -.43, reward +.005 / +.002 / -.028.
4. Held: at 0.1 and 0.3 its reward is within .003 of SELM's with greedy y, within .009 at
   temperature 1, with a little less KL after iteration 1; at 1 (greedy) it loses half as much, .09.
5. Refuted: alpha = 0.3 adds KL (+.86 +- .27) and reward, +.004 +- .004 / +.019 +- .012 / +.037 +-
   .012, the largest gain here. Its y is of the first model, which the policy has left behind; there
   was no control at equal KL, so it may be faster learning. alpha = 1 ends at -.32 +- .12.
6. Equal KL held after 1 (-.009 at 0.1, -.035 at 0.3), not after 3 (+.013 +- .009, +.014 +- .025).
   Equal entropy held for these two, +.033 and +.046 after 3: greedy optimism is not just slower
   learning. At temperature 1 alpha = 0.3 is below both after 3: -.019 +- .019, -.020 +- .017.
7. Half: retention held in all three worlds; and of the retained words a larger share is good in
   two, +.075 +- .033 neutral, +.054 +- .018 default. Where the best words are the rarest, and
   discovery would matter, there is none: +.013 +- .028.
8. Half: at the end 11 % of the greedy answers of alpha = 0 still change in an iteration and 49 % of
   those of greedy optimism, which has more rewards > 0.75, +.16 +- .09; but the same reward, +.002
   +- .057 (of six stops, one has a gain: the fifth, +.040 +- .039). At temperature 1 the reward
   falls from .66 to .57 after iteration 12, with or without optimism: 4 prompts are few.

+- is a 95 % interval over the seeds (Student's t), of paired differences.
Test: pytest tests/test_experiments.py.
"""

import functools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.evidence.common import (  # noqa: E402
    MEASURES, SEEDS, World, after, cell, command, differences, draw_panels, errorbars, markdown,
    mean_interval, minus, plain_logs)
from harness.models import weights  # noqa: E402

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1)
OF_Y = {"greedy y": dict(temperature=0.0), "y at temperature 1": dict(temperature=1.0)}
XPO = dict(temperature=1.0, optimism="xpo", reference="initial", pairs="reference")
FULL = dict(seeds=SEEDS, rows=512, alphas=ALPHAS, worlds=("neutral", "default", "rare"), long=24,
            stops=5)
QUICK = dict(seeds=(0, 1), rows=32, alphas=(0.3,), worlds=("neutral",), long=4, stops=1)
LONG_EVERY = 4  # the truth is measured after so many iterations of the long run


def main(argv=None):
    command(__file__, measure, draw, table, argv)


def arms_of(world, alphas):
    """name -> (settings, name of the arm to compare with)."""
    few, arms = [alpha for alpha in alphas if alpha >= 0.1], {}
    for y, how in OF_Y.items():
        base = f"alpha 0, {y}"
        arms[base] = dict(alpha=0.0, **how), None
        for alpha in alphas if world == "neutral" else few:
            arms[f"alpha {alpha:g}, {y}"] = dict(alpha=alpha, **how), base
        for alpha in few if world == "neutral" else ():
            arms[f"POPO, alpha {4 * alpha:g}, {y}"] = dict(
                alpha=4 * alpha, optimism="popo", **how), base
    if world == "neutral":
        arms["XPO, alpha 0"] = dict(alpha=0.0, **XPO), None
        for alpha in few:
            arms[f"XPO, alpha {alpha:g}"] = dict(alpha=alpha, **XPO), "XPO, alpha 0"
    return arms


# ----------------------------------------------------------------------------------------------
# 1. The measurements
# ----------------------------------------------------------------------------------------------


def measure(quick, workers):
    sizes = QUICK if quick else FULL
    seeds, rows = sizes["seeds"], sizes["rows"]
    return {"seeds": list(seeds), "alphas": sizes["alphas"],
            "worlds": {world: workers.map(functools.partial(
                all_arms, world, sizes["alphas"], rows), seeds) for world in sizes["worlds"]},
            "path": workers.map(functools.partial(
                both_paths, rows, sizes["stops"]), seeds),
            "long": workers.map(functools.partial(long_runs, sizes["long"]), seeds)}


def all_arms(variant, alphas, rows, home, seed):
    """The start and the courses of one seed."""
    world = World(home, seed, variant, rows=rows)
    return {"start": [world.measure()], **{name: world.course(**changes) for name, (changes, _) in
                                           arms_of(variant, alphas).items()}}


def both_paths(rows, iterations, home, seed):
    world = World(home, seed, rows=rows)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        return {y: path(world, Path(folder) / y, how, iterations) for y, how in OF_Y.items()}


def path(world, folder, how, iterations):
    """alpha = 0, stopped: the measures of the start and after each quarter of five iterations (the
    fourth and the fifth meet the prompts of the first and the second again)."""
    policy, points, portions = world.start.policy, [world.measure()], world.start.portions
    for k, portion in enumerate([*portions, *portions][:iterations]):
        for quarter in (1, 2, 3, 4):
            start = replace(world.start, policy=policy,
                            portions=[portion[:len(portion) * quarter // 4]])
            [stopped] = world.policies(folder / f"{k}_{quarter}", start, alpha=0.0, **how)
            points.append(world.measure(stopped))
        policy = str(stopped)  # of the whole portion
    return points


def long_runs(iterations, home, seed):
    """Both alphas and both y over many short iterations: the truth now and then, and after each
    iteration how many greedy answers to the test prompts are others than before."""
    world, result = World(home, seed, rows=64, iterations=iterations), {}
    before = world.greedy(world.base)
    for y, how in OF_Y.items():
        for alpha in (0.0, 0.3):
            with tempfile.TemporaryDirectory(dir=home) as folder:
                policies = world.policies(Path(folder), alpha=alpha, **how)
                answers = [before, *(world.greedy(weights.load_model(p)) for p in policies)]
                result[f"alpha {alpha:g}, {y}"] = {
                    "course": [world.measure(p) for p in policies[LONG_EVERY - 1::LONG_EVERY]],
                    "changed": [sum(a != b for a, b in zip(old, new)) / len(new)
                                for old, new in zip(answers, answers[1:])]}
    return result


# ----------------------------------------------------------------------------------------------
# 2. What came out
# ----------------------------------------------------------------------------------------------


def at_equal(points, measure, target):
    """The point of a path where a measure has the target, the last time, interpolated between two
    stops; None where it never has."""
    for old, new in reversed(list(zip(points, points[1:]))):
        low, high = sorted((old[measure], new[measure]))
        if low <= target <= high and low < high:
            part = (target - old[measure]) / (new[measure] - old[measure])
            return {name: old[name] + part * (new[name] - old[name]) for name in old}
    return None


def controlled(results, name, y, measure, k):
    """Differences in reward to alpha = 0 stopped where it has the arm's KL or entropy after
    iteration k, of the seeds where it has."""
    pairs = [(seed[name][k - 1], at_equal(points[y], measure, seed[name][k - 1][measure]))
             for seed, points in zip(results["worlds"]["neutral"], results["path"])]
    return [arm["reward"] - stop["reward"] for arm, stop in pairs if stop]


def arm(seeds, name):
    return [seed[name] for seed in seeds]


def iterations(results):
    return len(results["worlds"]["neutral"][0]["alpha 0, greedy y"])


def compared(results, world):
    """(arm, the arm it is compared with) of a world, in order."""
    return [(name, base) for name, (_, base) in arms_of(world, results["alphas"]).items() if base]


def table(results, full):
    """Markdown: the arms of the neutral world (full: of all), the controls, the long run."""
    ks = range(1, iterations(results) + 1)
    columns = [(m, ks) for m in MEASURES if m != "share"] if full else [
        ("reward", ks), *((m, ks[-1:]) for m in ("share_good", "coverage", "entropy", "kl"))]
    rows = []
    for world in results["worlds"] if full else ["neutral"]:
        for name, base in compared(results, world):
            seeds = results["worlds"][world]
            share, width = mean_interval([seed[name][0]["share"] for seed in seeds])
            rows.append([*([world] if full else []), name, f"{share:.2%} ± {width:.2%}",
                         *(differences(arm(seeds, name), arm(seeds, base), m, at)
                           for m, at in columns)])
    head = [*(["world"] if full else []), "arm, minus its alpha 0", "share of the gradient"]
    head += [f"{MEASURES[m]} {after(at)}" for m, at in columns]
    return "\n\n".join([markdown(head, rows), control_table(results), word_table(results),
                        long_table(results)])


def control_table(results):
    """Reward minus that of alpha = 0 stopped at equal KL and at equal entropy."""
    rows, ks = [], range(1, iterations(results) + 1)
    for name, base in compared(results, "neutral"):
        if name.startswith("alpha"):
            y = name.split(", ")[1]
            rows.append([name])
            for measure in ("kl", "entropy"):
                values = [controlled(results, name, y, measure, k) for k in ks]
                rows[-1].append(" / ".join(
                    f"{cell(v) if len(v) > 1 else 'never'} ({len(v)})" for v in values))
    return markdown([f"true reward {after(ks)} (seeds), minus alpha 0 stopped",
                     "at equal KL", "at equal entropy"], rows)


def word_table(results):
    """Retention and discovery of rare words after the last iteration."""
    rows = []
    for world, seeds in results["worlds"].items():
        for name, base in compared(results, world):
            if name.startswith("alpha 0.3"):
                rows.append([world, name, *(
                    text for m in ("rare", "rare_good") for text in (
                        cell([seed[base][-1][m] for seed in seeds], paired=False),
                        cell(minus(arm(seeds, name), arm(seeds, base), m,
                                   iterations(results)))))])
    return markdown(["world", "arm", "rare words: alpha 0", "minus alpha 0 (retention)",
                     "good share of them: alpha 0", "minus alpha 0 (discovery)"], rows)


def long_table(results):
    """The end of the long run, as differences; and how many greedy answers still change there."""
    rows = []
    for y in OF_Y:
        if results["long"][0][f"alpha 0, {y}"]["course"]:
            rows.append([f"alpha 0.3 minus alpha 0, {y}", *(
                at_the_end(results, y, m) for m in LONG_MEASURES), *(
                cell(still_changing(results, a, y), paired=False) for a in (0.3, 0))])
    return markdown(["long run, at its end", *(MEASURES[m] for m in LONG_MEASURES),
                     "greedy answers that change in an iteration: alpha 0.3", "alpha 0"], rows)


def at_the_end(results, y, measure):
    """alpha 0.3 minus alpha 0 at the end of the long run, as text."""
    return differences(*([seed[f"alpha {a:g}, {y}"]["course"][-1:] for seed in results["long"]]
                         for a in (0.3, 0)), measure, [1])


def still_changing(results, alpha, y):
    """Of each seed the share of greedy answers that change in one of the last iterations."""
    return [sum(seed[f"alpha {alpha:g}, {y}"]["changed"][-LONG_EVERY:]) / LONG_EVERY
            for seed in results["long"]]


LONG_MEASURES = ("reward", "greedy_reward", "share_good", "coverage", "entropy", "kl")


COLOURS = {"greedy y": "#d1495b", "y at temperature 1": "#30638e"}
GOLD, GREY = "#edae49", "#8a8a8a"


def draw(results, path):
    figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    panels = (draw_reward, draw_entropy, draw_paths,
              draw_words, draw_long_reward, draw_long_changes)
    draw_panels(axes.flat, panels, results)
    figure.suptitle(f"Optimism against alpha = 0 in the toy world, after {iterations(results)} "
                    f"iterations: means and 95 % intervals of {len(results['seeds'])} seeds, "
                    "differences paired", fontsize=11)
    figure.tight_layout(h_pad=2, w_pad=2)
    figure.savefig(path, dpi=100)


def by_alpha(axis, results, measure):
    """A line a family of arms of the neutral world, over alpha; POPO at a quarter of its alpha."""
    seeds = results["worlds"]["neutral"]
    families = [(f"alpha {{:g}}, {y}", 1, f"SELM, {y}", colour, "-") for y, colour in
                COLOURS.items()] + [(f"POPO, alpha {{:g}}, {y}", 4, f"POPO, {y}", colour, ":")
                                    for y, colour in COLOURS.items()]
    bases = dict(compared(results, "neutral"))
    for form, factor, label, colour, line in [*families, ("XPO, alpha {:g}", 1, "XPO", GOLD, "-")]:
        known = [(a, form.format(factor * a)) for a in results["alphas"]
                 if form.format(factor * a) in bases]
        errorbars(axis, [a for a, _ in known],
                  [minus(arm(seeds, name), arm(seeds, bases[name]), measure, iterations(results))
                   for _, name in known], color=colour, linestyle=line, label=label)
    axis.axhline(0, color="grey", linewidth=0.7)
    axis.set(xscale="log", xlabel="alpha (POPO: a quarter of its alpha)",
             ylabel=f"{MEASURES[measure]}, minus alpha = 0")
    plain_logs(axis.xaxis)


def draw_reward(axis, results):
    by_alpha(axis, results, "reward")
    seeds = results["worlds"]["neutral"]
    found = {name: mean_interval(minus(arm(seeds, name), arm(seeds, base), "reward",
                                       iterations(results)))
             for name, base in compared(results, "neutral")}
    best, worst = (pick(found, key=lambda name: found[name][0]) for pick in (max, min))
    gains = sum(mean > width for mean, width in found.values())
    return (f"1. Reward: {gains} of {len(found)} arms gain reliably. Best {found[best][0]:+.3f}\n"
            f"({best}), worst {found[worst][0]:+.3f} ({worst}).")


def draw_entropy(axis, results):
    by_alpha(axis, results, "entropy")
    return ("2. Entropy: greedy y spreads the policy, y at temperature 1\n"
            "and XPO narrow it, the more so the larger alpha is.")


def draw_paths(axis, results):
    """Reward over KL: alpha = 0 on its way, and where the arms are after each iteration."""
    seeds = results["worlds"]["neutral"]
    mean = lambda points, m: sum(p[m] for p in points) / len(points)  # noqa: E731
    for y, colour in COLOURS.items():
        stops = list(zip(*(points[y] for points in results["path"])))
        axis.plot([mean(s, "kl") for s in stops], [mean(s, "reward") for s in stops], color=colour,
                  label=f"alpha 0, {y}, stopped at each quarter iteration")
        for name, marker in ((f"alpha 0.1, {y}", "^"), (f"alpha 0.3, {y}", "o"),
                             (f"alpha 1, {y}", "s")):
            if name in seeds[0]:
                after = list(zip(*arm(seeds, name)))
                axis.plot([mean(s, "kl") for s in after], [mean(s, "reward") for s in after],
                          marker, color=colour, label=f"{name}, after each iteration")
    axis.set(xlabel="KL from the start, nats", ylabel="true reward", ylim=(0.3, None))
    return ("3. At equal KL, optimism (marks) is reliably above alpha = 0\n"
            f"(lines) with {', '.join(above(results)) or 'no alpha'}.")


def above(results):
    """The arms that gain reward over alpha = 0 stopped at equal KL, and after which iteration."""
    for name, _ in compared(results, "neutral"):
        if name.startswith("alpha"):
            for k in range(1, iterations(results) + 1):
                values = controlled(results, name, name.split(", ")[1], "kl", k)
                mean, width = mean_interval(values) if len(values) > 1 else (0, 0)
                if mean > width:
                    yield f"{name} (after {k})"


def draw_words(axis, results):
    """Retention and discovery of rare words, greedy y."""
    reliable = {}
    for measure, colour, offset in (("rare", GREY, -0.1), ("rare_good", GOLD, 0.1)):
        lists = [minus(arm(seeds, "alpha 0.3, greedy y"), arm(seeds, "alpha 0, greedy y"),
                       measure, iterations(results)) for seeds in results["worlds"].values()]
        reliable[measure] = [world for world, (mean, width) in zip(
            results["worlds"], map(mean_interval, lists)) if mean > width] or ["no world"]
        errorbars(axis, [x + offset for x in range(len(lists))], lists, linestyle="", color=colour,
                  label={"rare": "retention: probability of a rare first word",
                         "rare_good": "discovery: share of it on good words"}[measure])
    axis.axhline(0, color="grey", linewidth=0.7)
    axis.set_xticks(range(len(lists)), list(results["worlds"]))
    axis.set(xlabel="world", ylabel="alpha = 0.3 minus alpha = 0, greedy y")
    return (f"4. Optimism keeps more rare words in {', '.join(reliable['rare'])};\n"
            f"a larger share of them is good in {', '.join(reliable['rare_good'])}.")


def long_lines(axis, results, measure):
    for y, colour in COLOURS.items():
        for alpha, line in ((0.3, "-"), (0, ":")):
            courses = [seed[f"alpha {alpha:g}, {y}"]["course"] for seed in results["long"]]
            ks = [LONG_EVERY * (i + 1) for i in range(len(courses[0]))]
            if ks:
                errorbars(axis, ks, [[course[i][measure] for course in courses]
                                     for i in range(len(ks))], color=colour, linestyle=line,
                          label=f"alpha {alpha:g}, {y}")
    axis.set(xlabel="iteration of 4 prompts", ylabel=MEASURES[measure])


def draw_long_reward(axis, results):
    long_lines(axis, results, "greedy_reward")
    ends = [at_the_end(results, y, "greedy_reward") for y in COLOURS
            if results["long"][0][f"alpha 0, {y}"]["course"]]
    return ("5. Long runs, reward of the greedy answers; alpha 0.3 minus 0\n"
            f"at the end: {' (greedy y), '.join(ends)}.")


def draw_long_changes(axis, results):
    for y, colour in COLOURS.items():
        for alpha, line in ((0.3, "-"), (0, ":")):
            runs = [seed[f"alpha {alpha:g}, {y}"]["changed"] for seed in results["long"]]
            axis.plot(range(1, len(runs[0]) + 1), [sum(at) / len(at) for at in zip(*runs)],
                      color=colour, linestyle=line, label=f"alpha {alpha:g}, {y}")
    axis.set(xlabel="iteration of 4 prompts", ylabel="greedy answers that changed", ylim=(0, 1))
    shares = [sum(seeds) / len(seeds) for seeds in (
        still_changing(results, alpha, "greedy y") for alpha in (0.3, 0))]
    return ("6. Long runs: with greedy y, answers still change at the end:\n"
            "{:.0%} an iteration, against {:.0%} with alpha = 0.".format(*shares))


if __name__ == "__main__":
    main()

"""What does the optimism term do: nothing at first, or leave the habit; and how large is it?

    python experiments/evidence/mechanism.py            12 CPU minutes
    python experiments/evidence/mechanism.py --quick    seconds, no evidence; writes to
                                                        runs/mechanism_quick/
    python experiments/evidence/mechanism.py --share MODEL iter_1/pairs.jsonl
        question (c) for any model, a folder or .gguf file, and the pairs that a run has made with
        it, one row at a time
    python experiments/evidence/mechanism.py --habit MODEL DATA JUDGE
        question (b) for any model: are its greedy answers worse than its sampled ones? 48 prompts
        of DATA, 4 samples each, at most 112 tokens; JUDGE is what --ranker takes. SmolLM2 with
        real_model.py's judge: 4 CPU minutes

The term is alpha beta log pi(y)/pi_ref(y), to be minimised (selm.py). Its gradient decides what it
can do, and that depends on who y is. Three predictions, written down and committed before seeds
0..9 were run (what was known: first looks of 4 to 6 seeds, quoted in the issue).

(a) y ~ pi_ref AT TEMPERATURE 1. The mean of the term is -alpha beta KL(pi_ref || pi). Its gradient
    is zero where pi = pi_ref (the mean over y of grad log pi(y) is the gradient of 1) and grows
    outward: it has no direction of its own, it enlarges what the DPO term does. Predicted:
    1. the mean of grad log pi(y) over n samples falls as 1/sqrt(n), with greedy y it does not;
    2. at equal updates more KL and less entropy than alpha = 0, growing with the iterations;
    3. no effect on the reward after iteration 1;
    4. alpha = 0 at some larger learning rate does about the same, alpha = 0 at a smaller beta does
       not: beta scales the gradient too, so that a smaller one learns less, not more.

(b) GREEDY y. Now the gradient has a direction: probability leaves the mode, whatever the mode is
    worth, and goes to everything else. Predicted:
    1. more entropy and more words in use after iteration 1, however good the habit is;
    2. the reward gains where the habit (the greedy replies) is worse than what the policy says
       besides, and loses where it is better. Swept by the taste of the commonest word, 0 to 1: the
       gain falls all the way and crosses zero about where the two are equally good.

(c) SIZE. At the first update the DPO part has the gradient -beta/2 mean(grad log pi(chosen) - grad
    log pi(rejected)), the optimism term alpha beta mean(grad log pi(y)). Predicted: what
    metrics.jsonl calls `optimism_share` is about
        2 alpha |mean grad log pi(y)| / |mean(grad log pi(chosen) - grad log pi(rejected))|,
    linear in alpha until the term is no longer small against the total.

WHAT CAME OUT (ten seeds)
(a) 1. Held: 1.96 at 32 samples, 0.248 at 2048, a factor of 7.9 where sqrt(64) is 8; greedy 3.59
       (the same at every n: the 32 prompts have one greedy answer each).
    2. Held: KL +.063 / +.33 / +.81 and entropy -.048 / -.165 / -.43 after iterations 1 / 2 / 3.
    3. Not quite: +.0054 +- .0020 after iteration 1, a fifth of what the learning rate of 4. gains.
       Nothing is left after 2, and after 3 it is -.028 +- .017.
    4. Half: at 1.44 times the learning rate alpha = 0 ends where alpha = 0.3 does in KL (matched)
       and in entropy (-.07 +- .16 apart), but it gets there earlier, and with more reward all the
       way, by .022 / .015 / .023. Optimism is the worse way out. beta = 0.8 learns less, as said.
(b) 1. Held for each of the eight tastes: entropy +.16 to +.47, words in use +.5 to +1.2.
    2. Held after iteration 1: the gain falls from +.034 to -.027 all the way. It crosses zero where
       the habit is .013 +- .004 better than the rest, near equality but not there. After 2 the
       crossing is at -.010 +- .018. After 3 no line can be drawn: at the tastes 0 and 0.1 three of
       the twenty optimistic runs broke down (seed 8 at 0, seed 9 at both: KL 8 to 18, reward 0 to
       .4), and none of those with alpha = 0.
(c) Held: 1.6 alpha for greedy y, 1.0 alpha at temperature 1, the closed form within 3 % up to alpha
    = 0.1; at alpha = 1 the term is 84 % and 71 % of the gradient.

+- is a 95 % interval over the seeds (Student's t), of paired differences.
Test: pytest tests/test_experiments.py.
"""

import functools
import math
import random
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sample  # noqa: E402
import textbook  # noqa: E402
from experiments.evidence.common import (  # noqa: E402
    MEASURES, SEEDS, World, after, cell, command, differences, draw_panels, errorbars, jackknife,
    markdown, minus, plain_logs)
from harness.inputs import chat_template, preferences  # noqa: E402
from harness.judging import judges  # noqa: E402
from harness.judging.evaluation import mean_interval  # noqa: E402
from harness.models import weights  # noqa: E402
from harness.runs import output_files  # noqa: E402
from harness.runs.settings import stream  # noqa: E402

ALPHA = 0.3
RATE = 6e-3  # the toy's learning rate
FAR = 8  # nats from the start: a policy as far as that has broken down
ARMS = {"alpha 0": dict(alpha=0.0), "alpha 0.3": dict(alpha=ALPHA),
        "beta 0.8": dict(alpha=0.0, beta=0.8), "beta 0.5": dict(alpha=0.0, beta=0.5)}
FULL = dict(tastes=(0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1), rates=(1.2, 1.5, 2, 3), rows=512,
            alphas=(1e-4, 1e-3, 1e-2, 0.1, 0.3, 1), samples=2048, seeds=SEEDS)
QUICK = dict(tastes=(0, 1), rates=(2,), rows=32, alphas=(1e-3, 0.3), samples=128, seeds=(0, 1))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--share"]:
        return print(share_table(*argv[1:]))
    if argv[:1] == ["--habit"]:
        return print(habit_of(*argv[1:]))
    command(__file__, measure, draw, table, argv)


# ----------------------------------------------------------------------------------------------
# 1. The measurements
# ----------------------------------------------------------------------------------------------


def measure(quick, workers):
    sizes = QUICK if quick else FULL
    seeds, rows = sizes["seeds"], sizes["rows"]
    arms = ARMS | {f"lr x {m:g}": dict(alpha=0.0, lr=m * RATE) for m in sizes["rates"]}
    courses = workers.map(functools.partial(sampled_arms, arms, rows), seeds)
    factor = matching_rate(courses, sizes["rates"])
    match = {"match": dict(alpha=0.0, lr=factor * RATE)}
    matches = workers.map(functools.partial(sampled_arms, match, rows), seeds)
    habits = workers.map(functools.partial(habit_sweep, sizes["tastes"], rows), seeds)
    gradients = workers.map(
        functools.partial(gradient_sizes, sizes["alphas"], sizes["samples"]), seeds)
    return {"seeds": list(seeds), "alpha": ALPHA, "match": factor,
            "temperature 1": [a | b for a, b in zip(courses, matches)], "habit": habits,
            "size": gradients}


def sampled_arms(arms, rows, home, seed):
    """(a): the courses of one seed in the neutral world, y at temperature 1."""
    world = World(home, seed, rows=rows)
    return {arm: world.course(temperature=1.0, **changes) for arm, changes in arms.items()}


def matching_rate(courses, factors):
    """The factor of the learning rate at which alpha = 0 ends with the KL that alpha = 0.3 has:
    between two of the factors by interpolation in log KL over log factor."""
    def kl(arm):
        return math.log(sum(seed[arm][-1]["kl"] for seed in courses) / len(courses))
    target, known = kl("alpha 0.3"), [(1.0, kl("alpha 0"))] + [(m, kl(f"lr x {m:g}"))
                                                              for m in factors]
    for (low, below), (high, above) in zip(known, known[1:]):
        if below <= target <= above:
            return low * (high / low) ** ((target - below) / (above - below))
    return known[-1][0] if target > known[-1][1] else 1.0


def habit_sweep(tastes, rows, home, seed):
    """(b): taste -> the start and the courses of both arms, y greedy."""
    result = {}
    for taste in tastes:
        world = World(home, seed, str(taste), rows=rows)
        result[taste] = {"start": world.measure(), "alpha 0": world.course(alpha=0.0),
                         "alpha 0.3": world.course(alpha=ALPHA)}
    return result


def gradient_sizes(alphas, samples, home, seed):
    """(c): by temperature of y, the shares that a run logs at its first update and what the closed
    form needs, of the same 32 rows; and (a) 1: the norm of the mean gradient over more samples."""
    world, result = World(home, seed, rows=32, iterations=1), {}
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        folder, shares = world.home / f"size_{seed}_{name}", {}
        for alpha in alphas:
            world.policies(folder / f"{alpha}", alpha=alpha, temperature=temperature)
            [shares[alpha]] = [row["optimism_share"] for _, row in output_files.read_jsonl(
                folder / f"{alpha}/metrics.jsonl") if "optimism_share" in row]
        rows = list(output_files.Rows(folder / f"{alpha}/iter_1/pairs.jsonl"))
        result[name] = {"shares": shares, **gradient_norms(world.base, rows),
                        "norms": norms_of_means(world, temperature, samples)}
    return result


def gradient_norms(model, rows):
    """Rows of pairs.jsonl and the model that is pi at the first update -> |g_y|, |g_m| and g_y g_m:
    g_y is the mean of grad log pi(y), g_m that of grad log pi(chosen) - grad log pi(rejected).

    Backward row by row, so that what can be trained can be measured. Gradients are fp32."""
    def logp(row, c):
        return textbook.logps(model, [row["prompt_ids"]], [row["candidates"][c]["ids"]])

    def mean_gradient(value):
        model.zero_grad()
        for row in rows:
            (value(row) / len(rows)).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    rows = [row for row in rows if not row["dropped"]]
    g_y = mean_gradient(lambda row: logp(row, row["sampled"][0]))
    g_m = mean_gradient(lambda row: logp(row, row["chosen"]) - logp(row, row["rejected"]))
    dot = lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b))  # noqa: E731
    return {"y": dot(g_y, g_y) ** 0.5, "margin": dot(g_m, g_m) ** 0.5, "product": dot(g_y, g_m)}


def closed_form(norms, alpha):
    """(the share of the prediction, the same with the term in the total as metrics.jsonl has it)"""
    total = ((alpha * norms["y"]) ** 2 - alpha * norms["product"] + norms["margin"] ** 2 / 4) ** 0.5
    return 2 * alpha * norms["y"] / norms["margin"], alpha * norms["y"] / total


def norms_of_means(world, temperature, samples, batch=32):
    """n -> norm of the mean of grad log pi(y) over n samples, for n = 32, 64, ...: the root mean
    square over all groups of n."""
    chat, model = world.start.chat, world.base
    prompts = [chat.prompt_ids(record["prompt"]) for record in world.start.portions[0]]
    prompts = (prompts * (samples // len(prompts)))[:samples]
    ys = sample.generate(
        model, prompts, stop_ids=chat.stop_ids, max_new_tokens=8, slots=128, progress=False,
        temperature=temperature, seeds=[stream(world.seed, i) for i in range(samples)])
    means, norms = [], {}
    for i in range(0, samples, batch):
        model.zero_grad()
        textbook.logps(model, prompts[i:i + batch], ys[i:i + batch]).mean().backward()
        means.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    while means:
        norms[batch] = (sum(g.square().sum().item() for g in means) / len(means)) ** 0.5
        means, batch = [(a + b) / 2 for a, b in zip(means[::2], means[1::2])], 2 * batch
    return norms


def share_table(model, pairs, rows=32):
    """What --share prints: alpha -> share, and the alphas of three shares. The pairs are of
    iteration 1, whose first update has this model for its policy and its reference."""
    pairs = list(output_files.Rows(pairs))
    pairs = random.Random(0).sample(pairs, min(int(rows), len(pairs)))
    norms = gradient_norms(weights.load_model(model, attention="eager"), pairs)
    lines = [[f"{alpha:g}", *(f"{share:.2%}" for share in closed_form(norms, alpha))]
             for alpha in (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 0.1, 1)]
    unit = closed_form(norms, 1)[0]
    return "\n".join([
        f"|mean grad log pi(y)| {norms['y']:.4g}, |mean (grad log pi(chosen) - grad log "
        f"pi(rejected))| {norms['margin']:.4g}, {len(pairs)} rows",
        markdown(["alpha", "2 alpha ratio", "optimism_share"], lines),
        "alpha of a share of " + ", ".join(f"{share:g}: {share / unit:.2g}"
                                           for share in (1e-3, 0.1, 0.5))])


def habit_of(model, data, judge, prompts=48, samples=4, limit=112):
    """What --habit prints: the judge's mean score of greedy and of sampled answers, and how often a
    sampled answer beats the greedy one. Prompts are shuffled by seed 0."""
    chat = chat_template.ChatFormat(chat_template.load_tokenizer(model),
                                    weights.model_stop_ids(model))
    records = {preferences.prompt_key(r): r for r in preferences.load_preferences(data)}
    records = random.Random(0).sample(list(records.values()), min(int(prompts), len(records)))
    lm, judge = weights.load_model(model), judges.load_judge(judge)
    messages = [record["prompt"] for record in records]

    def answers(temperature, count):
        ids = [i for i in chat.prompts_ids(messages) for _ in range(count)]
        ys = sample.generate(lm, ids, stop_ids=chat.stop_ids, max_new_tokens=limit, slots=16,
                             temperature=temperature, seeds=list(range(len(ids))))
        texts = list(map(chat.text, ys))
        return [texts[i:i + count] for i in range(0, len(texts), count)]
    scores = judge(messages, [a + b for a, b in zip(answers(0.0, 1), answers(1.0, samples))])
    means = [(row[0], sum(row[1:]) / samples) for row in scores]
    beaten = [sum((y > row[0]) + 0.5 * (y == row[0]) for y in row[1:]) / samples for row in scores]
    lines = [("judge's score, greedy", [a for a, _ in means]),
             (f"judge's score, {samples} samples at temperature 1", [b for _, b in means]),
             ("greedy minus sampled", [a - b for a, b in means]),
             ("a sampled answer beats the greedy one", beaten)]
    return markdown([f"{len(records)} prompts", "mean ± 95 %"],
                    [[name, cell(values, name.startswith("greedy"))] for name, values in lines])


# ----------------------------------------------------------------------------------------------
# 2. What came out
# ----------------------------------------------------------------------------------------------


def arm(results, name, part="temperature 1", taste=None):
    """The courses of an arm, one a seed."""
    return [(seed[taste] if taste else seed)[name] for seed in results[part]]


def gains(results, taste, measure, k):
    """(b): alpha = 0.3 minus alpha = 0 after iteration k, of each seed."""
    return minus(arm(results, "alpha 0.3", "habit", taste), arm(results, "alpha 0", "habit", taste),
                 measure, k)


def advantage(seed, taste):
    """How much better the habit is than what the start says on average."""
    start = seed[taste]["start"]
    return start["greedy_reward"] - start["reward"]


def crossing(k, seeds):
    """The advantage at which the gain after iteration k is zero: of the straight line through the
    tastes, each the mean of the seeds."""
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    x = [mean([advantage(seed, taste) for seed in seeds]) for taste in seeds[0]]
    y = [mean(gains({"habit": seeds}, taste, "reward", k)) for taste in seeds[0]]
    slope = (sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y))
             / sum((a - mean(x)) ** 2 for a in x))
    return mean(x) - mean(y) / slope


def iterations(results):
    return range(1, len(results["temperature 1"][0]["alpha 0"]) + 1)


def table(results, full):
    """Three Markdown tables: (a), (b), (c)."""
    ks, measures = iterations(results), list(MEASURES)[:-1] if full else ["kl", "entropy", "reward"]
    names = {"match": f"alpha 0, lr x {results['match']:.2f}"}
    a = markdown(
        ["(a) y at temperature 1", *(f"{MEASURES[m]} {after(ks)}" for m in measures)],
        [[f"{names.get(name, name)} minus {names.get(base, base)}",
          *(differences(arm(results, name), arm(results, base), m, ks) for m in measures)]
         for name, base in pairs_of_arms(results, full)])
    b = markdown(
        ["(b) taste of the habit", "greedy minus sampled reward, start", f"gain {after(ks)}",
         *(f"{MEASURES[m]} after 1" for m in (*measures[:2], "coverage"))],
        [[taste, cell([advantage(seed, taste) for seed in results["habit"]], paired=False),
          " / ".join(cell(gains(results, taste, "reward", k)) for k in ks),
          *(cell(gains(results, taste, m, 1)) for m in (*measures[:2], "coverage"))]
         for taste in results["habit"][0]])
    zeros = " / ".join("{:+.3f} ± {:.3f}".format(
        *jackknife(functools.partial(crossing, k), results["habit"])) for k in ks)
    c = markdown(["(c) alpha", *(f"y {name}: {what}" for name in results["size"][0] for what in (
        "logged share", "2 alpha ratio"))], [[alpha, *size_cells(results, alpha)]
                                             for alpha in results["size"][0]["greedy"]["shares"]])
    return f"{a}\n\n{b}\n\nThe gain is zero at {zeros} (greedy minus sampled).\n\n{c}"


def pairs_of_arms(results, full):
    """(arm, what it is compared with)."""
    for name in results["temperature 1"][0]:
        if name != "alpha 0" and (full or not name.startswith("lr")):
            yield name, "alpha 0"
    yield "alpha 0.3", "match"


def size_cells(results, alpha):
    for name in results["size"][0]:
        seeds = [seed[name] for seed in results["size"]]
        for values in ([seed["shares"][alpha] for seed in seeds],
                       [closed_form(seed, float(alpha))[0] for seed in seeds]):
            mean, width = mean_interval(values)
            yield f"{mean:.2%} ± {width:.2%}"


GREEDY, SAMPLED, GREY, GOLD = "#d1495b", "#30638e", "#8a8a8a", "#edae49"


def draw(results, path):
    figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    panels = (draw_norms, draw_sampled, draw_rewards, draw_gains, draw_entropy, draw_sizes)
    draw_panels(axes.flat, panels, results)
    for axis in axes.flat[1:5]:  # of differences
        axis.axhline(0, color="grey", linewidth=0.7)
    figure.suptitle(f"The optimism term, alpha = {results['alpha']:g} minus alpha = 0 on the toy "
                    f"world: means and 95 % intervals of {len(results['seeds'])} seeds, paired",
                    fontsize=11)
    figure.tight_layout(h_pad=2, w_pad=2)
    figure.savefig(path, dpi=100)


def draw_norms(axis, results):
    for name, colour in (("greedy", GREEDY), ("temperature 1", SAMPLED)):
        ns = list(results["size"][0][name]["norms"])
        means, widths = zip(*(mean_interval([seed[name]["norms"][n] for seed in results["size"]])
                              for n in ns))
        axis.errorbar(list(map(int, ns)), means, yerr=widths, label=f"y {name}", color=colour,
                      marker="o", markersize=4, capsize=3)
    axis.plot(list(map(int, ns)), [means[0] * (int(ns[0]) / int(n)) ** 0.5 for n in ns], ":",
              color="black", label="1 / sqrt(n)")
    axis.set(xscale="log", yscale="log", xlabel="samples n",
             ylabel="norm of the mean of grad log pi(y)")
    plain_logs(axis.xaxis, axis.yaxis)
    return ("(a1) At the start the term has a direction with greedy y only;\n"
            f"at temperature 1 its gradient averages out: {means[0]:.2f} to {means[-1]:.2f}.")


def sampled_lines(axis, results, measure):
    ks, base = iterations(results), arm(results, "alpha 0")
    for name, label, colour in (("alpha 0.3", "alpha 0.3", GREEDY),
                               ("match", f"alpha 0, lr x {results['match']:.2f}", SAMPLED),
                               ("beta 0.8", "alpha 0, beta 0.8", GREY)):
        errorbars(axis, ks, [minus(arm(results, name), base, measure, k) for k in ks],
                  f"{MEASURES[measure]}: {label}", color=colour,
                  linestyle="--" if measure == "entropy" else "-")
    axis.set_xticks(ks)
    axis.set_xlabel("after iteration")


def draw_sampled(axis, results):
    sampled_lines(axis, results, "kl")
    sampled_lines(axis, results, "entropy")
    axis.set_ylabel("minus alpha = 0, nats")
    return ("(a2) y at temperature 1: more KL, less entropy, growing; a larger\n"
            "learning rate ends there too, a smaller beta does the contrary.")


def draw_rewards(axis, results):
    sampled_lines(axis, results, "reward")
    axis.set_ylabel("true reward, minus alpha = 0")
    matched, optimism = arm(results, "match"), arm(results, "alpha 0.3")
    more = [mean_interval(minus(matched, optimism, "reward", k))[0] for k in iterations(results)]
    return ("(a3) The same arms in true reward: the larger learning rate is\n"
            f"{min(more):+.3f} to {max(more):+.3f} above optimism, at the same final KL.")


def draw_gains(axis, results):
    tastes, ks = list(results["habit"][0]), iterations(results)
    xs = [mean_interval([advantage(seed, taste) for seed in results["habit"]])[0]
          for taste in tastes]
    for k, colour in zip(ks, (GREEDY, SAMPLED, GOLD)):
        errorbars(axis, xs, [gains(results, taste, "reward", k) for taste in tastes],
                  f"after iteration {k}", color=colour)
    axis.axvline(0, color="grey", linewidth=0.7)
    axis.set(xlabel="the habit: greedy minus sampled reward at the start",
             ylabel="gain in true reward over alpha = 0")
    worst, best = (mean_interval(gains(results, taste, "reward", 1))[0]
                   for taste in (tastes[0], tastes[-1]))
    return (f"(b1) Greedy y: {worst:+.3f} where the habit is bad, {best:+.3f} where it is good\n"
            f"(iteration 1). At the end {broken(results)} runs have broken down.")


def broken(results):
    """(b): how many optimistic runs end more than FAR nats from the start."""
    return sum(arms["alpha 0.3"][-1]["kl"] > FAR
               for seed in results["habit"] for arms in seed.values())


def draw_entropy(axis, results):
    tastes = list(results["habit"][0])
    for measure, colour in (("entropy", SAMPLED), ("coverage", GOLD), ("kl", GREY)):
        errorbars(axis, list(map(float, tastes)), [gains(results, t, measure, 1) for t in tastes],
                  MEASURES[measure], color=colour)
    axis.set(xlabel="taste of the commonest word", ylabel="after iteration 1, minus alpha = 0")
    return ("(b2) Greedy y: more entropy and more words in use,\n"
            "whether the habit is good or not.")


def draw_sizes(axis, results):
    alphas = list(results["size"][0]["greedy"]["shares"])
    for name, colour in (("greedy", GREEDY), ("temperature 1", SAMPLED)):
        seeds = [seed[name] for seed in results["size"]]
        means, widths = zip(*(mean_interval([seed["shares"][a] for seed in seeds]) for a in alphas))
        axis.errorbar(list(map(float, alphas)), means, yerr=widths, marker="o", markersize=4,
                      linestyle="", color=colour, label=f"logged, y {name}")
        axis.plot(list(map(float, alphas)),
                  [mean_interval([closed_form(s, float(a))[0] for s in seeds])[0] for a in alphas],
                  color=colour, label=f"2 alpha ratio, y {name}")
    axis.axhspan(1e-3, 0.5, color="grey", alpha=0.12)
    axis.set(xscale="log", yscale="log", xlabel="alpha", ylabel="optimism_share at update 0")
    plain_logs(axis.xaxis, axis.yaxis)
    return ("(c) Its share of the gradient is 2 alpha times a ratio of norms\n"
            "until it dominates; no warning in the shaded band.")


if __name__ == "__main__":
    main()

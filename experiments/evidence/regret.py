"""Does optimism find a good response that the model hardly ever gives, and what does it cost?

    python experiments/evidence/regret.py            110 s of CPU time
    python experiments/evidence/regret.py --quick    7 s: panel 1 in full, the others cut short;
                                                     writes to runs/regret_quick/

The theorem behind SELM (arXiv 2405.19332 v3, Algorithm 2: regret about sqrt(T)) speaks of an exact
argmin over a class of policies. Here the class is small enough to take it: no network, no step
size, no luck of an optimiser. What differs between DPO and SELM is the optimism term alone.

THE PROBLEM. One prompt, K = 4 responses. The reference gives response 0 nearly always, each other
one with probability eps. True rewards r* = (0, -1, 1, -1): response 2 is worth finding, 1 and 3
are traps. J(pi) = E_pi[r*] - beta KL(pi || ref), its maximum is J*, and regret is J* - J(pi),
summed over T rounds of one label each.

THE CLASS, AND WHY IT IS ONE OF POLICIES. A member is a reward vector r with r_0 = 0 and values of
a grid elsewhere. Its best policy is pi = ref e^{(r - V) / beta} with
V = beta log sum(ref e^{r / beta}), so that

    beta log(pi / ref) = r - V =: h,           DPO's implicit reward (selm.py, step 4)

and V is the J that r promises. DPO compares: it sees differences of h, which are differences of
r, and never V. The optimism term alpha h(y2), y2 ~ ref, is Eq. 4.2's alpha beta log-ratio, and
sees V: y2 is nearly always response 0, where h = -V. Among rewards that fit the labels alike it
prefers the one that promises most.

WHY IT HELPS. With alpha = 0 both responses of a round come from (nearly) the reference: both are
response 0, and two equal responses teach nothing. Chance shows the good one after some 1/eps
rounds of full regret (1.7/eps measured at eps = 0.01, unlucky first labels included). Only until
then is DPO's regret linear; afterwards it is flat. With alpha > 0 the first argmin takes every
unseen response for the best there is: the policy gives it, is told, and keeps it or moves on.

WHAT IT COSTS. alpha is added in every round, whether or not anything is left to find, so what
has lost is tried again and again: a fixed alpha leaves a constant regret a round, hence
alpha = 0.4 / sqrt(T). Where the reference is best already, or the good response is not rare,
there is nothing to gain.

THOMPSON SAMPLING (exploration by an ensemble, the paper's open question 2): alpha = 0, and the
member is not the argmin but drawn with probability ~ exp(-objective), the posterior of a flat
prior. So would act an ensemble of infinitely many reward heads. One label a round as well, but it
must keep the whole posterior where SELM keeps one policy.

A TREE OF TOKENS (open question 3). A response is H tokens of {0, 1}, token 1 has probability 0.1
under the reference after any prefix, the reward comes with the last token. In this token-wise MDP
Q(s, a) = V(s a), V(s) = beta log sum_a ref(a|s) e^{Q(s, a) / beta} and V(leaf) = r telescope: the
sum of beta log(pi(a|s) / ref(a|s)) over the tokens is r(leaf) - V(root) = h. Token-wise SELM IS
Algorithm 2 over leaves; depth matters through two things only. The good response 11..1 has
probability 0.1^H, and the class decides what a label of one leaf tells about another:

    leaf class    each leaf but 00..0 has a reward of its own, -1 or 1: 2^(2^H - 1) members;
                  r* is 1 at 11..1 and -1 at all others (00..0: 0)
    token class   r = sum_h q_h y_h / H, each q_h one of 9 values in [-2, 2]: 9^H members, whose
                  policies are products of independent tokens; r* = number of ones / H

Seeds 0..39 were named before the first run, are used throughout and all reported in
results/regret.json. They are a dear draw for SELM in panel 1 (186 +- 43; seeds 1000..1199, asked
afterwards, say 138 +- 14), so both are reported. A seed owns its random numbers: all arms meet
the same y2 and the same noise of the labels, and differences are paired. +- is a 95 % interval
(Student's t over seeds; for growth exponents the jackknife over seeds).

Test: pytest tests/test_regret.py.      Legend: K responses, M members, S seeds, T rounds.
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

BETA = 0.05
SCALE = 0.4  # alpha is SCALE / sqrt(T)
RARE = 1e-4  # probability of the good response in panels 1 and 3
SEEDS, MORE_SEEDS = range(40), range(1000, 1200)
T_95 = {40: 2.0227, 200: 1.9720}  # Student's t by number of values
TRUTHS = {"response 2 is best": (0, -1, 1, -1), "the reference is best": (0, -1, -1, -1)}
FULL = dict(horizons=(250, 500, 1000, 2000, 4000, 8000), depths=(1, 2, 3, 4),
            alphas=(0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1), more_seeds=MORE_SEEDS)
QUICK = dict(horizons=(125, 250, 500), depths=(1, 2, 3), alphas=(0, 1e-2, 1), more_seeds=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, no evidence")
    parser.add_argument("--out", type=Path, help="folder for regret.json and regret.png")
    args = parser.parse_args()
    sizes, root = QUICK if args.quick else FULL, Path(__file__).parents[2]
    out = args.out or root / ("runs/regret_quick" if args.quick else "experiments/results")
    results = {"seeds": list(SEEDS), **run_all(**sizes)}
    out.mkdir(parents=True, exist_ok=True)
    lines = [f'"{key}": {json.dumps(value)}' for key, value in results.items()]
    (out / "regret.json").write_text("{" + ",\n".join(lines) + "}\n")
    draw(results, out / "regret.png", "QUICK RUN, NO EVIDENCE" if args.quick else "")
    print(table(results))
    dpo, selm = results["arms"]["DPO"], results["arms"]["SELM"]
    ratio = selm["regret"][2000]["mean"] / dpo["regret"][2000]["mean"]
    print(json.dumps({"regret_ratio": round(ratio, 4), "slope_dpo": dpo["slope"]["mean"],
                      "slope_selm": selm["slope"]["mean"]}))


# ----------------------------------------------------------------------------------------------
# 1. The four panels
# ----------------------------------------------------------------------------------------------


def run_all(horizons, depths, alphas, more_seeds):
    """What regret.json holds beside the seeds: an entry a panel, and panel 1 with other seeds."""
    rare, trees = TRUTHS["response 2 is best"], {"leaf": leaf_tree, "token": token_tree}
    results = {"arms": by_arm(bandit(RARE, rare), 2000, SEEDS)}
    if more_seeds:
        results["arms, seeds 1000..1199"] = by_arm(bandit(RARE, rare), 2000, more_seeds)
    results["horizons"] = {f"{eps:g}": by_horizon(bandit(eps, rare), horizons)
                           for eps in (1e-2, 1e-3, RARE)}
    results["alphas"] = {name: by_alpha(bandit(RARE, truth), alphas, horizons[-1])
                         for name, truth in TRUTHS.items()}
    results["depths"] = {name: {H: by_horizon(make(H), horizons[:-1]) for H in depths}
                         for name, make in trees.items()}
    return results


def by_arm(problem, rounds, seeds):
    """Panel 1: the course of the regret in three arms; its growth is fitted to the last half."""
    curves = {"DPO": play(problem, 0, rounds, seeds),
              "SELM": play(problem, optimism(rounds), rounds, seeds),
              "Thompson": play(problem, 0, rounds, seeds, posterior=True)}
    halves = [rounds // 2, rounds]
    results = compare(problem, halves,
                      {arm: curve[:, np.array(halves) - 1] for arm, curve in curves.items()})
    last_half = np.arange(rounds // 2, rounds + 1)
    for arm, curve in curves.items():
        results[arm]["slope"] = growth(last_half, curve[:, last_half - 1])
        results[arm]["curve"] = {int(t): measured(curve[:, int(t) - 1], keep=False)
                                 for t in np.geomspace(1, rounds, 60)}
    return results


def by_horizon(problem, horizons):
    """Panels 2 and 4: R(T). alpha depends on T, so that for SELM every T is a run of its own."""
    dpo = play(problem, 0, horizons[-1], SEEDS)[:, np.array(horizons) - 1]  # (S, len(horizons))
    selm = np.stack([play(problem, optimism(T), T, SEEDS)[:, -1] for T in horizons], axis=1)
    return compare(problem, horizons, {"DPO": dpo, "SELM": selm})


def compare(problem, horizons, regrets):
    """Each arm's regret at each horizon, its paired difference to DPO, its growth.

    regrets: arm -> (S, len(horizons))."""
    by_T = lambda regret: dict(zip(horizons, map(measured, regret.T)))  # noqa: E731
    return {"J*": round(problem.best, 4), "members": len(problem.rewards),
            **{arm: {"regret": by_T(regret), "minus DPO": by_T(regret - regrets["DPO"]),
                     "slope": growth(horizons, regret)} for arm, regret in regrets.items()}}


def by_alpha(problem, alphas, rounds):
    """Panel 3: regret a round in the first and in the last quarter of the rounds, alpha fixed."""
    quarter, results = rounds // 4, {}
    for alpha in (*alphas, "Thompson"):
        posterior = alpha == "Thompson"
        regret = play(problem, 0 if posterior else alpha, rounds, SEEDS, posterior)
        results[f"{alpha:g}" if not posterior else alpha] = {
            "first": measured(regret[:, quarter - 1] / quarter),
            "last": measured((regret[:, -1] - regret[:, -quarter - 1]) / quarter)}
    return results


def optimism(rounds):
    return SCALE / rounds ** 0.5


# ----------------------------------------------------------------------------------------------
# 2. Algorithm 2
# ----------------------------------------------------------------------------------------------


def play(problem, alpha, rounds, seeds, posterior=False):
    """Algorithm 2 with an exact argmin (or Thompson sampling). Returns summed regret, (S, T)."""
    uniforms = np.stack([np.random.default_rng(s).random((rounds, 4)) for s in seeds])  # (S, T, 4)
    objective = np.tile(problem.prior, (len(seeds), 1))  # (S, M)
    # (K, M), each row in one piece: read by columns, a round takes five times as long
    bonus = alpha * np.ascontiguousarray(problem.implicit.T)
    member = np.full(len(seeds), problem.start)
    regret = np.empty((len(seeds), rounds))
    for t in range(rounds):
        regret[:, t] = problem.regret[member]
        u = uniforms[:, t]
        y1, y2 = pick(problem.policies[member], u[:, 0]), pick(problem.ref, u[:, 1])
        y1_wins = u[:, 2] < 1 / (1 + np.exp(problem.truth[y2] - problem.truth[y1]))
        chosen, rejected = np.where(y1_wins, (y1, y2), (y2, y1))
        differ = np.flatnonzero(y1 != y2)
        objective[differ] += problem.losses[chosen[differ], rejected[differ]]
        if alpha:
            objective += bonus[y2]
        if posterior:
            weights = np.exp(objective.min(1, keepdims=True) - objective)
            member = pick(weights / weights.sum(1, keepdims=True), u[:, 3])
        else:
            member = objective.argmin(1)
    return regret.cumsum(1)


def pick(probabilities, u):
    """Index drawn by the inverse of the distribution function, (S,). The last sum is left out: it
    may be 1 - 1e-16, and a u above it would pick an index that does not exist."""
    return (u[:, None] > probabilities.cumsum(-1)[..., :-1]).sum(-1)


class Problem:
    """Reference and true rewards (K,), and of each of M members: rewards, h, policy (M, K), its
    regret a round, its DPO loss for a pair (chosen, rejected). `start`: reward of every response
    but the first in the member that is played first and wins ties."""

    def __init__(self, ref, truth, rewards, start=0):
        self.ref, self.truth, self.rewards = ref, np.asarray(truth, float), rewards
        self.implicit = rewards - value(ref, rewards)[:, None]  # h = beta log(pi / ref)
        self.policies = ref * np.exp(self.implicit / BETA)
        self.best = value(ref, self.truth)  # J*: no policy has more
        # E_pi[h] is beta KL(pi || ref), so the bracket is J(pi)
        self.regret = self.best - (self.policies * (self.truth - self.implicit)).sum(1)
        by_response = np.ascontiguousarray(rewards.T)
        margins = by_response[:, None] - by_response  # (K, K, M)
        self.losses = np.log1p(np.exp(-margins))  # -log sigmoid, the DPO loss
        distance = ((rewards[:, 1:] - start) ** 2).sum(1)
        self.prior, self.start = 1e-6 * distance, distance.argmin()


def value(ref, rewards):
    """V(r) = beta log sum(ref e^{r / beta}) = max over pi of E_pi[r] - beta KL(pi || ref)."""
    return BETA * np.log((ref * np.exp(rewards / BETA)).sum(-1))


def bandit(eps, truth):
    """The problem of panels 1 to 3: 4 responses, 17^3 = 4,913 members."""
    grid = itertools.product([0.0], *[np.linspace(-2, 2, 17)] * 3)
    return Problem(np.array([1 - 3 * eps, eps, eps, eps]), truth, np.array(list(grid)))


def leaf_tree(depth):
    """Each leaf has its own reward. The first policy holds all but 00..0 for bad."""
    ref, ones = tree(depth)[1:]
    rewards = np.array(list(itertools.product([0.0], *[(-1.0, 1.0)] * (len(ref) - 1))))
    truth = np.where(ones == 0, 0, np.where(ones == depth, 1, -1))
    return Problem(ref, truth, rewards, start=-1)


def token_tree(depth):
    """The reward is a sum over tokens, and a policy a product of independent tokens."""
    leaves, ref, ones = tree(depth)
    tokens = np.array(list(itertools.product(np.linspace(-2, 2, 9), repeat=depth)))  # (M, H)
    return Problem(ref, ones / depth, tokens @ leaves.T / depth)


def tree(depth, rare=0.1):
    """All strings of `depth` tokens (K, H), their probabilities and numbers of ones (K,)."""
    leaves = np.array(list(itertools.product((0, 1), repeat=depth)))
    ones = leaves.sum(1)
    return leaves, rare ** ones * (1 - rare) ** (depth - ones), ones


# ----------------------------------------------------------------------------------------------
# 3. Statistics, table, figure
# ----------------------------------------------------------------------------------------------


def measured(values, keep=True):
    """Mean and half width of the 95 % interval; with `keep` also every seed's value."""
    width = T_95[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    return {"mean": round(values.mean(), 6), "width": round(width, 6),
            **({"seeds": [float(f"{v:.4g}") for v in values]} if keep else {})}


def growth(at, regret):
    """Slope of log(mean regret) over log(T): 1 is linear, 0.5 is sqrt(T), 0 is flat.

    at (N,) rounds, regret (S, N). Seeds are averaged first, as the log of one lucky seed's regret
    says nothing about the mean's; hence the jackknife, which leaves out one seed at a time.
    """
    n = len(regret)
    means = (regret.sum(0) - regret) / (n - 1)  # (S, N), row s without seed s
    left_out = np.polyfit(np.log(at), np.log(means).T, 1)[0]
    slope = np.polyfit(np.log(at), np.log(regret.mean(0)), 1)[0]
    return {"mean": round(slope, 3), "width": round(T_95[n] * ((n - 1) * left_out.var()) ** 0.5, 3)}


def table(results):
    """Markdown. A paired difference is bold where its interval excludes zero."""
    rows = {f"panel 1{key[4:]}": results[key] for key in results if key.startswith("arms")}
    rows |= {f"panel 2, eps = {eps}": row for eps, row in results["horizons"].items()}
    rows |= {f"panel 4, {name} class, H = {H}": row
             for name, by_depth in results["depths"].items() for H, row in by_depth.items()}
    lines = ["| problem | J* | members | arm | T | R(T) | minus DPO, paired | growth exponent |",
             "|" + "---|" * 8]
    for name, row in rows.items():
        for arm in [arm for arm in COLOURS if arm in row]:
            T = max(row[arm]["regret"])
            cells = [name, row["J*"], f"{row['members']:,}", arm, f"{T:,}",
                     cell(row[arm]["regret"][T]), cell(row[arm]["minus DPO"][T], bold=True),
                     cell(row[arm]["slope"], 2)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def cell(value, digits=0, bold=False):
    text = f"{value['mean']:.{digits}f} ± {value['width']:.{digits}f}"
    return f"**{text}**" if bold and abs(value["mean"]) > value["width"] else text


COLOURS = {"DPO": "#30638e", "SELM": "#d1495b", "Thompson": "#8a8a8a"}


def draw(results, path, warning):
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 10.5))
    for axis, panel, key in zip(axes.flat, (draw_arms, draw_horizons, draw_alphas, draw_depths),
                                ("arms", "horizons", "alphas", "depths")):
        title = panel(axis, results[key])
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7.5)
    figure.suptitle(
        f"{warning} SELM with an exact argmin: regret, the sum of J* - J(pi), in a bandit "
        "(1 to 3) and a tree of tokens (4).\nDPO is alpha = 0, SELM is "
        f"alpha = {SCALE} / sqrt(T); means and 95 % intervals of {len(SEEDS)} seeds", fontsize=11)
    figure.tight_layout(h_pad=2, w_pad=2)
    figure.savefig(path, dpi=110)


def line(axis, rows, label, **style):
    """One line with its interval, from {x: measured}. A log axis has no zero: an interval that
    reaches it is cut at a quarter of the mean."""
    mean, width = (np.array([row[key] for row in rows.values()]) for key in ("mean", "width"))
    axis.plot(list(rows), mean, label=label, **style)
    axis.fill_between(list(rows), np.maximum(mean - width, mean / 4), mean + width, alpha=0.15,
                      color=style["color"], linewidth=0)


def draw_arms(axis, arms):
    for arm, colour in COLOURS.items():
        line(axis, arms[arm]["curve"], f"{arm}: {cell(arms[arm]['regret'][2000])}, slope of the "
             f"last half {cell(arms[arm]['slope'], 2)}", color=colour)
    axis.set(xscale="log", xlabel="round t", ylabel="regret, summed up to round t")
    return (f"1. A good response of probability {RARE:g}: DPO waits for chance to show it, at\n"
            "full regret; SELM and Thompson sampling pay for trying out, and then ever less.")


def draw_horizons(axis, horizons):
    for style, (eps, row) in zip(("-", "--", ":"), horizons.items()):
        for arm in ("DPO", "SELM"):
            line(axis, row[arm]["regret"], f"{arm}, eps = {eps}: T to the power "
                 f"{cell(row[arm]['slope'], 2)}", color=COLOURS[arm], linestyle=style)
    ticks = list(row["DPO"]["regret"])
    axis.set(xscale="log", xlabel="horizon T", ylabel="R(T), regret after T rounds")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    return ("2. DPO's regret is linear only until chance has struck, after some 1/eps rounds: the\n"
            "commoner the good response, the less there is for optimism to gain.")


def draw_alphas(axis, alphas):
    for (name, by_alpha), colour in zip(alphas.items(), ("#d1495b", "#edae49")):
        for when, style in (("first", "-"), ("last", ":")):
            rows = {x: row[when] for x, row in enumerate(by_alpha.values())}
            thompson = {x: rows.pop(x) for x in [len(rows) - 1]}
            line(axis, rows, f"{name}: {when} quarter of the rounds", color=colour, linestyle=style,
                 marker="o", markersize=4)
            line(axis, thompson, None, color=colour, marker="o" if when == "first" else "x")
    axis.set_xticks(range(len(by_alpha)), [*by_alpha][:-1] + ["Thompson\n(o first, x last)"])
    axis.set(xlabel="alpha, the same for all T", ylabel="regret a round")
    return ("3. A fixed alpha leaves a regret that no longer falls (dotted meets solid); where\n"
            "the reference is best already, optimism only costs.")


def draw_depths(axis, depths):
    for style, (name, by_depth) in zip(("-", ":"), depths.items()):
        for arm in ("DPO", "SELM"):
            shares = {}
            for depth, row in by_depth.items():
                T, regret = list(row[arm]["regret"].items())[-1]
                shares[depth] = {k: regret[k] / (T * row["J*"]) for k in ("mean", "width")}
            exponents = ", ".join(f"{r[arm]['slope']['mean']:.2f}" for r in by_depth.values())
            line(axis, shares, f"{arm}, {name} class: T to the power {exponents} by H",
                 color=COLOURS[arm], linestyle=style, marker="o", markersize=4)
    axis.set_xticks(list(shares))
    axis.set(xlabel="tokens in a response, H (leaf class: each leaf has its own reward;\n"
             "token class: a sum over tokens)", ylabel=f"R(T) / (T J*) at T = {T:,}")
    return ("4. SELM's regret grows with depth, but sublinearly in T at each; DPO waits 10^H\n"
            "rounds unless leaves share what is learnt of tokens: then optimism gains little.")


if __name__ == "__main__":
    main()

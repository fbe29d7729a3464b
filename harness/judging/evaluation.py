"""Arithmetic of the evaluation: rows of eval.jsonl, duels.jsonl and pairs.jsonl in, numbers out.

Test: pytest tests/test_evaluation.py.
"""

import math
import statistics

import numpy as np

# Student's t for 95 % intervals, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23,
        11: 2.20, 12: 2.18, 13: 2.16, 14: 2.14, 15: 2.13, 19: 2.09, 29: 2.05}


def mean_interval(values):
    """(mean, half width of the 95 % interval of the mean); nan width for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    quantile = T_95[max(df for df in T_95 if df < len(values))]  # between two: the wider
    return mean, quantile * math.sqrt(variance / len(values))


def wilson(share, n, z=1.96):
    """The 95 % interval of a share of n trials: (low, high), arXiv-free and from 1927. Unlike mean
    ± 1.96 standard errors it does not say "1.00 ± 0" after five wins of five."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - width, centre + width


def half_for_ties(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def length_controlled(wins, differences, ridge=0.1, z=1.96):
    """The win rate at equal lengths, and its 95 % interval: (rate, low, high).

    wins: n values, 1, 0.5 for a tie, or 0; differences: n lengths, ours - theirs, in any unit.
    As in AlpacaEval 2 (arXiv 2404.04475): a logistic regression of the wins on an intercept and on
    d = tanh(difference / its standard deviation); the rate is that of d = 0.
    DEVIATION: without their term for an instruction's difficulty, which many models' outputs fit.

    An intercept is in the interval if the score test does not reject it, the slope fitted anew for
    each. That is `wilson` where all lengths are equal, and like it right for five wins of five. The
    ridge keeps the slope finite where length alone tells who wins. Where one side is always longer
    by the same, nothing can be said, and the interval says so: it is nearly 0 to 1.
    """
    wins, differences = np.asarray(wins, float), np.asarray(differences, float)
    d = np.tanh(differences / (differences.std() or 1.0))

    def score(intercept):
        """Derivative of the log-likelihood by the intercept, in its standard errors: falls."""
        slope, step = 0.0, 1.0
        while abs(step) > 1e-7:  # Newton on a concave function, in steps that cannot overshoot far
            p = 1 / (1 + np.exp(-intercept - slope * d))
            curvature = p * (1 - p) @ d**2 + ridge
            step = np.clip(((wins - p) @ d - ridge * slope) / curvature, -1, 1)
            slope += step
        information = (p * (1 - p)).sum() - (p * (1 - p) @ d) ** 2 / curvature
        return (wins - p).sum() / math.sqrt(information)

    def rate_where_the_score_is(wanted, low=-12.0, high=12.0):
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return 1 / (1 + math.exp(-low))
    return tuple(map(rate_where_the_score_is, (0.0, z, -z)))


def evaluation(answers, duels):
    """Rows of eval.jsonl and of duels.jsonl -> metrics, each with its 95 % interval over prompts
    (name_low, name_high; a mean of fewer than two prompts has none).

    win_rate: against the start's answers; lc_win_rate: at equal lengths, in characters.
    *_at_temperature_1: of samples (win rate: of both sides), where there are any.
    preference_accuracy: how often the implicit reward log(pi / pi_start) prefers the data's chosen.
    logratio_to_start: it of the policy's own response; sampled at temperature 1, its mean estimates
    KL(pi || pi_start); greedy, it does not.
    distinct_answers: where it is far below `prompts`, these are no independent trials, and all
    intervals over prompts are too narrow.
    """
    shares, means, answers, duels = {}, {}, list(answers), list(duels)
    for row, met in zip(answers, duels, strict=True):
        ratios = [p - q for p, q in zip(row["policy_logps"], row["start_logps"])]
        for values, name, value in (
                (means, "score", row["scores"][2]),
                (shares, "win_rate", half_for_ties(*met["duels"]["start"])),
                (shares, "preference_accuracy", half_for_ties(ratios[0], ratios[1])),
                (means, "logratio_to_start", ratios[2]),
                (means, "response_tokens", float(len(row["ids"]))),
                (shares, "finished", float(row["finished"]))):
            values.setdefault(name, []).append(value)
        if met["at_temperature_1"]:
            means.setdefault("score_at_temperature_1", []).append(row["score_at_temperature_1"])
            shares.setdefault("win_rate_at_temperature_1", []).append(
                half_for_ties(*met["at_temperature_1"]))
    metrics = {"prompts": len(answers),
               "distinct_answers": len({row["response"] for row in answers})}
    longer = [ours - theirs for ours, theirs in (met["characters"] for met in duels)]
    metrics |= with_interval("lc_win_rate", *length_controlled(shares["win_rate"], longer))
    for name, values in means.items():
        mean, width = mean_interval(values)
        metrics |= {name: mean} if math.isnan(width) else with_interval(
            name, mean, mean - width, mean + width)
    for name, values in shares.items():
        share = statistics.fmean(values)
        metrics |= with_interval(name, share, *wilson(share, len(values)))
    return metrics


def with_interval(name, value, low, high):
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def ranking(pairs, max_new_tokens):
    """Rows of pairs.jsonl -> counts: pairs, ties, drops by reason, and how y fared. One that has no
    end token and less than max_new_tokens was cut by what its prompt left of --max-length."""
    counts = dict.fromkeys(("prompts", "pairs", "equal", "sampled", "sampled_best",
                            "sampled_worst", "cut", "cut_by_max_length", "empty", "tokens"), 0)
    counts["dropped"] = {}
    for row in pairs:
        counts["prompts"] += 1
        for c in row["sampled"]:
            y = row["candidates"][c]
            counts["sampled"] += 1
            counts["tokens"] += len(y["ids"])
            counts["cut"] += not y["finished"]
            counts["cut_by_max_length"] += not y["finished"] and len(y["ids"]) < max_new_tokens
            counts["empty"] += not y["text"].strip()
        if row["dropped"]:
            counts["dropped"][row["dropped"]] = counts["dropped"].get(row["dropped"], 0) + 1
        elif row["chosen"] == row["rejected"]:
            counts["equal"] += 1
        else:
            counts["pairs"] += 1
            counts["sampled_best"] += row["chosen"] in row["sampled"]
            counts["sampled_worst"] += row["rejected"] in row["sampled"]
    return counts

"""Arithmetic of the evaluation: rows of eval.jsonl and pairs.jsonl in, numbers out.

Test: pytest tests/test_evaluate.py.
"""

import math
import statistics

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


def evaluation(rows):
    """Rows of eval.jsonl -> metrics, each with its 95 % interval over prompts (name_low, name_high;
    a mean of fewer than two prompts has none).

    preference_accuracy: how often the implicit reward log(pi / pi_start) prefers the data's chosen.
    logratio_to_start: it of the policy's own response; sampled at temperature 1, its mean estimates
    KL(pi || pi_start); greedy, it does not.
    """
    shares, means = {}, {}
    for row in rows:
        ratios = [p - q for p, q in zip(row["policy_logps"], row["start_logps"])]
        for values, name, value in (
                (means, "score", row["scores"][2]),
                (shares, "win_rate", half_for_ties(*row["duel"])),
                (shares, "preference_accuracy", half_for_ties(ratios[0], ratios[1])),
                (means, "logratio_to_start", ratios[2]),
                (means, "response_tokens", float(len(row["ids"]))),
                (shares, "finished", float(row["finished"]))):
            values.setdefault(name, []).append(value)
    metrics = {"prompts": len(means["score"])}
    for name, values in means.items():
        metrics[name], width = mean_interval(values)
        if not math.isnan(width):
            metrics[f"{name}_low"] = metrics[name] - width
            metrics[f"{name}_high"] = metrics[name] + width
    for name, values in shares.items():
        metrics[name] = statistics.fmean(values)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = wilson(metrics[name], len(values))
    return metrics


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

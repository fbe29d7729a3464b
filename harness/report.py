"""What a run says about itself, from its files alone: summary lines, warnings, the final table.

Reads metrics.jsonl and pairs.jsonl of a run folder; computes no log-prob and trains nothing. The
warnings are the failure signatures that the paper and its reproductions report, each with the
figure that raised it and what to try.

Test: pytest tests/test_report.py.
"""

import json
import math
import statistics
from pathlib import Path

from harness.rundir import read_jsonl, write_text

# Student's t for 95 % intervals, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23,
        11: 2.20, 12: 2.18, 13: 2.16, 14: 2.14, 15: 2.13, 19: 2.09, 29: 2.05}

# name in metrics.jsonl -> heading. The toy's come last: a real run cannot know them.
EVAL_COLUMNS = {
    "score": "judge's score", "win_rate": "win rate against the start",
    "preference_accuracy": "held-out preference accuracy", "response_tokens": "response tokens",
    "logratio_to_start": "log pi(y)/pi_start(y), nats",
    "true_reward": "true reward", "true_share_good": "true reward > 0.75",
    "true_coverage": "words in use", "true_entropy": "entropy, nats",
    "true_kl": "KL from the start, nats", "true_invalid": "invalid replies"}


def rows_of(folder, phase):
    path = Path(folder) / "metrics.jsonl"
    return [row for _, row in read_jsonl(path) if row["phase"] == phase] if path.exists() else []


def mean_interval(values):
    """(mean, half width of the 95 % interval of the mean); nan width for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    quantile = T_95[max(df for df in T_95 if df < len(values))]  # between two: the wider
    return mean, quantile * math.sqrt(variance / len(values))


# ----------------------------------------------------------------------------------------------
# 1. Before the run, and after each evaluation
# ----------------------------------------------------------------------------------------------


def plan(args, prompts, source):
    """What --dry-run prints: the iteration table and where files go. `prompts` may be None."""
    portion = min([x for x in (prompts and prompts // args.iterations, args.prompts_per_iteration)
                   if x], default=None)
    lines = [f"model   {args.model}",
             f"data    {args.data}: {prompts or '?'} prompts ({source})",
             f"ranker  {args.ranker}",
             f"loss    beta {args.beta:g}, reference: {args.reference}", "",
             "iteration  prompts  samples  alpha   lr       updates  warm-up  tokens at most"]
    first = 0 if args.offline_first else 1
    for k, lr in enumerate(args.lr, first):
        offline = args.offline_first and k == 0
        n = 0 if offline else args.responses_per_prompt
        updates = portion and math.ceil(portion / args.batch_size) * args.epochs
        longest = args.max_prompt_length + (2 + n) * (args.max_length - args.max_prompt_length)
        lines.append(
            f"{k:<10} {portion or '?':<8} {portion * n if portion else '?':<8} "
            f"{0 if offline else args.alpha:<7g} {lr:<8g} {updates or '?':<8} "
            f"{math.ceil(0.1 * updates) if updates else '?':<8} "
            f"{portion * longest if portion else '?'}"
            + ("   offline DPO on the data's own pairs" if offline else ""))
    return "\n".join(lines + [
        "", f"batch   {args.batch_size} prompts an update, in micro-batches of "
        f"{args.tokens_per_forward} tokens",
        f"sample  temperature {args.temperature:g} (0 = greedy), at most {args.max_new_tokens} new "
        f"tokens, {args.slots} slots",
        f"rows    prompt {args.max_prompt_length}, with response {args.max_length} tokens",
        f"seeds   {args.seeds}; baseline alpha = 0: {'yes' if args.baseline else 'no'}",
        f"files   {args.run_dir}/iter_K/{{samples.jsonl, pairs.jsonl, policy/, eval.jsonl}}, "
        f"{args.run_dir}/metrics.jsonl, {args.run_dir}/report.md, {args.run_dir}/figures/"])


def half_for_ties(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def evaluation(scores, duels, responses, policy_logps, start_logps):
    """Metrics of held-out prompts, each with its standard error over prompts (name_se).

    scores: B judge's scores of the response; duels: B pairs of scores (response, start's response);
    responses: B samples; *_logps: B rows for (chosen, rejected, response). preference_accuracy: how
    often the implicit reward log(pi / pi_start) prefers the data's chosen. logratio_to_start: it
    of the policy's own response; sampled at temperature 1, its mean estimates KL(pi || pi_start);
    greedy, it does not.
    """
    logratios = [[p - q for p, q in zip(*rows)] for rows in zip(policy_logps, start_logps)]
    row = {"prompts": len(scores)}
    for name, values in {
            "score": scores,
            "win_rate": [half_for_ties(*duel) for duel in duels],
            "preference_accuracy": [half_for_ties(r[0], r[1]) for r in logratios],
            "logratio_to_start": [r[2] for r in logratios],
            "response_tokens": [float(len(sample["ids"])) for sample in responses],
            "finished": [float(sample["finished"]) for sample in responses]}.items():
        row[name] = statistics.fmean(values)
        row[f"{name}_se"] = (statistics.stdev(values) / math.sqrt(len(values))
                             if len(values) > 1 else 0.0)
    return row


# ----------------------------------------------------------------------------------------------
# 2. After each iteration
# ----------------------------------------------------------------------------------------------


def pair_counts(folder, iteration):
    """How the ranking of one iteration went: counts of pairs, of drops by reason, of y's fate."""
    rows = [row for _, row in read_jsonl(Path(folder) / f"iter_{iteration}" / "pairs.jsonl")]
    kept = [row for row in rows if not row["dropped"]]
    samples = [row["candidates"][c] for row in rows for c in row["sampled"]]
    won = lambda role: sum(row[role] in row["sampled"] for row in kept)  # noqa: E731
    drops = {}
    for row in rows:
        if row["dropped"]:
            drops[row["dropped"]] = drops.get(row["dropped"], 0) + 1
    return {"prompts": len(rows), "pairs": len(kept), "drops": drops,
            "sample_best": won("chosen"), "sample_worst": won("rejected"), "samples": len(samples),
            "unfinished": sum(not c["finished"] for c in samples),
            "mean_tokens": sum(len(c["ids"]) for c in samples) / max(1, len(samples))}


def held_out_responses(folder, iteration):
    """prompt_id -> the policy's answer after this iteration; empty without evaluation."""
    path = Path(folder) / f"iter_{iteration}" / "eval.jsonl"
    rows = read_jsonl(path) if path.exists() else ()
    return {row["prompt_id"]: row["response"] for _, row in rows}


def summary(folder, iteration):
    """The lines to print after an iteration: one of figures, one for each warning."""
    counts = pair_counts(folder, iteration)
    steps = [row for row in rows_of(folder, "train") if row["iteration"] == iteration]
    evals = {row["iteration"]: row for row in rows_of(folder, "eval")}
    drops = ", ".join(f"{n} {reason}" for reason, n in counts["drops"].items())
    line = f"iteration {iteration}: {counts['pairs']} pairs of {counts['prompts']} prompts"
    line += f" ({drops})" if drops else ""
    if counts["samples"] and counts["pairs"]:
        line += (f", y best {counts['sample_best'] / counts['pairs']:.0%} worst "
                 f"{counts['sample_worst'] / counts['pairs']:.0%}")
    line += f" | loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}"
    if "sampled_logratio" in steps[-1]:
        line += f", log-ratio of y {steps[-1]['sampled_logratio']:+.2f}"
    if iteration in evals:
        row, before = evals[iteration], evals.get(iteration - 1, {})
        for name in ("true_reward", "score", "win_rate", "response_tokens"):
            if name in row and not (name == "score" and "true_reward" in row):
                line += f" | {name.replace('_', ' ')} {row[name]:.3g}"
                line += f" (was {before[name]:.3g})" if name in before else ""
    return [line] + [f"  warning: {text}"
                     for text in warnings_of(folder, iteration, counts, steps, evals)]


def warnings_of(folder, iteration, counts, steps, evals):
    """The paper's failure signatures that this iteration shows, one sentence each."""
    tail = steps[-max(1, len(steps) // 5):]
    mean = lambda name: sum(r.get(name, 0.0) for r in tail) / len(tail)  # noqa: E731
    tokens = max(1.0, counts["mean_tokens"])
    if mean("sampled_logratio") / tokens < -0.5 and mean("accuracy") < 0.6:
        yield ("optimism is too strong: the log-ratio of y fell to "
               f"{mean('sampled_logratio'):.1f} nats while the accuracy is "
               f"{mean('accuracy'):.2f}; lower --alpha")
    if counts["samples"] and counts["unfinished"] > 0.3 * counts["samples"]:
        yield (f"{counts['unfinished'] / counts['samples']:.0%} of the samples hit the length "
               "limit; raise --max-new-tokens, or, if it grew with the iterations, lower --alpha "
               "or --lr")
    drift = evals.get(iteration, {})
    if abs(drift.get("logratio_to_start", 0.0)) / max(1.0, drift.get("response_tokens", 1.0)) > 2.0:
        yield (f"the policy is {evals[iteration]['logratio_to_start']:.0f} nats from the start on "
               "its own responses; raise --beta, lower --lr, or try --reference initial")
    equal = counts["drops"].get("best and worst are equal", 0)
    if equal > 0.5 * counts["prompts"]:
        yield (f"{equal / counts['prompts']:.0%} of the examples were dropped because all "
               "candidates are equal; try --temperature 1 or a finer ranker")
    if not (Path(folder) / f"iter_{iteration - 1}" / "pairs.jsonl").exists():
        return
    before = pair_counts(folder, iteration - 1)
    if before["samples"] and counts["mean_tokens"] > 1.3 * before["mean_tokens"]:
        yield (f"samples grow longer, {before['mean_tokens']:.0f} -> "
               f"{counts['mean_tokens']:.0f} tokens; judges like length: try --length-penalty")
    # Held-out prompts: the training prompts of two iterations are disjoint.
    now, old = (held_out_responses(folder, k) for k in (iteration, iteration - 1))
    same = sum(now[p] == old.get(p) for p in now)
    if old and now and same > 0.9 * len(now):
        yield (f"{same / len(now):.0%} of the held-out responses are those of the last iteration: "
               "the policy is stuck; raise --lr or lower --beta")


# ----------------------------------------------------------------------------------------------
# 3. At the end
# ----------------------------------------------------------------------------------------------


def table(runs):
    """Markdown table of [(arm name, folder)]: a row an arm and iteration, mean +- 95 % interval.

    Several runs of an arm (seeds): the interval is over runs, by Student's t. One run: over its
    evaluation prompts, for what is measured a prompt.
    """
    values = {}  # (arm, iteration) -> rows
    for name, folder in runs:
        for row in rows_of(folder, "eval"):
            values.setdefault((name, row["iteration"]), []).append(row)
    if not values:
        return "No evaluation was run (--eval-prompts 0)."
    columns = [c for c in EVAL_COLUMNS if all(c in r for rows in values.values() for r in rows)]
    if "true_reward" in columns:  # the toy's judge IS the true reward: no need to say it twice
        columns = [c for c in columns
                   if c not in ("score", "preference_accuracy", "response_tokens")]
    lines = ["| arm | iteration | " + " | ".join(EVAL_COLUMNS[c] for c in columns) + " |",
             "|" + "---|" * (len(columns) + 2)]
    first = min(iteration for _, iteration in values)
    by_iteration = sorted(values.items(), key=lambda item: (item[0][1], item[0][0]))
    for (name, iteration), rows in by_iteration:
        if iteration == first and name != runs[0][0]:
            continue  # all arms start from the same policy
        cells = []
        for column in columns:
            mean, width = mean_interval([row[column] for row in rows])
            if len(rows) == 1:
                width = 1.96 * rows[0].get(f"{column}_se", math.nan)
            cells.append(f"{mean:.3g}" + ("" if math.isnan(width) else f" ± {width:.2g}"))
        arm = "start" if iteration == first else name
        lines.append(f"| {arm} | {iteration} | " + " | ".join(cells) + " |")
    seeds = max(map(len, values.values()))
    lines.append("\n± is the half width of the 95 % interval over "
                 + (f"{seeds} seeds." if seeds > 1 else "the evaluation prompts; one seed."))
    return "\n".join(lines)


def write(runs, path, figures):
    """Writes report.md, returns its table as text."""
    config = json.loads((Path(runs[0][1]) / "config.json").read_text())
    settings = config["settings"]
    text = [f"# SELM run: {settings['name']}", "",
            f"`{' '.join(config['command'])}`", "", table(runs), ""]
    text += [f"![{Path(f).stem}]({Path(f).relative_to(Path(path).parent)})\n" for f in figures]
    text += ["## Each iteration", ""]
    for name, folder in runs:
        text += [f"**{name}**, `{folder}`", ""]
        for row in sorted({row["iteration"] for row in rows_of(folder, "train")}):
            text += [f"- {line.strip()}" for line in summary(folder, row)]
        text.append("")
    text += ["## Settings", "", "| | |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in settings.items()]
    text += [f"| {name} | {config[name]} |" for name in ("git_revision", "torch", "transformers")]
    write_text(path, "\n".join(text) + "\n")
    return table(runs)

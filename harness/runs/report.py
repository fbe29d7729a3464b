"""The report of a run, made from its files alone: summary lines, warnings, the final table.

Reads metrics.jsonl and eval.jsonl of a run folder. The warnings are the signs of failure that the
paper and its reproductions report, each with the number that caused it and what to try.

Test: pytest tests/test_report.py.
"""

from pathlib import Path

from harness.judging.evaluation import mean_interval
from harness.runs.output_files import write_text
from harness.runs.run_record import METRICS
from harness.runs.run_reader import config_of, finished_rows, rows_of

# name in metrics.jsonl -> heading. The last six exist in the toy world only.
EVAL_COLUMNS = {
    "score": "judge's score", "win_rate": "win rate against the start",
    "lc_win_rate": "win rate at equal lengths",
    "score_at_temperature_1": "judge's score at temperature 1",
    "win_rate_at_temperature_1": "win rate at temperature 1",
    "preference_accuracy": "held-out preference accuracy", "response_tokens": "response tokens",
    "finished": "answers that end",
    "logratio_to_start": "log pi(y)/pi_start(y), nats",
    "true_reward": "true reward", "true_share_good": "true reward > 0.75",
    "true_coverage": "words in use", "true_entropy": "entropy, nats",
    "true_kl": "KL from the start, nats", "true_invalid": "invalid replies"}
# Left out for the toy: they mean nothing for answers of two words, or a true measure is better.
NOT_THE_TOYS = ("score", "score_at_temperature_1", "lc_win_rate", "preference_accuracy",
                "response_tokens", "finished")
STUCK = 0.05  # nats: smaller changes of answers' log-probs mean that nothing was learned


# ----------------------------------------------------------------------------------------------
# 1. After each iteration
# ----------------------------------------------------------------------------------------------


def summary(folder, iteration):
    """The lines to print after an iteration: one with numbers, and one for each warning."""
    ranks, evals = ({row["iteration"]: row for row in rows_of(folder, phase)}
                    for phase in ("rank", "eval"))
    counts = ranks[iteration]
    updates = [row for row in rows_of(folder, "train") if row["iteration"] == iteration]
    if not updates:
        raise ValueError(f"{folder}/{METRICS} has lost the updates of iteration {iteration}; put "
                         f"it back, or remove {folder}/iter_{iteration}/policy to train them again")
    drops = dict(counts["dropped"], **{"equal for the judge": counts["equal"]})
    drops = ", ".join(f"{n} {reason}" for reason, n in drops.items() if n)
    line = f"iteration {iteration}: {counts['pairs']} pairs of {counts['prompts']} prompts"
    line += f" ({drops})" if drops else ""
    if counts["sampled"] and counts["pairs"]:
        line += (f", y best {counts['sampled_best'] / counts['pairs']:.0%} worst "
                 f"{counts['sampled_worst'] / counts['pairs']:.0%}")
    line += f" | loss {updates[0]['loss']:.3f} -> {updates[-1]['loss']:.3f}"
    if "sampled_logratio" in updates[-1]:
        line += f", log-ratio of y {updates[-1]['sampled_logratio']:+.2f}"
    if iteration in evals:
        row, before = evals[iteration], evals.get(iteration - 1, {})
        for name in ("true_reward", "score", "win_rate", "response_tokens"):
            if name in row and not (name == "score" and "true_reward" in row):
                line += f" | {name.replace('_', ' ')} {row[name]:.3g}"
                line += f" (was {before[name]:.3g})" if name in before else ""
    texts = [*warnings_of(counts, ranks.get(iteration - 1), updates, evals.get(iteration, {})),
             *standstill(folder, iteration)]
    return [line] + [f"  warning: {text}" for text in texts]


def warnings_of(counts, before, updates, evaluated):
    """The signs of failure that an iteration shows, one sentence each. counts, before: the "rank"
    rows of this iteration and the last (or None). evaluated: its "eval" row, or {}."""
    tail = updates[-max(1, len(updates) // 5):]
    mean = lambda name: sum(r.get(name, 0.0) for r in tail) / len(tail)  # noqa: E731
    tokens = counts["tokens"] / max(1, counts["sampled"])
    if mean("sampled_logratio") / max(1.0, tokens) < -0.5 and mean("accuracy") < 0.6:
        yield ("optimism is too strong: the log-ratio of y fell to "
               f"{mean('sampled_logratio'):.1f} nats while the accuracy is "
               f"{mean('accuracy'):.2f}; lower --alpha")
    share = next((row["optimism_share"] for row in updates if "optimism_share" in row), None)
    if share is not None and share < 1e-3:
        yield (f"optimism is {share:.2g} of the first update's gradient, too little to matter: the "
               "run is like one with --alpha 0; for a share of 0.1 multiply alpha by "
               f"{0.1 / max(share, 1e-12):.2g}")
    elif share is not None and share > 0.5:  # above 1 only if the two gradients partly cancel
        yield (f"optimism is {share:.0%} of the first update's gradient"
               f"{' and opposes the preferences' if share > 1 else ', a large part'}; for a share "
               "of about 0.1 lower --alpha, tenfold at a time")
    if counts["cut"] > 0.3 * max(1, counts["sampled"]):
        flag = "--max-length" if counts["cut_by_max_length"] > counts["cut"] / 2 else (
            "--max-new-tokens")
        yield (f"{counts['cut'] / counts['sampled']:.0%} of the samples hit the length limit; "
               f"raise {flag}, or, if it grew with the iterations, lower --alpha or --lr")
    if counts["empty"] > 0.3 * max(1, counts["sampled"]):
        yield (f"{counts['empty'] / counts['sampled']:.0%} of the samples are empty: the policy "
               "ends at once; lower --lr or --alpha, and see how the judge scores empty answers")
    drift = abs(evaluated.get("logratio_to_start", 0.0))
    if drift / max(1.0, evaluated.get("response_tokens", 1.0)) > 2.0:
        yield (f"the policy is {drift:.0f} nats from the start on its own responses; raise --beta, "
               "lower --lr, or try --reference initial")
    if counts["equal"] > 0.5 * counts["prompts"]:
        yield (f"for {counts['equal'] / counts['prompts']:.0%} of the prompts all candidates are "
               "equal for the judge; try --temperature 1 or a finer judge")
    if before and before["sampled"]:
        old = before["tokens"] / before["sampled"]
        if counts["sampled"] and tokens > 1.3 * old:
            yield (f"samples grow longer, {old:.0f} -> {tokens:.0f} tokens; judges like length: "
                   "try --length-penalty")


def standstill(folder, iteration):
    """A warning if nearly all held-out answers and their log-probs are those of the iteration
    before. (The answers alone do not show it: a greedy answer may stay while the policy learns.)"""
    def answers(k):
        path = Path(folder) / f"iter_{k}" / "eval.jsonl"
        return {row["prompt_id"]: (row["response"], row["policy_logps"][2])
                for row in finished_rows(path)} if path.exists() else {}
    now, old = answers(iteration), answers(iteration - 1)
    moves = [abs(logp - old[prompt_id][1]) for prompt_id, (text, logp) in now.items()
             if prompt_id in old and old[prompt_id][0] == text]
    if len(moves) > 0.9 * len(now) and (moved := sum(moves) / len(moves)) < STUCK:
        yield (f"{len(moves) / len(now):.0%} of the held-out responses are those of the last "
               f"iteration, and their log-probs moved by {moved:.2g} nats: the policy is stuck; "
               "raise --lr or lower --beta")


# ----------------------------------------------------------------------------------------------
# 2. At the end
# ----------------------------------------------------------------------------------------------


def table(runs):
    """Markdown table of [(arm, folder)]: a row an arm and iteration, means and 95 % intervals."""
    head, *rows = table_cells(runs) or [None]
    if not head:
        return "No evaluation was run (--eval-prompts 0)."
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:], "", *notes(runs)])


def table_cells(runs):
    """The heading and the rows of the table, cells as text; [] if nothing was evaluated.

    With several runs of an arm (seeds), the interval is over runs, by Student's t. With one run it
    is over the evaluation prompts, for measures that each prompt has.
    """
    values = {}  # (arm, iteration) -> rows
    for name, folder in runs:
        for row in rows_of(folder, "eval"):
            values.setdefault((name, row["iteration"]), []).append(row)
    columns = [c for c in EVAL_COLUMNS if all(c in r for rows in values.values() for r in rows)]
    if "true_reward" in columns:
        columns = [c for c in columns if c not in NOT_THE_TOYS]
    first, lines = min((iteration for _, iteration in values), default=0), []
    for (name, iteration), rows in sorted(values.items(), key=lambda item: item[0][::-1]):
        if iteration == first and name != runs[0][0]:
            continue  # all arms start from the same policy
        arm = "start" if iteration == first else name
        lines.append([arm, str(iteration), *(cell(rows, column) for column in columns)])
    return lines and [["arm", "iteration", *map(EVAL_COLUMNS.get, columns)], *lines]


def notes(runs):
    """Sentences on the table's intervals."""
    rows = [row for _, folder in runs for row in rows_of(folder, "eval")]
    seeds = max(sum(name == other for other, _ in runs) for name, _ in runs)
    yield (f"±: half width of the 95 % interval over {seeds} seeds." if seeds > 1 else
           "(low to high): 95 % interval over the evaluation prompts, one seed.")
    distinct = [row["distinct_answers"] for row in rows if "distinct_answers" in row]
    if distinct and min(distinct) < rows[0]["prompts"] / 2:
        yield (f"The {rows[0]['prompts']} held-out prompts got {min(distinct)} to "
               f"{max(distinct)} distinct answers in an iteration: their duels are not independent "
               "trials, so intervals over prompts are too narrow, and win rates change in jumps.")


def judge_of(settings):
    """The name of the judge of the held-out answers. settings: those of config.json."""
    return settings.get("eval_ranker") or settings["ranker"]


def judged(settings):
    """A sentence on who judged the held-out answers, and what the scores mean therefore."""
    name, ranker = judge_of(settings), settings["ranker"]
    if name != ranker:
        return (f"Held-out answers were judged by `{name}`, which training did not use; `{ranker}` "
                "chose the pairs to train on.")
    if ranker == "oracle":
        return ("Held-out answers were judged by the toy world's true reward, which also chose the "
                "pairs to train on.")
    return (f"Held-out answers were judged by `{name}`, which also chose the pairs to train on: "
            "scores and win rates say how well the policy pleases this judge, not how good the "
            "policy is. --eval-ranker takes another judge.")


def cell(rows, column):
    """One number with its interval: over rows (seeds), or over prompts if there is one row."""
    mean, width = mean_interval([row[column] for row in rows])
    if len(rows) > 1:
        return f"{mean:.3g} ± {width:.2g}"
    low, high = (rows[0].get(f"{column}_{end}") for end in ("low", "high"))
    return f"{mean:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def write(runs, path, figures):
    """Writes report.md, returns its table as text."""
    config = config_of(runs[0][1])
    settings = config["settings"]
    text = [f"# SELM run: {settings['name']}", "",
            f"`{' '.join(config['command'])}`", "", table(runs), ""]
    text += [judged(settings), ""] if table_cells(runs) else []
    text += [f"![{Path(f).stem}]({Path(f).relative_to(Path(path).parent)})\n" for f in figures]
    text += ["## Each iteration", ""]
    for name, folder in runs:
        text += [f"**{name}**, `{folder}`", ""]
        for row in sorted({row["iteration"] for row in rows_of(folder, "rank")}):
            text += [f"- {line.strip()}" for line in summary(folder, row)]
        text.append("")
    text += ["## Settings", "", "| | |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in settings.items()]
    text += [f"| {name} | {config[name]} |" for name in ("git_revision", "torch", "transformers")]
    write_text(path, "\n".join(text) + "\n")
    return table(runs)

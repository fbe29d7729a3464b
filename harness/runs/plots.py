"""Draws the figures of a run from its files.

    python -m harness.runs.plots runs/toy    draws them again, with the baseline and all seeds

evaluation.png  held-out measures by iteration, with alpha = 0 for comparison
rewards.png     distribution of the judge's scores by iteration (Fig. 3 of arXiv 2405.19332)
duels.png       every iteration against every other, by the judge (its Fig. 2)
implicit.png    implicit reward of the data's responses, SELM minus DPO, sorted (its Fig. 4)
training.png    loss, accuracy, margin, ... of every update

Test: pytest tests/test_plots.py.
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a server has no display
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from harness.runs import exits  # noqa: E402
from harness.judging.evaluation import half_for_ties, mean_interval  # noqa: E402
from harness.runs.report import EVAL_COLUMNS, judge_of  # noqa: E402
from harness.runs.run_reader import (  # noqa: E402
    by_iteration, find_runs, finished_rows, home_of, rows_of, settings_of)
from harness.runs.settings import as_path  # noqa: E402

plt.rcParams["text.parse_math"] = False  # a judge's file may have dollar signs in its name
# Two colours that colour-blind readers can tell apart, and that differ in grey.
COLOURS = {"SELM": "#d1495b", "DPO": "#30638e"}
TRAIN_PANELS = {"loss": "loss (DPO + optimism)", "accuracy": "preference accuracy",
                "reward_margin": "implicit reward margin, beta x nats",
                "sampled_logratio": "log-ratio of y, nats", "grad_norm": "gradient norm"}
SHARES = ("win_rate", "win_rate_at_temperature_1", "lc_win_rate", "preference_accuracy", "finished",
          "true_share_good", "true_invalid")
PANELS = ("true_reward", "score", "score_at_temperature_1", "win_rate", "win_rate_at_temperature_1",
          "lc_win_rate", "preference_accuracy", "response_tokens", "finished", "logratio_to_start",
          "true_share_good", "true_coverage", "true_entropy", "true_kl")
# Left out for the toy: they mean nothing for answers of two words, or a true measure is better.
NOT_THE_TOYS = ("score_at_temperature_1", "lc_win_rate", "preference_accuracy", "response_tokens",
                "finished", "logratio_to_start")


def draw_all(runs, folder):
    """[(arm name, run folder)] -> the figures' paths. A figure without numbers is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw(runs, folder / f"{name}.png") for name, draw in (
        ("evaluation", draw_evaluation), ("rewards", draw_rewards), ("duels", draw_duels),
        ("implicit", draw_implicit), ("training", draw_training))]
    return [path for path in drawn if path]


# ----------------------------------------------------------------------------------------------
# 1. The numbers in the files of a run
# ----------------------------------------------------------------------------------------------


def scores_by_iteration(runs):
    """{whose: {iteration: {arm: the judge's scores}}}, of all seeds: of held-out answers, and of
    those at temperature 1. Without held-out prompts: of the samples that the run trained on.

    Each answer was scored in one list with the data's two responses. So PairRM's scores, which
    compare the candidates of a prompt, have the same opponents in every iteration."""
    found, heat = {}, settings_of(runs[0][1])["temperature"]

    def add(whose, k, arm, scores):
        for score in scores:
            found.setdefault(whose, {}).setdefault(k, {}).setdefault(arm, []).append(score)
    for arm, folder in runs:
        for k, rows in by_iteration(folder, "eval.jsonl").items():
            rows = list(rows)
            add(f"held-out, temperature {heat:g}", k, arm, [row["scores"][2] for row in rows])
            add("held-out, temperature 1", k, arm, [row["score_at_temperature_1"] for row in rows
                                             if "score_at_temperature_1" in row])
    for arm, folder in runs if not found else []:
        for k, rows in by_iteration(folder, "pairs.jsonl").items():
            add("training samples y", k, arm, [row["candidates"][c]["score"] for row in rows
                                               for c in row["sampled"]])
    return found


def duel_results(runs):
    """{(player, opponent): results}, in both orders: for each held-out prompt and seed 1 (a win),
    0, or 1/2 (a tie). A player is (arm, iteration); the start is ("", 0)."""
    found = {}
    for arm, folder in runs:
        def player(name):  # name: a path relative to the seed's folder
            place, _, k = name.rpartition("iter_")
            return ("", 0) if name == "start" else (
                "DPO" if place else arm if folder == home_of(folder) else "SELM", int(k))
        for path in folder.glob("iter_*/duels.jsonl"):
            ours = player(path.parent.relative_to(home_of(folder)).as_posix())
            for row in finished_rows(path):
                for name, scores in row["duels"].items():
                    win = half_for_ties(*scores)
                    found.setdefault((ours, player(name)), []).append(win)
                    found.setdefault((player(name), ours), []).append(1 - win)
    return found


def implicit_differences(runs):
    """{iteration: {"data_chosen": differences, "data_rejected": ...}}: for each prompt the implicit
    reward beta * log(pi / pi_start) of SELM minus that of DPO. pi_start cancels."""
    folders, found = [folder for _, folder in runs], {}
    for home in folders:
        if home / "baseline" not in folders:
            continue
        beta = float(settings_of(home)["beta"])
        theirs = by_iteration(home / "baseline", "eval.jsonl")
        for k, ours in by_iteration(home, "eval.jsonl").items():
            if k not in theirs or ours.path == theirs[k].path:  # all arms have the same start
                continue
            for row in ours:
                both = zip(row["policy_logps"], theirs[k].of(row["prompt_id"])["policy_logps"])
                for role, (a, b) in zip(("data_chosen", "data_rejected"), both):
                    found.setdefault(k, {}).setdefault(role, []).append(beta * (a - b))
    return found


# ----------------------------------------------------------------------------------------------
# 2. The figures
# ----------------------------------------------------------------------------------------------


def grid(panels, columns=3, width=3.6, height=2.7, **options):
    """A figure with a panel for each {key: title} -> figure, {key: axis}."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.9),
                                squeeze=False, layout="constrained", **options)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, title in zip(axes.flat, panels.values()):
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return figure, dict(zip(panels, axes.flat))


def save(figure, path, title):
    """Adds title and legend, and writes the file."""
    handles = {h.get_label(): h for axis in figure.axes
               for h in axis.get_legend_handles_labels()[0]}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=4,
                      fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_evaluation(runs, path):
    """Held-out measures by iteration, with 95 % intervals; None without evaluation."""
    by_arm = {}
    for arm, folder in runs:
        by_arm.setdefault(arm, []).append({r["iteration"]: r for r in rows_of(folder, "eval")})
    rows = [row for curves in by_arm.values() for curve in curves for row in curve.values()]
    toy = any("true_reward" in row for row in rows)
    panels = {c: EVAL_COLUMNS[c] for c in PANELS if rows and all(c in row for row in rows)
              and not (toy and c in NOT_THE_TOYS)}
    if not panels:
        return None
    figure, axes = grid(panels)
    for column, axis in axes.items():
        for shift, (arm, curves) in zip((-0.04, 0.04), by_arm.items()):
            draw_curve(axis, column, curves, shift, label=arm, color=COLOURS[arm])
        if "win_rate" in column:
            axis.axhline(0.5, color="grey", linewidth=0.7, linestyle=":")
        if column in SHARES:  # an interval over two or three seeds may go beyond 0 or 1
            axis.set_ylim(*np.clip(axis.get_ylim(), -0.02, 1.02))
    seeds, settings = max(map(len, by_arm.values())), settings_of(runs[0][1])
    return save(figure, path, f"{rows[0].get('prompts', '?')} held-out prompts, judge "
                f"{short(judge_of(settings))}, answers at temperature {settings['temperature']:g}"
                + ("; true reward, words, entropy, KL: at temperature 1" if toy else "")
                + "\nmean and 95 % interval over "
                + (f"{seeds} seeds" if seeds > 1 else "the prompts, one seed"))


def draw_curve(axis, column, curves, shift, **style):
    """Mean and interval of a column by iteration; curves: {iteration: eval row} of each seed."""
    iterations = sorted(curves[0])
    points = [mean_interval([c[i][column] for c in curves if i in c]) for i in iterations]
    means, widths = zip(*points)
    widths = [widths, widths]
    if len(curves) == 1:  # an interval over prompts, if the rows have one
        only = [curves[0][i] for i in iterations]
        widths = [[abs(row.get(f"{column}_{end}", row[column]) - row[column])
                   for row in only] for end in ("low", "high")]
    axis.errorbar([i + shift for i in iterations], means, yerr=widths, marker="o", markersize=3,
                  capsize=2, linewidth=1.4, **style)
    axis.set_xticks(iterations, ["start", *iterations[1:]])
    axis.set_xlabel("iteration", fontsize=8)


def draw_rewards(runs, path):
    """Histograms of the judge's scores, one row of panels for each iteration."""
    found = scores_by_iteration(runs)
    if not found:
        return None
    scores = [x for kind in found.values() for arms in kind.values() for v in arms.values()
              for x in v]
    bins = np.linspace(min(scores) - 1e-9, max(scores) + 1e-9, 30)
    steps = sorted({k for kind in found.values() for k in kind})
    start = None if "training samples y" in found else steps[0]
    figure, axes = grid({(k, whose): f"{'start' if k == start else f'iteration {k}'}: {whose}"
                         for k in steps for whose in found}, len(found), 4.8, 1.3,
                        sharex=True, sharey=True)
    for (k, whose), axis in axes.items():
        arms = found[whose].get(k, {})
        if k == start:  # the same for all arms
            arms = {"start": arms[runs[0][0]]}
        for arm, values in arms.items():
            colour = COLOURS.get(arm, "grey")
            axis.hist(values, bins, weights=np.full(len(values), 100 / len(values)), alpha=0.45,
                      color=colour, label=arm)
            axis.axvline(np.mean(values), color=colour, linestyle="--", linewidth=1.2)
        axis.set_ylabel("% of answers", fontsize=8)
    for axis in list(axes.values())[-len(found):]:
        axis.set_xlabel("judge's score, in its own unit; dashed: the mean", fontsize=8)
    n = max(len(v) for kind in found.values() for arms in kind.values() for v in arms.values())
    judge = short(judge_of(settings_of(runs[0][1])))
    return save(figure, path, f"Distribution of the judge's scores by iteration, judge {judge}\n"
                f"{n} answers of each arm and iteration, all seeds together")


def draw_duels(runs, path):
    """A matrix of win rates, row against column; a cell without duels is white."""
    found = duel_results(runs)
    if not found:
        return None
    players = sorted({player for pair in found for player in pair})
    names = [f"{arm} {k}" if arm else "start" for arm, k in players]
    matrix = np.array([[np.mean(found.get((a, b), math.nan)) for b in players] for a in players])
    figure, axis = plt.subplots(figsize=(3.4 + 0.5 * len(names), 2.6 + 0.45 * len(names)),
                                layout="constrained")
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for (i, j), rate in np.ndenumerate(matrix):
        if not math.isnan(rate):
            axis.text(j, i, f"{rate:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if abs(rate - 0.5) > 0.3 else "black")
    figure.colorbar(image, shrink=0.7).ax.tick_params(labelsize=8)
    return save(figure, path, "Win rate of the row against the column, on held-out prompts\n"
                f"{max(map(len, found.values()))} duels a cell, all seeds; a tie is half a win\n"
                f"judge {short(judge_of(settings_of(runs[0][1])))}")


def draw_implicit(runs, path):
    """Sorted differences of implicit rewards, a panel for each iteration; None without baseline."""
    found = implicit_differences(runs)
    if not found:
        return None
    figure, axes = grid({k: f"iteration {k}" for k in sorted(found)}, height=3.0)
    for k, axis in axes.items():
        for (role, values), colour in zip(found[k].items(), ("#2a9d5c", "#8a5a00")):
            percent = 100 * (np.arange(len(values)) + 0.5) / len(values)
            axis.plot(percent, sorted(values), color=colour, label=role)
            axis.axhline(np.mean(values), color=colour, linewidth=0.8, linestyle="--")
        axis.axhline(0, color="grey", linewidth=0.7)
        axis.set_xlabel("% of prompts, each curve sorted", fontsize=8)
        axis.set_ylabel("SELM minus DPO, beta x nats", fontsize=8)
    n = len(found[max(found)]["data_chosen"])
    return save(figure, path, "Implicit reward beta log pi(y|x) / pi_start(y|x) of the data's own "
                f"responses to held-out prompts, SELM minus DPO\n{n} prompts, all seeds together; "
                "dashed: the mean")


def draw_training(runs, path):
    """Every update of every run, all iterations in a row; one line for each seed."""
    panels = {name: title for name, title in TRAIN_PANELS.items()
              if any(name in row for _, folder in runs for row in rows_of(folder, "train"))}
    if not panels:
        return None
    figure, axes = grid(panels)
    for arm, folder in runs:
        rows = rows_of(folder, "train")
        for column, axis in axes.items():
            points = [(i, row[column]) for i, row in enumerate(rows) if column in row]
            if points:
                axis.plot(*zip(*points), label=arm, color=COLOURS[arm], linewidth=0.8, alpha=0.6)
    borders = [i for i, row in enumerate(rows) if row["update"] == 0 and i]
    for axis in axes.values():
        axis.set_xlabel("update", fontsize=8)
        for border in borders:
            axis.axvline(border - 0.5, color="grey", linewidth=0.6, linestyle=":")
    return save(figure, path, "Training, means over the batch of an update: one line for each "
                "seed; dotted: a new iteration")


def short(name):
    """The end of a long path."""
    return name if len(name) <= 40 else f"...{name[-37:]}"


def command_line(prog, makes, argv=None):
    """(folder, its runs) of a command whose only argument is the folder of a run."""
    parser = argparse.ArgumentParser(prog=f"python -m harness.runs.{prog}",
                                     description=f"Makes {makes} of a run again.")
    parser.add_argument("folder", metavar="RUN_DIR", type=as_path, help="what train_loop.py wrote")
    folder = Path(parser.parse_args(argv).folder)
    return folder, find_runs(folder) or parser.error(f"{folder}: no run of train_loop.py")


def main(argv=None):
    folder, found = command_line("plots", "the figures", argv)
    print(*draw_all(found, folder / "figures"), sep="\n")


if __name__ == "__main__":
    exits.run(main, "the same command draws them again")

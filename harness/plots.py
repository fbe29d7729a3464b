"""Figures from the files that a run leaves; no number here that is not in them.

    python -m harness.plots runs/toy  draws the figures of a run (with its baseline and seeds) again

Test: pytest tests/test_report.py.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a server has no display
import matplotlib.pyplot as plt  # noqa: E402

from harness.evaluate import mean_interval
from harness.report import EVAL_COLUMNS, rows_of  # noqa: E402

# Two colours that stay apart for colour-blind eyes and in grey; SELM is always the first.
COLOURS = {"SELM": "#d1495b", "DPO": "#30638e"}
TRAIN_PANELS = {"loss": "loss (DPO + optimism)", "accuracy": "preference accuracy",
                "margin": "implicit reward margin", "sampled_logratio": "log-ratio of y, nats",
                "grad_norm": "gradient norm"}


def grid(panels):
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, title in zip(axes.flat, panels.values()):
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return figure, dict(zip(panels, axes.flat))


def save(figure, axes, path, title):
    handles = {h.get_label(): h for axis in axes.values()
               for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=4, fontsize=8,
                  frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_evaluation(runs, path):
    """Held-out figures by iteration, mean and 95 % interval over seeds; None without evaluation."""
    by_arm = {}
    for name, folder in runs:
        by_arm.setdefault(name, []).append({r["iteration"]: r for r in rows_of(folder, "eval")})
    rows = [row for curves in by_arm.values() for curve in curves for row in curve.values()]
    toy = any("true_reward" in row for row in rows)
    wanted = (("true_reward", "true_share_good", "win_rate",
               "true_coverage", "true_entropy", "true_kl") if toy else
              ("score", "win_rate", "preference_accuracy", "response_tokens", "logratio_to_start"))
    panels = {c: EVAL_COLUMNS[c] for c in wanted if rows and all(c in row for row in rows)}
    if not panels:
        return None
    figure, axes = grid(panels)
    for column, axis in axes.items():
        for name, curves in by_arm.items():
            iterations = sorted(curves[0])
            points = [mean_interval([c[i][column] for c in curves if i in c]) for i in iterations]
            means, widths = zip(*points)
            widths = [widths, widths]
            if len(curves) == 1:  # over prompts, where that is known
                only = [curves[0][i] for i in iterations]
                widths = [[abs(row.get(f"{column}_{end}", row[column]) - row[column])
                           for row in only] for end in ("low", "high")]
            axis.errorbar(iterations, means, yerr=widths, label=name, color=COLOURS[name],
                          marker="o", markersize=3, capsize=2, linewidth=1.4)
        axis.set_xticks(iterations)
        axis.set_xlabel("iteration", fontsize=8)
    seeds = max(len(curves) for curves in by_arm.values())
    over = f"{seeds} seeds" if seeds > 1 else "the evaluation prompts, one seed"
    return save(figure, axes, path, f"Held-out prompts: mean and 95 % interval over {over}")


def draw_training(runs, path):
    """Every update of every run, iterations one after the other; thin lines are seeds."""
    panels = {name: title for name, title in TRAIN_PANELS.items()
              if any(name in row for _, folder in runs for row in rows_of(folder, "train"))}
    figure, axes = grid(panels)
    for name, folder in runs:
        rows = rows_of(folder, "train")
        for column, axis in axes.items():
            points = [(i, row[column]) for i, row in enumerate(rows) if column in row]
            if points:
                axis.plot(*zip(*points), label=name, color=COLOURS[name], linewidth=0.8, alpha=0.6)
    borders = [i for i, row in enumerate(rows) if row["update"] == 0 and i]
    for axis in axes.values():
        axis.set_xlabel("update", fontsize=8)
        for border in borders:
            axis.axvline(border - 0.5, color="grey", linewidth=0.6, linestyle=":")
    return save(figure, axes, path,
                "Training: one line a seed; dotted: a new iteration")


def draw_all(runs, folder):
    """[(arm name, run folder)] -> the figures' paths."""
    folder = Path(folder)
    paths = [draw_evaluation(runs, folder / "evaluation.png"),
             draw_training(runs, folder / "training.png")]
    return [path for path in paths if path]


def find_runs(run_dir):
    """[(arm name, folder)] of a run folder, its baseline and its other seeds."""
    folders = [Path(run_dir), *sorted(Path(run_dir).glob("seed_*"))]
    found = []
    for folder in [f for main in folders for f in (main, main / "baseline")]:
        if (folder / "metrics.jsonl").exists():
            settings = json.loads((folder / "config.json").read_text())["settings"]
            found.append(("SELM" if float(settings["alpha"]) > 0 else "DPO", folder))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or not find_runs(sys.argv[1]):
        sys.exit("usage: python -m harness.plots RUN_DIR (a folder that train_loop.py wrote)")
    print(*draw_all(find_runs(sys.argv[1]), Path(sys.argv[1]) / "figures"), sep="\n")

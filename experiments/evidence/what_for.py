"""What is SELM for? Three panels from numbers that other commands have made.

    python experiments/evidence/regret.py; python experiments/evidence/mechanism.py
    python train_loop.py
    python experiments/evidence/what_for.py    seconds; draws experiments/results/what_for.png

Left: where a good answer is rare, alpha = 0 waits for chance (regret.py). Middle: what optimism is
worth follows how bad the habit is that it pushes down (mechanism.py, b). Right: the default run,
whose habit is bad on purpose.
Test: pytest tests/test_experiments.py.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from experiments.evidence import mechanism, regret  # noqa: E402
from experiments.evidence.common import errorbars, plain_logs  # noqa: E402
from harness.judging.evaluation import mean_interval  # noqa: E402
from harness.runs import plots  # noqa: E402
from harness.runs.report import rows_of  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is SELM for? One figure.")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/toy",
                        help="of the default run")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results")
    args = parser.parse_args(argv)
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.8))
    numbers = {name: json.loads((args.results / f"{name}.json").read_text())
               for name in ("regret", "mechanism")}
    titles = (draw_regret(axes[0], numbers["regret"]), draw_habit(axes[1], numbers["mechanism"]),
              draw_run(axes[2], args.run_dir))
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.tight_layout(w_pad=2)
    figure.savefig(args.results / "what_for.png", dpi=110)


def draw_regret(axis, results):
    for arm in ("DPO", "SELM"):
        regret.line(axis, {int(t): row for t, row in results["arms"][arm]["curve"].items()}, arm,
                    color=regret.COLOURS[arm])
    axis.set(xscale="log", yscale="log", xlabel="round", ylabel="regret, summed up")
    plain_logs(axis.xaxis, axis.yaxis)
    return (f"A good answer of probability {regret.RARE:g} in a bandit "
            f"({len(results['seeds'])} seeds):\n"
            "DPO waits for chance to show it, SELM looks for it.")


def draw_habit(axis, results):
    mechanism.draw_gains(axis, results)
    worlds = len(results["habit"][0])
    return (f"{worlds} toy worlds ({len(results['seeds'])} seeds): optimism gains where the habit\n"
            f"is bad, costs where it is good. {mechanism.broken(results)} runs break down.")


def draw_run(axis, run_dir):
    runs = plots.find_runs(run_dir)
    ends = {}
    for arm in ("DPO", "SELM"):
        courses = [true_rewards(folder) for name, folder in runs if name == arm]
        iterations = list(courses[0])
        rewards = [[course[k] for course in courses] for k in iterations]
        errorbars(axis, iterations, rewards, arm, color=regret.COLOURS[arm])
        ends[arm] = rewards[-1]
    axis.set(xlabel="iteration", ylabel="true reward", xticks=iterations)
    gain = [selm - dpo for selm, dpo in zip(ends["SELM"], ends["DPO"])]
    return (f"The default run ({len(gain)} seeds), whose habit is bad on\n"
            f"purpose: SELM minus DPO is {mean_interval(gain)[0]:+.3f} at the end.")


def true_rewards(folder):
    """{iteration: true reward} of a run; the baseline's start is in the folder above it."""
    start = rows_of(plots.home_of(folder), "eval")[:1]
    return {row["iteration"]: row["true_reward"] for row in start + rows_of(folder, "eval")}


if __name__ == "__main__":
    main()

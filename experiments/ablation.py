"""What the optimism term does in the toy worlds: arms x worlds x seeds, with 95 % intervals.

    python experiments/ablation.py                 8 seeds
    python experiments/ablation.py --seeds 3       the README's table; 6 minutes on 2 busy cores
    python experiments/ablation.py --draw          table and figure again from ablation.json

Arms: alpha = 0 (iterative DPO); the paper's alpha 1e-3 and a large one with greedy y, as the
authors' code samples; the large one with y at temperature 1, as the paper writes. All arms of a
seed share the base model, the prompts and the seeds: differences are taken within seeds.

Worlds (harness/toy.py): "default" has headroom because its commonest word is poor, which suits it;
"neutral" favours nothing; in "rare" the best words are those that are hardly ever said.

Writes experiments/results/ablation.json and ablation.png; prints the README's table.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_loop  # noqa: E402
from harness import report  # noqa: E402

RESULTS = Path(__file__).parent / "results"
WORLDS = ("toy", "toy-neutral", "toy-rare")
ARMS = {"DPO (alpha 0)": ["--alpha", "0"],
        "alpha 0.001, greedy y": ["--alpha", "0.001"],
        "alpha 0.3, greedy y": ["--alpha", "0.3"],
        "alpha 0.3, y at temperature 1": ["--alpha", "0.3", "--temperature", "1"],
        "DPO, y at temperature 1": ["--alpha", "0", "--temperature", "1"]}
# What each optimism arm is compared with: the arm that differs in alpha alone.
BASELINE = {"alpha 0.001, greedy y": "DPO (alpha 0)", "alpha 0.3, greedy y": "DPO (alpha 0)",
            "alpha 0.3, y at temperature 1": "DPO, y at temperature 1"}
MEASURES = {"true_reward": "true reward", "true_coverage": "words in use",
            "true_entropy": "entropy, nats", "true_kl": "KL from the start, nats",
            "true_invalid": "invalid replies"}


def run_all(seeds):
    """world -> arm -> a final evaluation row a seed (and 'start' for the base model)."""
    results = {world: {arm: [] for arm in ("start", *ARMS)} for world in WORLDS}
    with tempfile.TemporaryDirectory() as folder:
        todo = [(w, s, a) for w in WORLDS for s in range(seeds) for a in ARMS]
        for world, seed, arm in tqdm(todo, desc="ablation", unit="run"):
            first, run = (Path(folder) / f"{world}_{seed}_{list(ARMS).index(a)}"
                          for a in (next(iter(ARMS)), arm))
            if run != first:  # the arms of a seed share one world
                shutil.copytree(first / "world", run / "world")
            with (contextlib.redirect_stdout(io.StringIO()),
                  contextlib.redirect_stderr(io.StringIO())):
                train_loop.main(["--model", world, "--run-dir", str(run), "--seed", str(seed),
                                 "--seeds", "1", "--no-baseline", *ARMS[arm]])
            rows = report.rows_of(run, "eval")
            if run == first:
                results[world]["start"].append(pick(rows[0]))
            results[world][arm].append(pick(rows[-1]))
    return results


def pick(row):
    return {name: row[name] for name in MEASURES}


def cell(values):
    mean, width = report.mean_interval(values)
    return f"{mean:.3g} ± {width:.1g}"


def table(results):
    lines = ["| world | arm | " + " | ".join(MEASURES.values()) + " |",
             "|" + "---|" * (len(MEASURES) + 2)]
    for world, arms in results.items():
        for arm, rows in arms.items():
            lines.append(f"| {world} | {arm} | " + " | ".join(
                cell([row[name] for row in rows]) for name in MEASURES) + " |")
            if arm in BASELINE:
                base = arms[BASELINE[arm]]
                lines.append(f"| {world} | - its DPO, paired | " + " | ".join(
                    cell([a[name] - b[name] for a, b in zip(rows, base)])
                    for name in MEASURES) + " |")
    return "\n".join(lines)


def draw(results, seeds):
    """Paired differences to the arm without optimism, one panel a measure."""
    shown = ("true_reward", "true_coverage", "true_entropy", "true_kl")
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.3), sharey=True)
    labels = [(world, arm) for world in results for arm in BASELINE]
    for axis, name in zip(axes, shown):
        for y, (world, arm) in enumerate(labels):
            pairs = zip(results[world][arm], results[world][BASELINE[arm]])
            mean, width = report.mean_interval([a[name] - b[name] for a, b in pairs])
            axis.errorbar(mean, -y, xerr=width, marker="o", markersize=4, capsize=3, color=(
                "#30638e", "#d1495b", "#8a8a8a")[list(BASELINE).index(arm)])
        axis.axvline(0, color="grey", linewidth=0.7)
        axis.set_title(MEASURES[name], fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks([-y for y in range(len(labels))],
                       [f"{world}: {arm}" for world, arm in labels], fontsize=7)
    figure.suptitle("Optimism minus none, after 3 iterations: paired mean and 95 % interval, "
                    f"{seeds} seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "ablation.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=8, help="seeds of every arm in every world")
    parser.add_argument("--draw", action="store_true", help="only draw from ablation.json")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "ablation.json"
    if not args.draw:
        path.write_text(json.dumps({"seeds": args.seeds, "results": run_all(args.seeds)}, indent=1))
    stored = json.loads(path.read_text())
    draw(stored["results"], stored["seeds"])
    print(table(stored["results"]))


if __name__ == "__main__":
    main()

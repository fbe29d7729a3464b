"""Does the default run break down, on any processor? Its seeds, each at several instruction sets.

    python experiments/checks/breakdown.py     seeds 0..19 at three instruction sets: 25 minutes
    python experiments/checks/breakdown.py --seeds 5 --flags "--alpha 0.3 --lr 6e-3"
                                               another setting

The same command gives other last digits on another processor, and a run that is near a cliff may
fall there and not here. So each seed runs at each of the instruction sets that this processor has.
A run breaks down where more than BROKEN of its replies are invalid, or where it is more than FAR
nats from the start. Prints a table and the paired differences; exit code 1 if a seed breaks down or
warns. Run it before the toy's settings change.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from experiments.evidence.common import cell, markdown  # noqa: E402
from harness.runs.report import rows_of  # noqa: E402
from harness.runs.settings import RECIPES  # noqa: E402

SETS = {  # name -> the variables that choose it; "native" is whatever the processor offers
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
             "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default"}}
BROKEN, FAR = 0.05, 8.0
MEASURES = {"true_reward": "true reward", "true_share_good": "true reward > 0.75",
            "true_kl": "KL, nats", "true_invalid": "invalid replies"}


def run(name, seed, flags):
    """One seed at one instruction set -> {"rows": {arm: evaluations}, "warnings": lines}."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_loop.py"), "--run-dir", folder, "--seeds", "1",
             "--seed", str(seed), *flags], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | SETS[name])
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return {"rows": {arm: [{m: row[m] for m in ("iteration", *MEASURES)}
                               for row in rows_of(here, "eval")[1:]]
                         for arm, here in (("SELM", folder), ("DPO", f"{folder}/baseline"))},
                "warnings": re.findall(r"warning: (.*)", done.stdout)}


def measure(flags, seeds, jobs, file):
    """{instruction set: [run of seed 0, 1, ...]}. Each run is appended to `file` as it comes, and
    what is there already is not run again."""
    key = lambda row: (row["recipe"], row["flags"], row["instructions"], row["seed"])  # noqa: E731
    known = {key(row): row for row in map(json.loads, open(file))} if file.exists() else {}

    def one(job):
        name, seed = job
        row = {"recipe": repr(RECIPES["toy"]), "flags": " ".join(flags), "instructions": name,
               "seed": seed}
        if key(row) not in known:
            known[key(row)] = row | run(name, seed, flags)
            with open(file, "a") as out:
                out.write(json.dumps(known[key(row)]) + "\n")
        return known[key(row)]
    with ThreadPoolExecutor(jobs) as pool:
        return {name: list(pool.map(one, [(name, seed) for seed in range(seeds)]))
                for name in SETS}


def faults(results):
    """A line for each seed that broke down or warned."""
    for name, runs in results.items():
        for seed, result in enumerate(runs):
            for arm, rows in result["rows"].items():
                worst, far = (max(row[m] for row in rows) for m in ("true_invalid", "true_kl"))
                if worst > BROKEN or far > FAR:
                    yield (f"{name}, seed {seed}, {arm}: breaks down ({worst:.0%} invalid, "
                           f"{far:.1f} nats from the start)")
            yield from (f"{name}, seed {seed}: {line}" for line in result["warnings"])


def table(results):
    """A row for each instruction set, arm and iteration; then SELM minus DPO, within seeds."""
    head = ["instructions", "arm", "iteration", *MEASURES.values(), "farthest seed, nats",
            "most invalid"]
    lines = []
    for name, runs in results.items():
        for k in range(len(runs[0]["rows"]["DPO"])):
            at_k = {arm: [result["rows"][arm][k] for result in runs] for arm in ("DPO", "SELM")}
            for arm, rows in at_k.items():
                lines.append([name, arm, k + 1,
                              *(cell([row[m] for row in rows], False) for m in MEASURES),
                              f"{max(row['true_kl'] for row in rows):.2f}",
                              f"{max(row['true_invalid'] for row in rows):.1%}"])
            pairs = list(zip(at_k["SELM"], at_k["DPO"]))
            lines.append([name, "SELM - DPO", k + 1,
                          *(cell([a[m] - b[m] for a, b in pairs]) for m in MEASURES), "", ""])
    return markdown(head, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Does the default run break down?")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--flags", default="", help="of train_loop.py, in one string")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/breakdown.jsonl",
                        help="the runs, appended as they come; the same command resumes")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(exist_ok=True)
    results = measure(args.flags.split(), args.seeds, args.jobs, args.out)
    found = list(faults(results))
    print(table(results), f"{len(found)} faults", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

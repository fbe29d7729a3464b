"""A run's files, read for the report, the figures and the page.

A damaged file is not shown: ValueError names it, and says what to do.

Test: pytest tests/test_run_folder.py tests/test_report.py tests/test_plots.py.
"""

import re
from pathlib import Path

from harness.runs.output_files import Rows
from harness.runs.run_folder import in_order, is_unchanged, read_groups
from harness.runs.run_record import CONFIG, METRICS, read_record, record_of


def find_runs(run_dir):
    """[(arm name, folder)] of a run folder, its baseline and its other seeds."""
    folders = [Path(run_dir), *sorted(Path(run_dir).glob("seed_*"))]
    return [("SELM" if float(settings_of(folder)["alpha"]) > 0 else "DPO", folder)
            for home in folders for folder in (home, home / "baseline")
            if (folder / METRICS).exists()]


def home_of(folder):
    """The folder of a seed, in which its start is. The baseline's folder is in it, too."""
    return folder.parent if folder.name == "baseline" else folder


def config_of(folder):
    """config.json of a run. ValueError where there is no run."""
    config = read_record(Path(folder) / CONFIG)
    if not isinstance((config or {}).get("settings"), dict):
        raise ValueError(f"{Path(folder) / CONFIG} is not a run's: it has no settings")
    return config


def settings_of(folder):
    return config_of(folder)["settings"]


def rows_of(folder, phase):
    """The rows of metrics.jsonl of one phase, "rank", "train" or "eval", in the order of the loop;
    [] without a file. A training that is not finished shows the updates that it has logged."""
    folder, found = Path(folder), []
    groups, damaged = read_groups(folder, record_of(folder))
    for name in sorted(damaged):
        k = re.match(r"iteration (\d+)", name)[1]
        if name.endswith("train") and phase == "train" and (folder / f"iter_{k}/policy").exists():
            raise ValueError(f"{folder / METRICS} has lost the updates of iteration {k}; put it "
                             f"back, or remove {folder}/iter_{k}/policy to train them again")
        if name.endswith(phase) and phase != "train":
            raise ValueError(f"{folder / METRICS}: {name} is not what the run wrote there; the "
                             "command that made the run, given again, makes it again")
    for name, rows in groups.items():
        found += [row for row in rows if row["phase"] == phase and name not in damaged]
    return sorted(found, key=in_order)


def finished_rows(path):
    """The Rows of a finished file of a run."""
    folder = path.parents[1]
    entry = record_of(folder).get(path.relative_to(folder).as_posix())
    if entry and not is_unchanged(path, entry):
        raise ValueError(f"{path} is not what the run wrote there; the command that made the run, "
                         "given again, makes it again")
    return Rows(path)


def by_iteration(folder, name):
    """{iteration: finished Rows of the file `name`}; the start counts as the iteration before the
    first."""
    paths = {int(path.parent.name[5:]): path for path in Path(folder).glob(f"iter_*/{name}")}
    start = home_of(Path(folder)) / "start" / name
    if start.exists():
        paths[min(paths, default=1) - 1] = start
    return {k: finished_rows(paths[k]) for k in sorted(paths)}

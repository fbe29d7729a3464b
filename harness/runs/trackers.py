"""--track: the rows of metrics.jsonl, as they come, to a tracker that you have installed.

    trackio, wandb    a run of project "selm", named after the folder; the same again after a kill
    tensorboard       RUN/tensorboard (tensorboard --logdir runs)

The step is the number of updates so far. metrics.jsonl is written in any case.
Test: pytest tests/test_trackers.py.
"""

import hashlib
import importlib
from pathlib import Path


def tracker(kind, folder, settings):
    """kind: "trackio", "wandb" or "tensorboard" -> function(name -> number, step)."""
    folder = Path(folder)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")

        def add(numbers, step):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()
        return add
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    own = {"wandb": {"id": key, "dir": folder, "reinit": "finish_previous"}, "trackio": {}}[kind]
    run = importlib.import_module(kind).init(
        project="selm", name=f"{folder.name} {key}", config=settings, resume="allow", **own)
    return lambda numbers, step: run.log(numbers, step=step)

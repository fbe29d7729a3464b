"""Tests of harness/runs/trackers.py and of what reaches a tracker. The packages themselves need not be
installed: modules with their signatures stand in for them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import train_loop
from harness.runs import settings, trackers
from test_train_loop import command  # noqa: F401 (command: a fixture)


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is told."""
    module, told = ModuleType("wandb"), SimpleNamespace(runs=[], rows=[])
    module.__spec__ = SimpleNamespace()

    def init(*, project, name, config, resume, id, dir, reinit):
        told.runs.append((project, id, resume))
        return SimpleNamespace(log=lambda numbers, step: told.rows.append((step, numbers)))
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_tracker_sees_every_row_once_at_the_number_of_updates_so_far(command, tmp_path, wandb,
                                                                       monkeypatch):
    """A loss curve of the second iteration drawn over the first's; an evaluation shown again with
    every command; a killed run that goes on as another run."""
    whole, save = train_loop.weights.save_policy, []

    def killed(policy, tokenizer, path, *more):
        whole(policy, tokenizer, path, *more)
        save.append(path)
        if len(save) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train_loop.weights, "save_policy", killed)
    with pytest.raises(KeyboardInterrupt):
        train_loop.main([*command, "--track", "wandb"])
    for _ in range(2):  # what is finished already is shown no more
        train_loop.main([*command, "--track", "wandb"])
    assert len(wandb.runs) == 3 and len(set(wandb.runs)) == 1
    shown = []
    for step, numbers in wandb.rows:
        [phase] = {name.split("/")[0] for name in numbers}
        shown.append((step, phase, numbers[f"{phase}/iteration"]))
    once = [(0, "eval", 0)]
    for k in (1, 2):  # 6 prompts in batches of 3: two updates an iteration
        once += [(2 * k - 2, "train", k), (2 * k - 1, "train", k), (2 * k, "rank", k),
                 (2 * k, "eval", k)]
    assert sorted(shown) == sorted([*once, (2, "train", 2), (3, "train", 2)])  # trained twice


def test_numbers_reach_tensorboard_under_their_names(tmp_path, monkeypatch):
    """A text or a list handed over as a number."""
    told = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: SimpleNamespace(
        add_scalar=lambda *row: told.append((folder, *row)), flush=lambda: told.append("flush"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trackers.tracker("tensorboard", tmp_path, {})({"train/loss": 0.5, "train/lr": 1e-3}, 7)
    assert told == [(tmp_path / "tensorboard", "train/loss", 0.5, 7),
                    (tmp_path / "tensorboard", "train/lr", 1e-3, 7), "flush"]


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(monkeypatch):
    """An ImportError after the first iteration."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="--track trackio: it is not installed; pip install"):
        settings.read(["--track", "trackio"])

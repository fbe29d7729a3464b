"""Algorithm 1 on a device that is not the CPU: see accelerator.py, which pretends to be one."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_loop
from conftest import ROOT
from test_judges import save_reward_model
from test_processes import launch
from test_rank import pairrm, save_pairrm, tokenizer  # noqa: F401 (fixtures)
from test_train_loop import (  # noqa: F401 (command: a fixture)
    command, rows, training, write_model)


@pytest.fixture
def runs(command, pairrm, tmp_path):  # noqa: F811
    """name -> flags of a run, all done on the device, at tmp_path / "device" / name."""
    runs = {"packed": ["--top-p", "0.9", "--iterations", "2", "--eval-prompts", "2",
                       "--ranker", f"pairrm:{save_pairrm(pairrm, tmp_path / 'PairRM')}"],
            "offloaded": ["--offload", "--gradient-checkpointing", "--temperature", "0",
                          "--model", write_model(tmp_path / "mistral", "mistral")],
            "lora": ["--offload", "--lora-rank", "2"],
            "plain": ["--plain-rows", "--pairs", "reference", "--reference", "initial",
                      "--ranker", f"reward:{save_reward_model(tmp_path / 'reward')}"],
            "bf16": ["--dtype", "bf16"],
            "bf16 offloaded": ["--dtype", "bf16", "--offload"],
            "bf16 plain": ["--dtype", "bf16", "--plain-rows", "--lora-rank", "2"]}
    runs = {name: [*command, "--iterations", "1", "--eval-prompts", "0", *more]
            for name, more in runs.items()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/accelerator.py"), json.dumps([
            [*flags, "--run-dir", str(tmp_path / "device" / name)]
            for name, flags in runs.items()])], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of them wide products" in done.stderr  # with `out` and without
    assert "note:" not in done.stdout  # that another sampler has to step in
    return runs


def test_the_loop_on_another_device_gives_the_numbers_of_the_cpu(runs, tmp_path):
    """A tensor that is made on the CPU and meets one of the GPU, weights that stay behind, a
    gradient or moment on the wrong side: what stops a run at its first step on a GPU, and on a CPU
    is never seen. Packed and plain rows, --offload, LoRA, windows, PairRM and a reward model; in
    bf16 a call of mm that CUDA would refuse, two dtypes where autocast does not cast."""
    for name, flags in runs.items():
        here, there = tmp_path / "cpu" / name, tmp_path / "device" / name
        if "bf16" in name:  # on a CPU other products are in bf16
            continue
        train_loop.main([*(flag for flag in flags if flag != "--offload"), "--run-dir", str(here)])
        assert_same_run(here, there)
    plain, offloaded = (training(tmp_path / "device" / name) for name in ("bf16", "bf16 offloaded"))
    for expected, got in zip(plain, offloaded, strict=True):
        for name in ("loss", "grad_norm", "reward_margin"):
            assert got[name] == pytest.approx(expected[name], abs=2e-3, rel=0.01)


def assert_same_run(here, there):
    """To rounding: the same samples, pairs, losses and weights."""
    for file in sorted([*here.glob("*/*samples.jsonl"), *here.glob("*/pairs.jsonl")]):
        for expected, got in zip(rows(file), rows(there / file.relative_to(here)), strict=True):
            for row in (expected, got):  # equal to the last digits alone
                row["scores"] = [c.pop("score") for c in row.get("candidates", [])]
            assert got.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-4)
            assert got == expected
    for expected, got in zip(training(here), training(there), strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    for file in sorted(here.glob("*/policy/*.safetensors")):
        got = load_file(there / file.relative_to(here))
        for key, weight in load_file(file).items():  # a step of Adam is 1e-3
            torch.testing.assert_close(got[key], weight, atol=5e-5, rtol=0)


def test_two_processes_on_such_devices_give_the_run_of_one_on_the_cpu(
        command, tmp_path):  # noqa: F811
    """Shards, collectives or checkpoints of FSDP2 that are looked for on the CPU; the norm of a
    gradient whose shares lie on two devices; policies that are saved from there."""
    flags = [*command, "--iterations", "1", "--epochs", "2", "--save-every", "1"]
    process = launch(ROOT / "tests/accelerator.py",
                     json.dumps([[*flags, "--run-dir", str(tmp_path / "device")]]))
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output[1][-3000:]
    train_loop.main([*flags, "--run-dir", str(tmp_path / "cpu")])
    assert_same_run(tmp_path / "cpu", tmp_path / "device")


def test_the_device_refuses_what_a_gpu_refuses():
    """A pretended device on which everything works would find nothing."""
    script = ("import torch, accelerator\n"
              "held = accelerator.register()\n"
              "with accelerator.Factories():\n"
              "    a, i = torch.ones(3, device='gpu'), torch.tensor([1])\n"
              "    assert (a[i] + 1).tolist() == [2.0] and a.device.type == 'gpu'\n"
              "    for fault in (lambda: a + torch.ones(3), lambda: torch.ones(3)[i.to('gpu')],\n"
              "                  lambda: a.index_put_((i,), torch.ones(1)),\n"
              "                  lambda: torch.cat((a, torch.ones(3))),\n"
              "                  lambda: torch.stack((a[0], torch.tensor(1.)))):\n"
              "        try:\n"
              "            fault()\n"
              "        except RuntimeError as error:\n"
              "            print(error)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", text=True,
                          capture_output=True)
    assert done.stdout.count("tensors on two devices") == 5, done.stdout + done.stderr

"""The memory estimate against real runs and closed forms, and runs that do not fit."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, MistralConfig

import memory_worker
import train_loop
from conftest import ROOT
from harness.models import memory
from harness.runs import command, settings


def measure(tmp_path, *what):
    """The lines of memory_worker.py: (measured, planned, their ratio). Without a GPU, which would
    not let a fork compute, and with glibc's heap as it is by itself."""
    plain = {name: value for name, value in os.environ.items()
             if not name.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/memory_worker.py"), *what], text=True, timeout=240,
        capture_output=True, env=plain | {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
                                          "HIP_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]


def test_the_estimate_counts_what_torchs_own_profiler_counts_in_a_real_pass(tmp_path):
    """Activations counted twice or not at all, a refill of the slots beside a full cache that is
    forgotten, a copy of the weights, a plan for another code than the one that runs. Equal but for
    a few indices, which are no part of the plan."""
    found = measure(tmp_path, "count")
    assert len(found) == 2 * len(memory_worker.COUNTED) + 1
    for measured, estimated, _ in found:
        assert estimated == pytest.approx(measured, rel=2e-3)


def system_counts():
    """Whether the system reports what the test compares. (Resets the peak of this process.)"""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return (platform.libc_ver()[0] == "glibc"
                and "RssAnon" in Path("/proc/self/status").read_text())
    except OSError:
        return False


@pytest.mark.skipif(not system_counts(), reason="needs Linux's /proc and glibc's heap")
@pytest.mark.parametrize("phase", ["training", "sampling"])
def test_the_estimated_peak_is_that_of_a_real_run_within_15_percent(phase, tmp_path):
    """Gradients that only the second micro-batch finds, moments that only the second update has,
    the weights twice; and holes of the heap that are far larger than those allowed for."""
    [(measured, estimated, _)] = measure(tmp_path, phase, "1")
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_estimate_for_two_processes_is_what_fsdp_holds_within_15_percent(tmp_path):
    """Weights, gradient or moments that every process is planned to hold whole; layers at work that
    are forgotten."""
    for measured, estimated, _ in measure(tmp_path, "shared"):
        assert estimated == pytest.approx(measured, rel=0.15)


def test_the_estimate_for_offload_is_what_the_device_holds_within_15_percent(tmp_path):
    """Masters or moments that lie on the device all the same; weights that are estimated there once
    more beside the whole ones, or a gradient in bf16."""
    for measured, estimated, _ in measure(tmp_path, "offloaded"):
        assert estimated == pytest.approx(measured, rel=0.15)


def recipe(tmp_path, *flags):
    """Settings of the paper's run on a GPU, with a model of a Mistral's shape, but 60 MB small."""
    MistralConfig(hidden_size=256, intermediate_size=896, num_hidden_layers=8, vocab_size=32000,
                  num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True
                  ).save_pretrained(tmp_path)
    s = settings.read(["--model", "zephyr-7b-sft", "--dry-run", "--tokens-per-forward", "2048",
                       "--slots", "4", *flags])
    return replace(s, model=str(tmp_path), device="cuda", dtype="bf16", dry_run=False)


def parameters(hidden=256, inner=896, layers=8, vocabulary=32000, heads=8, kv_heads=2):
    head = hidden // heads
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    return vocabulary * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def test_weights_gradient_and_moments_are_those_of_a_closed_form(tmp_path):
    """A tied embedding that is counted twice; moments or masters in bf16; shares of N processes
    that each hold all; with --offload something of the optimiser on the GPU, or less on the host
    than 4 + 4 + 8 bytes a weight; blocks of pinned memory that are taken for their contents."""
    n, s = parameters(), recipe(tmp_path, "--no-offload")
    for processes in (1, 4):
        p = memory.phases(s, processes)["training"]
        assert [p.weights, p.gradient, p.optimiser] == [x * n / processes for x in (4, 4, 8)]
    p = memory.phases(replace(s, offload=True))["training"]
    layer = 2 * [256 * 256] + 2 * [64 * 256] + 3 * [896 * 256] + 2 * [256]
    sizes = 8 * layer + [32000 * 256, 256]
    assert sum(sizes) == n
    blocks = sum(1 << (4 * size - 1).bit_length() for size in sizes)
    assert [p.weights, p.gradient, p.optimiser, p.host] == [2 * n, 4 * n, 0, 2 * blocks + 8 * n]
    p = memory.phases(replace(s, eval_prompts=0))["sampling"]
    assert p.weights == pytest.approx(2 * n, abs=1000)  # and a table of rotary frequencies


def test_the_kv_slots_are_those_of_a_closed_form(tmp_path):
    """Keys without values, all heads where keys and values have fewer, slots that are half full."""
    s = recipe(tmp_path)
    slots = memory.sampling(s.model, s.compute, (512, 1024), 4).slots
    assert slots == 4 * 1024 * 2 * 8 * 2 * 32 * 2  # slots, tokens, k and v, layers, heads, D, bytes


def test_lora_trains_its_adapters_alone(tmp_path):
    """Gradient and moments estimated for all weights, so that LoRA would seem to help nobody."""
    n, s = parameters(), recipe(tmp_path, "--lora-rank", "4", "--no-offload")
    p = memory.phases(s)["training"]
    adapters = 8 * 4 * sum(a + b for a, b in [(256, 256), (256, 64), (256, 64), (256, 256),
                                               (256, 896), (256, 896), (896, 256)])
    assert [p.weights, p.gradient, p.optimiser] == [4 * (n + adapters), 4 * adapters, 8 * adapters]


def test_a_judge_of_any_architecture_is_counted(tmp_path):
    """GPT-2 takes past_key_values second, where others take the mask; a path with a colon."""
    folder = tmp_path / "a:b"
    GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, bos_token_id=1, eos_token_id=1
               ).save_pretrained(folder)
    held, at_work = memory.judging(f"reward:{folder}", "cpu")
    block = 12 * 64**2 + 13 * 64
    assert held == pytest.approx(4 * ((500 + 1024) * 64 + 2 * block + 4 * 64), rel=0.01, abs=2**20)
    assert at_work > 8 * 2048 * 64 and memory.judging("judge.py:f", "cpu") == (0, 0)


def test_checkpointing_and_shorter_micro_batches_need_less(tmp_path):
    """An estimate that is the same whatever the flags say."""
    s = recipe(tmp_path, "--no-offload")
    without = replace(s, gradient_checkpointing=False)
    at = lambda s: memory.phases(s)["training"].activations
    assert at(s) < 0.7 * at(without)
    assert at(without) < 0.7 * at(replace(without, tokens_per_forward=8192))


@pytest.fixture
def card(monkeypatch):
    """card(gigabytes): a GPU of that size, which is not here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda size: monkeypatch.setattr(memory, "card", lambda: size * 1e9)


def test_offload_is_turned_on_where_it_alone_makes_a_gpu_large_enough(
        tmp_path, card, capsys, monkeypatch):
    """A run that dies of memory with a flag at hand; a --no-offload that is overruled; an offload
    that nobody needs, or for which the host is too small."""
    s = recipe(tmp_path, "--slots", "1", "--eval-prompts", "0", "--ranker", "my.py:judge")
    plain, with_it = (memory.need(replace(s, offload=x))[0] / 1e9 / memory.ROOM
                      for x in (False, True))
    assert with_it < plain
    card(1.01 * plain)
    assert memory.fitted(s).offload is False and capsys.readouterr().out == ""
    card(0.99 * plain)
    assert memory.fitted(s).offload is True and "--offload" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fits with .*--offload"):
        memory.fitted(replace(s, offload=False))
    monkeypatch.setattr(memory, "host_memory", lambda: 10**8)
    with pytest.raises(ValueError, match="--offload needs .* GB of host memory") as error:
        memory.fitted(s)
    assert "--offload" not in str(error.value).partition("fits with ")[2]
    with pytest.raises(ValueError, match="of a GPU.* fits with") as error:
        memory.fitted(replace(s, offload=False))
    assert "--offload" not in str(error.value).partition("fits with ")[2]
    with pytest.raises(ValueError, match="host memory.* fits with --no-offload"):
        memory.fitted(replace(s, offload=True))
    on_cpu = replace(s, device="cpu", offload=False)
    assert memory.fitted(on_cpu) is on_cpu


def test_the_hosts_memory_is_that_of_the_machine_or_less(monkeypatch):
    """Kilobytes or pages that are taken for bytes; what all processes need, held against one of
    their two machines."""
    [total] = [int(line.split()[1]) * 1024 for line in
               Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    one = memory.host_memory()
    assert 0 < one <= 1.01 * total
    monkeypatch.setattr(memory, "PROCESSES", 16)  # of torchrun on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory.host_memory() == 2 * one


def test_heads_are_counted_where_a_gpu_has_no_kernel_for_grouped_ones(
        tmp_path, monkeypatch):
    """In fp32 or with a window CUDA gets the keys of each group repeated: memory not counted."""
    s = replace(recipe(tmp_path, "--no-gradient-checkpointing"), dtype="fp32")
    repeated = memory.passes(s.model, s.compute, memory.micro_batch(s), False).backward
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, *_: x)
    memory.passes.cache_clear()
    grouped = memory.passes(s.model, s.compute, memory.micro_batch(s), False).backward
    memory.passes.cache_clear()
    assert repeated > 1.02 * grouped


def test_a_run_that_does_not_fit_stops_before_it_loads_anything(tmp_path, card, monkeypatch):
    """An out-of-memory error after an hour of sampling; advice that does not help."""
    flags = ["--no-gradient-checkpointing", "--tokens-per-forward", "8192", "--ranker", "my.py:f"]
    s = recipe(tmp_path, *flags)
    card(0.9)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="of a GPU") as error:
        patch.setattr(command.flags, "read", lambda _: s)
        patch.setattr(command.setup, "read_inputs", None)
        patch.setattr(train_loop.distributed, "start", None)
        train_loop.main([])
    advice = str(error.value).split("fits with ")[1].split()
    advised = recipe(tmp_path, *flags, *advice)
    assert memory.fitted(advised) == replace(advised, offload="--offload" in advice)


def test_a_dry_run_estimates_for_a_folder_that_has_no_weights(tmp_path, capsys):
    """An estimate that wants the weights, or a tokenizer, or the hub, before it says anything."""
    recipe(tmp_path)
    train_loop.main(["--model", str(tmp_path), "--dry-run", "--processes", "2", "--data",
                     "HuggingFaceH4/ultrafeedback_binarized", "--slots", "4"])
    out = capsys.readouterr().out
    assert "GPU of 2" in out and "smallest usual card" in out and "24 GB" in out
    assert "order of magnitude" in out and "TFLOP/s" in out


def test_a_dry_run_without_a_hub_says_in_one_line_what_the_memory_estimate_needs(capsys):
    """A page of a library's traceback, or half a minute of retries, for an estimate of counts."""
    train_loop.main(["--model", "zephyr-7b-sft", "--dry-run"])
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("memory")]
    assert "config.json" in line and "--model FOLDER" in line
    with pytest.raises(ValueError, match="--processes"):
        settings.read(["--processes", "2"])

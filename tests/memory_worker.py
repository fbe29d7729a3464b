"""Measures what the memory plan predicts (test_memory.py). A line for each case: measured bytes,
planned bytes, planned / measured.

    python tests/memory_worker.py count                        torch's profiler: passes, sampling
    python tests/memory_worker.py training|sampling|lora       the system: whole phases, all cases
    python tests/memory_worker.py training 1                   the first case alone
    python tests/memory_worker.py shared                       torch's profiler: training, FSDP2
    python tests/memory_worker.py offloaded                    what accelerator.py holds: --offload
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "shared" in sys.argv:
    os.environ.update(RANK="0", WORLD_SIZE="2")

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

import data
import model as policies
import sample
import train_loop
from harness.models import distributed, memory, weights
from harness.runs import settings

COUNTED = [[], ["--lora-rank", "8"], ["--gradient-checkpointing"], ["--plain-rows"],
           ["--lora-rank", "8", "--gradient-checkpointing"]]
CHECKPOINTING = ["--gradient-checkpointing"]
# (hidden size, layers, vocabulary), flags
CASES = {"training": [((256, 12, 4000), []), ((384, 10, 4000), []), ((512, 8, 4000), []),
                      ((384, 10, 4000), CHECKPOINTING)],
         "sampling": [((384, 10, 4000), ["--slots", "16", "--max-length", "192"]),
                      ((512, 8, 4000), ["--slots", "32", "--max-length", "160"]),
                      ((512, 4, 32000), ["--max-prompt-length", "200", "--max-length", "256"])],
         "lora": [((256, 12, 4000), []), ((384, 10, 4000), []), ((512, 8, 4000), []),
                  ((512, 12, 4000), []), ((384, 10, 4000), CHECKPOINTING)]}
SHARED = [(256, 12, 4000)]


def load_model(path, *_):
    """A model of random weights; in the place of weights.load_model, too."""
    model = weights.empty_model(path, "selm_tree")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model


def read(shape, flags):
    """Settings of a run of a Llama of this shape (hidden size, layers, vocabulary)."""
    folder, (hidden, layers, vocabulary) = tempfile.mkdtemp(), shape
    LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden,
                num_hidden_layers=layers, num_attention_heads=8,
                num_key_value_heads=4).save_pretrained(folder)
    return settings.read(["--model", folder, "--data", "x", "--ranker", "j.py:f", "--device", "cpu",
                          "--max-length", "128", "--max-prompt-length", "64", "--batch-size", "2",
                          "--tokens-per-forward", "256", "--eval-prompts", "0", "--slots", "8",
                          *flags]).at(1)


# ----------------------------------------------------------------------------------------------
# What is done
# ----------------------------------------------------------------------------------------------


class Reference(dict):
    of = dict.get


class Pairs(list):
    path = "pairs"


def training(s):
    """Two updates of two micro-batches (or more) with train_loop.train itself."""
    rows = Pairs(dict(prompt_id=str(i), prompt_ids=[3] * 64, dropped=None, chosen=0, rejected=1,
                      sampled=[2], candidates=[dict(ids=[4 + j] * 64) for j in range(3)])
                 for i in range(4))
    trees = data.read_trees(rows, s.alpha)
    data.add_reference(trees, Reference(
        (row["prompt_id"], row) for row in train_loop.reference_logps(rows, trees, s.model, s)))
    train_loop.train(Path(s.model) / "policy", s.model, trees, s.model, Mock(), Mock(), s)


def sampling(s):
    """Every slot is filled twice, with prompts and responses as long as they may be."""
    model, prompt = load_model(s.model).eval(), s.max_prompt_length
    requests = [([3] * prompt, s.max_length - prompt, i) for i in range(2 * s.slots)]
    for _ in sample.serve(model, requests, stop_ids=(), slots=s.slots):
        pass


# ----------------------------------------------------------------------------------------------
# How it is measured
# ----------------------------------------------------------------------------------------------


def profiled(work):
    """The most bytes that torch's allocator had handed out at a time, beyond those before."""
    gc.collect()  # what is freed meanwhile would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = 0
    for event in sorted((e for e in found.profiler.kineto_results.events()
                         if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most, "torch's profiler reports no memory events"
    return most


def count():
    for flags in COUNTED:
        s = read((128, 3, 1000), ["--max-length", "192", "--tokens-per-forward", "768", *flags])
        planned = memory.passes(s.model, s.compute, memory.micro_batch(s), False)
        model = load_model(s.model)
        model.set_attn_implementation(s.compute.attention)
        if s.lora_rank:
            model = distributed.add_lora(model, s.lora_rank)
        policy = policies.Policy(model, s.gradient_checkpointing)
        for p in policy.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        batch = (data.pad if s.plain_rows else data.pack)(memory.trees_of(*memory.micro_batch(s)))
        policy(batch).sum().backward()
        yield profiled(lambda: policy(batch).sum().backward()), planned.backward
        with torch.no_grad():
            yield profiled(lambda: policy(batch)), planned.forward
    s = read((128, 3, 1000), ["--max-length", "192"])
    sampling(s)
    yield profiled(lambda: sampling(s)), sum(memory.sampling(
        s.model, s.compute, (s.max_prompt_length, s.max_length), s.slots))


def shared():
    """Process 0 of two that do not exist: under torch's fake process group all collectives return
    at once, so what is counted is FSDP2's own. (Gloo, the group of CPU processes, comes on top: it
    frees what it was given on threads that the profiler does not see.)"""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    train_loop.gather = lambda mine: [mine, mine]
    distributed.told, distributed.all_finite = lambda value: value, lambda _: True
    train_loop.check_update_zero = lambda *_: None  # weights that nobody has sent are any
    train_loop.clip = lambda *_: 1.0
    Reference.of = lambda *_: {"logps": [-100.0] * 3}
    torch.distributed.tensor.distribute_tensor = lambda whole, *_: SimpleNamespace(
        to_local=lambda: whole.chunk(2)[0])
    for shape in SHARED:
        s = read(shape, ["--batch-size", "4", "--epochs", "2"])
        planned = memory.phases(s)["training"].device / (1 + memory.HOLES)
        yield profiled(lambda: training(s)), planned


def offloaded():
    """What the device of the tests' own holds in a training in bf16 with --offload. The scores of
    attention are among it: it has no flash attention, for which the plan is."""
    import accelerator
    with accelerator.pretended():
        for flags in [], CHECKPOINTING:
            s = read((256, 6, 4000), ["--dtype", "bf16", "--offload", *flags])
            accelerator.memory.peak = accelerator.memory.now
            training(s)
            planned = memory.phases(replace(s, device="cuda"))["training"].device
            yield accelerator.memory.peak, planned


def system(what, cases=None):
    """Each of the first `cases` in a fork that has loaded the libraries, which are no part of the
    plan."""
    weights.spare_housekeeping()
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no huge pages, half used
    lora, phase = ["--lora-rank", "8"] * (what == "lora"), what.replace("lora", "training")
    work = globals()[phase]
    work(read((64, 2, 1000), lora))
    for shape, flags in CASES[what][:cases]:
        child = os.fork()
        if child == 0:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            # Pages of a library's file do not come along into a fork: leave them out.
            before, s = resident("RssAnon"), read(shape, [*flags, *lora])
            work(s)
            measured = resident("VmHWM") - resident("RssFile") - before
            show(measured, memory.phases(s)[phase].device)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def resident(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field)) * 1024


def show(measured, planned):
    print(json.dumps([measured, planned, round(planned / measured, 3)]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights.load_model, weights.save_policy = load_model, lambda *_: None
    weights.stored_dtype = lambda _: torch.float32
    what = sys.argv[1]
    if what in CASES:
        system(what, *map(int, sys.argv[2:]))
    else:
        for found in globals()[what]():
            show(*found)

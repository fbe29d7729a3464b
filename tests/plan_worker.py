"""What test_plan.py measures in processes of their own: prints lines of [measured, planned] bytes.

    plan_worker.py count '[[FLAG, ...], ...]'      torch's profiler, of passes and of sampling
    plan_worker.py training|sampling '[[[hidden, layers, vocabulary], [FLAG, ...]], ...]'
                                                   the system, of each in a fork of its own
    torchrun plan_worker.py shared                 torch's profiler, of a training under FSDP2
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

import data
import model as policies
import sample
import train_loop
from harness import plan, scale, settings, weights


def load_model(path, *_, attention="selm_tree"):
    """A model of random weights; in the place of weights.load_model, too."""
    model = weights.empty_model(path, attention)
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
    """Two updates of two micro-batches with train_loop.train itself."""
    rows = Pairs(dict(prompt_id=str(i), prompt_ids=[3] * 64, dropped=None, chosen=0, rejected=1,
                      sampled=[2], candidates=[dict(ids=[4 + j] * 64) for j in range(3)])
                 for i in range(4))
    training_set = train_loop.TrainingSet(rows, s.model, s)
    training_set.reference = Reference(
        (row["prompt_id"], row) for row in list(train_loop.reference_logps(rows, training_set)))
    train_loop.train(Path(s.model) / "policy", s.model, training_set, Mock(), Mock())


def sampling(s):
    """Every slot is filled twice, with prompts and responses as long as they may be."""
    model, prompt = load_model(s.model, attention="sdpa").eval(), s.max_prompt_length
    requests = [([3] * prompt, s.max_length - prompt, i) for i in range(2 * s.slots)]
    for _ in sample.serve(model, requests, stop_ids=(), slots=s.slots):
        pass


# ----------------------------------------------------------------------------------------------
# How it is measured
# ----------------------------------------------------------------------------------------------


def profiled(work):
    """The most bytes that torch's allocator had handed out at a time, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = 0
    for event in sorted((e for e in found.profiler.kineto_results.events()
                         if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def count(cases):
    for flags in cases:
        s = read((128, 3, 1000), ["--max-length", "192", "--tokens-per-forward", "768", *flags])
        planned = plan.passes(s.model, s.compute, plan.micro_batch(s), False)
        model = load_model(s.model, attention=s.compute.attention)
        if s.lora_rank:
            model = scale.add_lora(model, s.lora_rank)
        policy = policies.Policy(model, s.gradient_checkpointing)
        for p in policy.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        batch = (data.pad if s.plain_rows else data.pack)(plan.trees_of(*plan.micro_batch(s)))
        policy(batch).sum().backward()
        yield profiled(lambda: policy(batch).sum().backward()), planned.backward
        with torch.no_grad():
            yield profiled(lambda: policy(batch)), planned.forward
    sampling(s)
    yield profiled(lambda: sampling(s)), sum(plan.sampling(
        s.model, s.compute, (s.max_prompt_length, s.max_length), s.slots))


def shared():
    scale.start("cpu")
    s = read((384, 10, 4000), ["--batch-size", "4"])
    yield profiled(lambda: training(s)), plan.phases(s)["training"].device / (1 + plan.HOLES)


def system(phase, cases):
    """Each in a fork that has loaded the libraries, which are no part of the plan."""
    weights.keep_freed_memory()
    work = globals()[phase]
    work(read((64, 2, 1000), []))
    for shape, flags in cases:
        child = os.fork()
        if child == 0:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            # Pages of a library's file do not come along into a fork: leave them out.
            before, s = resident("RssAnon"), read(shape, flags)
            work(s)
            measured = resident("VmHWM") - resident("RssFile") - before
            print(json.dumps([measured, plan.phases(s)[phase].device]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def resident(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field)) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights.load_model, weights.save_policy = load_model, lambda *_: None
    weights.stored_dtype = lambda _: torch.float32
    what, cases = sys.argv[1], json.loads((sys.argv + ["[]"])[2])
    if what in ("training", "sampling"):
        system(what, cases)
    else:
        for line in count(cases) if what == "count" else shared():
            print(json.dumps(line), flush=True)

"""Several processes, and one process with --offload: the same run, in the memory that it needs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import data
import model as policies
import train_loop
from conftest import ARCHITECTURES, ROOT, SIZES, make_model, make_tokenizer
from harness.models import distributed, weights
from test_model import make_trees
from test_train_loop import (SMALL, command, files_of, rows,  # noqa: F401 (command: a fixture)
                             training, write_judge, write_model, write_preferences)


@pytest.fixture
def alone():
    """--offload on one process makes a group of one; the next test must not find it."""
    yield
    distributed.stop()


def launch(script, *arguments, processes=2, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options)


def write_script(path, text):
    path.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{text}")
    return path


# ----------------------------------------------------------------------------------------------
# --offload
# ----------------------------------------------------------------------------------------------


# 0.05: LoRA's gradients are smaller, and all must be clipped at times.
@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"], ["--gradient-checkpointing"]],
                         ids=" ".join)
def test_offload_leaves_the_files_of_plain_training_bit_for_bit(extra, command, tmp_path, alone):
    """20 updates of several micro-batches: a gradient that is summed, clipped or copied otherwise,
    an optimiser of weights that nobody reads, new weights that never come back to the device."""
    command += [*extra, "--iterations", "1", "--epochs", "10", "--max-grad-norm", "0.05"]
    train_loop.main(command)
    train_loop.main([*(a.replace("/run", "/offloaded") for a in command), "--offload"])
    assert len(training(tmp_path / "run")) == 20
    assert any(row["grad_norm"] > 0.05 for row in training(tmp_path / "run"))
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "offloaded")
    assert list(got) == list(expected)
    assert [name for name in got if got[name] != expected[name]] == []


def bf16_steps(policy, count=20, lr=5e-7):
    """AdamW at the paper's rate on whatever dtype the parameters have -> them, in fp32."""
    parameters = distributed.trained(policy)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    for _ in range(count):
        for last in (False, True):
            distributed.last_micro_batch(policy, last)
            policy(data.pack(make_trees(0))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().float()
            for p in parameters]


def test_weights_in_bf16_alone_stand_still_where_masters_move(alone):
    """The reason for fp32 masters: at the paper's learning rate a step is far below the distance of
    two bf16 numbers, and training in bf16 alone trains next to nothing, with a fine loss curve."""
    start = make_model().to(torch.bfloat16).state_dict()

    def policy(dtype):
        model = make_model().to(dtype)
        model.load_state_dict({name: value.to(dtype) for name, value in start.items()})
        return policies.Policy(model, autocast_dtype=torch.bfloat16)
    names = [name for name, _ in policy(torch.float32).causal_lm.named_parameters()]
    alone = bf16_steps(policy(torch.bfloat16))
    ours = bf16_steps(distributed.shard(policy(torch.float32), offload=True))
    read = sorted({token for tree in make_trees(0) for response in tree.responses
                   for token in tree.prompt_ids + response[:-1]})  # others have no gradient
    for name, still, moved in zip(names, alone, ours):
        rows = read if "embed_tokens" in name else slice(None)
        before, still, moved = start[name].float()[rows], still[rows], moved[rows]
        large = before.abs() > 1e-3
        assert torch.equal(still[large], before[large])
        steps = (moved - before).abs()[large]
        assert (steps > 0).float().mean() > 0.9
        # The gradient hardly changes, so Adam's 20 steps are of lr each; whatever it does, a step
        # is at most lr (1 - beta_1) / sqrt(1 - beta_2) = 3.2 lr (arXiv 1412.6980, section 2.1).
        assert steps.median() == pytest.approx(20 * 5e-7, rel=0.05) and steps.max() < 64 * 5e-7


def test_the_device_gets_the_masters_as_bf16_after_every_update(alone):
    """Weights that are trained on the host while the device goes on with old ones."""
    policy = distributed.shard(policies.Policy(make_model(), autocast_dtype=torch.bfloat16),
                               offload=True)
    masters = bf16_steps(policy, count=2, lr=1e-2)
    fresh = make_model()
    with torch.no_grad():
        for parameter, master in zip(fresh.parameters(), masters):
            parameter.copy_(master)
    batch = data.pack(make_trees(0))
    expected = policies.Policy(fresh.to(torch.bfloat16), autocast_dtype=torch.bfloat16)(batch)
    torch.testing.assert_close(policy(batch), expected, atol=1e-3, rtol=1e-3)
    first = policies.Policy(make_model().to(torch.bfloat16), autocast_dtype=torch.bfloat16)(batch)
    assert (first - expected).abs().max() > 1  # a stale copy would have been seen


# ----------------------------------------------------------------------------------------------
# What is read, and what is saved
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_empty_model_is_a_loaded_one_without_its_weights(architecture, tmp_path):
    """Processes that disagree about names, shapes, ties or a buffer, and wait for each other."""
    path = write_model(tmp_path / "model", architecture)
    full, empty = weights.load_model(path), weights.empty_model(path, "selm_tree")
    assert type(full) is type(empty) and not empty.training
    assert [(n, p.shape, p.dtype) for n, p in full.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in empty.named_parameters()]
    buffers = dict(empty.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in full.named_buffers())
    assert empty.config._attn_implementation == full.config._attn_implementation


LOADS = """
import torch
from harness.models import distributed, weights
from harness.runs.settings import Compute
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if field in line) / 1024
def load(path):
    return weights.load_policy(path, Compute("cpu", "fp32", False, False, 0, False, False))
distributed.start("cpu")
load(sys.argv[2])  # the libraries that loading imports are no weights
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = resident("VmRSS")
policy = load(sys.argv[1])
added = distributed.gather(resident("VmHWM") - before)
total = sum(p.full_tensor().double().sum().item() for p in policy.parameters())
if distributed.PROCESS == 0: print(*added, total)  # alone: two processes would write into one line
del policy
distributed.stop()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_only_one_process_ever_holds_all_weights(tmp_path):
    """Eight processes that load 29 GB each, to keep an eighth."""
    config = LlamaConfig(**SIZES | dict(hidden_size=512, intermediate_size=2048,
                                        num_hidden_layers=8, tie_word_embeddings=False))
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20  # MiB
    weights.save_policy(policies.Policy(model), make_tokenizer(), tmp_path / "model")
    tiny = write_model(tmp_path / "tiny", "llama")
    script = write_script(tmp_path / "loads.py", LOADS)
    for _ in range(3):  # where process 1 is slow, a layer more is on its way: the best of three
        process = launch(script, str(tmp_path / "model"), str(tiny))
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-2000:]
        *added, got = map(float, stdout.split())
        if added[1] < 0.5 * size + 20:
            break
    # Its own half, and one layer; before, all of it and the half.
    assert size > 100 and added[1] < 0.5 * size + 20 and added[0] < 1.5 * size + 40, (size, added)
    total = sum(p.double().sum().item() for p in model.parameters())
    assert got == pytest.approx(total, rel=1e-12)


READS = """
from harness.models import distributed, weights
from harness.runs.settings import Compute
def load():
    compute = Compute("cpu", "fp32", False, False, 0, False, False)
    return weights.load_policy(sys.argv[1], compute)
distributed.start("cpu")
policy = load()
names = distributed.gather([name for name, _ in policy.named_parameters()])
assert names[0] == names[1] and any("lm_head" in name for name in names[0]), names
del policy
def damaged(*arguments):
    raise ValueError("a damaged file")
weights.load_model = damaged  # process 0 alone calls it
weights.load_policy.cache_clear()
try:
    load()
except ValueError as error:
    assert str(error) == "a damaged file"
else:
    sys.exit(f"process {distributed.PROCESS} does not stop")
distributed.gather(None)
distributed.stop()
"""


def test_all_processes_build_what_process_0_has_read_or_stop_with_it(tmp_path):
    """A config that says tied over a file with two matrices: process 0 loads two, the others build
    one, and all wait for each other for ever. Six hours of silence: process 0 reports that it
    cannot read a file, the others wait for their slices."""
    path = write_model(tmp_path / "model", "llama")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    process = launch(write_script(tmp_path / "reads.py", READS), path)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-2000:]


@pytest.mark.parametrize("given, flag, expected", [
    ("bfloat16", None, "float32"), ("bfloat16", "start", "bfloat16"),
    ("float32", "start", "float32"), ("float16", "start", "float16")])
def test_policies_are_fp32_unless_the_starts_dtype_is_asked_for(given, flag, expected, command,
                                                                tmp_path):
    """Masters that are rounded between iterations although nobody asked, which loses most of an
    iteration's steps at the paper's rates; a config.json that says float32 over bf16 weights."""
    model = make_model(scale=3.0).to(getattr(torch, given))
    model.save_pretrained(tmp_path / "model")
    train_loop.main([*command, *(["--save-dtype", flag] if flag else [])])
    for k in (1, 2):
        folder = tmp_path / f"run/iter_{k}/policy"
        assert weights.stored_dtype(folder) == getattr(torch, expected)
        assert json.loads((folder / "config.json").read_text())["dtype"] == expected
    kept = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert kept.dtype == getattr(torch, expected)


def test_the_stored_dtype_is_read_off_the_weights(tmp_path):
    """A config.json that claims bf16 over fp32 weights: half of every weight would be gone."""
    make_model().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"float32"', '"bfloat16"'))
    assert weights.stored_dtype(tmp_path) == torch.float32


# ----------------------------------------------------------------------------------------------
# 1, 2 and 3 processes give the same run
# ----------------------------------------------------------------------------------------------

# 7 prompts in batches of 3 divide by neither 2 nor 3. Adam's usual eps turns a gradient of rounding
# errors into a full step; with 0.01 a step is as exact as its gradient.
SAME = ("--prompts-per-iteration 7 --batch-size 3 --iterations 1 --adam-eps 0.01 --lr 1e-2 "
        "--temperature 1").split()
VARIANTS = {  # name: (architecture, template, flags)
    "sampled": ("llama", "chatml", "--iterations 2"),
    "greedy, a checkpoint an update": ("llama", "llama3", "--temperature 0 --save-every 1"),
    "fewer prompts than processes": ("llama", "chatml", "--prompts-per-iteration 1"),
    "plain rows": ("llama", "chatml", "--plain-rows"),
    "offload": ("llama", "chatml", "--offload"),
    "LoRA": ("llama", "chatml", "--lora-rank 2"),
    "Zephyr's iteration 0, checkpointing": (
        "mistral", "zephyr", "--gradient-checkpointing --offline-first --iterations 2"),
    "Phi-3": ("phi3", "phi3", ""),
    "bf16, checkpointing": ("llama", "chatml", "--dtype bf16 --gradient-checkpointing"),
    "sigterm": ("llama", "chatml", "")}
# What two processes do not show: weights, batches and checkpoints that divide unevenly.
OF_THREE = ("sampled", "greedy, a checkpoint an update", "fewer prompts than processes")
MANY = """
import json, signal
import train_loop
from harness.models import distributed
from harness.runs import command
command.finish = lambda *arguments: None  # figures take longer than all that is compared
distributed.start("cpu")
stop, gradient, calls = distributed.stop, train_loop.gradient, []
distributed.start, distributed.stop = lambda device: None, lambda: None  # one group for all runs

def asked(*arguments):  # one process alone is told to end
    calls.append(1)
    if len(calls) == 2 and distributed.PROCESS == distributed.PROCESSES - 1:
        signal.raise_signal(signal.SIGTERM)
    return gradient(*arguments)
for command in json.loads(sys.argv[1]):
    command = [word.replace("/1/", f"/{distributed.PROCESSES}/") for word in command]
    if "/sigterm" in command[command.index("--run-dir") + 1]:
        train_loop.gradient = asked
        try:
            train_loop.main(command)
        except train_loop.exits.Terminated as end:
            assert "after update 1 of 3" in str(end)
        else:
            raise SystemExit("SIGTERM was not heard")
        train_loop.gradient = gradient
    train_loop.main(command)
stop()
"""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(a folder with 1/VARIANT, the runs of one process; {VARIANT: its command})"""
    home = tmp_path_factory.mktemp("same")
    data, judge = write_preferences(home / "p.jsonl"), write_judge(home / "judge.py")
    commands = {}
    for name, (architecture, style, flags) in VARIANTS.items():
        model = home / f"{architecture}_{style}"
        if not model.exists():
            write_model(model, architecture, style)
        commands[name] = ["--model", str(model), "--data", data, "--ranker", judge, "--run-dir",
                          str(home / "1" / name), *SMALL, *SAME, *flags.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_loop.command, "finish", lambda *arguments: None)
        for command in commands.values():
            train_loop.main(command)
    return home, commands


@pytest.mark.parametrize("processes, names", [(2, tuple(VARIANTS)), (3, OF_THREE)], ids=[2, 3])
def test_several_processes_give_the_run_of_one(processes, names, single, tmp_path):
    """Samples that depend on the number of GPUs; gradients off by the number of processes; a
    process that waits for another's micro-batch for ever; sharding that works for plain fp32 only;
    SIGTERM at one process, for which the others wait."""
    home, commands = single
    process = launch(write_script(tmp_path / "many.py", MANY),
                     json.dumps([commands[name] for name in names]), processes=processes)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    for name in names:
        flags = VARIANTS[name][-1]
        one, many = home / "1" / name, home / str(processes) / name
        first = 0 if "offline" in flags else 1
        last = first + ("--iterations 2" in flags)
        start, a, b = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (
            json.loads((one / "config.json").read_text())["settings"]["model"],
            one / f"iter_{last}/policy", many / f"iter_{last}/policy"))
        assert max((a[key] - start[key]).abs().max() for key in a) > 1e-3, name
        if "bf16" in name:  # the order of its sums shows in every digit: it ran, and it moved
            assert max((b[key] - start[key]).abs().max() for key in b) > 1e-3, name
            continue
        for k in range(first, last + 1):
            for file in ("samples.jsonl", "pairs.jsonl"):
                assert rows(one / f"iter_{k}" / file) == rows(many / f"iter_{k}" / file), name
        assert len(training(one)) == len(training(many)) == (
            (1 if "fewer" in name else 3) * (last - first + 1))
        for x, y in zip(training(one), training(many)):
            assert x.pop("phase") == y.pop("phase")  # the rest are numbers
            assert x == pytest.approx(y, rel=1e-4, abs=1e-5), name
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0, msg=f"{name}, {key}")


# ----------------------------------------------------------------------------------------------
# Processes that do not come, or are left alone
# ----------------------------------------------------------------------------------------------


WAITS = """
import os, time
import torch, torch.distributed as dist
from harness.models import distributed
distributed.start("cpu")
backend = dist.group.WORLD._get_backend(torch.device("cpu"))
assert backend.options._timeout == distributed.PATIENCE  # from here on: a judge may take hours
pids = distributed.gather(os.getpid())
if distributed.PROCESS == 0: print(*pids, flush=True)
if distributed.PROCESS == 0: time.sleep(300)  # the others wait for it
distributed.gather(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is told of its parent")
def test_a_killed_launcher_leaves_no_process_running(tmp_path):
    """Two processes that wait for each other for six hours, and hold a GPU each."""
    launcher = launch(write_script(tmp_path / "waits.py", WAITS))
    pids = list(map(int, launcher.stdout.readline().split()))
    assert len(pids) == 2, launcher.communicate()[1][-2000:]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 30
    while (left := list(filter(alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid):
    """A dead one that nobody has asked for (a zombie) is not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


ALONE = """
from datetime import timedelta
from harness.models import distributed
from harness.runs import exits
distributed.COMING = timedelta(seconds=2)
exits.run(lambda: distributed.start("cpu"))
"""


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_never_comes_is_named_after_the_time_for_coming(process, tmp_path):
    """Seven GPUs that wait in silence for the eighth, six hours long. (2 seconds here, else 5
    minutes.)"""
    assert distributed.COMING.total_seconds() == 300
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    result = subprocess.run(
        [sys.executable, str(write_script(tmp_path / "alone.py", ALONE))], capture_output=True,
        text=True, timeout=120, env=os.environ | {
            "RANK": str(process), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port)})
    assert result.returncode == 1, result.stderr[-2000:]
    assert f"error: process {process} waited 0:00:02 for the other 1" in result.stderr
    assert "Traceback" not in result.stderr

"""Processes that act as one, sharding, checkpoints."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import data
import model as policies
from conftest import ROOT, SIZES, VOCABULARY, make_model
from harness.models import distributed
from test_model import make_trees


@pytest.mark.parametrize("error", [RuntimeError("disk is full"), KeyboardInterrupt()], ids=repr)
def test_a_checkpoint_that_fails_leaves_the_old_one_and_no_rubbish(monkeypatch, tmp_path, error):
    """Half a checkpoint that keeps a full disk full; a Ctrl-C that is taken for a full disk."""
    policy = policies.Policy(make_model())
    optimizer = torch.optim.AdamW(policy.parameters())
    distributed.save_checkpoint(tmp_path / "000001", policy, optimizer, [1.5])
    write = HuggingFaceStorageWriter.write_data

    def write_and_fail(*args):
        write(*args)
        raise error

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_and_fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        distributed.save_checkpoint(tmp_path / "000002", policy, optimizer, [])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"000001"} or isinstance(error, KeyboardInterrupt)
    assert distributed.load_checkpoint(tmp_path / "000001", policy, optimizer) == [1.5]


@pytest.mark.parametrize("how", ["bit", "empty", "history", "list", "latin-1"])
def test_a_checkpoint_that_cannot_be_read_is_named(how, tmp_path):
    """A page of a library's traceback for a damaged file; one flipped bit that trains on; a digit
    of a loss that has changed in the history, and is drawn."""
    policy = policies.Policy(make_model())
    optimizer = torch.optim.AdamW(policy.parameters())
    distributed.save_checkpoint(tmp_path / "000001", policy, optimizer, [{"loss": 0.69}])
    history = tmp_path / "000001/history.json"
    if how == "history":
        history.write_text(history.read_text().replace("0.69", "0.68"))
    elif how in ("list", "latin-1"):
        history.write_bytes(b"[1, 2]" if how == "list" else b"\xe9")
    for file in (tmp_path / "000001").glob("*.safetensors" if how in ("bit", "empty") else "no"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if how == "bit" else b"")
    with pytest.raises(ValueError, match="000001 cannot be read"):
        distributed.load_checkpoint(tmp_path / "000001", policy, optimizer)


@pytest.mark.parametrize("name, text", [("WORLD_SIZE", "x"), ("WORLD_SIZE", ""), ("RANK", "-1"),
                                        ("WORLD_SIZE", "0"), ("RANK", "1.5"), ("RANK", "\u0663")])
def test_an_environment_that_torchrun_would_not_make_is_one_line(name, text, monkeypatch):
    """WORLD_SIZE=x: a traceback while modules load."""
    monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit, match=f"variable {name} is .*torchrun sets it"):
        distributed._whole_number(name, 0, 1)


def test_nothing_in_a_checkpoint_can_run_code(tmp_path):
    """A pickle in somebody's run folder: resuming it ran a shell command."""
    policy = policies.Policy(make_model())
    distributed.save_checkpoint(tmp_path / "000001", policy, torch.optim.AdamW(policy.parameters()), [])
    assert {path.suffix for path in (tmp_path / "000001").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("file_bytes", [2**30, 50_000])
def test_a_checkpoint_brings_back_weights_moments_and_steps_of_tied_weights_too(
        file_bytes, tmp_path, monkeypatch):
    """A resumed AdamW that starts its moments over; a tied head that is saved twice, or not; files
    whose bytes are made in memory before they are written, all at once."""
    monkeypatch.setattr(distributed, "FILE", file_bytes)

    def make():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True))
        policy = policies.Policy(model)
        return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)

    def update(policy, optimizer, seed):
        logps = policy.model(torch.tensor([[5, 6, 7 + seed]])).logits.float().log_softmax(-1)
        logps[0, :, 9].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    straight, resumed = make(), make()
    for seed in range(3):
        update(*straight, seed)
    distributed.save_checkpoint(tmp_path / "000003", *straight, [])
    files = [file.stat().st_size for file in (tmp_path / "000003").glob("*.safetensors")]
    assert len(files) == 1 if file_bytes == 2**30 else len(files) > 3 and max(files) < 3 * file_bytes
    distributed.load_checkpoint(tmp_path / "000003", *resumed)
    for policy in (straight, resumed):
        update(*policy, 3)
    for a, b in zip(straight[0].parameters(), resumed[0].parameters()):
        assert torch.equal(a, b)


def test_decoder_layers_are_found_and_sharded_whatever_they_are_called():
    """GPT-2 calls them `h`: an AttributeError on two processes, or one shard of everything. (One
    process here; the next test has two.)"""
    from torch.distributed.fsdp import FSDPModule
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="selm_tree")
    with torch.no_grad():
        expected = policies.Policy(model)(data.pack(make_trees()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = distributed.shard(policies.Policy(model, checkpointing=True))
        assert [isinstance(layer, FSDPModule) for layer in policy.layers] == [True] * 3
        logps = policy(data.pack(make_trees()))
        torch.testing.assert_close(logps.detach(), expected, atol=1e-4, rtol=1e-5)
        logps.sum().backward()
        assert all(p.grad is not None for p in policy.parameters())
    finally:
        dist.destroy_process_group()


SHARDED = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import data, model as policies
from harness.models import distributed, weights
from conftest import make_model
from test_model import make_trees
dist.init_process_group("gloo")
policy = distributed.shard(policies.Policy(make_model("llama")))
optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
losses = []
for step in range(3):
    trees = make_trees(step)[dist.get_rank()::2] if step < 2 else make_trees(step)[:1]
    loss = policy(data.pack(trees)).sum() * dist.get_world_size()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total); losses.append(total.item())
weights.save_policy(policy, __import__("conftest").make_tokenizer(), {folder!r})

def adam(policy):
    return torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)

def update(policy, optimizer):
    policy(data.pack(make_trees(dist.get_rank()))).sum().backward()
    optimizer.step(); optimizer.zero_grad()
    return [p.to_local().clone() for p in policy.parameters()]

optimizer = adam(policy)
update(policy, optimizer)
distributed.save_checkpoint({folder!r} + "_states/1", policy, optimizer, [0.1])
expected = update(policy, optimizer)
other = distributed.shard(policies.Policy(make_model("llama", seed=1)))
optimizer = adam(other)
assert distributed.load_checkpoint({folder!r} + "_states/1", other, optimizer) == [0.1]
assert all(torch.equal(a, b) for a, b in zip(update(other, optimizer), expected))
try:  # the folder is there: rank 0 cannot move the new one onto it, and the others must hear of it
    distributed.save_checkpoint({folder!r} + "_states/1", other, optimizer, [])
except OSError:
    pass
else:
    raise SystemExit("no error")
with torch.no_grad():
    next(other.parameters()).to_local().fill_(torch.nan)
try:  # the first process alone writes, and sees it; the other must not wait for ever
    weights.save_policy(other, __import__("conftest").make_tokenizer(), {folder!r})
except FloatingPointError:
    pass
else:
    raise SystemExit("no error")
if dist.get_rank() == 0: print("LOSSES", *losses)
del policy, other, optimizer, expected, loss, total, trees
distributed.stop()
"""


def test_two_sharded_processes_train_to_the_losses_and_weights_of_one(tmp_path):
    """A head weight read while it is sharded; gradients averaged where they must be summed; a
    checkpoint that forgets a shard or a moment; an error of rank 0 for which the others wait."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT), folder=str(tmp_path / "policy")))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    got = [float(x) for x in result.stdout.split("LOSSES")[1].split()]
    policy = policies.Policy(make_model("llama"))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    expected = []
    for step in range(3):
        trees = make_trees(step) if step < 2 else make_trees(step)[:1] * 2
        loss = policy(data.pack(trees)).sum()
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        expected.append(loss.item())
    assert got == pytest.approx(expected, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    for name, value in policy.causal_lm.state_dict().items():
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=1e-4, msg=name)

"""The packed forward pass against one-by-one forward passes of unmodified transformers models."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import model as policies
from conftest import ARCHITECTURES, ROOT, SIZES, VOCABULARY, make_model, make_tokenizer
from harness import scale


def make_trees(seed=0, sizes=((5, (4, 7)), (3, (6, 2, 9)), (11, (1,)))):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, VOCABULARY, (n,), generator=g).tolist()  # noqa: E731
    return [data.Tree(ids(p), [ids(n) for n in ns], 0, 0, []) for p, ns in sizes]


def plain_logps(model, trees):
    """One forward pass a response on the model's own logits: the textbook, and the oracle."""
    logps = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([tree.prompt_ids + response])
            token_logps = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            picked = token_logps.gather(1, ids[0, 1:, None]).squeeze(1)
            logps.append(picked[len(tree.prompt_ids) - 1:].sum())
    return torch.stack(logps)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_log_probs_and_gradients_equal_one_by_one_forwards(architecture):
    """A response that sees its sibling or a neighbouring tree; positions that run on; a window or
    logit cap that is forgotten; gradients that reach the prompt from one response only."""
    ours = make_model(architecture)
    oracle = copy.deepcopy(ours)
    oracle.set_attn_implementation("eager")
    trees = make_trees()
    weights = torch.linspace(-1, 1, sum(len(t.responses) for t in trees))
    logps = policies.Policy(ours)(data.pack(trees))
    expected = plain_logps(oracle, trees)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-5)
    (logps * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), oracle.parameters()):
        scale = max(1.0, q.grad.abs().max().item())
        torch.testing.assert_close(p.grad / scale, q.grad / scale, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_self_check_passes_where_packing_is_exact(architecture):
    """A self-check that cries wolf."""
    policy = policies.Policy(make_model(architecture))
    assert policies.self_check(policy, data.pack, make_trees()) < 1e-4


def test_the_self_check_stops_an_architecture_that_ignores_position_ids():
    """Wrong log-probs without a sign: here a model whose positions run on through the line."""
    policy = policies.Policy(make_model("llama"))
    forward = policy.backbone.forward
    policy.backbone.forward = lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    with pytest.raises(ValueError, match="--plain-rows"):
        policies.self_check(policy, data.pack, make_trees())


def test_the_self_check_stops_an_architecture_with_scaled_logits():
    """A head with a multiplier (Granite, Cohere) that the fused log-probs do not know."""
    policy = policies.Policy(make_model("llama"))
    forward = policy.causal_lm.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
    policy.causal_lm.forward = scaled
    with pytest.raises(ValueError, match="differ by .* nats"):
        policies.self_check(policy, data.pack, make_trees())


def test_the_self_check_covers_plain_rows_too():
    """Granite's scaled logits: wrong by nats in packed and plain rows, as both use our head."""
    from transformers import GraniteConfig
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    with pytest.raises(ValueError, match="head is not supported"):
        policies.self_check(policies.Policy(model), data.pad, make_trees(), packed=False)
    fine = policies.Policy(make_model("gemma3"))
    assert policies.self_check(fine, data.pad, make_trees(), packed=False) < 1e-4


def test_compiled_layers_are_compiled_once_for_many_layouts():
    """A graph guarded on the layout: recompiled for each micro-batch, given up after eight."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    policy = policies.Policy(make_model(), compile=counter)
    with torch.no_grad():
        for n in range(2, 8):
            policy(data.pack(make_trees(n, ((n, (3,) * (n % 3 + 1)), (4, (n, n + 1))))))
        seen = counter.frame_count
        for n in range(8, 16):
            policy(data.pack(make_trees(n, ((n, (3,) * (n % 4 + 1)),) * (n % 3 + 1))))
    assert 0 < seen == counter.frame_count


def test_checkpointed_layers_are_compiled_too():
    """--compile with --gradient-checkpointing: dynamo gave up on every layer, without a word."""
    from torch._dynamo.testing import CompileCounter
    counts = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()
        policy = policies.Policy(make_model(), checkpointing=checkpointing, compile=counter)
        policy(data.pack(make_trees())).sum().backward()
        counts.append(counter.op_count)
    assert counts[1] > 0.7 * counts[0] > 10  # what lies between a layer's parts stays uncompiled


def test_a_model_whose_generation_config_contradicts_itself_can_still_be_saved(tmp_path):
    """Greedy with temperature 0.6, as many hub models say: transformers refuses to save it, and the
    training of an iteration is lost. Several chat templates: saved as a folder, not a file."""
    make_model().save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    policy = policies.Policy(policies.load_model(tmp_path / "hub"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    policies.save_policy(policy, tokenizer, tmp_path / "policy")
    assert policies.load_model(tmp_path / "policy").generation_config.temperature is None


def test_capped_attention_scores_are_refused_by_packing_and_right_in_plain_rows():
    """Gemma-2 under sdpa: transformers drops the cap without a word."""
    from transformers import Gemma2Config
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="selm_tree").eval()
    with pytest.raises(ValueError, match="--plain-rows"):
        policies.self_check(policies.Policy(model), data.pack, make_trees())
    model.set_attn_implementation("eager")
    got = policies.Policy(model)(data.pad(make_trees()))
    torch.testing.assert_close(got, plain_logps(model, make_trees()), atol=1e-4, rtol=1e-5)


def test_plain_rows_equal_packed_rows():
    """Padding that leaks into a shorter row."""
    policy = policies.Policy(make_model("mistral"))
    torch.testing.assert_close(policy(data.pad(make_trees())), policy(data.pack(make_trees())),
                               atol=1e-4, rtol=1e-5)


def test_other_trees_in_the_micro_batch_do_not_change_a_log_prob():
    """A leak between trees that cancels in averages."""
    policy, trees = policies.Policy(make_model("qwen3")), make_trees()
    alone = torch.cat([policy(data.pack([tree])) for tree in trees])
    torch.testing.assert_close(policy(data.pack(trees)), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [4, 10**6])
def test_the_flex_attention_mask_is_the_tree_mask_of_a_loop(window):
    """FlexAttention runs on CUDA only; its mask is checked here, bit by bit."""
    trees = make_trees()
    layout = policies.TreeLayout(data.pack(trees).layout)
    owner = [(t, s, p) for t, tree in enumerate(trees)
             for s, p in [("prompt", p) for p in range(len(tree.prompt_ids))]
             + [(r, len(tree.prompt_ids) + i) for r, ids in enumerate(tree.responses)
                for i in range(len(ids))]]
    mask = layout.mask_function(window, "cpu")
    for q, (tree_q, segment_q, position_q) in enumerate(owner):
        for k, (tree_k, segment_k, position_k) in enumerate(owner):
            expected = (tree_q == tree_k and segment_k in ("prompt", segment_q)
                        and 0 <= position_q - position_k < window)
            assert bool(mask(0, 0, torch.tensor(q), torch.tensor(k))) == expected, (q, k)


def test_flex_attention_under_that_mask_gives_the_same_log_probs():
    """A BlockMask whose blocks skip tokens that must be seen (uncompiled on CPU, forward only)."""
    policy = policies.Policy(make_model("mistral"))
    with torch.no_grad():
        expected = policy(data.pack(make_trees()))
        policies._compiled_flex.__defaults__[0][:] = [policies.flex_attention]
        policy.use_flex = True
        try:
            got = policy(data.pack(make_trees()))
        finally:
            policies._compiled_flex.__defaults__[0].clear()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@pytest.mark.parametrize("fault", [None, "leak", "gradient", "crash"])
def test_flex_check_accepts_flex_attention_only_where_it_agrees(monkeypatch, kind, fault):
    """A kernel that leaks between responses, loses a gradient or does not compile, seen only on the
    user's GPU; queries that a norm left in fp32 under autocast (Qwen3). The kernel here is sdpa."""
    def flex(query, key, value, block_mask, scale, enable_gqa, kernel_options):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        if fault == "crash":
            raise RuntimeError("NoValidChoicesError\nand a page of reasons")
        index = torch.arange(query.shape[2])
        mask = block_mask.mask_mod(None, None, index[:, None], index[None])
        if fault == "leak":
            mask = index[:, None] >= index[None]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value.detach() if fault == "gradient" else value, attn_mask=mask,
            scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(policies, "_compiled_flex", lambda: flex)
    policy = policies.Policy(make_model(kind, scale=2.0), autocast_dtype=torch.bfloat16)
    batch = data.pack(make_trees(0, ((70, (60, 50)), (20, (90, 30, 40)))))
    if fault:
        message = "^NoValidChoicesError$" if fault == "crash" else "differ from"
        with pytest.raises(ValueError, match=message):
            policies.flex_check(policy, batch)
    else:
        policies.flex_check(policy, batch)


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"compile": "aot_eager"},
                                     {"checkpointing": True, "compile": "aot_eager"}], ids=str)
def test_checkpointing_and_compile_change_no_number(options):
    """Recomputed layers that lose the tree layout; dropout that training mode switches on; compiled
    layers that keep the first micro-batch's layout. (aot_eager traces like inductor does, without
    its minute of C++ compilation.)"""
    plain, changed = policies.Policy(make_model()), policies.Policy(make_model(), **options)
    for trees in (make_trees(), make_trees(1, ((2, (3, 8)), (9, (5,))))):
        grads = []
        for policy in (plain, changed):
            policy.zero_grad()
            logps = policy(data.pack(trees))
            logps.sum().backward()
            grads.append([logps] + [p.grad for p in policy.parameters()])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bf16_autocast_keeps_fp32_master_weights_and_gradients():
    """A model cast to bf16: updates of 5e-7 would round to nothing."""
    policy = policies.Policy(make_model(scale=2.0), autocast_dtype=torch.bfloat16)
    exact = policies.Policy(make_model(scale=2.0))(data.pack(make_trees()))
    logps = policy(data.pack(make_trees()))
    logps.sum().backward()
    assert logps.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
    assert 0 < (logps - exact).abs().max() < 0.5  # bf16 was really used, and is not far off


def test_lora_trains_adapters_only_and_saves_a_merged_plain_model(tmp_path):
    """Adapters that are saved without their base; a frozen weight that moves; B = 0 at the start
    must leave the policy exactly the reference."""
    base = make_model()
    expected = policies.Policy(copy.deepcopy(base))(data.pack(make_trees()))
    policy = policies.Policy(scale.add_lora(copy.deepcopy(base), 4), checkpointing=True)
    assert torch.equal(policy(data.pack(make_trees())), expected)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n for n in trained)
    assert not any("lm_head" in n for n in trained)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        policy(data.pack(make_trees())).sum().backward()
        optimizer.step()
    after = policy(data.pack(make_trees())).detach()
    assert not torch.allclose(after, expected, atol=1e-3)
    policies.save_policy(policy, make_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(plain_logps(loaded, make_trees()), after, atol=1e-3, rtol=1e-4)


def test_a_saved_policy_loads_in_plain_transformers_and_generates(tmp_path):
    """A folder that only our own code can read."""
    policy = policies.Policy(make_model())
    policies.save_policy(policy, make_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.chat_template and not (tmp_path / "policy.tmp").exists()
    torch.testing.assert_close(plain_logps(loaded, make_trees()), policy(data.pack(make_trees())),
                               atol=1e-4, rtol=1e-5)
    generated = loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 5)


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path):
    """Forty lines of a library's traceback for a misspelt folder."""
    for load in (policies.load_model, policies.load_config):
        with pytest.raises(ValueError, match="--model .*could") as error:
            load(tmp_path / "absent")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError("disk is full"), KeyboardInterrupt()], ids=repr)
def test_a_checkpoint_that_fails_leaves_the_old_one_and_no_rubbish(monkeypatch, tmp_path, error):
    """Half a checkpoint that keeps a full disk full; a Ctrl-C that is taken for a full disk."""
    policy = policies.Policy(make_model())
    optimizer = torch.optim.AdamW(policy.parameters())
    scale.save_checkpoint(tmp_path / "000001", policy, optimizer, [1.5])
    write = FileSystemWriter.write_data

    def write_and_fail(*args):
        write(*args)
        raise error

    monkeypatch.setattr(FileSystemWriter, "write_data", write_and_fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        scale.save_checkpoint(tmp_path / "000002", policy, optimizer, [])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"000001"} or isinstance(error, KeyboardInterrupt)
    assert scale.load_checkpoint(tmp_path / "000001", policy, optimizer) == [1.5]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    """A page of a library's traceback for a damaged file."""
    policy = policies.Policy(make_model())
    optimizer = torch.optim.AdamW(policy.parameters())
    scale.save_checkpoint(tmp_path / "000001", policy, optimizer, [])
    for file in (tmp_path / "000001").glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="000001 cannot be read"):
        scale.load_checkpoint(tmp_path / "000001", policy, optimizer)


SHARDED = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import data, model as policies
from harness import scale
from conftest import make_model
from test_model import make_trees
dist.init_process_group("gloo")
policy = scale.shard(policies.Policy(make_model("llama")))
optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
losses = []
for step in range(3):
    trees = make_trees(step)[dist.get_rank()::2] if step < 2 else make_trees(step)[:1]
    loss = policy(data.pack(trees)).sum() * dist.get_world_size()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total); losses.append(total.item())
policies.save_policy(policy, __import__("conftest").make_tokenizer(), {folder!r})

def adam(policy):
    return torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)

def update(policy, optimizer):
    policy(data.pack(make_trees(dist.get_rank()))).sum().backward()
    optimizer.step(); optimizer.zero_grad()
    return [p.to_local().clone() for p in policy.parameters()]

optimizer = adam(policy)
update(policy, optimizer)
scale.save_checkpoint({folder!r} + "_states/1", policy, optimizer, [0.1])
expected = update(policy, optimizer)
other = scale.shard(policies.Policy(make_model("llama", seed=1)))
optimizer = adam(other)
assert scale.load_checkpoint({folder!r} + "_states/1", other, optimizer) == [0.1]
assert all(torch.equal(a, b) for a, b in zip(update(other, optimizer), expected))
try:  # the folder is there: rank 0 cannot move the new one onto it, and the others must hear of it
    scale.save_checkpoint({folder!r} + "_states/1", other, optimizer, [])
except OSError:
    pass
else:
    raise SystemExit("no error")
if dist.get_rank() == 0: print("LOSSES", *losses)
dist.destroy_process_group()
"""


def test_two_sharded_processes_train_to_the_losses_and_weights_of_one(tmp_path):
    """A head weight read while it is sharded; gradients averaged where they must be summed; a
    checkpoint that forgets a shard or a moment; an error of rank 0 for which the others wait."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT), folder=str(tmp_path / "policy")))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", "29517", str(script)], capture_output=True, text=True, timeout=240)
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

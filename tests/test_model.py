"""The packed forward pass against one-by-one forward passes of unmodified transformers models."""

import copy
import io
import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import model as policies
from conftest import ARCHITECTURES, SIZES, VOCABULARY, make_model, make_tokenizer
from harness.models import compatibility, distributed, weights


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
    assert compatibility.self_check(policy, data.pack, make_trees()) < 1e-4


def test_the_self_check_stops_an_architecture_that_ignores_position_ids():
    """Wrong log-probs without a sign: here a model whose positions run on through the line."""
    policy = policies.Policy(make_model("llama"))
    forward = policy.backbone.forward
    policy.backbone.forward = lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    with pytest.raises(ValueError, match="--plain-rows"):
        compatibility.self_check(policy, data.pack, make_trees())


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
        compatibility.self_check(policy, data.pack, make_trees())


def test_the_self_check_covers_plain_rows_too():
    """A model whose log-probs depend on the padding of its row: no other way is left to train it.
    (Granite's scaled logits, refused when packed, are right here: test_compatibility.py.)"""
    policy = policies.Policy(make_model("gemma3"))
    assert compatibility.self_check(policy, data.pad, make_trees(), packed=False) < 1e-4
    forward = policy.causal_lm.forward

    def padded(*args, attention_mask=None, **kwargs):
        output = forward(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            output.logits = output.logits * attention_mask.float().mean(1)[:, None, None]
        return output
    policy.causal_lm.forward = padded
    with pytest.raises(ValueError, match="not supported"):
        compatibility.self_check(policy, data.pad, make_trees(), packed=False)


def test_a_layer_that_does_not_use_our_attention_is_refused_however_small_its_effect():
    """Its tokens would see their neighbours' trees. With weights as here the numbers hardly tell;
    after some training they would."""
    policy = policies.Policy(make_model())
    attention = policy.layers[1].self_attn
    with torch.no_grad():
        attention.o_proj.weight.mul_(1e-6)
    assert compatibility.self_check(policy, data.pack, make_trees()) < 1e-4
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="1 of its 2 layers use our attention.*--plain-rows"):
        compatibility.self_check(policy, data.pack, make_trees())


def test_the_probe_outgrows_every_window_that_the_run_can_outgrow():
    """A self-check whose rows are shorter than a window that lives in the mask only; a row of
    100,000 tokens, for a window that no row of the run can outgrow."""
    config = make_model("gemma3").config  # a window of 7
    assert compatibility.probe_length(config, 64) == 7 + 16
    config.sliding_window, config.attention_chunk_size = 4096, 40
    assert compatibility.probe_length(config, 64) == 40 + 16
    assert compatibility.probe_length(config, 1024) == 40 + 16
    assert compatibility.probe_length(config, 5000) == 4096 + 16
    assert compatibility.probe_length(config, 12) == 12


def test_plain_rows_keep_no_softmax_for_backward():
    """(N, V) log-probs that autograd keeps for every row, beside the logits: twice the memory."""
    policy, batch, kept = policies.Policy(make_model()), data.pad(make_trees()), set()

    def keep(x):
        if x.shape[-1] == VOCABULARY and x.shape[0] != SIZES["hidden_size"]:  # the head's weight
            kept.add(x.untyped_storage().data_ptr())
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy(batch)
    assert len(kept) == 1, "the logits, which the rows are views of"


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
    policy = policies.Policy(weights.load_model(tmp_path / "hub"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    weights.save_policy(policy, tokenizer, tmp_path / "policy")
    assert weights.load_model(tmp_path / "policy").generation_config.temperature is None


@pytest.mark.parametrize("cap", [0.5, 1e6])
def test_capped_attention_scores_are_refused_by_packing_and_right_in_plain_rows(cap):
    """Gemma-2 under sdpa: transformers drops the cap without a word. A cap that no score reaches
    today is refused as well: training may get there."""
    from transformers import Gemma2Config
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=cap, query_pre_attn_scalar=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="selm_tree").eval()
    with pytest.raises(ValueError, match="--plain-rows"):
        compatibility.self_check(policies.Policy(model), data.pack, make_trees())
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
    policy = policies.Policy(distributed.add_lora(copy.deepcopy(base), 4), checkpointing=True)
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
    weights.save_policy(policy, make_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(plain_logps(loaded, make_trees()), after, atol=1e-3, rtol=1e-4)


def test_a_saved_policy_loads_in_plain_transformers_and_generates(tmp_path):
    """A folder that only our own code can read."""
    policy = policies.Policy(make_model())
    weights.save_policy(policy, make_tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer.chat_template and not (tmp_path / "policy.tmp").exists()
    torch.testing.assert_close(plain_logps(loaded, make_trees()), policy(data.pack(make_trees())),
                               atol=1e-4, rtol=1e-5)
    generated = loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 5)


def test_the_saved_policy_stops_where_our_sampler_stops(tmp_path):
    """A base model that learned to end its turn, and never stops in plain `generate`."""
    model = make_model(scale=3.0)
    with torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    weights.save_policy(policies.Policy(model), make_tokenizer(), tmp_path / "policy",
                         {2, likeliest})
    assert weights.model_stop_ids(tmp_path / "policy") == {2, likeliest}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert weights.model_stop_ids(loaded) == {2, likeliest}
    text = loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
    assert text.tolist() == [[5, 6, 7, likeliest]]
    weights.save_policy(policies.Policy(loaded), make_tokenizer(), tmp_path / "policy",
                         {likeliest})
    saved = json.loads((tmp_path / "policy/generation_config.json").read_text())
    assert saved["eos_token_id"] == likeliest


@pytest.mark.parametrize("fault", ["nan", "disk", "tokenizer"])
def test_a_policy_that_cannot_be_saved_leaves_the_old_one_and_no_half(tmp_path, fault):
    """NaN weights saved with exit 0; a full disk, kept full by half a policy; a traceback of the
    writer's own error class. The disk here is a limit on file sizes: a real error of the writer."""
    policy, tokenizer = policies.Policy(make_model()), make_tokenizer()
    weights.save_policy(policy, tokenizer, tmp_path / "policy")
    before = (tmp_path / "policy/model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] = torch.inf if fault == "nan" else 1.0
    if fault == "tokenizer":
        tokenizer.save_pretrained = None
    expected = FloatingPointError if fault == "nan" else OSError
    with pytest.raises(expected, match="nothing was saved" if fault == "nan" else "stays") as error:
        try:
            if fault == "disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            weights.save_policy(policy, tokenizer, tmp_path / "policy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert (tmp_path / "policy/model.safetensors").read_bytes() == before


def spoil(folder, fault):
    """Makes a model folder one that must not be loaded."""
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(weights)
    if fault == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif fault == "another shape":
        config["intermediate_size"] = 128
    elif fault == "too many layers":
        config["num_hidden_layers"] = 1
    elif fault == "remote code":
        config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
        (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    elif fault == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif fault == "text in config.json":
        config = "{"
    save_file(tensors, weights, metadata={"format": "pt"})
    if fault == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()
    elif fault == "half a file":
        weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("fault, message", [
    ("missing", "do not fit its config.json: 1 missing, model.layers.1.mlp.up_proj.weight"),
    ("another shape", "do not fit its config.json: 6 of another shape"),
    ("too many layers", "do not fit its config.json: 9 too many, model.layers.1."),
    ("pickle", "a pickle .* not read"), ("adapter", "merge it first"),
    ("remote code", "custom code"), ("half a file", "could not be loaded"),
    ("text in config.json", "could not be loaded")])
def test_a_model_folder_that_is_not_whole_and_plain_is_refused(tmp_path, monkeypatch, fault,
                                                               message):
    """Random weights where a tensor is missing, and exit 0; a model cut to fewer layers; a pickle
    or a folder's own code that is run, or a question on stdin whether to run it."""
    make_model().save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model", fault)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match=message) as error:
        weights.load_model(tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "model/ran").exists()


def test_surplus_weights_that_take_nothing_from_the_model_are_no_error(tmp_path):
    """A value head left over from PPO: a refusal without need."""
    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file(load_file(file) | {"v_head.weight": torch.zeros(3)}, file,
              metadata={"format": "pt"})
    assert weights.load_model(tmp_path / "model").config.num_hidden_layers == 2


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path):
    """Forty lines of a library's traceback for a misspelt folder."""
    for load in (weights.load_model, weights.load_config):
        with pytest.raises(ValueError, match="--model .*could") as error:
            load(tmp_path / "absent")
        assert "\n" not in str(error.value)

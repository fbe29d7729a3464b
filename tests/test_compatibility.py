"""Many architectures, tiny and random, through the real door: a folder and load_model.

For each there are two outcomes: our numbers are those of plain transformers, or it is refused in
one line that says what to do. Never a third: wrong numbers, or a traceback.
"""

import json
import os

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig,
    MODEL_FOR_CAUSAL_LM_MAPPING)

import data
import model as policies
import sample
import train_loop
from conftest import SIZES, VOCABULARY, make_model, make_tokenizer
from harness.models import compatibility, weights

WINDOW = 9  # shorter than the test's rows
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1,
           eos_token_id=2)
WIDE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, bos_token_id=1,
            eos_token_id=2, pad_token_id=0)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=16, patch_size=8)
MIXED = ["sliding_attention", "full_attention"]


def sizes(**changes):
    return {name: value for name, value in (SIZES | changes).items() if value is not None}


def config(kind, **settings):
    return lambda: AutoConfig.for_model(kind, **settings)


# name: (configuration, can it be packed?, how it is sampled)
TABLE = {
    "llama": (config("llama", **SIZES), True, "slots"),
    "dynamic rope": (config("llama", **SIZES, rope_parameters=DEFAULT_ROPE | {
        "rope_type": "dynamic", "factor": 4.0}), True, "slots"),
    "longrope": (config("phi3", **SIZES, original_max_position_embeddings=96, rope_parameters={
        **DEFAULT_ROPE, "rope_type": "longrope", "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}), True, "slots"),
    "mistral": (config("mistral", **SIZES, sliding_window=WINDOW), True, "slots"),
    "mixtral": (config("mixtral", **SIZES, sliding_window=WINDOW, num_local_experts=4,
                       output_router_logits=True, router_jitter_noise=0.5), True, "slots"),
    "phi": (config("phi", **SIZES), True, "slots"),
    "phi3": (config("phi3", **SIZES), True, "slots"),
    # The window is in the mask only, which packing does not build.
    "phimoe": (config("phimoe", **SIZES, sliding_window=WINDOW, num_local_experts=4, head_dim=8,
                      router_jitter_noise=0.5), False, "slots"),
    "qwen2": (config("qwen2", **SIZES, use_sliding_window=True, sliding_window=WINDOW,
                     max_window_layers=1), True, "slots"),
    "qwen2_moe": (config("qwen2_moe", **SIZES, **EXPERTS, use_sliding_window=True,
                         sliding_window=WINDOW, max_window_layers=1, decoder_sparse_step=1,
                         shared_expert_intermediate_size=32), False, "slots"),
    "qwen3": (config("qwen3", **SIZES, head_dim=8), True, "slots"),
    "qwen3_moe": (config("qwen3_moe", **SIZES, **EXPERTS, head_dim=8), True, "slots"),
    "qwen3_next": (config("qwen3_next", **SIZES, **EXPERTS, head_dim=8, layer_types=[
        "linear_attention", "full_attention"], shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8), False, "one by one"),
    "gemma2": (config("gemma2", **SIZES, head_dim=8, attn_logit_softcapping=2.0,
                      sliding_window=WINDOW, query_pre_attn_scalar=8), False, "eager"),
    "gemma3": (config("gemma3_text", **SIZES, head_dim=8, sliding_window=WINDOW,
                      layer_types=MIXED), True, "slots"),
    "gpt_oss": (config("gpt_oss", **SIZES, head_dim=8, sliding_window=WINDOW, num_local_experts=4,
                       num_experts_per_tok=2, rope_parameters=DEFAULT_ROPE), False, "eager"),
    "gpt2": (config("gpt2", **GPT), True, "slots"),
    "gpt_bigcode": (config("gpt_bigcode", **GPT), True, "slots"),
    "gpt_neo": (config("gpt_neo", vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
                       attention_types=[[["global", "local"], 1]], window_size=WINDOW,
                       max_position_embeddings=256, bos_token_id=1, eos_token_id=2),
                False, "one by one"),
    "gpt_neox": (config("gpt_neox", **sizes(num_key_value_heads=None)), True, "slots"),
    "gptj": (config("gptj", **GPT, rotary_dim=4), False, "slots"),
    "opt": (config("opt", **WIDE, ffn_dim=64, num_attention_heads=4, max_position_embeddings=256,
                   word_embed_proj_dim=16, dropout=0.5), True, "slots"),
    "bloom": (config("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
                     bos_token_id=1, eos_token_id=2, hidden_dropout=0.5), False, "one by one"),
    "mpt": (config("mpt", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4,
                   max_seq_len=256), False, "slots"),
    "falcon": (config("falcon", **WIDE, num_attention_heads=4), False, "slots"),
    "falcon with alibi": (config("falcon", **WIDE, num_attention_heads=4, alibi=True), False,
                          "one by one"),
    "granite": (config("granite", **SIZES, logits_scaling=8.0), False, "slots"),
    "cohere": (config("cohere", **SIZES, logit_scale=0.25), False, "slots"),
    "cohere2": (config("cohere2", **SIZES, logit_scale=0.25, sliding_window=WINDOW, head_dim=8),
                False, "slots"),
    "olmo2": (config("olmo2", **SIZES), True, "slots"),
    "starcoder2": (config("starcoder2", **SIZES, sliding_window=WINDOW), True, "slots"),
    # Its decoder layers drop what they do not know, our layout of the trees among it.
    "stablelm": (config("stablelm", **SIZES), False, "slots"),
    "deepseek_v3": (config("deepseek_v3", **sizes(num_key_value_heads=4), n_routed_experts=4,
                           num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=8,
                           kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
                           first_k_dense_replace=1, n_group=1, topk_group=1), True, "slots"),
    "llama4": (config("llama4_text", **SIZES, head_dim=8, attention_chunk_size=WINDOW,
                      num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64,
                      moe_layers=[1]), False, "one by one"),
    "mamba": (config("mamba", **WIDE, state_size=4), False, "one by one"),
    "recurrent_gemma": (config("recurrent_gemma", **SIZES, lru_width=32, head_dim=8,
                               attention_window_size=WINDOW, block_types=[
                                   "recurrent", "attention"]), False, "one by one"),
    "rwkv": (config("rwkv", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
                    attention_hidden_size=32, context_length=256), False, "one by one"),
    "gemma3 with vision": (config("gemma3", vision_config=VISION, text_config=dict(
        SIZES, head_dim=8, sliding_window=WINDOW, layer_types=MIXED, model_type="gemma3_text")),
        True, "slots"),
    "llava": (config("llava", vision_config=VISION | {"model_type": "clip_vision_model"},
                     text_config=dict(SIZES, model_type="llama")), True, "slots"),
    "qwen2_vl": (config("qwen2_vl", text_config=SIZES | {"rope_parameters": DEFAULT_ROPE | {
        "mrope_section": [1, 1, 2]}}, vision_config=dict(depth=1, embed_dim=16, num_heads=2,
                                                         hidden_size=32)), True, "slots"),
    # Not causal: every token sees the whole text, and its log-prob is no log pi(y|x).
    "bert": (config("bert", **WIDE, num_attention_heads=4, intermediate_size=64), False, "refused"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small a second thread is waited for, minutes long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_random(folder, make_config):
    """Weights three times as large as usual: at 0.02 all logits are nearly equal, and a wrong mask
    would hardly show."""
    torch.manual_seed(0)
    settings = make_config()
    auto = (AutoModelForCausalLM if type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING else
            AutoModelForImageTextToText)
    model = auto.from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "A_log" not in name:
                parameter.mul_(3.0)
            if "sinks" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    return auto


@pytest.fixture(scope="module", params=sorted(TABLE))
def case(request, tmp_path_factory):
    """(folder, can it be packed?, how it is sampled, the oracle: transformers' eager model)"""
    make_config, packs, sampled = TABLE[request.param]
    folder = tmp_path_factory.mktemp("models") / "model"
    auto = save_random(folder, make_config)
    oracle = auto.from_pretrained(folder, attn_implementation="eager").eval()
    return folder, packs, sampled, oracle


def make_trees(seed=0, shapes=((5, (4, 7)), (40, (6, 2, 9)), (11, (1,)))):
    """Prompts shorter and longer than all windows, side by side."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(26, VOCABULARY, (n,), generator=g).tolist()
    return [data.Tree(ids(p), [ids(n) for n in ns], 0, 0, []) for p, ns in shapes]


@torch.no_grad()
def plain_logps(model, trees):
    """One row at a time, full logits: the textbook."""
    logps = []
    for tree in trees:
        for response in tree.responses:
            ids, n = torch.tensor([tree.prompt_ids + response]), len(response)
            lm_logits = model(ids, use_cache=False).logits[0, -n - 1:-1].log_softmax(-1)
            logps.append(lm_logits.gather(1, ids[0, -n:, None]).sum())
    return torch.stack(logps)


def check(folder, packed, trees, **options):
    """A policy that the self-check has passed."""
    model = weights.load_model(folder, attention="selm_tree" if packed else "eager")
    policy = policies.Policy(model, **options)
    compatibility.self_check(policy, data.pack if packed else data.pad, trees,
                        sample.context_length(model.config), packed=packed)
    return policy


def test_log_probs_are_those_of_plain_transformers_or_packing_is_refused(case):
    """Windows that live in a mask we do not build, sinks and caps that sdpa drops, positions that
    run on, logits scaled behind the head, layers that ignore our attention. Each was silent."""
    folder, packs, _, oracle = case
    trees, short = make_trees(), make_trees(1, ((4, (3, 4)), (3, (2,))))
    expected = plain_logps(oracle, trees)
    plain = check(folder, False, short)(data.pad(trees)).detach()
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-5)
    if packs:
        packed = check(folder, True, short)(data.pack(trees)).detach()
        torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="--plain-rows") as error:
            check(folder, True, short)
        assert "\n" not in str(error.value)


def test_recomputed_layers_give_the_same_gradient_and_no_noise(case):
    """Dropout and router noise that come back with --gradient-checkpointing; layers that are not
    called `layers`; a model whose own checkpointing is missing or a no-op."""
    folder, packs, _, _ = case
    make, trees = (data.pack if packs else data.pad), make_trees()
    results = []
    for checkpointing in (False, True):
        policy = check(folder, packs, trees[:1], checkpointing=checkpointing)
        calls = []
        for layer in policy.layers:
            layer.register_forward_pre_hook(lambda layer, args: calls.append(layer.training))
        logps = policy(make(trees))
        assert torch.equal(policy(make(trees)), logps) and not any(calls)
        logps.sum().backward()
        results.append([logps.detach()] + [p.grad for p in policy.parameters()])
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_model_generate_or_it_is_refused(case):
    """A cap or sink that sdpa drops, boolean masks added as numbers, a local window that counts
    from another row's position, a router loss that breaks on our mask."""
    folder, _, sampled, oracle = case
    model, notes = weights.load_model(folder), []
    prompts = [tree.prompt_ids for tree in make_trees(2, [(n, ()) for n in (5, 2, 12, 45, 8)])]
    if sampled == "refused":
        with pytest.raises(ValueError, match="not a causal language model") as error:
            compatibility.choose_sampler(model, prompts[0], 32, notes.append)
        assert "\n" not in str(error.value)
        return
    probe = compatibility.probe_length(model.config, sample.context_length(model.config))
    sampler = compatibility.choose_sampler(model, prompts[0], probe, notes.append)
    stop_ids = set(range(2, VOCABULARY, 8))
    got = sample.generate(model, prompts, by=sampler, stop_ids=stop_ids, max_new_tokens=8, slots=3,
                          progress=False)
    oracle.generation_config = GenerationConfig(
        max_new_tokens=8, eos_token_id=sorted(stop_ids), pad_token_id=0)
    for ids, response in zip(prompts, got):
        text = oracle.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        assert response == text[0, len(ids):].tolist()
    assert (sampler is sample.serve) == (sampled != "one by one")
    assert len(notes) == (sampled != "slots") and not any("\n" in note for note in notes)
    assert all(re.search(r"\(.*\w{3}.*\)", note) for note in notes)  # why, not only that


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 12")])
def test_too_little_memory_is_no_fault_of_the_architecture(error, monkeypatch):
    """Advice to use --plain-rows, which needs more; hours of sampling one by one, because a trial
    ran out of memory."""
    def fail(*_, **__):
        raise error
    model = make_model()
    monkeypatch.setattr(type(model), "forward", fail)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind):
        compatibility.choose_sampler(model, [3, 4, 5], 16, print)
    with pytest.raises(kind):
        compatibility.self_check(fail_policy(model, fail), data.pack, make_trees(0))


def fail_policy(model, fail):
    policy = policies.Policy(model)
    policy.forward = fail
    return policy


def test_one_long_row_cannot_change_its_neighbours(tmp_path):
    """longrope turns all positions of a forward pass once one row is long: a log-prob moved by 1.15
    nats with --tokens-per-forward. Rows end below that; the self-check would see it too."""
    save_random(tmp_path, TABLE["longrope"][0])
    model = weights.load_model(tmp_path)
    assert sample.context_length(model.config) == 96
    trees = make_trees(0, ((5, (4, 7)), (120, (6,))))
    for make, packed in ((data.pack, True), (data.pad, False)):
        with pytest.raises(ValueError, match="differ by .* nats"):
            compatibility.self_check(policies.Policy(model), make, trees, packed=packed)
        compatibility.self_check(policies.Policy(model), make, trees[:1], packed=packed)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    with pytest.raises(ValueError, match="--max-length 97 exceeds the context of .* 96"):
        train_loop.main(["--model", str(tmp_path), "--data", str(tmp_path / "data.jsonl"),
                         "--run-dir", str(tmp_path / "run"), "--max-length", "97",
                         "--max-prompt-length", "30", "--max-new-tokens", "8"])


@pytest.mark.parametrize("name", ["granite", "mamba", "gemma2", "bloom"])
def test_the_whole_loop_runs_with_plain_rows_and_names_them_without(tmp_path, name):
    """A refusal that names a way out which does not work: at the reference pass, when the policy is
    saved, or when it is loaded for the next iteration."""
    save_random(tmp_path / "model", TABLE[name][0])
    words = "cat mat moon hello how are you there sat looked".split()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({
        "prompt": f"the {a} and the {b}", "prompt_id": f"{a} {b}",
        "chosen": [{"role": "user", "content": f"the {a} and the {b}"},
                   {"role": "assistant", "content": f"the {b}"}],
        "rejected": [{"role": "user", "content": f"the {a} and the {b}"},
                     {"role": "assistant", "content": f"{a} and the {a}"}]}) + "\n"
        for a in words for b in words[:2]))
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(len(c)) for c in cs] for cs in candidates]")
    command = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"),
               "--ranker", f"{tmp_path / 'judge.py'}:judge", "--run-dir", str(tmp_path / "run"),
               "--iterations", "2", "--batch-size", "4", "--max-length", "40", "--lr", "1e-3",
               "--max-prompt-length", "30", "--max-new-tokens", "8", "--eval-prompts", "2",
               "--tokens-per-forward", "256", "--slots", "4", "--gradient-checkpointing",
               "--temperature", "1"]
    with pytest.raises(ValueError, match="--plain-rows") as error:
        train_loop.main(command)
    assert "\n" not in str(error.value)
    train_loop.main([*command, "--plain-rows"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()
              if '"train"' in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and min(losses) < losses[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iter_2/policy")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())


# ----------------------------------------------------------------------------------------------
# Folders that are not what they say
# ----------------------------------------------------------------------------------------------


def damaged(folder, name, content):
    """A sound model's folder, of which one file has another content (bytes, or JSON fields)."""
    make_model().save_pretrained(folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content).encode()
    (folder / name).write_bytes(content)
    return folder


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4943162336\n"
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("name, content, words", [
    (WEIGHTS, LFS, "model.safetensors: a git-LFS pointer.*git lfs pull"),
    ("tokenizer.json", LFS, "tokenizer.json: a git-LFS pointer"),
    ("config.json", LFS, "config.json: a git-LFS pointer"),
    ("config.json", b"[1, 2]", "config.json holds no JSON object"),
    ("tokenizer_config.json", b"5", "tokenizer_config.json holds no JSON object"),
    ("generation_config.json", b'{"eos_token_id": [2, 7', "generation_config.json cannot be read"),
    ("generation_config.json", b"[2]", "generation_config.json holds no JSON object"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id 'x' .* is no token id"),
    ("generation_config.json", b'{"eos_token_id": [2, true]}', "eos_token_id True .* no token id"),
    ("config.json", {"num_attention_heads": 3}, "not a multiple of .* attention heads"),
    ("config.json", {"num_hidden_layers": 0}, "num_hidden_layers 0"),
    ("config.json", b'{"model_type": "llama", "model_type": "llama"}', "'model_type' occurs twice"),
    ("generation_config.json", b'{"eos_token_id": 2, "eos_token_id": 7}', "occurs twice"),
    ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id -1 .* is no token id"),
    ("generation_config.json", b'{"eos_token_id": [[2]]}', "is no token id"),
    ("chat_template.jinja", LFS, "chat_template.jinja: a git-LFS pointer"),
    *(("config.json", {"quantization_config": {"quant_method": method, "bits": 4}},
       f"quantised .{method}.*; load the unquantised model")
      for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4"))])
def test_a_damaged_file_is_named_before_anything_runs(name, content, words, tmp_path):
    """A reason that stands in a second line nobody prints; `pip install` for a model that could not
    be trained afterwards; stop ids that are lost; an end token that is no number, found when the
    trained policy is saved."""
    with pytest.raises(ValueError, match=words) as error:
        weights.load_config(damaged(tmp_path, name, content))
    assert "\n" not in str(error.value) and "pip install" not in str(error.value)


@pytest.mark.parametrize("content, words", [
    (b"\x10\0\0\0\0\0\0\0{}", "Error while deserializing header"),
    (None, "no file named model.safetensors"), ("layers", "9 too many, model.layers.1"),
    ("nan", r"NaN or infinite numbers \(1 tensors, model.embed_tokens.weight")])
def test_weights_that_are_not_whole_are_named(content, words, tmp_path):
    """A NaN in an embedding that no prompt uses, which is found when the trained policy is saved,
    and then blamed on --lr; a cut file; a config with fewer layers than the file."""
    model = make_model()
    if content == "nan":
        with torch.no_grad():
            model.model.embed_tokens.weight[7, 3] = float("nan")
    model.save_pretrained(tmp_path)
    if content == "layers":
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"num_hidden_layers": 2',
                                                           '"num_hidden_layers": 1'))
    elif content is None:
        (tmp_path / WEIGHTS).unlink()
    elif isinstance(content, bytes):
        (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        weights.load_model(tmp_path)
    assert "--plain-rows" not in str(error.value)


def test_a_model_whose_saved_policy_nothing_could_load_is_refused(tmp_path):
    """Tensors that are held in another form than a new model of the config has: the saved policy
    would have names that no model knows."""
    model = make_model()
    model.save_pretrained(tmp_path)
    weights.check_saved_form(model, tmp_path)
    proj = model.model.layers[0].mlp.up_proj
    proj.weight_blocks = torch.nn.Parameter(proj.weight.detach().clone())
    del proj.weight
    with pytest.raises(ValueError, match="2 of its tensors .*up_proj.weight is the first.*unquant"):
        weights.check_saved_form(model, tmp_path)


def test_two_matrices_stay_two_whatever_the_config_says(tmp_path):
    """A config that says tied over a file with two matrices: process 0 has two, the others one, and
    all wait for each other for ever. What is saved says what it holds."""
    path = damaged(tmp_path, "config.json", {"tie_word_embeddings": True})
    model = weights.load_model(path)
    assert not weights.is_tied(model) and not model.config.tie_word_embeddings
    empty = weights.empty_model(path, "selm_tree", tied=weights.is_tied(model))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in empty.named_parameters()}


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight", "q_proj.lora_A.weight"])
def test_weights_that_would_be_left_out_of_a_layer_are_named(name, tmp_path):
    """A bias, a norm or an adapter that transformers drops with a warning: the model that is
    trained is another one. A value head, outside the layers, does no harm."""
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"v_head.summary.weight": torch.ones(1, 32)}, tmp_path / WEIGHTS,
              {"format": "pt"})
    weights.load_model(tmp_path)
    name = f"model.layers.0.self_attn.{name}"
    save_file(tensors | {name: torch.ones(32)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 too many, {name}"):
        weights.load_model(tmp_path)


def test_weights_in_eight_bits_are_refused_whatever_the_config_says(tmp_path):
    """A quantised checkpoint whose config lost its quantization_config: rounded integers are
    trained as weights."""
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} in I8: it is quantised.*unquantised model"):
        weights.load_config(tmp_path)


def test_a_pipe_in_a_model_folder_is_not_waited_for(tmp_path):
    """A command that hangs without a word."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ValueError, match="generation_config.json is no regular file"):
        weights.load_config(tmp_path)

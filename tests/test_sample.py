"""The slot sampler against transformers' own `generate`, and its command line."""

import copy
import io
import json
import math

import pytest
import torch

import model as policies  # noqa: F401  registers the attention that conftest's models ask for
import sample
from conftest import ARCHITECTURES, VOCABULARY, make_model, make_tokenizer

STOP = set(range(2, VOCABULARY, 8))  # so many that a random model meets one now and then


def make_prompts(lengths=(5, 1, 12, 3, 8, 2, 20, 6, 9), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(26, VOCABULARY, (n,), generator=g).tolist() for n in lengths]


def plain_generate(model, prompt_ids, max_new_tokens, stop_ids=STOP):
    """The oracle: transformers' generate, one prompt at a time, with its own eager attention."""
    oracle = copy.deepcopy(model)
    oracle.set_attn_implementation("eager")
    outputs = []
    for ids in prompt_ids:
        output = oracle.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0)
        outputs.append(output[0, len(ids):].tolist())
    return outputs


def ours(model, prompt_ids, **kwargs):
    return sample.generate(model, prompt_ids, **{
        "stop_ids": STOP, "max_new_tokens": 24, "slots": 3, "progress": False, **kwargs})


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_greedy_slots_give_the_tokens_of_model_generate(architecture, monkeypatch):
    """A slot that sees its predecessor's keys, a position off by one, a window that is forgotten, a
    boolean mask that eager attention adds as 0 and 1, a cache that loses keys when it grows."""
    monkeypatch.setattr(sample, "KV_BLOCK", 8)
    model, prompts = make_model(architecture, scale=3.0), make_prompts()
    expected = plain_generate(model, prompts, 24)
    lengths = {len(response) for response in expected}
    assert 24 in lengths and len(lengths) > 2, "the oracle's responses must end at different times"
    assert len({tuple(response[:3]) for response in expected}) > 4, "and differ"
    for attention, slots in (("selm_tree", 3), ("sdpa", 16), ("eager", 4)):
        model.set_attn_implementation(attention)
        assert ours(model, prompts, slots=slots) == expected


def test_no_row_of_any_step_belongs_to_an_ended_response(monkeypatch):
    """Dead slots that are still computed: the rows of all steps must be the sampled tokens."""
    model, rows = make_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: (
        rows.append(tuple(kw["input_ids"].shape)) or forward(**kw)))
    responses = ours(model, make_prompts((4,) * 20), slots=4)
    steps = [n for n, width in rows if width == 1]
    assert sum(steps) == sum(map(len, responses)) and max(steps) == 4
    assert len(steps) < 24 * 20 / 4, "slots that free up are refilled before the others end"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_sample_depends_on_its_prompt_and_seed_only(top_p):
    """One generator for the whole batch: another number of slots would then give other samples."""
    model, prompts, seeds = make_model(), make_prompts(), [7 * i for i in range(9)]
    kwargs = dict(temperature=1.5, top_p=top_p)
    expected = ours(model, prompts, seeds=seeds, slots=1, **kwargs)
    assert ours(model, prompts, seeds=seeds, slots=4, **kwargs) == expected
    assert ours(model, prompts[::-1], seeds=seeds[::-1], slots=9, **kwargs) == expected[::-1]
    assert ours(model, prompts[3:5], seeds=seeds[3:5], **kwargs) == expected[3:5]
    assert ours(model, prompts, seeds=[s + 1 for s in seeds], **kwargs) != expected
    torch.manual_seed(0)
    unseeded = ours(model, prompts, **kwargs)
    assert ours(model, prompts, **kwargs) != unseeded, "without seeds every call differs"


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.6), (2.0, 0.95), (1.0, 1e-6)])
def test_tokens_are_drawn_with_the_nucleus_probabilities(temperature, top_p):
    """Temperature applied to probabilities, a nucleus that drops the token which crosses top_p, or
    is not renormalised. Expected: a Python loop over sorted probabilities."""
    lm_logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 2.0001, -9.0])
    weights = [math.exp(x / temperature) for x in lm_logits.tolist()]
    probs, mass, expected = [w / sum(weights) for w in weights], 0.0, [0.0] * 7
    for token in sorted(range(7), key=lambda t: -probs[t]):
        if mass < top_p:
            expected[token] = probs[token]
        mass += probs[token]
    n = 20_000  # uniform numbers on a grid: frequencies are exact to 1 / n, no statistics needed
    grid = [(i + 0.5) / n for i in range(n)]
    drawn = sample.pick_tokens(lm_logits.expand(n, 7), grid, temperature, top_p)
    frequencies = torch.bincount(drawn, minlength=7) / n
    torch.testing.assert_close(frequencies, torch.tensor(expected) / sum(expected),
                               atol=2 / n, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    """searchsorted from the wrong side: u = 0 would hit a first token of probability 0."""
    lm_logits = torch.tensor([[-torch.inf, 1.0, -torch.inf]]).expand(2, 3)
    assert sample.pick_tokens(lm_logits, [0.0, 1 - 2**-53], 1.0, 1.0).tolist() == [1, 1]
    assert sample.pick_tokens(lm_logits, [0.0, 0.5], 1e-30, 0.9).tolist() == [1, 1]


def test_packed_linear_layers_compute_the_same_and_vanish_afterwards():
    """Weights that stay packed would no longer learn; a bias that is lost."""
    model = make_model("qwen2")  # has biases
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ids = torch.tensor(make_prompts((12, 12)))
    expected = model(ids).logits
    with torch.no_grad(), pytest.raises(KeyError), sample.packed_linears(model):
        packed = sum("forward" in vars(module) for module in model.modules())
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        raise KeyError
    assert packed == 15  # seven in each of two layers, and the head
    assert not any("forward" in vars(module) for module in model.modules())


def test_sampling_leaves_the_model_as_it_was():
    """Dropout that stays off after sampling; parameters or buffers that cannot train any more."""
    model = make_model("phi3").train()
    ours(model, make_prompts())
    assert model.training
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_models_sample_their_own_likeliest_tokens():
    """A float32 cache or mask under a bf16 model. Greedy tokens may differ by rounding, so each one
    must come within rounding of the best logit of one plain forward pass over the whole text."""
    model, prompts = make_model(scale=3.0).to(torch.bfloat16), make_prompts()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        for ids, response in zip(prompts, ours(model, prompts)):
            lm_logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1:-1].float()
            picked = lm_logits.gather(1, torch.tensor(response)[:, None]).squeeze(1)
            assert ((lm_logits.amax(1) - picked) / lm_logits.std(1)).max() < 0.1


def test_edges_no_prompts_one_token_and_one_new_token():
    """Empty tensors in prefill (a prompt of one token has nothing to prefill)."""
    model, prompts = make_model(), make_prompts((1, 1, 4))
    assert ours(model, []) == []
    assert ours(model, prompts, max_new_tokens=1) == plain_generate(model, prompts, 1)


@pytest.mark.parametrize("change, message", [
    (dict(prompt_ids=[[5], []]), "prompt 1 has no tokens"),
    (dict(prompt_ids=[[5] * 240]), "240 tokens and 24 new ones exceed the model's context of 256"),
    (dict(slots=0), "slots >= 1"), (dict(top_p=0.0), "0 < top_p"), (dict(temperature=-1), ">= 0")])
def test_bad_input_is_one_clear_line(change, message):
    """An IndexError deep in the model, or rotary positions beyond what the model was trained on."""
    with pytest.raises(ValueError, match=message) as caught:
        ours(make_model(), **{"prompt_ids": [[5]], **change})
    assert "\n" not in str(caught.value)


def test_architectures_without_masked_attention_are_refused():
    """Linear-attention and chunked layers would silently attend to the wrong tokens."""
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        ours(model, [[5]])


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny-policy"
    model = make_model()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(path)
    make_tokenizer("chatml").save_pretrained(path)
    return path


def test_the_prompt_command_prints_one_answer(folder, capsys):
    """Decoding the prompt with the answer, or special tokens in it; a default that does not fit."""
    assert sample.main(["--model", str(folder), "--prompt", "hello there"]) == 0
    first = capsys.readouterr().out
    assert first.strip() and "<|im_" not in first and "hello there" not in first
    assert sample.main(["--model", str(folder), "--prompt", "hello there", "--slots", "3"]) == 0
    assert capsys.readouterr().out == first


def test_interactive_chat_keeps_the_history(folder, monkeypatch, capsys):
    """A chat that forgets: the second answer must be that to the whole conversation."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nthe moon\n"))
    args = ["--model", str(folder), "--max-new-tokens", "8"]
    assert sample.main(args + ["--interactive"]) == 0
    chat = capsys.readouterr().out
    assert sample.main(args + ["--prompt", "hello"]) == 0
    hello = capsys.readouterr().out.rstrip("\n")
    assert sample.main(args + ["--prompt", "the moon"]) == 0
    moon = capsys.readouterr().out.rstrip("\n")
    first, second = (answer.strip() for answer in chat.split("> ")[1:3])
    assert first == hello.strip() and second != moon.strip()


def test_alpaca_eval_outputs_have_its_format(folder, tmp_path, capsys):
    """Outputs in another order than the instructions (the sampler sorts by length)."""
    rows = [{"instruction": "the moon and the cat and the mat", "dataset": "d"},
            {"instruction": "hello"}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    args = ["--model", str(folder), "--max-new-tokens", "8"]
    assert sample.main(args + ["--alpaca-eval", str(tmp_path / "in.json"),
                               "--output", str(tmp_path / "out.json")]) == 0
    outputs = json.loads((tmp_path / "out.json").read_text())
    assert [o["instruction"] for o in outputs] == [row["instruction"] for row in rows]
    assert [o["generator"] for o in outputs] == ["tiny-policy"] * 2
    assert outputs[0]["dataset"] == "d"
    assert set(outputs[1]) == {"instruction", "output", "generator"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.json", "out.json"]
    capsys.readouterr()
    assert sample.main(args + ["--prompt", "hello"]) == 0
    assert capsys.readouterr().out == outputs[1]["output"] + "\n"


def test_command_line_errors_are_one_line_and_exit_code_2(folder, tmp_path, capsys):
    """A traceback, or an output folder found missing only after an hour of sampling."""
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text('[{"text": "x"}]')
    good.write_text('[{"instruction": "x"}]')
    for args, message in [
            (["--model", str(tmp_path / "no"), "--prompt", "x"], "--model"),
            (["--model", str(folder), "--prompt", "x", "--max-new-tokens", "999"], "of 256"),
            (["--model", "x", "--alpaca-eval", str(bad), "--output", "o"], "entry 0 has no string"),
            (["--model", "x", "--alpaca-eval", str(tmp_path), "--output", "o"], "cannot be read"),
            (["--model", "x", "--alpaca-eval", str(good), "--output", str(tmp_path / "no/o.json")],
             "no such folder")]:
        assert sample.main(args) == 2
        errors = capsys.readouterr().err.splitlines()  # transformers' loading bar may come first
        assert errors[-1].startswith("error: ") and message in errors[-1]
        assert not any("Traceback" in line for line in errors)

"""The slot sampler against transformers' own `generate`."""

import copy
import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import model as policies  # noqa: F401  registers the attention that conftest's models ask for
import sample
from conftest import ARCHITECTURES, VOCABULARY, make_model
from harness.models import compatibility

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


def test_responses_are_handed_out_as_they_end_while_slots_stay_full(monkeypatch):
    """A killed phase that loses an hour of finished responses; slots that are drained between two
    portions of the prompts; all prompts of a large file in memory; a response that goes to another
    prompt; a model that the caller gets back with layers that are still packed."""
    model, prompts, rows = make_model(), make_prompts((4, 9, 1, 6, 3) * 16), []
    forward, asked = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **kw: (
        rows.append(kw["input_ids"].shape) or forward(**kw)))
    monkeypatch.setattr(sample, "worth_a_prefill", lambda *_: 1)  # else some wait for company
    requests = ((asked.append(i) or ids, 24, i) for i, ids in enumerate(prompts))
    waits, got, sampled = [], {}, 0
    for i, response in sample.serve(model, requests, stop_ids=STOP, slots=4, temperature=1.0):
        got[i], sampled = response, sampled + len(response)
        waits.append(len(asked) - len(got))
        # A kill now would lose what is in the other three slots, and no response that has ended.
        assert sum(n for n, width in rows if width == 1) - sampled < 4 * 24
    assert not any("forward" in vars(module) for module in model.modules() if module is not model)
    steps = [n for n, width in rows if width == 1]
    last = len(steps) - steps[::-1].index(4)  # until the last prompts nobody waits for anybody
    assert len(steps) - last <= 24 and steps[:last].count(4) / last > 0.85
    assert len(got) == 80 and max(waits) <= 4 + 2 * 4 * sample.AHEAD < 80
    monkeypatch.undo()
    for i, ids in enumerate(prompts):
        assert ours(model, [ids], seeds=[i], temperature=1.0) == [got[i]]


def test_a_response_that_takes_long_does_not_hold_back_the_others():
    """199 finished responses in memory, lost by a kill, because the first one was not done."""
    model = make_model()
    requests = (([5, 6, 7], (150 if i == 0 else 1), i) for i in range(200))
    order = [i for i, _ in sample.serve(model, requests, stop_ids=(), slots=2)]
    assert sorted(order) == list(range(200)) and order.index(0) > 140


def test_a_prompt_is_complete_when_all_its_samples_are_there():
    """A sample that goes to the neighbour, or a row with the samples in the order of their ends."""
    ended = [(3, "3"), (0, "0"), (5, "5"), (1, "1"), (4, "4"), (2, "2")]
    assert list(sample.by_prompt(iter(ended), 2)) == [
        (0, ["0", "1"]), (2, ["4", "5"]), (1, ["2", "3"])]
    assert list(sample.by_prompt(iter(ended), 1)) == [(i, [y]) for i, y in ended]


def test_slots_are_refilled_by_how_long_responses_are_not_by_how_long_they_may_be(monkeypatch):
    """A tenth of all forward passes wasted on prefills of one prompt, where responses end long
    before their limit."""
    model, prompts = make_model(), make_prompts((4,) * 160)
    forward, passes = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(1) or forward(**kw))

    def count():
        passes.clear()
        got = ours(model, prompts, slots=8, max_new_tokens=240, temperature=9.0, seeds=range(160))
        return len(passes), sum(map(len, got)) / 160
    by_mean, mean = count()
    assert mean < 12
    worth = sample.worth_a_prefill
    monkeypatch.setattr(sample, "worth_a_prefill", lambda slots, _: worth(slots, 240))
    by_limit, _ = count()
    assert by_mean < 0.93 * by_limit


def test_most_slots_never_wait_for_a_few_slow_responses(monkeypatch):
    """Where nearly all responses end at once, a prefill seems to be worth all slots: whole batches,
    each as slow as its slowest."""
    model, passes = make_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: passes.append(1) or forward(**kw))
    limits = [60 if i % 40 == 0 else 1 for i in range(320)]

    def count():
        passes.clear()
        ours(model, [[5, 6]] * 320, slots=8, max_new_tokens=limits, stop_ids=())
        return len(passes)
    by_mean = count()
    monkeypatch.setattr(sample, "worth_a_prefill", lambda *_: 1)
    assert by_mean < 1.1 * count()


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


def test_every_prompt_has_a_limit_of_its_own():
    """The shortest limit, or the longest, for all; a cache made for the longest prompt with the
    longest limit only, where two others may be longer together."""
    model, prompts = make_model(), make_prompts((5, 30, 12, 3))
    limits = [24, 2, 5, 30]
    expected = [plain_generate(model, [ids], n)[0] for ids, n in zip(prompts, limits)]
    assert [len(response) for response in expected] == [24, 2, 5, 9], "three at their limit"
    assert ours(model, prompts, max_new_tokens=limits) == expected
    with pytest.raises(ValueError, match="230 tokens and 27 new ones"):
        ours(model, [[5], [5] * 230], max_new_tokens=[24, 27])
    assert len(ours(model, [[5], [5] * 230], max_new_tokens=[200, 26])) == 2


def test_edges_no_prompts_one_token_and_one_new_token():
    """Empty tensors in prefill (a prompt of one token has nothing to prefill)."""
    model, prompts = make_model(), make_prompts((1, 1, 4))
    assert ours(model, []) == []
    assert ours(model, prompts, max_new_tokens=1) == plain_generate(model, prompts, 1)


@pytest.mark.parametrize("change, message", [
    (dict(prompt_ids=[[5], []]), "prompt 1 has no tokens"),
    (dict(prompt_ids=[[5] * 240]), "240 tokens and 24 new ones exceed the model's context of 256"),
    (dict(max_new_tokens=[24, 0], prompt_ids=[[5], [5]]), "max_new_tokens >= 1"),
    (dict(slots=0), "slots >= 1"), (dict(top_p=0.0), "0 < top_p"), (dict(temperature=-1), ">= 0"),
    (dict(top_p=math.nan), "0 < top_p"), (dict(temperature=math.nan), ">= 0"),
    (dict(temperature=math.inf), ">= 0")])
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


def test_the_context_is_the_shortest_that_the_configuration_names():
    """BLOOM names none: an AttributeError. Dynamic and longrope embeddings turn for ALL rows once
    ONE is long, also where each kind of layer has an embedding of its own."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    for settings, expected in [
            (dict(max_position_embeddings=256), 256), (dict(), math.inf),
            (dict(max_seq_len=100), 100), (dict(max_position_embeddings=-1), math.inf),
            (dict(max_position_embeddings=256, rope_parameters=rope), 64),
            (dict(max_position_embeddings=256, rope_parameters={"sliding_attention": {
                "rope_type": "default"}, "full_attention": rope}), 64),
            (dict(max_position_embeddings=256, rope_parameters={"rope_type": "dynamic"}), 256)]:
        config = PretrainedConfig()
        vars(config).update(settings)
        assert sample.context_length(config) == expected


# ----------------------------------------------------------------------------------------------
# harness/models/compatibility.py (many architectures: test_compatibility.py)
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_one_by_one_gives_the_samples_of_slots(top_p):
    """Other random numbers, or the model's own repetition penalty, for models that do not fit."""
    model, prompts, seeds = make_model(), make_prompts(), [7 * i for i in range(9)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 9
    for kwargs in (dict(), dict(temperature=1.5, top_p=top_p, seeds=seeds),
                   dict(max_new_tokens=[3, 24, 8] * 3)):
        kwargs = dict(stop_ids=STOP, max_new_tokens=24, slots=3, progress=False) | kwargs
        assert sample.generate(model, prompts, by=compatibility.serve_one_by_one, **kwargs) == (
            sample.generate(model, prompts, **kwargs))
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("fault", ["position", "mask", "neighbour", "moved row"])
def test_slots_that_are_wrong_for_a_model_are_not_used(monkeypatch, fault):
    """Other tokens, without a sign. The faults are ours here, and architectures' in real life."""
    model, notes = make_model(scale=3.0), []
    assert compatibility.choose_sampler(model, [5, 6, 7, 8], 20, notes.append) is sample.serve
    if fault == "position":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda *args, position_ids=None, **kwargs: forward(
            *args, position_ids=position_ids if position_ids is None else position_ids + (
                position_ids.shape[1] == 1) * torch.arange(len(position_ids))[:, None], **kwargs))
    elif fault == "mask":
        monkeypatch.setattr(sample, "step_mask", lambda *args: None)
    elif fault == "moved row":
        monkeypatch.setattr(sample.SlotCache, "move", lambda *args: None)
    else:
        aim = sample.SlotCache.aim
        monkeypatch.setattr(sample.SlotCache, "aim", lambda self, first, *args, **kwargs: aim(
            self, 0, *args, **kwargs) or setattr(self, "rows", self.rows * 0))
    assert not notes
    sampler = compatibility.choose_sampler(model, [5, 6, 7, 8], 20, notes.append)
    assert sampler is compatibility.serve_one_by_one and len(notes) == 1
    assert model.config._attn_implementation == "eager"


def test_slots_are_compared_with_eager_attention_not_with_the_one_they_use():
    """An attention that drops an architecture's cap or sinks: slots and plain forward passes would
    agree, both wrong."""
    AttentionInterface.register("half", lambda module, query, *args, **kwargs: (
        sdpa_attention_forward(module, query / 2, *args, **kwargs)))
    AttentionMaskInterface.register("half", sdpa_mask)
    model, notes = make_model(scale=3.0), []
    model.set_attn_implementation("half")
    assert compatibility.choose_sampler(model, [5, 6, 7, 8], 20, notes.append) is sample.serve
    assert model.config._attn_implementation == "eager" and "eager attention" in notes[0]


def test_a_model_that_sees_the_future_is_refused(monkeypatch):
    """BERT and its kin: log-probs of tokens that were in sight."""
    model = make_model(scale=3.0)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **kwargs: forward(
        input_ids.flip(1), **{**kwargs, "past_key_values": None, "use_cache": False}))
    with pytest.raises(ValueError, match="not a causal language model") as error:
        compatibility.choose_sampler(model, [5, 6, 7, 8], 20)
    assert "\n" not in str(error.value)

"""Which sampler is right for this architecture: slots (sample.py), or transformers' own generate?

Architectures cap attention scores, keep windows in masks of their own, add position biases, have a
state instead of a cache. Slots would then give other tokens, without a sign. So before a model is
sampled, a few tokens behind two prompts, one short and one longer than any attention window, are
compared with plain forward passes under eager attention, transformers' most faithful.

Test: pytest tests/test_architectures.py tests/test_sample.py.

Legend: n prompts, V vocabulary.
"""

import math

import torch
from tqdm import tqdm
from transformers import GenerationConfig

import sample

TRIAL_STEPS = 5


@torch.no_grad()
def choose_sampler(model, ids, length, say=print):
    """The function that samples this model: sample.serve, or serve_one_by_one (the same
    arguments) where slots are not right. May set the model's attention to eager; `say` gets a line
    about anything but the ordinary case. ValueError where neither is right.

    ids: any prompt's, to make the two of; length: of the longer one, see model.probe_length.
    """
    length = min(length, sample.context_length(model.config) - TRIAL_STEPS)
    prompts = sorted((ids[:3], (ids * length)[:length]), key=len)
    name, first = type(model).__name__, model.config._attn_implementation
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # bf16 is off by a few percent
    for sampler, trial, attention in ((sample.serve, trial_in_slots, first),
                                      (sample.serve, trial_in_slots, "eager"),
                                      (serve_one_by_one, trial_one_by_one, "eager")):
        model.set_attn_implementation(attention)
        if error_of(trial, model, prompts) <= tolerance:
            if sampler is serve_one_by_one:
                say(f"note: {name} does not fit into slots; its own generate samples it, slowly, "
                    "one prompt at a time")
            elif attention != first:
                say(f"note: {name} is sampled under eager attention: slower, but right for it")
            return sampler
    raise ValueError(f"{name}: the tokens that it generates one after the other are not those of "
                     "its forward pass over the whole text; it is not a causal language model, or "
                     "not one that transformers can sample")


def error_of(trial, model, prompts):
    """How far a trial's logits are from those of plain forward passes, in standard deviations;
    infinite where the trial cannot even run."""
    attention, errors = model.config._attn_implementation, []
    try:
        responses = trial(model, prompts)
        model.set_attn_implementation("eager")
        for ids, (tokens, lm_logits) in zip(prompts, responses):
            text = torch.tensor([ids + tokens], device=model.device)
            expected = model(text, use_cache=False).logits[0, len(ids) - 1:-1].float()  # (steps, V)
            distance = (lm_logits.float() - expected).square().mean(1).sqrt()  # (steps,)
            # Not the largest: in bf16 rounding can send one token to another expert (PhiMoE).
            errors.append((distance / expected.std(1)).median().item())
    except Exception:  # whatever an architecture may raise that was not made for this
        return math.inf
    finally:
        model.set_attn_implementation(attention)
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def trial_in_slots(model, prompts):
    """TRIAL_STEPS greedy tokens behind each prompt, and their logits: n (tokens, (steps, V))."""
    cache = sample.SlotCache(len(prompts), max(map(len, prompts)) + TRIAL_STEPS)
    live, steps = [sample.make_slot(model.config, i, ids, TRIAL_STEPS, seed=0)
                   for i, ids in enumerate(prompts)], []
    sample.prefill(model, cache, prompts, first=0)
    while live:
        steps.append(sample.step(model, cache, live))  # (n, V)
        ended = sample.advance(live, cache, steps[-1].argmax(-1).tolist(), stop_ids=())
    responses = [slot.response for slot in reversed(ended)]  # advance went through them backwards
    return list(zip(responses, torch.stack(steps, dim=1)))


def trial_one_by_one(model, prompts):
    outputs = [own_generate(model, ids, TRIAL_STEPS, (), output_logits=True) for ids in prompts]
    return [(output.sequences[0, len(ids):].tolist(), torch.cat(output.logits))
            for ids, output in zip(prompts, outputs)]


@torch.no_grad()
def serve_one_by_one(model, requests, *, stop_ids, slots=1, temperature=0.0, top_p=1.0,
                     expected=None):
    """sample.serve where slots are not right: transformers' own, prompt by prompt, with whatever
    cache or state the model has. The same tokens, from the same random numbers."""
    sample.check_settings(slots, temperature, top_p)
    for i, request in enumerate(tqdm(requests, "sample", expected or None, unit="response",
                                     leave=False, disable=expected is None)):
        slot = sample.make_slot(model.config, i, *request)

        def only_ours(_, lm_logits):
            """A logits processor that leaves one token to choose from."""
            uniforms = [slot.uniforms.random()] if temperature else None
            token = sample.pick_tokens(lm_logits, uniforms, temperature, top_p)[:, None]
            return torch.full_like(lm_logits, -math.inf).scatter(1, token, 0.0)

        output = own_generate(model, slot.prompt, slot.limit, stop_ids,
                              logits_processor=[only_ours])
        yield output.sequences[0, len(slot.prompt):].tolist()


def own_generate(model, ids, limit, stop_ids, **options):
    """transformers' generate on one prompt, greedy. Without the model's own generation settings
    (a repetition penalty, say): they would be filled in wherever we name nothing."""
    own, model.generation_config = model.generation_config, GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(stop_ids) or None, pad_token_id=0)
    text = torch.tensor([ids], device=model.device)
    try:
        return model.generate(text, attention_mask=torch.ones_like(text),
                              return_dict_in_generate=True, **options)
    finally:
        model.generation_config = own

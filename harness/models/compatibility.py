"""Are packed rows and sampling slots right for this model? Checked with its weights before a run.

Some architectures cap attention scores, keep windows in masks of their own, add position biases, or
have a state instead of a cache. With them, packed rows and slots could give wrong numbers without
an error. So we compare with plain forward passes under eager attention, which is transformers' most
faithful: a few log-probs of the packed forward pass, and a few tokens sampled after a short prompt
and after one that is longer than any attention window.

    self_check        compares log-probs of packed (or plain) rows; refuses the model if wrong
    choose_sampler    slots (sample.py), slots under eager attention, or the model's own generate

Test: pytest tests/test_compatibility.py tests/test_model.py tests/test_sample.py.

Legend: R responses, n prompts, V vocabulary.
"""

import math
from dataclasses import replace

import torch
from tqdm import tqdm
from transformers import GenerationConfig

import sample
from harness.runs.exits import one_line, out_of_memory

TRIAL_STEPS = 5


# ----------------------------------------------------------------------------------------------
# 1. Log-probs
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def self_check(policy, make_batch, trees, max_length=0, packed=True):
    """Compares our log-probs with the model's own logits under eager attention, one response at a
    time. Returns the largest difference in nats; ValueError if it is more than rounding.

    Some architectures ignore position_ids, mix tokens outside attention (Mamba), keep a window in
    the mask that we never build, or scale their logits (Granite, Cohere). make_batch: data.pack, or
    data.pad for packed=False. trees: a few short ones; we add one that is longer than every
    attention window, so that short and long rows are packed together. Runs in the weights' dtype,
    without autocast, before sharding.
    """
    model, prompt = policy.causal_lm, trees[0].prompt_ids
    attention, autocast_dtype = model.config._attn_implementation, policy.autocast_dtype
    advice = "use --plain-rows" if packed else "this architecture is not supported"
    length = min(probe_length(model.config, max_length), max_length - len(trees[0].responses[0]))
    if length > len(prompt):
        trees = [*trees, replace(trees[0], prompt_ids=(prompt * length)[:length])]
    rows = [(tree.prompt_ids, response) for tree in trees for response in tree.responses]
    try:
        policy.autocast_dtype = None
        logps = policy(make_batch(trees).to(model.device))  # (R,)
        model.set_attn_implementation("eager")  # knows every architecture's caps, sinks and windows
        expected = torch.stack([_alone(model, *row) for row in rows])
    except Exception as reason:  # whatever a library may raise
        if out_of_memory(reason):  # this says nothing about the architecture
            raise
        raise ValueError(f"{type(model).__name__} cannot run our forward pass "
                         f"({one_line(reason)}); {advice}") from None
    finally:
        policy.autocast_dtype = autocast_dtype
        model.set_attn_implementation(attention)
    error = (logps - expected).abs().max().item()
    tolerance = (1e-4 if model.dtype == torch.float32 else 0.05) * max(len(y) for _, y in rows)
    if not error <= tolerance:  # also catches NaN
        raise ValueError(f"{type(model).__name__}: our log-probs and the model's differ by "
                         f"{error:.2g} nats (at most {tolerance:.2g} is rounding); {advice}")
    return error


def _alone(model, prompt_ids, response):
    """log pi(y|x), a scalar, by one forward pass of the unmodified model over one row."""
    ids, n = torch.tensor([prompt_ids + response], device=model.device), len(response)
    lm_logits = model(ids, use_cache=False).logits[0, -n - 1:-1].float()  # (n, V)
    return lm_logits.log_softmax(-1).gather(1, ids[0, -n:, None]).sum()


def probe_length(config, max_length):
    """Tokens of a row that is longer than every attention window below max_length.

    Windows have many names (sliding_window, window_size, attention_chunk_size). If another number
    is mistaken for a window, the row is only longer than necessary.
    """
    windows = [value for name, value in config.get_text_config().to_dict().items()
               if ("window" in name or "chunk" in name) and isinstance(value, int)]
    return min(16 + max((w for w in windows if w < max_length), default=0), max_length)


# ----------------------------------------------------------------------------------------------
# 2. Samples
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_sampler(model, ids, length, say=print):
    """The function that samples this model: sample.serve, or serve_one_by_one (with the same
    arguments) if slots give wrong logits. May set the model's attention to eager. `say` reports all
    but the ordinary case. ValueError if both are wrong.

    ids: of any prompt; two prompts are made of them. length: of the longer one, see probe_length.
    """
    length = min(length, sample.context_length(model.config) - TRIAL_STEPS)
    prompts = sorted((ids[:3], (ids * length)[:length]), key=len)
    name, first, reason = type(model).__name__, model.config._attn_implementation, None
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # bf16 is off by a few percent
    for sampler, trial, attention in ((sample.serve, trial_in_slots, first),
                                      (sample.serve, trial_in_slots, "eager"),
                                      (serve_one_by_one, trial_one_by_one, "eager")):
        model.set_attn_implementation(attention)
        error, why = error_of(trial, model, prompts)
        if error <= tolerance:
            if sampler is serve_one_by_one:
                say(f"note: {name} does not fit into slots ({reason}); the model's own generate "
                    "is used, slowly, one prompt at a time")
            elif attention != first:
                say(f"note: {name} is sampled under eager attention, which is slower: its logits "
                    f"are wrong under {first} ({reason})")
            return sampler
        reason = why
    raise ValueError(f"{name}: generating token by token gives other logits than a forward pass "
                     "over the whole text. This is not a causal language model, or transformers "
                     f"cannot sample it ({reason})")


def error_of(trial, model, prompts):
    """(how far a trial's logits are from those of plain forward passes, in standard deviations, or
    infinity if the trial fails; the same in words)."""
    attention, errors = model.config._attn_implementation, []
    try:
        responses = trial(model, prompts)
        model.set_attn_implementation("eager")
        for ids, (tokens, lm_logits) in zip(prompts, responses):
            text = torch.tensor([ids + tokens], device=model.device)
            expected = model(text, use_cache=False).logits[0, len(ids) - 1:-1].float()  # (steps, V)
            distance = (lm_logits.float() - expected).square().mean(1).sqrt()  # (steps,)
            # The median: in bf16, rounding can send one token to another expert (PhiMoE).
            errors.append((distance / expected.std(1)).median().item())
    except Exception as error:  # whatever another architecture may raise
        if out_of_memory(error):
            raise
        return math.inf, one_line(error)
    finally:
        model.set_attn_implementation(attention)
    error = max(errors) if all(map(math.isfinite, errors)) else math.inf
    return error, f"its logits are {error:.2g} standard deviations off"


def trial_in_slots(model, prompts):
    """Up to TRIAL_STEPS greedy tokens after each prompt, and their logits: n (tokens, (steps, V)).
    The first response ends three steps early, and the last row moves into its place. This is early
    enough for the median in `error_of`."""
    cache = sample.SlotCache(len(prompts), max(map(len, prompts)) + TRIAL_STEPS)
    live = [sample.make_slot(model.config, i, ids, TRIAL_STEPS - 3 * (i == 0), seed=0)
            for i, ids in enumerate(prompts)]
    slots, logits = list(live), [[] for _ in live]
    with sample.packed_linears(model):
        sample.prefill(model, cache, prompts, first=0)
        while live:
            lm_logits = sample.step(model, cache, live)  # (n, V)
            for slot, row in zip(live, lm_logits):
                logits[slot.index].append(row)
            sample.advance(live, cache, lm_logits.argmax(-1).tolist(), stop_ids=())
    return [(slot.response, torch.stack(rows)) for slot, rows in zip(slots, logits)]


def trial_one_by_one(model, prompts):
    """The same with the model's own generate."""
    outputs = [own_generate(model, ids, TRIAL_STEPS, (), output_logits=True) for ids in prompts]
    return [(output.sequences[0, len(ids):].tolist(), torch.cat(output.logits))
            for ids, output in zip(prompts, outputs)]


@torch.no_grad()
def serve_one_by_one(model, requests, *, stop_ids, slots=1, temperature=0.0, top_p=1.0,
                     expected=None):
    """Replaces sample.serve where slots are wrong: transformers' generate, prompt by prompt, with
    whatever cache or state the model has. The same tokens, from the same random numbers."""
    sample.check_settings(slots, temperature, top_p)
    was_training = model.training
    model.eval()
    try:
        for i, request in enumerate(tqdm(requests, "sample", expected or None, unit="response",
                                         leave=False, disable=expected is None)):
            slot = sample.make_slot(model.config, i, *request)

            def only_ours(_, lm_logits):
                """A logits processor that leaves only the token that we pick."""
                uniforms = [slot.uniforms.random()] if temperature else None
                token = sample.pick_tokens(lm_logits, uniforms, temperature, top_p)[:, None]
                return torch.full_like(lm_logits, -math.inf).scatter(1, token, 0.0)

            output = own_generate(model, slot.prompt, slot.limit, stop_ids,
                                  logits_processor=[only_ours])
            yield i, output.sequences[0, len(slot.prompt):].tolist()
    finally:
        model.train(was_training)


def own_generate(model, ids, limit, stop_ids, **options):
    """transformers' generate on one prompt, greedy. The model's own generation settings (such as a
    repetition penalty) are put aside, because generate uses them for all that we leave open."""
    own, model.generation_config = model.generation_config, GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(stop_ids) or None, pad_token_id=0)
    text = torch.tensor([ids], device=model.device)
    try:
        return model.generate(text, attention_mask=torch.ones_like(text),
                              return_dict_in_generate=True, **options)
    finally:
        model.generation_config = own

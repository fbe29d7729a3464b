"""Sampling responses: slots instead of batches, over an unmodified transformers model.

A batch takes as long as its longest response. `model.generate` on 4 prompts at a time (each letter
is one token of one response, '.' is work on a row that has ended):

    row 1  a a a a a a a a   e e e e e e e e         slot 1  a a a a a a a a
    row 2  b b . . . . . .   f f f . . . . .         slot 2  b b e e e e e e e e
    row 3  c c c c . . . .   g . . . . . . .         slot 3  c c c c f f f
    row 4  d d d d d . . .   h h . . . . . .         slot 4  d d d d d g h h
           time ------->  16 steps                          time ------->  10 steps

SELM samples one response for each of thousands of prompts, and their lengths differ tenfold. So:

  - A SLOT is one row of the KV cache. The live slots are always the first n. When a response ends,
    the last row moves into its place. When enough slots are free (`worth_a_prefill`: one to eight
    of 16), new prompts are prefilled after the live ones. So every step computes only live rows.
  - Each slot has its own position, so there is no padding on the left. `SlotCache` writes each
    row's key and value in place, at that row's position (a DynamicCache copies everything at every
    step), and shows the model no more of the cache than the longest live row fills.
  - Of the next AHEAD * slots prompts the longest come first. Prompts of similar length are then
    prefilled together, with little padding, and a long one does not run alone at the end.
  - A response is yielded as soon as it has ended, with the number of its prompt. So a kill loses
    only the responses in the slots.
  - On a CPU most of a step is matrix products with few rows: see `packed_linears`.

A sample depends only on its prompt and its seed, and not on the slots, the other prompts or the
number of processes: each prompt has its own stream of uniform numbers, one per token. (Exception:
with another number of rows, rounding differs and can decide a near tie differently.)

Replaces textbook.py's `sample`. Leaves templates to harness/inputs/chat_template.py, and loading to
harness/models/weights.py. harness/models/compatibility.py decides whether an architecture can use
slots (a few need another attention, some another sampler).
Run:  python sample.py --model runs/toy/iter_3/policy --prompt "describe the fox"
Test: pytest tests/test_sample.py.    Read next: rank.py.

Legend: B prompts, n live slots, T tokens, V vocabulary, A heads, D size of one head.
"""

if __name__ == "__main__":  # the command line is harness/runs/sample_command.py
    import runpy
    runpy.run_module("harness.runs.sample_command", run_name="__main__")

import math
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm
from transformers import Cache

AHEAD = 8  # times slots: the number of prompts that are sorted by length at a time
KV_BLOCK = 128  # positions by which the cache grows: one copy in 128 steps, little unused memory

# ----------------------------------------------------------------------------------------------
# 1. The cache
# ----------------------------------------------------------------------------------------------


class SlotCache(Cache):
    """A KV cache whose rows have different positions. One (slots, A, length, D) pair per layer.

    transformers' layers call `update` with new keys and values, and attend to what it returns.
    Before each forward pass, `aim` sets the positions of the batch's tokens.
    """

    def __init__(self, slots, max_length):
        self.layers = []  # transformers' own bookkeeping, not used here
        self.slots, self.max_length = slots, max_length
        self.keys, self.values = [], []

    def aim(self, first, positions, length, prefill):
        """Row r of the next batch is slot first + r. Its tokens go to positions[r]; (n, T)."""
        self.rows = torch.arange(first, first + len(positions), device=positions.device)[:, None]
        self.positions, self.length, self.prefill = positions, length, prefill

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """(n, A, T, D) each -> the keys and values to attend to, (n, A, length, D)."""
        shown = []
        for buffers, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx == len(buffers):
                buffers.append(new.new_zeros(self.slots, new.shape[1], 0, new.shape[3]))
            if buffers[layer_idx].shape[2] < self.length:
                buffers[layer_idx] = self._grown(buffers[layer_idx])
            buffers[layer_idx][self.rows, :, self.positions] = new.transpose(1, 2)  # (n, T, A, D)
            # A prompt attends only to itself, and `new` holds all of it.
            shown.append(new if self.prefill else buffers[layer_idx][:len(new), :, :self.length])
        return tuple(shown)

    def _grown(self, old):
        length = min(-(-self.length // KV_BLOCK) * KV_BLOCK, self.max_length)
        # Zeros, not empty: masked positions get weight 0, but 0 * NaN is NaN.
        grown = old.new_zeros(*old.shape[:2], length, old.shape[3])
        grown[:, :, :old.shape[2]] = old
        return grown

    def move(self, source, target):
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]

    # transformers calls these two for the causal mask of a prefill, which has nothing before it.
    def get_seq_length(self, layer_idx=0):
        return 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        return query_length, 0


# ----------------------------------------------------------------------------------------------
# 2. One token for each live slot
# ----------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """A prompt and its response so far. (It gets a row of the cache when its prefill starts.)
    `last` is its newest token, which is not yet in the cache."""
    index: int  # of the request
    prompt: list
    last: int
    position: int  # where `last` belongs
    limit: int  # of tokens in the response
    uniforms: random.Random
    response: list = field(default_factory=list)


def pick_tokens(lm_logits, uniforms, temperature, top_p):
    """(n, V) logits and n uniform numbers in [0, 1) -> (n,) tokens; temperature 0 is greedy.

    Inverse CDF: lay the probabilities end to end on [0, 1); the token at u is the sample.
    top_p: only the likeliest tokens whose mass reaches top_p (arXiv 1904.09751, nucleus sampling).
    The tokens are laid out by id, not by rank. If two runs differ in the last digit of a logit,
    nearly equal tokens may swap ranks, and the same u would then give another token.
    """
    lm_logits = lm_logits.float()
    if temperature == 0:
        return lm_logits.argmax(-1)
    lm_logits = lm_logits - lm_logits.amax(-1, keepdim=True)  # or a tiny temperature overflows
    probs = (lm_logits / temperature).softmax(-1)  # (n, V)
    if top_p < 1:
        ranked = probs.sort(-1, descending=True).values
        kept = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)  # mass BEFORE the token
        probs = probs * (probs >= ranked.gather(-1, (kept - 1).clamp(min=0)))
    cdf = probs.double().cumsum(-1)  # float32 sums over 128k tokens are off by whole tokens
    u = torch.tensor(uniforms, dtype=torch.float64, device=cdf.device)[:, None] * cdf[:, -1:]
    # right=True: no u, not even 0, may give a token of probability 0.
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=cdf.shape[1] - 1)


def step_mask(config, positions, length, dtype):
    """positions (n,) -> the mask of each row's token over its slot, (n, 1, 1, length).

    transformers uses a 4-D mask unchanged, so it must contain the sliding window. Models that mix
    full and windowed layers (Gemma, Qwen) take a dict with one mask per kind of layer.
    """
    distance = positions[:, None] - torch.arange(length, device=positions.device)  # (n, length)

    def mask(window):
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if config._attn_implementation == "eager":  # it ADDS the mask to the scores
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return seen[:, None, None]

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError("slots need layers whose attention takes a mask, not "
                         f"{', '.join(unknown)}; harness/models/compatibility.py finds another way")
    if not kinds:  # Llama has no window; Mistral and Phi-3 have one for all layers, or None
        return mask(window)
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


@contextmanager
def packed_linears(model):
    """In this context, the model's fp32 linear layers on the CPU use oneDNN, with packed weights.

    torch uses MKL for fp32 products, which is made for many rows; a step has one row per slot. With
    16 rows, oneDNN takes 59 ms and MKL 95 (all layers of SmolLM2-135M, one core of an AMD EPYC).
    These are the operators of torch.compile's freezing, without the compiler. Trap: while sampling,
    a second copy of the weights is in memory, and the model uses that copy.
    """
    def runs_on_mkl(module):  # no subclass, and no layer that other code has wrapped
        return (type(module) is nn.Linear and "forward" not in vars(module)
                and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
                and module.weight.dtype == torch.float32)

    linears = [module for module in model.modules() if can_pack() and runs_on_mkl(module)]
    try:
        for linear in linears:
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
            linear.forward = lambda x, weight=weight, bias=linear.bias: (
                torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def can_pack():
    operators = ("_reorder_linear_weight", "_linear_pointwise")  # private: a later torch may differ
    return (torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
            and all(hasattr(torch.ops.mkldnn, name) for name in operators))


# ----------------------------------------------------------------------------------------------
# 3. The loop
# ----------------------------------------------------------------------------------------------


def generate(model, prompt_ids, *, max_new_tokens, seeds=None, progress=True, by=None, **options):
    """B lists of prompt ids -> B lists of sampled ids, in the order of the prompts.

    max_new_tokens: an int, or B of them. seeds: B ints >= 0, each for all random numbers of its
    prompt; None draws them from torch's global generator. by: `serve` or a function like it
    (harness/models/compatibility.py), which gets the other options.
    """
    count = len(prompt_ids)
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
    seeds = torch.randint(2**62, (count,)).tolist() if seeds is None else seeds
    requests = list(zip(prompt_ids, limits, seeds, strict=True))
    for i, request in enumerate(requests):  # before the first is sampled
        make_slot(model.config, i, *request)
    responses = (by or serve)(model, requests, expected=count if progress else None, **options)
    return [response for _, response in sorted(responses)]


@torch.no_grad()  # under inference_mode, buffers that a model replaces could not be trained on
def serve(model, requests, *, stop_ids, slots=16, temperature=0.0, top_p=1.0, expected=None):
    """Requests, any iterable of (prompt ids, limit, seed) -> yields (number of the request, its
    response, a list of ids), each as soon as it has ended. Reads only as many requests as it needs.

    A response ends with the first of `stop_ids` (kept), or at its limit; temperature 0 is greedy.
    expected: the number of requests (0: unknown), for a progress bar; None: no bar. Errors: those
    of `make_slot`. Trap: the model runs on a copy of its weights until the generator has ended.
    """
    check_settings(slots, temperature, top_p)
    coming = (make_slot(model.config, i, *request) for i, request in enumerate(requests))
    waiting = longest_last(coming, AHEAD * slots)
    slots = min(slots, len(waiting))
    cache = SlotCache(slots, context_length(model.config))
    live, ended, sampled, was_training = [], 0, 0, model.training
    model.eval()
    try:
        with packed_linears(model), tqdm(total=expected or None, desc="sample", unit="response",
                                         leave=False, disable=expected is None) as bar:
            while waiting or live:
                free = min(slots - len(live), len(waiting))
                enough = worth_a_prefill(slots, sampled / max(ended, 1))
                if free >= min(enough, len(waiting)) > 0:
                    taken = [waiting.pop() for _ in range(free)]
                    prefill(model, cache, [slot.prompt for slot in taken], len(live))
                    live += taken
                    waiting = waiting or longest_last(coming, AHEAD * slots)
                lm_logits = step(model, cache, live)  # (n, V)
                uniforms = [slot.uniforms.random() for slot in live] if temperature else None
                tokens = pick_tokens(lm_logits, uniforms, temperature, top_p).tolist()
                sampled += len(live)
                for slot in advance(live, cache, tokens, stop_ids):
                    ended += 1
                    bar.update()
                    yield slot.index, slot.response
    finally:
        model.train(was_training)


def by_prompt(responses, count):
    """What `serve` yields of requests that are `count` in a row for each prompt -> yields (number
    of the prompt, its responses in the order of the requests), as soon as all have ended."""
    waiting = {}  # prompt -> {number of the response: response}
    for index, response in responses:
        prompt, j = divmod(index, count)
        found = waiting.setdefault(prompt, {})
        found[j] = response
        if len(found) == count:
            del waiting[prompt]
            yield prompt, [found[j] for j in range(count)]


def worth_a_prefill(slots, length):
    """The number k of free slots at which to refill them. A prefill costs about one step for any
    number of prompts; a free slot wastes 1/slots of each step; slots / L of them end per step. (L:
    the mean length so far; at first it is too high, as unfinished responses count.) With k, a
    prompt costs 1/k of a prefill and k L / (2 slots^2) idle steps. The sum is smallest at
    k = slots * sqrt(2 / L). At most half the slots, or all would wait for the slowest few."""
    return max(1, min(slots // 2, round(slots * (2 / max(length, 1)) ** 0.5)))


def longest_last(coming, count):
    """The next slots, at most `count`, the longest prompt last."""
    return sorted(islice(coming, count), key=lambda slot: slot.position)


def make_slot(config, index, ids, limit, seed):
    """The Slot of a request. ValueError for an empty prompt, or if prompt and limit exceed the
    context."""
    if len(ids) == 0:
        raise ValueError(f"prompt {index} has no tokens; there is nothing to predict from")
    if limit < 1:
        raise ValueError(f"need max_new_tokens >= 1; got {limit}")
    if len(ids) + limit > (context := context_length(config)):
        raise ValueError(f"a prompt of {len(ids)} tokens and {limit} new ones exceed the model's "
                         f"context of {context}; shorten the prompt or the response")
    return Slot(index, ids, ids[-1], len(ids) - 1, limit, random.Random(seed))


def check_settings(slots, temperature, top_p):
    if slots < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # nan fails, too
        raise ValueError(f"need slots >= 1, temperature >= 0, 0 < top_p <= 1; got {slots}, "
                         f"{temperature}, {top_p}")


def context_length(config):
    """Most tokens of prompt + response; infinite if the model has no limit (BLOOM). Some rotary
    embeddings (dynamic, longrope) rescale ALL rows once ONE is long. Their limit is the length from
    which they rescale, because no sample may depend on its neighbours."""
    config = config.get_text_config()
    lengths = [getattr(config, name, None) for name in (
        "max_position_embeddings", "max_seq_len", "context_length")]
    rope = getattr(config, "rope_parameters", None) or {}
    for rope in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            lengths += [rope.get("original_max_position_embeddings"),
                        getattr(config, "original_max_position_embeddings", None)]
    return min((n for n in lengths if n and n > 0), default=math.inf)


def prefill(model, cache, prompts, first):
    """Writes all tokens but the last of each prompt into slots first, first + 1, ...

    The last token is the slot's first step, so tokens are sampled in one place only. Padding is on
    the right, and causal attention looks to the left, so no mask is needed. The slot's own tokens
    overwrite the padding in the cache before the slot's position reaches it.
    """
    length = max(map(len, prompts)) - 1
    if length == 0:
        return
    rows = [list(ids[:-1]) + [0] * (length + 1 - len(ids)) for ids in prompts]
    input_ids = torch.tensor(rows, device=model.device)  # (free, T)
    positions = torch.arange(length, device=model.device).expand(len(rows), -1)
    cache.aim(first, positions, length, prefill=True)
    model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True,
          logits_to_keep=1)


def step(model, cache, live):
    """Feeds the model each live slot's last token; returns the logits of the next ones, (n, V)."""
    last, positions = torch.tensor([[s.last for s in live], [s.position for s in live]],
                                   device=model.device)  # (n,) each
    length = max(s.position for s in live) + 1
    cache.aim(0, positions[:, None], length, prefill=False)
    return model(
        input_ids=last[:, None], position_ids=positions[:, None], past_key_values=cache,
        attention_mask=step_mask(model.config.get_text_config(), positions, length, model.dtype),
        use_cache=True, logits_to_keep=1).logits[:, -1]


def advance(live, cache, tokens, stop_ids):
    """Appends each slot's token, and moves the slots that end from `live` to the result."""
    ended = []
    for row in reversed(range(len(live))):  # from the end: a row that moves is done already
        slot = live[row]
        slot.response.append(tokens[row])
        slot.last, slot.position = tokens[row], slot.position + 1
        if tokens[row] in stop_ids or len(slot.response) == slot.limit:
            ended.append(slot)
            if row < len(live) - 1:
                live[row] = live[-1]
                cache.move(len(live) - 1, row)
            live.pop()
    return ended

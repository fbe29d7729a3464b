"""Sampling responses: slots instead of batches, over an unmodified transformers model.

A batch is as slow as its longest response. `model.generate` on 4 prompts at a time (each letter is
one token of one response, '.' is work on a row that has long ended):

    row 1  a a a a a a a a   e e e . . . . .         slot 1  a a a a a a a a h h
    row 2  b b . . . . . .   f f f f f f f f         slot 2  b b f f f f f f f f
    row 3  c c c c . . . .   g . . . . . . .         slot 3  c c c c e e e
    row 4  d d d d d . . .   h h . . . . . .         slot 4  d d d d d g
           time ------->  16 steps                          time ------->  10 steps

SELM samples one response for each of thousands of prompts, and their lengths differ tenfold, so:

  - A SLOT is one row of the KV cache. The moment its response ends, the slot takes the next prompt.
  - Live slots are always the first n rows: when a slot ends and no prompt waits, the last row moves
    into the hole. Every step computes n rows and no dead one, also in the tail.
  - Each slot is at its own position, so nothing is padded to the left. `SlotCache` writes each
    row's key and value where that row stands, in place (a DynamicCache copies all of it at every
    step), and shows the model no more of the cache than the longest live row fills.
  - Prompts are taken longest first: neighbours in length are prefilled together (little padding),
    and the longest sequences do not start last, with few others to share a step.
  - On a CPU most of a step is matrix products with few rows: see `packed_linears`.

A sample depends on its prompt and its seed alone, not on the slots, the other prompts or the number
of processes: each prompt has its own stream of uniform numbers, one for each token. (But another
number of rows may sum a matrix product in another order, and rounding can tip a near tie.)

Leaves chat templates to data.py, loading to model.py, ranking and training log-probs to others.
Run:  python sample.py --model runs/toy/iter_3/policy --prompt "describe the fox"
Test: pytest tests/test_sample.py.    Read next: rank.py.

Legend: B prompts, n live slots, T tokens, V vocabulary, A heads, D size of one head.
"""

import argparse
import json
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import Cache

KV_BLOCK = 128  # the cache grows by so many positions: one copy in 128 steps, little unused memory

# ----------------------------------------------------------------------------------------------
# 1. The cache
# ----------------------------------------------------------------------------------------------


class SlotCache(Cache):
    """A KV cache whose rows stand at different positions. One (slots, A, length, D) pair a layer.

    transformers' layers call `update` with new keys and values and attend to what it returns.
    Before each forward pass, `aim` says where the batch's tokens belong.
    """

    def __init__(self, slots, max_length):
        self.layers = []  # transformers' own bookkeeping, not used here
        self.slots, self.max_length = slots, max_length
        self.keys, self.values = [], []

    def aim(self, first, positions, length, prefill):
        """Row r of the next batch is slot first + r; its tokens go to positions[r] (n, T)."""
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
            # A prompt sees only itself, which is all in `new`: no need to read it back.
            shown.append(new if self.prefill else buffers[layer_idx][:len(new), :, :self.length])
        return tuple(shown)

    def _grown(self, old):
        length = min(-(-self.length // KV_BLOCK) * KV_BLOCK, self.max_length)
        # Zeros, not empty: masked positions get weight 0, but 0 * NaN would still be NaN.
        grown = old.new_zeros(*old.shape[:2], length, old.shape[3])
        grown[:, :, :old.shape[2]] = old
        return grown

    def move(self, source, target):
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]

    # What transformers asks when it makes the causal mask of a prefill: nothing lies before it.
    def get_seq_length(self, layer_idx=0):
        return 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        return query_length, 0


# ----------------------------------------------------------------------------------------------
# 2. One token for each live slot
# ----------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """A prompt and its response so far. `last` is its newest token, not yet in the cache."""
    index: int  # of the prompt
    last: int
    position: int  # where `last` belongs
    uniforms: random.Random
    response: list = field(default_factory=list)


def pick_tokens(lm_logits, uniforms, temperature, top_p):
    """(n, V) logits and n uniform numbers in [0, 1) -> (n,) tokens; temperature 0 is greedy.

    Inverse CDF: lay the probabilities end to end on [0, 1); the token under u is the sample.
    top_p: only the likeliest tokens whose mass reaches top_p (arXiv 1904.09751, nucleus sampling).
    They are laid out by token id, not by rank: where two runs differ in a logit's last digit,
    nearly equal tokens may swap ranks, and the same rank would then be another token.
    """
    lm_logits = lm_logits.float()
    if temperature == 0:
        return lm_logits.argmax(-1)
    lm_logits = lm_logits - lm_logits.amax(-1, keepdim=True)  # a tiny temperature cannot overflow
    probs = (lm_logits / temperature).softmax(-1)  # (n, V)
    if top_p < 1:
        ranked = probs.sort(-1, descending=True).values
        kept = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)  # mass BEFORE the token
        probs = probs * (probs >= ranked.gather(-1, (kept - 1).clamp(min=0)))
    cdf = probs.double().cumsum(-1)  # float32 sums over 128k tokens would be off by whole tokens
    u = torch.tensor(uniforms, dtype=torch.float64, device=cdf.device)[:, None] * cdf[:, -1:]
    # right=True: a token of probability 0 spans nothing and must never be hit, not even by u = 0.
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=cdf.shape[1] - 1)


def step_mask(config, positions, length, dtype):
    """positions (n,) -> what the token of each row sees of its slot, (n, 1, 1, length).

    transformers passes a 4-D mask through untouched, so a sliding window has to be in it. Models
    that mix full and windowed layers (Gemma, Qwen) take a dict with one mask a kind of layer.
    """
    distance = positions[:, None] - torch.arange(length, device=positions.device)  # (n, length)

    def mask(window):
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if config._attn_implementation == "eager":  # it ADDS the mask to the scores
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return seen[:, None, None]

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:  # Llama has no window; Mistral and Phi-3 have one for all layers, or None
        return mask(window)
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]


@contextmanager
def packed_linears(model):
    """Within it, the model's fp32 linear layers on the CPU use oneDNN with weights packed once.

    torch hands fp32 products to MKL, which is made for many rows; a step has one row a slot. With
    16 rows, oneDNN's kernels on pre-packed weights take 59 ms where MKL takes 95 (all layers of
    SmolLM2-135M, one core of an AMD EPYC). torch.compile's freezing does the same; these are its
    operators, without the compiler. Costs a second copy of the weights for the time of sampling.
    """
    def runs_on_mkl(module):  # not a subclass, nor a layer that somebody else has wrapped
        return (type(module) is nn.Linear and "forward" not in vars(module)
                and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"
                and module.weight.dtype == torch.float32)

    operators = ("_reorder_linear_weight", "_linear_pointwise")  # private: a later torch may differ
    available = (torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
                 and all(hasattr(torch.ops.mkldnn, name) for name in operators))
    linears = [module for module in model.modules() if available and runs_on_mkl(module)]
    try:
        for linear in linears:
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
            linear.forward = lambda x, weight=weight, bias=linear.bias: (
                torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


# ----------------------------------------------------------------------------------------------
# 3. The loop
# ----------------------------------------------------------------------------------------------


def check(model, prompt_ids, max_new_tokens, slots, temperature, top_p):
    """ValueError, one line, for what could only fail or go wrong silently later."""
    config = model.config
    if slots < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need slots >= 1, max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1; "
                         f"got {slots}, {max_new_tokens}, {temperature}, {top_p}")
    for i, ids in enumerate(prompt_ids):
        if len(ids) == 0:
            raise ValueError(f"prompt {i} has no tokens; there is nothing to predict from")
    longest, limit = max(map(len, prompt_ids)), context_length(config)
    if longest + max_new_tokens > limit:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's context of {limit}; shorten the prompt or the response")
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown or "flash" in config._attn_implementation:
        raise ValueError(f"the slot sampler needs layers whose attention takes a mask, not "
                         f"{', '.join(unknown) or config._attn_implementation}; load the model "
                         f"with attn_implementation='sdpa', or use one of plain attention")


def context_length(config):
    """Most tokens of prompt + response. Some rotary embeddings (dynamic, longrope) rescale ALL rows
    once ONE is long; they count up to there, for no sample may depend on its neighbours."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        short = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None)
        return min(short or config.max_position_embeddings, config.max_position_embeddings)
    return config.max_position_embeddings


def prefill(model, cache, prompts, first):
    """Writes all tokens but the last of each prompt into slots first, first + 1, ...

    The last token is the slot's first step, so there is one place where tokens are sampled. Padding
    stands on the right, where causal attention never looks: no mask is needed, and what padding
    leaves in the cache is overwritten before the slot's own position gets there.
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


def step(model, cache, live, temperature, top_p):
    """Feeds the last token of each live slot; returns the next token of each, a list of n ints."""
    last, positions = torch.tensor([[s.last for s in live], [s.position for s in live]],
                                   device=model.device)  # (n,) each
    length = max(s.position for s in live) + 1
    cache.aim(0, positions[:, None], length, prefill=False)
    lm_logits = model(
        input_ids=last[:, None], position_ids=positions[:, None], past_key_values=cache,
        attention_mask=step_mask(model.config, positions, length, model.dtype),
        use_cache=True, logits_to_keep=1).logits[:, -1]  # (n, V)
    uniforms = [s.uniforms.random() for s in live] if temperature else None
    return pick_tokens(lm_logits, uniforms, temperature, top_p).tolist()


def advance(live, cache, tokens, stop_ids, max_new_tokens):
    """Appends each slot's token; takes the slots that end out of `live` and returns them."""
    ended = []
    for row in reversed(range(len(live))):  # from behind: a row that moves has had its turn
        slot = live[row]
        slot.response.append(tokens[row])
        slot.last, slot.position = tokens[row], slot.position + 1
        if tokens[row] in stop_ids or len(slot.response) == max_new_tokens:
            ended.append(slot)
            if row < len(live) - 1:
                live[row] = live[-1]
                cache.move(len(live) - 1, row)
            live.pop()
    return ended


@torch.no_grad()  # inference_mode would taint buffers that a model replaces while it runs
def generate(model, prompt_ids, *, stop_ids, max_new_tokens, slots=16, temperature=0.0, top_p=1.0,
             seeds=None, progress=True):
    """B lists of prompt ids -> B lists of sampled ids, in the order of the prompts.

    A response ends with the first of `stop_ids` (kept), or without one at max_new_tokens.
    temperature 0 is greedy: the tokens of model.generate(do_sample=False). seeds: B ints >= 0, each
    fixing all random numbers of its prompt; None draws them from torch's global generator.
    ValueError for an empty prompt, or one that does not fit the context with its response.
    """
    if not prompt_ids:
        return []
    check(model, prompt_ids, max_new_tokens, slots, temperature, top_p)
    seeds = torch.randint(2**62, (len(prompt_ids),)).tolist() if seeds is None else seeds
    assert len(seeds) == len(prompt_ids), "one seed a prompt"
    slots = min(slots, len(prompt_ids))
    # When to refill? A prefill has the fixed cost of about one step, however few prompts are in it;
    # a waiting slot wastes 1/slots of each step. When slots / L of them end in a step (L: length of
    # a response), waiting until k are free costs least at k = slots * sqrt(2 / L): 1 or 2 of 16.
    refill_at = max(1, min(slots, round(slots * (2 / max_new_tokens) ** 0.5)))
    cache = SlotCache(slots, max(map(len, prompt_ids)) + max_new_tokens)
    waiting = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # longest last
    live, responses, was_training = [], [None] * len(prompt_ids), model.training
    model.eval()
    try:
        with packed_linears(model), tqdm(total=len(prompt_ids), desc="sample", unit="response",
                                         disable=not progress) as bar:
            while waiting or live:
                free = min(slots - len(live), len(waiting))
                if free >= min(refill_at, len(waiting)) > 0:
                    chosen = [waiting.pop() for _ in range(free)]
                    prefill(model, cache, [prompt_ids[i] for i in chosen], first=len(live))
                    live += [Slot(i, prompt_ids[i][-1], len(prompt_ids[i]) - 1,
                                  random.Random(seeds[i])) for i in chosen]
                tokens = step(model, cache, live, temperature, top_p)
                for slot in advance(live, cache, tokens, stop_ids, max_new_tokens):
                    responses[slot.index] = slot.response
                    bar.update()
    finally:
        model.train(was_training)
    return responses


# ----------------------------------------------------------------------------------------------
# 4. The command line: a prompt, a chat, or a file in AlpacaEval's format
# ----------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Sample from a policy: one prompt, a chat, or AlpacaEval's model outputs.",
        epilog='python sample.py --model runs/toy/iter_3/policy --prompt "describe the fox"')
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder (a run's iter_K/policy) or .gguf file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="answer this once")
    what.add_argument("--interactive", action="store_true", help="chat with history; Ctrl-D ends")
    what.add_argument("--alpaca-eval", metavar="FILE",
                      help="JSON list of objects with 'instruction' [and 'dataset']")
    add("--output", metavar="FILE", help="of --alpaca-eval: instruction, output, generator")
    add("--generator", help="name of the model in --output (default: the model folder's name)")
    add("--max-new-tokens", type=int, help="cut responses here (default: what the context has room "
                                           "for, at most 512)")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy, 1 the model itself")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--slots", type=int, default=16, help="prompts in work at a time; memory grows with it")
    add("--seed", type=int, default=0, help="same seed, same samples, whatever --slots is")
    add("--chat-template", metavar="FILE", help="Jinja file, for a tokenizer that has no template")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU, float32 on the CPU")
    args = parser.parse_args(argv)
    if bool(args.alpaca_eval) != bool(args.output):
        parser.error("--alpaca-eval and --output go together")
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    return args


def read_instructions(path, output):
    """AlpacaEval's list of objects. ValueError that names the entry which is wrong."""
    if not Path(output).absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no such folder")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--alpaca-eval {path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--alpaca-eval {path}: expected a list of objects, one or more")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise ValueError(f"--alpaca-eval {path}: entry {i} has no string 'instruction'")
    return rows


def load_answerer(args):
    """Returns a function from message lists to texts."""
    import data  # only the command line needs them: the sampler itself takes ids and a model
    import model as policies

    tokenizer = data.load_tokenizer(args.model, args.chat_template)
    chat = data.ChatFormat(tokenizer)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    model = policies.load_model(args.model, getattr(torch, dtype), args.device)
    stop_ids = chat.stop_ids

    def answer(conversations, progress=False):
        prompt_ids = [chat.prompt_ids(messages) for messages in conversations]
        limit = args.max_new_tokens
        if limit is None:
            limit = max(1, min(512, context_length(model.config) - max(map(len, prompt_ids))))
        responses = generate(
            model, prompt_ids, stop_ids=stop_ids, max_new_tokens=limit, slots=args.slots,
            temperature=args.temperature, top_p=args.top_p, progress=progress,
            seeds=[args.seed * 1_000_003 + i for i in range(len(prompt_ids))])
        cut = sum(ids[-1] not in stop_ids for ids in responses)
        if cut:
            print(f"note: {cut} of {len(responses)} cut at {limit} tokens", file=sys.stderr)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return answer


def interact(answer):
    history = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        history.append({"role": "user", "content": text})
        reply = answer([history])[0]
        history.append({"role": "assistant", "content": reply})
        print(reply)


def write_alpaca(args, rows, outputs):
    from harness.rundir import write_text  # the file appears whole or not at all

    name = args.generator or Path(args.model).resolve().name
    write_text(args.output, json.dumps([
        {**{key: row[key] for key in ("dataset", "instruction") if key in row},
         "output": output, "generator": name} for row, output in zip(rows, outputs)],
        ensure_ascii=False, indent=2))
    print(f"wrote {len(rows)} outputs to {args.output}")


def main(argv=None):
    args = parse_args(argv)
    try:
        rows = read_instructions(args.alpaca_eval, args.output) if args.alpaca_eval else []
        texts = [row["instruction"] for row in rows] or [args.prompt]
        answer = load_answerer(args)
        if args.interactive:
            return interact(answer)
        outputs = answer([[{"role": "user", "content": text}] for text in texts], bool(rows))
        if rows:
            write_alpaca(args, rows, outputs)
        else:
            print(outputs[0])
    except (ValueError, OSError, RuntimeError) as error:
        print("error:", (str(error) or repr(error)).splitlines()[0], file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The memory estimate: --dry-run prints it, and a run that would not fit on its GPU is refused.

No formula gives the memory of a forward and backward pass for every architecture. So the code of
model.py, selm.py and sample.py itself runs over fake tensors, which have shapes and no content,
and `Live` counts their bytes. No weights are loaded. The rest is arithmetic:

    n weights, m of them trained (all, without LoRA), c bytes each in the compute dtype
    one process      4n weights   4m gradient   8m AdamW's moments              all on the device
    N processes      the same / N on each device, and the layers at work, whole (FSDP2)
    --offload        cn weights   4m gradient on the device;   4n + 4m + 8m on the host, of which
                     weights and gradient are pinned, in blocks of a power of two

torch's profiler counts the same bytes in a real pass, to 0.2 %. Not counted: CUDA's own memory and
the holes between blocks on a GPU (ROOM leaves 8 % of a card for both; on a CPU HOLES adds 8 %), the
buffers of NCCL or gloo, the page cache, and the memory of a judge of your own.

Test: pytest tests/test_memory.py.    Legend: s is the Settings of a run.
"""

import functools
import math
import os
import random
import urllib.error
import urllib.request
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.bias import causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import data
import model as policies
import sample
from harness.judging.judges import parse_spec
from harness.models import distributed, weights
from harness.models.distributed import PROCESSES, say
from harness.runs.exits import one_line
from harness.runs.settings import prompts_of_iteration

CARDS = 24, 48, 80, 141  # GB of the usual GPUs
ROOM = 0.92  # the share of a GPU that a run may fill
# glibc's heap leaves holes between blocks: 4 to 11 % of the live bytes in runs on a CPU. (With LoRA
# 40 to 130 %, because its many short-lived sums lie between activations that stay.)
HOLES = 0.08

# ----------------------------------------------------------------------------------------------
# 1. Counting over fake tensors
# ----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make: alive `now`, and the largest `peak`.

    Operations on real tensors stay real. These are indices, whose values are needed.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor not in types and any(
                isinstance(x, torch.Tensor) for x in tree_leaves((args, kwargs))):
            with _disable_current_modes():
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        for tensor in [result] if isinstance(result, FakeTensor) else tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:  # a view shares its base's storage
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, key, size)

    def _died(self, key, size):
        self.known.discard(key)
        self.now -= size


@contextmanager
def counting():
    """Within it, new tensors are fake, and `Live` counts them."""
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        yield live


def kernels_for(device):
    """model.Kernels for fake tensors. These are always on the CPU, because torch without CUDA has
    no others. For a GPU there is no mask beside attention, and bf16 matrices get no fp32 copies."""
    gpu, real = device == "cuda", policies.Policy.kernels
    bias = causal_upper_left if gpu else real.causal_bias

    def causal_bias(n, m):
        with _disable_current_modes():  # torch cannot make a fake of this tensor class
            return bias(n, m)

    def takes_groups(cuda, dtype, window):
        return real.takes_groups(gpu, dtype, window)

    def matmul_fp32(a, b, out=None):
        return a.new_empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out
    return policies.Kernels(causal_bias, takes_groups, matmul_fp32 if gpu else real.matmul_fp32)


@dataclass(frozen=True)
class Passes:
    """A model's numbers of weights, and the bytes of a pass beside weights and gradient."""
    numels: tuple  # (numbers in it, whether it is trained) of each parameter
    largest: int  # weights of the largest layer
    rest: int  # weights outside of all layers: embedding, head, norm
    backward: int  # bytes at the peak of forward and backward
    forward: int  # bytes at the peak of a forward pass alone

    weights = property(lambda self: sum(numel for numel, _ in self.numels))
    trained = property(lambda self: sum(numel for numel, trained in self.numels if trained))


@functools.cache
def passes(path, compute, shape, sharded):
    """Passes for one micro-batch. shape: how many trees, prompt tokens, [tokens of a response].
    sharded: FSDP2 hands over weights in the compute dtype. Otherwise autocast copies them."""
    dtype = torch.bfloat16 if compute.dtype == "bf16" else torch.float32
    with counting() as live:
        stored = dtype if sharded else torch.float32
        model = (model_with_lora(path, compute, stored) if compute.lora_rank else
                 weights.empty_model(path, compute.attention, stored))
        policy = policies.Policy(model, compute.gradient_checkpointing,
                                 dtype if compute.dtype == "bf16" else None)
        policy.kernels = kernels_for(compute.device)
        parameters = list(policy.parameters())
        for p in parameters:  # all micro-batches of an update but the first find a gradient
            p.grad = torch.empty_like(p) if p.requires_grad else None
        batch, before = (data.pad if compute.plain_rows else data.pack)(trees_of(*shape)), live.now
        live.peak = before
        with torch.no_grad():
            policy(batch)
        forward, live.peak = live.peak - before, before
        policy(batch).sum().backward()
    count = lambda ps: sum(p.numel() for p in ps)
    layers = [count(layer.parameters()) for layer in policy.layers]
    return Passes(tuple((p.numel(), p.requires_grad) for p in parameters), max(layers),
                  count(parameters) - sum(layers), live.peak - before, forward)


def model_with_lora(path, compute, dtype):
    """A fake model with LoRA. peft moves modules between devices, and fake parameters cannot be
    moved. So the model is made on the meta device, and then its tensors are replaced by fakes."""
    with _disable_current_modes(), torch.device("meta"):
        model = weights.empty_model(path, compute.attention, dtype)
        model = distributed.add_lora(model, compute.lora_rank)
    model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))  # to_empty would not make fakes
    model.get_base_model().tie_weights()
    return model


def trees_of(count, prompt, responses):
    """Trees of these lengths."""
    return [data.Tree([3] * prompt, [[3] * n for n in responses], 0, 1, [])] * count


class SamplingNeeds(NamedTuple):
    """Bytes of sampling."""
    weights: int
    copies: int  # of the weights (sample.packed_linears)
    slots: int  # keys and values when all slots are full
    rest: int  # all else, at the peak of filling every slot, its last step, and filling all again


@functools.cache
def sampling(path, compute, lengths, slots):
    """SamplingNeeds. lengths: (tokens of a prompt, tokens of prompt + response)."""
    dtype = torch.bfloat16 if compute.dtype == "bf16" else torch.float32
    prompt, longest = lengths
    with counting() as live, torch.no_grad():
        model = weights.empty_model(path, compute.attention, dtype)
        cache = sample.SlotCache(slots, sample.context_length(model.config))
        kept = live.peak = live.now
        sample.prefill(model, cache, [[3] * prompt] * slots, 0)
        last = sample.Slot(0, [], 3, longest - 1, 1, random.Random(0))
        lm_logits = sample.step(model, cache, [last] * slots)
        sample.pick_tokens(lm_logits, [0.5] * slots, 1.0, 1.0)
        sample.prefill(model, cache, [[3] * prompt] * slots, 0)  # the cache has grown meanwhile
        slots_full = sum(x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values))
    copied = compute.device == "cpu" and compute.dtype == "fp32" and sample.can_pack()
    copies = sum(4 * m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    return SamplingNeeds(kept, copies * copied, slots_full, live.peak - kept - slots_full)


@functools.cache
def judging(ranker, device):
    """(bytes of its weights, of a forward pass of 8192 tokens) for PairRM or a reward model, and
    (0, 0) for other judges. PairRM is a DeBERTa-v3-large, so its config.json is not needed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, DebertaV2Config
    kind, path, _ = parse_spec(ranker)
    if kind not in ("pairrm", "reward"):
        return 0, 0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if kind == "pairrm":
        config = DebertaV2Config(
            vocab_size=128_100, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, position_buckets=256, relative_attention=True,
            max_relative_positions=-1, pos_att_type=["p2c", "c2p"], share_att_key=True,
            norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with counting() as live, torch.no_grad():
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
        kept = live.peak = live.now
        ids = torch.full((4, 2048) if config.pad_token_id is not None else (1, 2048), 3)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return kept, live.peak - kept


# ----------------------------------------------------------------------------------------------
# 2. The phases of a run
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Bytes on the device of one process; `host`: in host memory, of all processes together."""
    weights: float
    gradient: float = 0
    optimiser: float = 0
    activations: float = 0
    other: float = 0
    host: float = 0

    @property
    def device(self):
        return self.weights + self.gradient + self.optimiser + self.activations + self.other


def micro_batch(s):
    """The shape of a full micro-batch, for `passes`: texts are as long as the settings allow."""
    responses = 2 if s.pairs == "reference" else 2 + s.responses_per_prompt
    tree = s.max_prompt_length, (s.max_length - s.max_prompt_length,) * responses
    size = trees_of(1, *tree)[0].size
    tokens = size.rows * size.width if s.plain_rows else size.tokens
    return max(1, s.tokens_per_forward // tokens), *tree


class Uncountable(ValueError):
    """An architecture that cannot run over tensors without content."""


def phases(s, processes=PROCESSES):
    """name -> Phase of a run. On a CPU, device and host are one memory. Errors: Uncountable."""
    try:
        table = training_phases(s, processes) | sampling_phases(s)
        judge, judged = judging(s.ranker, s.device)
    except Exception as reason:  # whatever a library may raise
        raise Uncountable(f"{s.model} cannot be counted ({one_line(reason)})") from None
    table = {name: replace(phase, other=phase.other + judge) for name, phase in table.items()}
    table["ranking"] = replace(table["ranking"], activations=judged)
    if s.device == "cpu":
        table = {name: replace(phase, other=phase.other + HOLES * phase.device)
                 for name, phase in table.items()}
    return table


def training_phases(s, processes):
    """The phases that run Policy: name -> Phase, without the judge."""
    sharded = bool(s.offload) or processes > 1
    p = passes(s.model, s.compute, micro_batch(s), sharded)
    n, m, c = p.weights, p.trained, 2 if s.dtype == "bf16" else 4
    share = dict(weights=4 * n / processes, gradient=4 * m / processes,
                 optimiser=8 * m / processes)
    # FSDP2 gathers a layer for its work, and the next one meanwhile. It sums gradients in fp32,
    # from one buffer into another. Weights outside of all layers stay whole throughout.
    layers, sums = c * (p.rest + 3 * p.largest) * sharded, 8 * p.largest * sharded
    host = 4 * n * (s.device == "cuda")  # process 0 alone loads and saves all weights
    if s.offload:
        whole = processes == 1  # weights and gradient stay on the device for a whole update
        block = pinned if s.device == "cuda" else float
        blocks = [block(4 * x / processes) * (1 + trained) for x, trained in p.numels]
        # The moments are freed before the policy is saved.
        host = sum(blocks) * processes + max(8 * m, host)
        share, layers = dict(weights=c * n * whole, gradient=4 * m * whole), layers * (not whole)
    return {"training": Phase(**share, activations=p.backward, other=layers + sums, host=host),
            "reference": Phase(share["weights"], activations=p.forward, other=layers, host=4 * n)}


def sampling_phases(s):
    """The phases with a frozen policy in the compute dtype: name -> Phase, without the judge."""
    y = sampling(s.model, s.compute, (s.max_prompt_length, s.max_length), s.slots)
    # Loaded to sample, and kept while the judge works: the policy, and the start model with it.
    kept = y.weights * (2 if s.eval_prompts or s.pairs == "reference" else 1)
    return {"sampling": Phase(kept + y.copies, activations=y.rest, other=y.slots),
            "ranking": Phase(kept)}


def pinned(size):
    """Bytes of the block that torch pins for `size` bytes (CachingHostAllocator.h)."""
    return 2 ** math.ceil(math.log2(max(size, 1)))


def need(s, processes=PROCESSES):
    """(bytes on a device at the peak of the run, the phase of that peak)."""
    return max((phase.device, name) for name, phase in phases(s, processes).items())


def fitted(s):
    """s, with --offload turned on if the GPU is too small without it and large enough with it. On a
    CPU, s itself. Errors: ValueError for a run that does not fit."""
    if s.device != "cuda" or s.variant:
        return s
    room = ROOM * card()
    plain, offloaded = replace(s, offload=bool(s.offload)), replace(s, offload=True)
    try:
        needed, phase = need(plain)
        may = s.offload is None and PROCESSES == 1 and need(offloaded)[0] <= room
        host = need_of_host(offloaded)
    except Uncountable as reason:
        say(f"note: {reason}, so it is unknown whether this GPU is large enough")
        return plain
    chosen = offloaded if needed > room and may else plain
    if chosen.offload and host > host_memory():
        raise ValueError(f"--offload needs {host / 1e9:.0f} GB of host memory, and this machine "
                         f"has {host_memory() / 1e9:.0f}; {remedy(s, room, host=host_memory())}")
    if needed <= room:
        return chosen
    if may:
        say(f"--offload: this run needs {needed / 1e9:.0f} GB of a GPU and has "
            f"{room / 1e9:.0f}; its master weights go to host memory (--no-offload forbids this)")
        return chosen
    raise ValueError(f"{phase} needs {needed / 1e9:.0f} GB of a GPU, and {room / 1e9:.0f} of this "
                     f"one's {card() / 1e9:.0f} can be filled; "
                     f"{remedy(s, room, host=host_memory())}")


def card():
    """Bytes of the GPU of this process."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    return torch.cuda.get_device_properties(place).total_memory


def need_of_host(s, processes=PROCESSES):
    """Bytes of host memory at the peak of the run."""
    return max(phase.host for phase in phases(s, processes).values())


def host_memory():
    """Bytes of this machine or container. If several machines share the processes: of all of them,
    assuming that they are like this one."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except AttributeError:  # Windows
        return math.inf
    except (OSError, ValueError):  # no container, or "max"
        pass
    return min(limits) * PROCESSES / int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES))


def remedy(s, room, processes=PROCESSES, host=math.inf):
    """The flags with which a run fits into `room` bytes of a device, and with --offload into `host`
    bytes of the host. They are tried one after the other, the cheapest first, and added up."""
    tree = trees_of(1, *micro_batch(s)[1:])[0].size.tokens

    def fits(run, processes):
        return need(run, processes)[0] <= room and not (
            run.offload and need_of_host(run, processes) > host)
    for may_offload in (True, False):
        run = replace(s, offload=bool(s.offload) and may_offload)
        flags = ["--no-offload"] * (bool(s.offload) and not may_offload)
        for name, change in (
                ("--offload", {"offload": may_offload}),
                ("--gradient-checkpointing", {"gradient_checkpointing": True}),
                (f"--tokens-per-forward {tree}", {"tokens_per_forward": tree}),
                ("--slots 16", {"slots": min(16, s.slots)}),
                ("--lora-rank 16", {"lora_rank": s.lora_rank or 16})):
            smaller = replace(run, **change)
            if need(smaller, processes)[0] < need(run, processes)[0]:
                run, flags = smaller, [*flags, name]
            if fits(run, processes):
                return f"it fits with {' '.join(flags)}"
        for more in (2, 4, 8):
            if more > processes and fits(run, more):
                return f"it fits with {' '.join(flags)} under torchrun --nproc-per-node {more}"
    return "no flag makes it fit: take a smaller model, or shorter rows (--max-length)"


# ----------------------------------------------------------------------------------------------
# 3. What --dry-run prints of it
# ----------------------------------------------------------------------------------------------

FLOPS = {"cuda": 4e14, "cpu": 1e11}  # a second, of matrix products inside a training step


def describe(s, prompts):
    """The lines of the estimate. prompts: how many there are, or None."""
    processes, place = s.processes or PROCESSES, "GPU" if s.device == "cuda" else "process"
    if s.variant:
        return "memory  the toy needs less than 1 GB"
    try:
        find_config(s.model)
        table = phases(replace(s, offload=bool(s.offload)), processes)
    except ValueError as reason:
        return f"memory  no estimate: {reason}"
    cells = [("GB", "weights", "gradient", "optimiser", "activations", "other", place, "host")]
    cells += [(name, *(f"{x / 1e9:.2f}" for x in (
        p.weights, p.gradient, p.optimiser, p.activations, p.other, p.device, p.host)))
        for name, p in table.items()]
    lines = [f"memory  of one {place} of {processes}, and of their host: {s.dtype}"
             f"{', --offload' * bool(s.offload)}; GB are 10^9 bytes"
             + "; this machine has no GPU, --device cpu estimates for it" * (
                 s.device == "cuda" and not torch.cuda.is_available())]
    lines += ["        " + "".join(f"{x:<12}" for x in row).rstrip() for row in cells]
    return "\n".join(lines + [f"        {line}" for line in notes(s, processes)]
                     + times(s, prompts, processes))


def find_config(path):
    """ValueError, quickly, if config.json is not on this machine and the hub cannot be reached. The
    hub's own client would try for half a minute."""
    from huggingface_hub import constants, try_to_load_from_cache
    if os.path.exists(path) or try_to_load_from_cache(path, "config.json"):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as reason:
        raise ValueError(
            f"it needs {path}'s config.json, and the hub cannot be reached ({one_line(reason)}); "
            "run this where the hub can be reached, or put that file into a folder and give "
            "--model FOLDER (no weights needed)") from None


def notes(s, processes):
    """What the table's sums contain, and on which GPUs the run fits."""
    vocabulary = weights.load_config(s.model).vocab_size
    cache = sampling(s.model, s.compute, (s.max_prompt_length, s.max_length), s.slots).slots
    other = replace(s, gradient_checkpointing=not s.gradient_checkpointing)
    flag = f"--{'no-' * s.gradient_checkpointing}gradient-checkpointing"
    yield (f"of this: {s.slots} KV slots {cache / 1e9:.2f}, log-prob chunk "
           f"{512 * vocabulary * 4 / 1e9:.2f}, judge {judging(s.ranker, s.device)[0] / 1e9:.2f}; "
           f"with {flag} activations of "
           f"{phases(other, processes)['training'].activations / 1e9:.2f}")
    if s.device == "cuda":
        for offload in (False, True) if s.offload is None else (s.offload,):
            at = replace(s, offload=offload)
            needed, phase = need(at, processes)
            fits = next((f"{size} GB" for size in CARDS if needed <= ROOM * size * 1e9), None)
            yield (f"with{'' if offload else 'out'} --offload: {needed / 1e9:.1f} GB ({phase}); "
                   f"the smallest usual card, filled to {100 * ROOM:.0f} %: "
                   + (fits or f"none; {remedy(at, ROOM * CARDS[-1] * 1e9, processes)}"))


def times(s, prompts, processes):
    """Lines with the hours of one iteration, if all texts are as long as they may be."""
    per = prompts_of_iteration(s, prompts)
    if per is None:
        return []
    n = passes(s.model, s.compute, micro_batch(s), bool(s.offload) or processes > 1).weights
    layers, speed = weights.load_config(s.model).num_hidden_layers, FLOPS[s.device] * processes
    tokens = per * trees_of(1, *micro_batch(s)[1:])[0].size.tokens
    factor = (4 if s.lora_rank else 6) + 2 * s.gradient_checkpointing
    training = factor * n * tokens * s.epochs / speed
    if s.offload:  # AdamW reads and writes 28 bytes a weight, 8 more go to the device and back
        training += math.ceil(per / s.batch_size) * s.epochs * 36 * n / 50e9
    reference = 2 * n * tokens / speed
    new = min(s.max_new_tokens, s.max_length - s.max_prompt_length)
    steps = per * s.responses_per_prompt * new / s.slots / processes
    step = 1e-3 * layers if s.device == "cuda" else 2 * n * s.slots / FLOPS["cpu"]
    host = "50 GB/s of host memory, " if s.offload else ""
    lines = [f"time    of an iteration, if all rows are full: training {training / 3600:.1f} h, "
             f"reference {reference / 3600:.1f} h, sampling {steps * step / 3600:.1f} h",
             f"        assuming {FLOPS[s.device] / 1e12:g} TFLOP/s, {host}{step * 1e3:.0f} ms a "
             "token of all slots: guesses, not measured"]
    if s.device == "cuda":
        lines += ["        (1 ms a layer: plain transformers waits for its kernel launches; at 64",
                  "        slots a 7B model is about an order of magnitude slower than in an",
                  "        engine such as vLLM, see --samples-from)"]
    return lines

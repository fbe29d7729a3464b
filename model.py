"""The policy: loading, the packed forward pass to response log-probs, saving, LoRA, sharding.

The architecture is transformers' own, unmodified. Ours is what happens around it:

  - `tree_attention` enforces the tree mask of data.py without any mask: it calls ordinary causal
    attention once a response, on [prompt; response]. What is masked out is never computed, where
    a (T, T) mask over the packed line would compute everything and throw most of it away.
  - `Policy.forward` runs the backbone without its head and hands the hidden states of response
    tokens to selm.token_logps, so (tokens, vocabulary) logits never exist.
  - There is no reference model. At the start of an iteration the reference IS the policy: the same
    forward, under no_grad, before the first update, gives its log-probs once and for all. Same code
    and dtype, so the loss of step 0 is ln 2 to the last digits; train_loop.py asserts it.

Leaves the loss to selm.py, the optimiser to train_loop.py, generation to sample.py.
Test: pytest tests/test_model.py.    Read next: sample.py.

Legend: R responses, T tokens of a micro-batch, N response tokens, V vocabulary, H hidden size,
A attention heads, D size of one head.
"""

import ctypes
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForCausalLM)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import selm

# ----------------------------------------------------------------------------------------------
# 1. Tree attention
# ----------------------------------------------------------------------------------------------


class TreeLayout:
    """Where the trees of a packed line lie; travels through transformers' layers to the attention.

    trees: a (prompt length, [response lengths]) for each, in order and without gaps.
    use_flex: one FlexAttention call for the whole line, its BlockMask skipping what no token sees
    (CUDA, compiled); otherwise one call a response.
    """

    def __init__(self, trees, use_flex=False):
        self.trees, self.use_flex, self.block_masks = trees, use_flex, {}
        self.segment_lengths = [n for p, responses in trees for n in (p, *responses)]
        self.longest = max(p + max(responses) for p, responses in trees)

    def mask_function(self, window, device):
        """(b, h, q, k) -> may token q see token k? FlexAttention's form; also the tests' oracle."""
        tree, segment, position = [], [], []
        for t, (p, responses) in enumerate(self.trees):
            for s, n in enumerate((p, *responses)):  # segment 0 is the prompt
                tree += [t] * n
                segment += [s] * n
                position += range(n) if s == 0 else range(p, p + n)
        tree, segment, position = (
            torch.tensor(x, device=device) for x in (tree, segment, position))  # (T,) each

        def may_see(b, h, q, k):
            same_branch = (segment[k] == 0) | (segment[k] == segment[q])
            near = position[q] - position[k] < window
            return (q >= k) & (tree[q] == tree[k]) & same_branch & near
        return may_see

    def block_mask(self, window, device):
        if window not in self.block_masks:
            tokens = sum(self.segment_lengths)
            self.block_masks[window] = create_block_mask(
                self.mask_function(window, device), None, None, tokens, tokens, device=device)
        return self.block_masks[window]


@torch.compiler.disable  # --compile: dynamo would compile anew for every micro-batch's layout
def tree_attention(module, query, key, value, attention_mask, tree_layout=None, scaling=None,
                   sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """transformers' attention interface: query (1, A, T, D), key and value (1, A_kv, T, D) ->
    ((1, T, A, D), None). Without a tree_layout it is transformers' own sdpa, so sampling and
    `model.generate` work on the same model object. Dropout is off: DPO compares two passes."""
    if tree_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      sliding_window=sliding_window, **kwargs)
    if softcap is not None or s_aux is not None:
        raise ValueError("this architecture caps or sinks its attention scores, which the packed "
                         "attention does not compute; use --plain-rows")
    window = sliding_window if sliding_window and sliding_window < tree_layout.longest else None
    if tree_layout.use_flex:
        mask = tree_layout.block_mask(window or tree_layout.longest, query.device)
        # Autocast casts for sdpa, not for this; norms of queries and keys (Qwen3) leave them fp32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        # TRITON: left to itself it takes a decoding kernel for short lines, which has no backward.
        out = _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True,
                               kernel_options={"BACKEND": "TRITON"})
        return out.transpose(1, 2).contiguous(), None  # (1, T, A, D)

    # split, not slices: the backward of each slice would allocate and add a whole (A, T, D) tensor.
    pieces = zip(*(x.split(tree_layout.segment_lengths, dim=2) for x in (query, key, value)))
    outputs = []
    for p, responses in tree_layout.trees:
        prompt = next(pieces)
        for i, n in enumerate(responses):
            # [prompt; response] is a plain causal sequence. The prompt's queries are computed again
            # for each response: less work than a mask that the causal kernel cannot skip by.
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(prompt, next(pieces)))
            mask = None if window is None else _causal_window(p + n, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                 scale=scaling, enable_gqa=True)  # (1, A, p + n, D)
            outputs.append((out if i == 0 else out[:, :, p:]).transpose(1, 2))
    return torch.cat(outputs, dim=1), None  # (1, T, A, D)


def _causal_window(length, window, device):
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)  # (length, length)


def _compiled_flex(_cache=[]):
    if not _cache:  # compiled on first use: torch.compile at import would slow every command
        _cache.append(torch.compile(flex_attention, dynamic=True))
    return _cache[0]


AttentionInterface.register("selm_tree", tree_attention)
AttentionMaskInterface.register("selm_tree", sdpa_mask)

# ----------------------------------------------------------------------------------------------
# 2. The policy
# ----------------------------------------------------------------------------------------------


def load_model(path, dtype=torch.float32, device="cpu", attention="selm_tree"):
    """A causal LM from a hub id, a folder or a .gguf file, in eval mode. ValueError if it fails.

    attention: "eager" for --plain-rows (transformers' slowest and most faithful: it alone knows
    every architecture's capped scores and sinks).
    """
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            os.path.dirname(path) or "." if gguf else path, dtype=dtype,
            attn_implementation=attention, **gguf)
    except Exception as error:
        raise ValueError(f"--model {path}: could not be loaded as a causal language model "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
    if gguf:  # transformers would refuse to save what it takes for a quantised model
        model.is_quantized, model.hf_quantizer = False, None
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, name):
                delattr(model.config, name)
    if not model.generation_config.do_sample:
        # Many hub models say "greedy, temperature 0.6"; save_pretrained would refuse that, but only
        # after the training.
        for name in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, name, None)
    return model.to(device).eval()


def keep_freed_memory():
    """Tells glibc to keep freed memory for the next micro-batch (CPU, Linux; elsewhere nothing).

    By default it gives large blocks back to the system at once, and each activation of the next
    layer is faulted in page by page again: several percent of a training step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def load_config(path):
    """The configuration of what load_model would load, without its weights."""
    path = str(path)
    gguf = {"gguf_file": os.path.basename(path)} if path.endswith(".gguf") else {}
    try:
        config = AutoConfig.from_pretrained(os.path.dirname(path) or "." if gguf else path, **gguf)
        return config.get_text_config()
    except Exception as error:
        raise ValueError(f"--model {path}: no model configuration could be loaded "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None


class Policy(nn.Module):
    """A causal LM seen as pi(y|x): micro-batch in, one log-prob a response out.

    autocast_dtype: bf16 compute over fp32 master weights, or None. checkpointing: recompute each
    layer in backward (less memory for one more forward pass). compile: a torch.compile backend
    ("inductor") for each layer, or None.
    """

    def __init__(self, model, checkpointing=False, autocast_dtype=None, compile=None):
        super().__init__()
        self.model = model
        self.autocast_dtype, self.use_flex = autocast_dtype, False
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # training mode below must not bring dropout back
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        if checkpointing:
            self.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
            self.causal_lm.enable_input_require_grads()  # LoRA freezes what the first layer reads
            self.model.train()  # transformers checkpoints in training mode only
        if compile:
            for layer in self.layers:
                # Dynamo cannot leave a graph inside a checkpoint, as tree_attention makes it do: of
                # a checkpointed layer it would compile nothing.
                for part in layer.children() if checkpointing else [layer]:
                    part.compile(backend=compile, dynamic=True)

    @property
    def causal_lm(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self):
        return getattr(self.causal_lm, self.causal_lm.base_model_prefix)

    @property
    def layers(self):
        return self.backbone.layers

    def forward(self, batch):
        """MicroBatch -> log pi(y|x) of each response, (R,) fp32, in nats."""
        device = batch.input_ids.device
        autocast = (torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype
                    else nullcontext())
        if batch.layout is None:
            attention = {"attention_mask": batch.attention_mask}
        else:
            # A 4-D mask is passed through as it is: transformers builds none of its own, and
            # tree_attention never reads this one.
            attention = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
                         "tree_layout": TreeLayout(batch.layout, self.use_flex)}
        with autocast:
            hidden = self.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids,
                                   use_cache=False, **attention).last_hidden_state
            hidden = hidden.flatten(0, 1)[batch.predicted_from]  # (N, H), response tokens only
            head = self.causal_lm.get_output_embeddings()
            token_logps = selm.token_logps(
                hidden, head.weight, batch.targets, head.bias,
                softcap=getattr(self.causal_lm.config, "final_logit_softcapping", None))  # (N,)
        return selm.response_logps(token_logps, batch.response_index, batch.responses)  # (R,)


@torch.no_grad()
def self_check(policy, make_batch, trees, packed=True):
    """Compares our log-probs with the model's own logits, one response at a time.

    Some architectures ignore position_ids, mix tokens outside attention (Mamba) or scale their
    logits (Granite, Cohere); log-probs would then be wrong without a sign. ValueError says so.
    make_batch: data.pack, or data.pad for packed=False. `trees`: a few short ones. Runs in the
    weights' dtype, without autocast, before sharding.
    """
    advice = "use --plain-rows" if packed else "its head is not supported; see Policy.forward"
    autocast_dtype, policy.autocast_dtype = policy.autocast_dtype, None
    device = next(policy.parameters()).device
    expected = []
    for tree in trees:
        for response in tree.responses:
            n = len(response)
            ids = torch.tensor([tree.prompt_ids + response], device=device)
            lm_logits = policy.causal_lm(ids, use_cache=False).logits[0, -n - 1:-1].float()
            expected.append(lm_logits.log_softmax(-1).gather(1, ids[0, -n:, None]).sum())
    expected = torch.stack(expected)
    try:
        got = policy(make_batch(trees).to(device))
        error = (got - expected).abs().max().item()
    except (ValueError, TypeError, AttributeError, RuntimeError) as reason:
        raise ValueError(f"{type(policy.causal_lm).__name__} cannot run our forward pass "
                         f"({str(reason).splitlines()[0]}); {advice}") from None
    finally:
        policy.autocast_dtype = autocast_dtype
    longest = max(len(response) for tree in trees for response in tree.responses)
    tolerance = longest * (1e-4 if next(policy.parameters()).dtype == torch.float32 else 0.05)
    if not error <= tolerance:  # also catches NaN
        raise ValueError(f"{type(policy.causal_lm).__name__}: our log-probs and the model's differ "
                         f"by {error:.2g} nats (at most {tolerance:.2g} is rounding); {advice}")
    return error


def flex_check(policy, batch):
    """Compares FlexAttention with one call a response, under autocast, forward and backward.

    The step-0 check could not see a wrong kernel: policy and reference would share it. batch: a
    packed line of a few hundred tokens, more than one block of the mask. ValueError if they differ.
    """
    weight, results = next(policy.layers.parameters()), []
    for policy.use_flex in (False, True):
        try:
            logps = policy(batch)
            gradient, = torch.autograd.grad(logps.sum(), weight)  # through every attention call
        except Exception as reason:  # whatever a compiler may raise
            raise ValueError(str(reason).splitlines()[0]) from None
        results.append((logps.detach(), gradient.float()))
    exact = weight.dtype == torch.float32 and policy.autocast_dtype is None
    errors = [((flex - plain).norm() / plain.norm()).item() for plain, flex in zip(*results)]
    if not (errors[0] < (1e-3 if exact else 0.02) and errors[1] < (1e-2 if exact else 0.2)):
        raise ValueError("its log-probs and gradient differ from plain attention's by "
                         f"{errors[0]:.1%} and {errors[1]:.1%}")


# ----------------------------------------------------------------------------------------------
# 3. Saving
# ----------------------------------------------------------------------------------------------


def save_policy(policy, tokenizer, folder):
    """Writes a plain Hugging Face folder (LoRA merged in); it appears whole or not at all.

    A sharded policy must be saved by all processes together; rank 0 writes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    folder, temporary = Path(folder), Path(f"{folder}.tmp")
    distributed = any(hasattr(p, "full_tensor") for p in policy.parameters())  # DTensors
    model = (policy.model.merge_and_unload() if hasattr(policy.model, "merge_and_unload")
             else policy.model)
    state = None
    if distributed:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
    if not distributed or torch.distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    if distributed:
        torch.distributed.barrier()

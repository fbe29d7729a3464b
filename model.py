"""The policy pi(y|x): a packed forward pass from token ids to response log-probs.

The model itself is transformers' own, unmodified. This file changes what happens around it:

  - `tree_attention` needs no mask. It runs causal attention once over the prompt, and once per
    response over [prompt; response]. A (T, T) mask over the packed line would compute scores
    between all trees and responses, and then throw most of them away.
  - `Policy.forward` runs the decoder without its head and passes the hidden states of response
    tokens to selm.token_logps, so (tokens, vocabulary) logits never exist.
  - There is no reference model. At the start of an iteration the reference IS the policy, so its
    log-probs are computed once, before the first update, by the same forward under no_grad. With
    the same code and dtype both agree up to rounding; train_loop.check_update_zero checks it.
  - A policy is never in training mode. DPO compares two passes over the same text. Dropout or a
    router's noise would make them differ without any update.

Some architectures cannot be packed. harness/models/compatibility.py compares our numbers with the
model's own before a run. With --plain-rows, transformers does everything (mask, positions,
attention, head).

Replaces textbook.py's `logps` and its deep-copied reference. Leaves the loss to selm.py, the
optimiser to train_loop.py, generation to sample.py, loading and saving to
harness/models/weights.py, processes and LoRA to harness/models/distributed.py.
Test: pytest tests/test_model.py tests/test_compatibility.py.    Read next: sample.py.

Legend: R responses, T tokens of a micro-batch, N response tokens, V vocabulary, H hidden size,
A attention heads, D size of one head.
"""

from contextlib import nullcontext
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import selm

# ----------------------------------------------------------------------------------------------
# 1. The policy
# ----------------------------------------------------------------------------------------------


def takes_groups(cuda, dtype, window):
    """Whether a kernel takes fewer key heads than query heads without storing all (A, n, m) scores.
    On CUDA only flash attention does, and it takes neither masks (see transformers'
    sdpa_attention.py) nor fp32. Not measured here."""
    return not cuda or window is None and dtype != torch.float32


class Kernels(NamedTuple):
    """What a GPU computes in another way than a CPU. harness/models/memory.py counts the memory of
    a GPU that is not here, and replaces these by functions for tensors without content."""
    causal_bias: Callable = causal_lower_right  # (n, m) -> bias: the last n of m see all before
    takes_groups: Callable = takes_groups
    matmul_fp32: Callable = selm.matmul_fp32


class Policy(nn.Module):
    """A causal LM as pi(y|x): micro-batch in, one log-prob per response out.

    autocast_dtype: bf16 compute over fp32 master weights, or None. checkpointing: recompute each
    layer in backward, which saves memory and costs one more forward pass. compile: a torch.compile
    backend ("inductor") for each layer, or None.
    """

    kernels = Kernels()

    def __init__(self, model, checkpointing=False, autocast_dtype=None, compile=None):
        super().__init__()
        self.model, self.autocast_dtype = model.eval(), autocast_dtype
        self.device = next(model.parameters()).device  # distributed.shard: weights may be elsewhere
        for layer in self.layers:
            if compile:
                # tree_attention breaks dynamo's graph. Inside a checkpoint dynamo cannot resume
                # after a break, so it would compile nothing of a checkpointed layer.
                for part in layer.children() if checkpointing else [layer]:
                    part.compile(backend=compile, dynamic=True)
            if checkpointing:  # transformers' own works in training mode only
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                        preserve_rng_state=False)  # nothing here is random

    @property
    def causal_lm(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self):
        return self.causal_lm.get_decoder()  # of a vision-language model: its text model

    @property
    def layers(self):
        """The decoder layers: the outermost list of modules, as every architecture has another name
        for it. (A list of experts is inside a layer, and so comes later.)"""
        return next(m for m in self.backbone.modules() if isinstance(m, nn.ModuleList))

    def forward(self, batch):
        """MicroBatch -> log pi(y|x) of each response, (R,) fp32, in nats."""
        autocast = (torch.autocast(batch.input_ids.device.type, self.autocast_dtype)
                    if self.autocast_dtype else nullcontext())
        with autocast:
            token_logps = (self._packed_token_logps(batch) if batch.layout else
                           self._plain_token_logps(batch))  # (N,)
        return selm.response_logps(token_logps, batch.response_index, batch.responses)  # (R,)

    def _packed_token_logps(self, batch):
        layout = TreeLayout(batch.layout, self.kernels)
        # transformers builds no mask if it gets a 4-D one. tree_attention does not read this one.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        hidden = self.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids,
                               attention_mask=mask, use_cache=False,
                               tree_layout=layout).last_hidden_state
        if layout.calls != len(self.layers):  # layers without attention, or with one of their own
            raise ValueError(f"{layout.calls} of its {len(self.layers)} layers use our attention")
        hidden = hidden.flatten(0, 1)[batch.predicted_from]  # (N, H), response tokens only
        head = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config.get_text_config()
        return selm.token_logps(hidden, head.weight, batch.targets, head.bias,
                                softcap=getattr(config, "final_logit_softcapping", None),
                                matmul=self.kernels.matmul_fp32)  # (N,)

    def _plain_token_logps(self, batch):
        """--plain-rows: from the model's own logits, whatever its head does to them.

        The logits of all rows exist here, (rows, T, V). Their softmax in fp32 exists for one row at
        a time, and is computed again in backward.
        """
        rows, width = batch.input_ids.shape
        position = batch.predicted_from % width  # (N,), in its row
        kept = width - int(position.min())  # no logits where all rows have prompt
        lm_logits = self.causal_lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                                   use_cache=False, logits_to_keep=kept).logits
        position = position - width  # from the right: some models keep all logits anyway
        lengths = batch.response_index.bincount(minlength=rows).tolist()
        pieces = zip(lm_logits.unbind(0), position.split(lengths), batch.targets.split(lengths))
        return torch.cat([checkpoint(_row_logps, *piece, use_reentrant=False)
                          for piece in pieces])  # (N,)


def _row_logps(lm_logits, position, targets):
    """(T, V), (n,), (n,) -> (n,)"""
    return lm_logits[position].float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------
# 2. Tree attention
# ----------------------------------------------------------------------------------------------


class TreeLayout:
    """The lengths of a packed line's trees. transformers' layers pass it on to the attention.

    trees: (prompt length, [response lengths]) of each, in order and without gaps. kernels: those of
    the policy. calls: the number of layers that have used it.
    """

    def __init__(self, trees, kernels):
        self.trees, self.kernels, self.calls = trees, kernels, 0
        self.segment_lengths = [n for p, responses in trees for n in (p, *responses)]
        self.longest = max(p + max(responses) for p, responses in trees)


@torch.compiler.disable  # with --compile, dynamo would recompile for every micro-batch's layout
def tree_attention(module, query, key, value, attention_mask, tree_layout=None, scaling=None,
                   sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """transformers' attention interface: query (1, A, T, D), key and value (1, A_kv, T, D) ->
    ((1, T, A, D), None). Without a tree_layout it calls transformers' own sdpa, so sampling and
    `model.generate` work on the same model object."""
    if softcap is not None or s_aux is not None:  # sdpa would silently ignore sinks
        raise ValueError("its attention scores are capped or have sinks, which only eager "
                         "attention computes")
    if tree_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      sliding_window=sliding_window, **kwargs)
    tree_layout.calls += 1
    kernels = tree_layout.kernels
    window = sliding_window if sliding_window and sliding_window < tree_layout.longest else None

    def attend(q, k, v):
        """The last n of m tokens attend causally to all m: -> (1, n, A, D)."""
        mask = (kernels.causal_bias if window is None else
                partial(_causal_window, window, q.device))
        if not kernels.takes_groups(q.is_cuda, q.dtype, window):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2], k.shape[2]),
                                              scale=scaling, enable_gqa=True).transpose(1, 2)

    # split, not slices: the backward of each slice would allocate and add a whole (A, T, D) tensor.
    # One dtype for all: causal_lower_right checks the dtypes before autocast casts them for sdpa.
    pieces = zip(*(x.to(value.dtype).split(tree_layout.segment_lengths, dim=2)
                   for x in (query, key, value)))
    outputs = []
    for _, responses in tree_layout.trees:
        q, prompt_k, prompt_v = next(pieces)
        outputs.append(attend(q, prompt_k, prompt_v))
        for _ in responses:  # each attends to [prompt; response] and to no other response
            q, k, v = next(pieces)
            outputs.append(attend(q, torch.cat((prompt_k, k), 2), torch.cat((prompt_v, v), 2)))
    return torch.cat(outputs, dim=1), None  # (1, T, A, D)


def _causal_window(window, device, n, m):
    """The mask of the last n of m tokens, (n, m): True where one may attend to another."""
    distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register("selm_tree", tree_attention)
AttentionMaskInterface.register("selm_tree", sdpa_mask)

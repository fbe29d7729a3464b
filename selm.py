"""The SELM objective on plain tensors: log-probs without logits, the DPO loss, the optimism term.

Self-Exploring Language Models (SELM), arXiv 2405.19332 v3. The derivation, in the paper's letters
(its y' is what all code calls y or `sampled`; its y_w, y_l are `chosen`, `rejected`):

  1. Bradley-Terry: P(y_w beats y_l | x) = sigmoid(r(x, y_w) - r(x, y_l)); L(r; D) is its negative
     log-likelihood on the preferences D. Many rewards fit D about equally well.
  2. Among them, take the one that promises most: under which the best policy gains most over
     pi_ref (a bilevel objective; means are over the prompts x, too):
         max_r  -L(r; D) + alpha * max_pi { E[r(x, y) - r(x, y')] - beta * KL(pi || pi_ref) }
     with y ~ pi, y' ~ pi_ref. Where D does not say how good an answer is, that is optimism.
  3. For a fixed r the inner maximum is the usual KL-regularised one: its solution is
         pi_r(y|x) = pi_ref(y|x) * exp(r(x, y) / beta) / Z_r(x),   Z_r(x) the sum over all y,
     and its value is  E_x[ beta * log Z_r(x) - E_{y' ~ pi_ref} r(x, y') ].
  4. Reparametrise by the policy:  r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)). Then Z_r(x) = 1,
     pi_r = pi, beta * log Z_r vanishes, and the two-level problem becomes one level:
         min_pi  L_DPO(pi; D) + alpha * beta * E_{y' ~ pi_ref}[log pi(y'|x) - log pi_ref(y'|x)].
     (r has lost a shift that depends on x alone; it cancels in 1 and in r(x, y) - r(x, y').)
  5. What is left (Eq. 4.2): DPO, plus a term that pushes DOWN the log-prob of the reference's own
     samples y'. alpha = 0 is (iterative) DPO.

What Algorithm 1 makes of it is a heuristic: pi_ref moves on with every iteration, D is that
iteration's portion alone, and the authors' y' is the GREEDY answer. With y' ~ pi_ref the term's
mean is -alpha * beta * KL(pi_ref || pi), whose gradient is zero at pi = pi_ref, where each
iteration starts (the mean of grad log pi(y') over y' ~ pi is the gradient of sum_y pi(y) = 1). With
the greedy y' it pushes the mode down from the first update on; where y' is chosen as well, DPO's
slope of -beta/2 outweighs its alpha * beta below alpha = 1/2. What that is good for is not derived,
but measured: README, "What optimism does".

A log-prob of a response is the SUM over its tokens of log softmax(lm_logits)[token], in fp32. With
a vocabulary of 128k, the (N, V) logits are by far the largest tensor of preference training, and
two numbers per row are all that is needed: the target's logit and the logsumexp. `token_logps`
never holds them all.

Replaces textbook.py's `loss`, and the (B, T, V) logits of its `logps`. Knows nothing of models,
tokenizers, devices or files: tensors in, tensors out.
Test: pytest tests/test_selm.py.    Read next: data.py.

Legend: B prompts, R responses, N response tokens of all of them, V vocabulary, H hidden size.
"""

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------
# 1. Token log-probs: the textbook version, and the same numbers without the logits
# ----------------------------------------------------------------------------------------------


def textbook_token_logps(hidden, weight, targets, bias=None, softcap=None):
    """What `token_logps` computes, in four lines with (N, V) tensors. For tests and readers."""
    lm_logits = F.linear(hidden, weight, bias).float()  # (N, V)
    if softcap is not None:
        lm_logits = softcap * torch.tanh(lm_logits / softcap)
    return lm_logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,)


def token_logps(hidden, weight, targets, bias=None, softcap=None, chunk_tokens=512):
    """log softmax(hidden @ weight.T + bias)[n, targets[n]] for every n, without the (N, V) logits.

    Forward needs one number per row beside the target's logit: log p = logit[target] - logsumexp.
    Backward needs softmax(logits) again; recomputing it (all but the first chunk) costs up to one
    more matmul, 4 instead of 3, and peak memory falls from several N x V to one chunk_tokens x V,
    however large the batch is.

    hidden (N, H), weight (V, H), targets (N,) int64, bias (V,) or None; softcap: Gemma's
    cap * tanh(logits / cap), or None. Returns (N,) in fp32 (fp64 for fp64 inputs).
    `hidden[n]` must be the state that PREDICTS targets[n], i.e. of the token before it: the shift
    by one is the caller's, and forgetting it is the classic bug.
    Under autocast the matmuls take inputs of the autocast dtype and sum in fp32, but the gradient
    of an fp32 weight stays fp32.
    Idea: Liger kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1], (
        f"hidden {tuple(hidden.shape)} and head weight {tuple(weight.shape)} must share H")
    assert targets.shape == hidden.shape[:1], "one target per row of hidden"
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    return _TokenLogps.apply(hidden, weight, bias, targets, softcap, compute_dtype, chunk_tokens)


def _matmul_fp32(a, b, out=None):
    """a @ b with products summed and returned in fp32, also for bf16 inputs (fp64 stays fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # only CUDA has out_dtype
    return torch.mm(a.float(), b.float(), out=out)


class _TokenLogps(torch.autograd.Function):
    """Chunked log-probs with a recomputing backward; `token_logps` is the front door."""

    @staticmethod
    def _buffer(hidden, weight, compute_dtype, chunk_tokens):
        """(V, chunk): every chunk's logits lie in it, so there is one chunk of them at a time."""
        dtype = torch.promote_types(compute_dtype, torch.float32)
        return hidden.new_empty(len(weight), min(len(hidden), chunk_tokens), dtype=dtype)

    @staticmethod
    def _lm_logits(hidden_chunk, weight, bias, softcap, buffer):
        # hidden @ weight.T, (chunk, V), computed as its transpose: on a CPU it saves 4 to 7 %.
        lm_logits = _matmul_fp32(weight, hidden_chunk.t(), out=buffer[:, :len(hidden_chunk)]).t()
        if bias is not None:
            lm_logits += bias
        if softcap is not None:
            lm_logits.div_(softcap).tanh_().mul_(softcap)
        return lm_logits

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, compute_dtype, chunk_tokens):
        # Autocast would round the fp32 logits back to bf16 behind our back.
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(compute_dtype)
            buffer = _TokenLogps._buffer(hidden, weight, compute_dtype, chunk_tokens)
            target_logits, largest, exp_sum = buffer.new_empty(3, len(hidden), 1)  # (N, 1) each
            # Last chunk first: the backward pass starts with the first chunk and finds its
            # exponentials still in the buffer. That saves a product, and the peak stays.
            for start in reversed(range(0, len(hidden), chunk_tokens)):
                rows = slice(start, start + chunk_tokens)
                lm_logits = _TokenLogps._lm_logits(
                    hidden[rows].to(compute_dtype), compute_weight, bias, softcap, buffer)
                target_logits[rows] = lm_logits.gather(1, targets[rows, None])
                largest[rows] = lm_logits.amax(1, keepdim=True)  # torch.logsumexp, but in place
                exp_sum[rows] = lm_logits.sub_(largest[rows]).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, exp_sum)
        ctx.first_exps = lm_logits if softcap is None and len(hidden) else None
        ctx.settings = softcap, compute_dtype, chunk_tokens
        return (target_logits - (exp_sum.log() + largest)).squeeze(1)

    @staticmethod
    def backward(ctx, grad_logps):
        """d logp[n] / d logits[n] = onehot(target) - softmax(logits[n]); then two matmuls."""
        hidden, weight, bias, targets, largest, exp_sum = ctx.saved_tensors
        softcap, compute_dtype, chunk_tokens = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        sum_dtype, compute_weight = exp_sum.dtype, weight.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # One accumulator for all chunks. addmm_ adds to it in place, as a (V, H) temporary a chunk
        # costs more than the chunk's logits; only a sum wider than its inputs (bf16) needs one.
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias else None
        # Taken once: they are overwritten below, and a second backward pass computes its own.
        exps, ctx.first_exps = ctx.first_exps, None
        buffer = (_TokenLogps._buffer(hidden, weight, compute_dtype, chunk_tokens)
                  if exps is None else exps.t())
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows, cap_slope = slice(start, start + chunk_tokens), None
                h, g = hidden[rows].to(compute_dtype), grad_logps[rows, None].to(sum_dtype)
                if start or exps is None:
                    lm_logits = _TokenLogps._lm_logits(h, compute_weight, bias, softcap, buffer)
                    if softcap is not None:  # its derivative needs the logits exp_ will destroy
                        cap_slope = 1 - (lm_logits / softcap) ** 2
                    exps = lm_logits.sub_(largest[rows]).exp_()
                grad_logits = exps.mul_(-g / exp_sum[rows])  # (chunk, V), of softmax = exps / sum
                grad_logits.scatter_add_(1, targets[rows, None], g)
                if cap_slope is not None:
                    grad_logits *= cap_slope
                if need_bias:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(compute_dtype)
                if need_hidden:
                    grad_hidden[rows] = _matmul_fp32(grad_logits, compute_weight).to(hidden.dtype)
                if need_weight and compute_dtype == sum_dtype:
                    grad_weight.addmm_(grad_logits.t(), h)
                elif need_weight:
                    grad_weight += _matmul_fp32(grad_logits.t(), h)
        return (grad_hidden,
                grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
                grad_bias if grad_bias is None else grad_bias.to(bias.dtype), *[None] * 4)


def response_logps(token_logps, response_index, responses):
    """Sums token log-probs into response log-probs: (N,), (N,) in [0, R) -> (R,) fp32.

    A sum, not a mean: pi(y|x) is a product over tokens. (Length-normalised variants of DPO divide
    here; neither DPO nor SELM does.)
    """
    return token_logps.new_zeros(responses).index_add(0, response_index, token_logps)


# ----------------------------------------------------------------------------------------------
# 2. The losses
# ----------------------------------------------------------------------------------------------


def dpo_losses(policy_chosen_logps, policy_rejected_logps,
               ref_chosen_logps, ref_rejected_logps, beta):
    """The DPO loss of each pair, (B,) tensors in and out. arXiv 2305.18290, Eq. 7.

    losses = -log sigmoid(beta * (policy_logratios - ref_logratios)); ln 2 where policy and
    reference agree.
    """
    policy_logratios = policy_chosen_logps - policy_rejected_logps  # (B,)
    ref_logratios = ref_chosen_logps - ref_rejected_logps  # (B,)
    margin = policy_logratios - ref_logratios  # (B,) in nats
    return -F.logsigmoid(beta * margin)


def selm_loss(policy_chosen_logps, policy_rejected_logps, policy_sampled_logps,
              ref_chosen_logps, ref_rejected_logps, ref_sampled_logps, *, alpha, beta,
              optimism="selm"):
    """The SELM loss of each example: DPO + optimism. arXiv 2405.19332 v3, Eq. 4.2.

    All inputs are (B,) sums over response tokens, in nats; the ref_* ones are constants (detached
    here: a reference that learns is a silent bug). `sampled` is the fresh sample y ~ pi_ref, ALSO
    where y won or lost the ranking and is chosen or rejected as well. Of several samples per prompt
    pass the mean: the term is linear. With alpha = 0 both sampled inputs may be None.
    optimism: which term, a name in OPTIMISM. Returns (losses (B,), metrics: name -> (B,) detached).
    """
    assert beta > 0, f"beta is the strength of the KL anchor and must be > 0, got {beta}"
    assert alpha >= 0, f"alpha < 0 would be pessimism; got {alpha}"
    assert alpha == 0 or policy_sampled_logps is not None, "the optimism term needs the samples"
    ref_chosen_logps, ref_rejected_logps = ref_chosen_logps.detach(), ref_rejected_logps.detach()
    losses = dpo_losses(policy_chosen_logps, policy_rejected_logps,
                        ref_chosen_logps, ref_rejected_logps, beta)
    metrics = {"dpo_loss": losses}
    if policy_sampled_logps is not None:
        ref_sampled_logps = ref_sampled_logps.detach()
        losses = losses + OPTIMISM[optimism](policy_sampled_logps, ref_sampled_logps, alpha, beta)
        metrics["sampled_logratio"] = policy_sampled_logps - ref_sampled_logps
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # implicit
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    metrics |= {"loss": losses,
                "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                "reward_margin": chosen_rewards - rejected_rewards,
                # A tie is half right: at step 0 the accuracy is 0.5, not 0.
                "accuracy": (chosen_rewards > rejected_rewards).float()
                            + 0.5 * (chosen_rewards == rejected_rewards).float()}
    return losses, {name: value.detach() for name, value in metrics.items()}


# The optimism terms, to MINIMISE: all of them push y down. (B,), (B,) of y under policy and
# reference -> (B,). A published port of XPO has the sign turned; tests/test_selm.py looks at it.


def selm_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """alpha * beta * log pi(y)/pi_ref(y). arXiv 2405.19332 v3, Eq. 4.2.

    DEVIATION: Algorithm 1 of the paper prints alpha alone; Eq. 4.2 and the authors' released
    trainer have alpha * beta. We follow the equation. log pi_ref(y) does not depend on theta;
    subtracting it makes the term 0 at the start.
    """
    return alpha * beta * (policy_sampled_logps - ref_sampled_logps)


def xpo_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """alpha log pi(y): no beta, no reference. XPO, arXiv 2405.21046, Algorithm 1."""
    return alpha * policy_sampled_logps


def popo_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """(alpha / beta) (sigmoid(beta * log pi(y)/pi_ref(y)) - 1/2): 0 and of slope alpha / 4 at the
    start, bounded: what is down already is pushed no further. POPO, arXiv 2502.00666, and its code.
    """
    return alpha / beta * (torch.sigmoid(beta * (policy_sampled_logps - ref_sampled_logps)) - 0.5)


OPTIMISM = {"selm": selm_optimism, "xpo": xpo_optimism, "popo": popo_optimism}

"""The SELM objective on plain tensors: log-probs without logits, pair losses, optimism terms.

Self-Exploring Language Models (SELM), arXiv 2405.19332 v3. The derivation, in the paper's letters
(the code calls y_w, y_l and y' `chosen`, `rejected` and `sampled`; y' is also called y):

  1. Bradley-Terry: P(y_w beats y_l | x) = sigmoid(r(x, y_w) - r(x, y_l)). L(r; D) is the negative
     log-likelihood of r on the preferences D. Many rewards fit D about equally well.
  2. Among them, take the one whose best policy gains most over pi_ref (means are over x, too):
         max_r  -L(r; D) + alpha * max_pi { E[r(x, y) - r(x, y')] - beta * KL(pi || pi_ref) }
     with y ~ pi, y' ~ pi_ref.
  3. For a fixed r, the inner maximum is the usual KL-regularised one. It is reached by
         pi_r(y|x) = pi_ref(y|x) * exp(r(x, y) / beta) / Z_r(x),   Z_r(x) the sum over all y,
     and its value is  E_x[V_r(x) - E_{y' ~ pi_ref} r(x, y')]  with  V_r(x) = beta * log Z_r(x).
     V_r is what r PROMISES. L sees only differences of r between labelled answers, so the rewards
     of all other answers, and with them V_r, are free. Among rewards that fit the labels alike,
     the objective prefers the one that promises most: optimism. Example (experiments/evidence/regret.py, to
     the end and with its cost): one x, r(0) = 0, pi_ref = (0.9997, 0.0001, 0.0001, 0.0001), beta =
     0.05. pi_ref samples answer 0 nearly always, and comparing 0 with itself teaches nothing:
         r = ( 0,  0, 0, 0)   V = 0      pi_r = pi_ref. DPO waits until chance samples 1, 2 or 3.
         r = ( 0,  2, 2, 2)   V = 1.59   SELM's first choice, if all |r| <= 2: pi_r gives 1, 2 or 3,
                                         and the judge compares it with 0. Say that 1 loses.
         r = ( 0, -2, 2, 2)   V = 1.57   promises most among what fits: pi_r tries 2 or 3. If 2
                                         wins, the label confirms the promise, and pi_r keeps 2.
  4. Reparametrise by the policy:  r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)). Then Z_r(x) = 1,
     V_r = 0, pi_r = pi, and the two levels become one:
         min_pi  L_DPO(pi; D) + alpha * beta * E_{y' ~ pi_ref}[log pi(y'|x) - log pi_ref(y'|x)].
     (This r differs from that of step 3 by V_r(x), which cancels in steps 1 and 2. Hence the
     log-ratio of y' holds the promise: beta * log(pi_r(y')/pi_ref(y')) = r(x, y') - V_r(x).)
  5. The result (Eq. 4.2) is DPO plus a term that pushes DOWN the log-prob of the reference's own
     samples y'. alpha = 0 is (iterative) DPO.

Algorithm 1 is a heuristic form of this: pi_ref changes in every iteration, D is the portion of that
iteration, gradient steps replace the exact minimum, and the authors' y' is the GREEDY answer.
  - With y' ~ pi_ref the term's mean is -alpha * beta * KL(pi_ref || pi). Its gradient is zero at
    pi = pi_ref, where each iteration starts: it is proportional to that of sum_y pi(y) = 1 there.
  - With the greedy y the term prefers a large V_r(x) - r(x, y), the promise above that one answer,
    and pushes y down from the first update. Once another answer is likelier than y, the NEXT
    iteration's greedy answer is that one, and it is judged. Where y is chosen as well, y still
    rises if alpha < 1/2: at the start DPO's slope is -beta/2, and the term's is alpha * beta. The
    theory does not cover this y; README, "What optimism does", reports what we measured.

A response's log-prob is the SUM over its tokens of log softmax(lm_logits)[token], in fp32. With
128k words, the (N, V) logits are by far the largest tensor of preference training, but two numbers
per row are enough: the target's logit and the logsumexp. `token_logps` never holds all logits.

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
    """The plain form of `token_logps`, with (N, V) tensors. For tests and readers."""
    lm_logits = F.linear(hidden, weight, bias).float()  # (N, V)
    if softcap is not None:
        lm_logits = softcap * torch.tanh(lm_logits / softcap)
    return lm_logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)  # (N,)


def matmul_fp32(a, b, out=None):
    """a @ b with products summed and returned in fp32, also for bf16 inputs (fp64 stays fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # only CUDA has out_dtype
    return torch.mm(a.float(), b.float(), out=out)


def token_logps(hidden, weight, targets, bias=None, softcap=None, chunk_tokens=512,
                matmul=matmul_fp32):
    """log softmax(hidden @ weight.T + bias)[n, targets[n]] for every n, without the (N, V) logits.

    Forward computes log p = logit[target] - logsumexp, one chunk of rows at a time. Backward needs
    softmax(logits) and computes the logits again. That costs a fourth matmul, but peak memory falls
    from several N x V to one chunk_tokens x V, however large the batch is.

    hidden (N, H), weight (V, H), targets (N,) int64, bias (V,) or None; softcap: Gemma's
    cap * tanh(logits / cap), or None. Returns (N,) in fp32 (fp64 for fp64 inputs).
    matmul: another one only counts memory (harness/models/memory.py).
    Trap: `hidden[n]` must be the state that PREDICTS targets[n], which is that of the token before.
    The caller makes this shift by one; forgetting it is the classic bug.
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
    return _TokenLogps.apply(hidden, weight, bias, targets, softcap, compute_dtype, chunk_tokens,
                             matmul)


class _TokenLogps(torch.autograd.Function):
    """Chunked log-probs whose backward recomputes the logits. Call `token_logps` instead."""

    @staticmethod
    def _buffer(hidden, weight, compute_dtype, chunk_tokens):
        """(V, chunk): memory for the logits of one chunk, which all chunks use in turn."""
        dtype = torch.promote_types(compute_dtype, torch.float32)
        return hidden.new_empty(len(weight), min(len(hidden), chunk_tokens), dtype=dtype)

    @staticmethod
    def _lm_logits(hidden_chunk, weight, bias, softcap, buffer, matmul):
        # hidden @ weight.T, (chunk, V), as the transpose of its transpose: 4 to 7 % less time.
        lm_logits = matmul(weight, hidden_chunk.t(), out=buffer[:, :len(hidden_chunk)]).t()
        if bias is not None:
            lm_logits += bias
        if softcap is not None:
            lm_logits.div_(softcap).tanh_().mul_(softcap)
        return lm_logits

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, compute_dtype, chunk_tokens, matmul):
        # Autocast would round the fp32 logits to bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            compute_weight = weight.to(compute_dtype)
            buffer = _TokenLogps._buffer(hidden, weight, compute_dtype, chunk_tokens)
            target_logits, largest, exp_sum = buffer.new_empty(3, len(hidden), 1)  # (N, 1) each
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                lm_logits = _TokenLogps._lm_logits(
                    hidden[rows].to(compute_dtype), compute_weight, bias, softcap, buffer, matmul)
                target_logits[rows] = lm_logits.gather(1, targets[rows, None])
                largest[rows] = lm_logits.amax(1, keepdim=True)  # logsumexp in place
                exp_sum[rows] = lm_logits.sub_(largest[rows]).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, exp_sum)
        ctx.settings = softcap, compute_dtype, chunk_tokens, matmul
        return (target_logits - (exp_sum.log() + largest)).squeeze(1)

    @staticmethod
    def backward(ctx, grad_logps):
        """d logp[n] / d logits[n] = onehot(target) - softmax(logits[n]); then two matmuls."""
        hidden, weight, bias, targets, largest, exp_sum = ctx.saved_tensors
        softcap, compute_dtype, chunk_tokens, matmul = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        sum_dtype, compute_weight = exp_sum.dtype, weight.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # One sum for all chunks. addmm_ adds in place, because a (V, H) temporary costs more than a
        # chunk's logits. Only a sum that is wider than its inputs (bf16) needs such a temporary.
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if need_bias else None
        buffer = _TokenLogps._buffer(hidden, weight, compute_dtype, chunk_tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows, cap_slope = slice(start, start + chunk_tokens), None
                h, g = hidden[rows].to(compute_dtype), grad_logps[rows, None].to(sum_dtype)
                lm_logits = _TokenLogps._lm_logits(h, compute_weight, bias, softcap, buffer, matmul)
                if softcap is not None:  # before exp_ overwrites the logits
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
                    grad_hidden[rows] = matmul(grad_logits, compute_weight).to(hidden.dtype)
                if need_weight and compute_dtype == sum_dtype:
                    grad_weight.addmm_(grad_logits.t(), h)
                elif need_weight:
                    grad_weight += matmul(grad_logits.t(), h)
        return (grad_hidden,
                grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
                grad_bias if grad_bias is None else grad_bias.to(bias.dtype), *[None] * 5)


def response_logps(token_logps, response_index, responses):
    """Sums token log-probs into response log-probs: (N,), (N,) in [0, R) -> (R,) fp32.

    A sum, not a mean: pi(y|x) is a product over tokens. (Length-normalised variants of DPO divide
    here. DPO and SELM do not.)
    """
    return token_logps.new_zeros(responses).index_add(0, response_index, token_logps)


# ----------------------------------------------------------------------------------------------
# 2. The losses
# ----------------------------------------------------------------------------------------------


# The losses of a pair, by its margin (B,): log pi/pi_ref of chosen minus that of rejected, in nats.


def dpo_losses(margin, beta):
    """-log sigmoid(beta * margin). DPO, arXiv 2305.18290, Eq. 7. It is ln 2 at margin 0."""
    return -F.logsigmoid(beta * margin)


def ipo_losses(margin, beta):
    """(margin - 1 / (2 beta))^2: the margin has a target and stops there, however clear the labels
    are. IPO, arXiv 2310.12036, Eq. 17 (its tau is beta). Trap: alpha and the learning rate need
    other values than with DPO, as the slope at margin 0 is -1 / beta instead of -beta / 2."""
    return (margin - 1 / (2 * beta)) ** 2


PREFERENCE_LOSS = {"dpo": dpo_losses, "ipo": ipo_losses}

def selm_loss(policy_chosen_logps, policy_rejected_logps, policy_sampled_logps,
              ref_chosen_logps, ref_rejected_logps, ref_sampled_logps, *, alpha, beta,
              loss="dpo", optimism="selm"):
    """The SELM loss of each example: DPO + optimism. arXiv 2405.19332 v3, Eq. 4.2.

    All inputs are (B,) sums over response tokens, in nats. The ref_* ones are constants (detached
    here: a reference that learns is a silent bug). `sampled` is the fresh sample y ~ pi_ref, ALSO
    where y won or lost the ranking and is chosen or rejected as well. Of several samples per prompt
    pass the mean: the term is linear. With alpha = 0 both sampled inputs may be None.
    loss, optimism: names in PREFERENCE_LOSS, OPTIMISM. Returns losses (B,), metrics: name -> (B,).
    """
    assert beta > 0, f"beta is the strength of the KL anchor and must be > 0, got {beta}"
    assert alpha >= 0, f"alpha < 0 would be pessimism; got {alpha}"
    assert alpha == 0 or policy_sampled_logps is not None, "the optimism term needs the samples"
    ref_chosen_logps, ref_rejected_logps = ref_chosen_logps.detach(), ref_rejected_logps.detach()
    policy_logratios = policy_chosen_logps - policy_rejected_logps  # (B,)
    ref_logratios = ref_chosen_logps - ref_rejected_logps  # (B,)
    margin = policy_logratios - ref_logratios  # (B,)
    losses = PREFERENCE_LOSS[loss](margin, beta)
    metrics = {"preference_loss": losses}
    if policy_sampled_logps is not None:
        ref_sampled_logps = ref_sampled_logps.detach()
        losses = losses + OPTIMISM[optimism](policy_sampled_logps, ref_sampled_logps, alpha, beta)
        metrics["sampled_logratio"] = policy_sampled_logps - ref_sampled_logps
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # implicit
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    metrics |= {"loss": losses,
                "chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                "reward_margin": chosen_rewards - rejected_rewards,
                # A tie is half right: before the first update the accuracy is 0.5, not 0.
                "accuracy": (chosen_rewards > rejected_rewards).float()
                            + 0.5 * (chosen_rewards == rejected_rewards).float()}
    return losses, {name: value.detach() for name, value in metrics.items()}


# The optimism terms, to MINIMISE: all of them push y down. Log-probs of y under the policy and the
# reference, (B,) each -> (B,). Trap: a published port of XPO has the sign turned.


def selm_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """alpha * beta * log pi(y)/pi_ref(y). arXiv 2405.19332 v3, Eq. 4.2.

    DEVIATION: Algorithm 1 of the paper prints alpha alone; Eq. 4.2 and the authors' released
    trainer have alpha * beta. We follow the equation. log pi_ref(y) does not depend on theta;
    subtracting it makes the term start at 0.
    """
    return alpha * beta * (policy_sampled_logps - ref_sampled_logps)


def xpo_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """alpha log pi(y): no beta, no reference. XPO, arXiv 2405.21046, Algorithm 1."""
    return alpha * policy_sampled_logps


def popo_optimism(policy_sampled_logps, ref_sampled_logps, alpha, beta):
    """(alpha / beta) (sigmoid(beta * log pi(y)/pi_ref(y)) - 1/2). POPO, arXiv 2502.00666, and its
    code. It starts at 0 with slope alpha / 4, and is bounded: a y that is far down is pushed less.
    """
    return alpha / beta * (torch.sigmoid(beta * (policy_sampled_logps - ref_sampled_logps)) - 0.5)


OPTIMISM = {"selm": selm_optimism, "xpo": xpo_optimism, "popo": popo_optimism}

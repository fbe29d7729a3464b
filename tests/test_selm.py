"""The objective against closed forms, Python floats, finite differences, torch's own functions."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import selm


def problem(n=11, hidden=6, vocabulary=13, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=g, dtype=dtype)
    w = torch.randn(vocabulary, hidden, generator=g, dtype=dtype)
    b = torch.randn(vocabulary, generator=g, dtype=dtype)
    return h, w, b, torch.randint(vocabulary, (n,), generator=g)


def test_log_probs_at_a_vocabulary_of_three_equal_a_hand_calculation():
    """A softmax over the wrong axis, or a target taken from another row."""
    # hidden = identity: row n of the logits is column n of the weight.
    weight = torch.tensor([[0.0, math.log(2)], [0.0, 0.0], [math.log(2), 0.0]])  # logits (2, 3)
    hidden = torch.eye(2)  # row 0: logits 0, 0, ln 2 -> p = 1/4, 1/4, 1/2; row 1: 1/2, 1/4, 1/4
    got = selm.token_logps(hidden, weight, torch.tensor([2, 1]))
    assert got.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)], abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_gradients_pass_gradcheck(with_bias, softcap):
    """A wrong sign, a lost chunk, a cap or bias that forward knows and backward forgets; what a
    second backward pass (gradcheck runs one) finds overwritten."""
    h, w, b, t = problem()
    inputs = [x.requires_grad_() for x in ((h, w, b) if with_bias else (h, w))]

    def f(hidden, weight, bias=None):
        return selm.token_logps(hidden, weight, t, bias, softcap, chunk_tokens=4)
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("chunk", [1, 3, 11, 64])
def test_the_fused_version_equals_the_textbook_for_every_chunk_size(chunk):
    """A last partial chunk that is dropped, or counted twice."""
    h, w, b, t = problem(dtype=torch.float32)
    grads = []
    for f in (selm.textbook_token_logps,
              lambda *a, **k: selm.token_logps(*a, chunk_tokens=chunk, **k)):
        hw = [x.clone().requires_grad_() for x in (h, w, b)]
        out = f(hw[0], hw[1], t, bias=hw[2], softcap=3.0)
        (out * torch.arange(1, 12)).sum().backward()
        grads.append([out.detach()] + [x.grad for x in hw])
    for ours, textbook in zip(*grads):
        torch.testing.assert_close(ours, textbook, atol=2e-5, rtol=1e-4)


def test_a_vocabulary_wide_gradient_skips_what_needs_none():
    """A (V, H) weight gradient computed for a frozen head: LoRA would pay for it."""
    h, w, _, t = problem(dtype=torch.float32)
    for frozen in ("hidden", "weight"):
        context = SimpleNamespace(
            saved_tensors=(h, w, None, t, torch.zeros(len(h), 1), torch.ones(len(h), 1)),
            settings=(None, torch.float32, 4, selm.matmul_fp32),
            needs_input_grad=(frozen != "hidden", frozen != "weight", False))
        grads = selm._TokenLogps.backward(context, torch.ones(len(h)))
        assert (grads[0] is None) == (frozen == "hidden")
        assert (grads[1] is None) == (frozen == "weight")


def test_huge_logits_do_not_overflow():
    """exp before subtracting the maximum."""
    h, w, _, t = problem(dtype=torch.float32)
    expected = torch.log_softmax((1e4 * h) @ w.T, -1).gather(1, t[:, None]).squeeze(1)
    got = selm.token_logps(1e4 * h, w, t)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-2)


def test_no_response_tokens_give_no_log_probs():
    """torch.cat of an empty list."""
    h, w, _, t = problem(dtype=torch.float32)
    assert selm.token_logps(h[:0], w, t[:0]).shape == (0,)


def test_under_bf16_autocast_sums_are_fp32_and_the_weight_gradient_stays_fp32():
    """Autocast that rounds the logits to bf16 (errors of 0.5 nats a response), or a master weight
    whose gradient comes back in bf16."""
    h, w, _, t = problem(n=64, hidden=32, vocabulary=300, dtype=torch.float32)
    w.requires_grad_()
    rounded_h, rounded_w = h.bfloat16().double(), w.detach().bfloat16().double()
    expected = torch.log_softmax(rounded_h @ rounded_w.T, -1).gather(1, t[:, None]).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = selm.token_logps(h, w, t, chunk_tokens=16)
    got.sum().backward()
    assert got.dtype == torch.float32 and w.grad.dtype == torch.float32
    # Exact for inputs rounded to bf16: nothing after that is rounded to bf16 again.
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_tied_weight_collects_the_gradients_of_both_its_uses():
    """A backward that writes the weight's gradient instead of adding to the embedding's."""
    _, w, _, t = problem(dtype=torch.float32)
    grads = []
    for f in (selm.token_logps, selm.textbook_token_logps):
        tied = w.clone().requires_grad_()
        f(torch.tanh(tied[t]), tied, t.roll(1)).sum().backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_response_log_probs_are_sums_over_their_own_tokens():
    """A mean instead of a sum, or a token counted for its neighbour."""
    token_logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    got = selm.response_logps(token_logps, torch.tensor([0, 0, 1, 2, 2]), 4)
    assert got.tolist() == [-3.0, -4.0, -24.0, 0.0]


# ----------------------------------------------------------------------------------------------
# The losses
# ----------------------------------------------------------------------------------------------


def logps(seed, b=5):
    g = torch.Generator().manual_seed(seed)
    return [-30 * torch.rand(b, generator=g, dtype=torch.float64) for _ in range(6)]


def loss_in_python_floats(pc, pr, ps, rc, rr, rs, alpha, beta):
    """Eq. 4.2 for one example, on Python floats, written without looking at selm.py."""
    margin = beta * ((pc - rc) - (pr - rr))
    return math.log(1 + math.exp(-margin)) + alpha * beta * (ps - rs)


@pytest.mark.parametrize("alpha, beta", [(0.0, 0.1), (0.001, 0.01), (0.3, 1.0)])
def test_the_loss_equals_the_formula_on_python_floats(alpha, beta):
    """A swapped role, a missing beta, a wrong sign."""
    x = logps(0)
    losses, _ = selm.selm_loss(*x, alpha=alpha, beta=beta)
    expected = [loss_in_python_floats(*(v[i].item() for v in x), alpha, beta) for i in range(5)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name, formula", [
    ("dpo", lambda margin, beta: math.log(1 + math.exp(-beta * margin))),
    ("ipo", lambda margin, beta: margin**2 - margin / beta + 1 / (4 * beta**2))])
def test_each_loss_of_a_pair_is_its_papers_formula(name, formula):
    """A sign, a beta, or the 2 in IPO's target that is dropped. Oracle: Python floats, with IPO's
    square multiplied out."""
    pc, pr, ps, rc, rr, rs = logps(6)
    for beta in (0.1, 1.0):
        _, metrics = selm.selm_loss(pc, pr, ps, rc, rr, rs, alpha=0.3, beta=beta, loss=name)
        expected = [formula(margin, beta) for margin in ((pc - rc) - (pr - rr)).tolist()]
        assert metrics["preference_loss"].tolist() == pytest.approx(expected, rel=1e-9)


def test_policy_equal_to_reference_gives_exactly_ln_2_and_no_optimism():
    """An optimism term without the reference's log-prob: it would not start at 0."""
    p = logps(1)[:3]
    losses, metrics = selm.selm_loss(*p, *p, alpha=0.7, beta=0.3)
    assert losses.tolist() == [pytest.approx(math.log(2), abs=1e-15)] * 5
    assert metrics["sampled_logratio"].tolist() == [0.0] * 5
    assert metrics["accuracy"].tolist() == [0.5] * 5


def test_alpha_zero_is_dpo():
    """A second code path for DPO that drifts from the first."""
    pc, pr, ps, rc, rr, rs = logps(2)
    losses, _ = selm.selm_loss(pc, pr, None, rc, rr, None, alpha=0.0, beta=0.2)
    expected = -torch.nn.functional.logsigmoid(0.2 * ((pc - rc) - (pr - rr)))
    torch.testing.assert_close(losses, expected)
    with_samples, _ = selm.selm_loss(pc, pr, ps, rc, rr, rs, alpha=0.0, beta=0.2)
    torch.testing.assert_close(losses, with_samples)


def test_gradients_equal_finite_differences_and_the_reference_gets_none():
    """A reference that learns; a sampled response without gradient."""
    x = [v.requires_grad_() for v in logps(3)]
    alpha, beta = 0.4, 0.3
    selm.selm_loss(*x, alpha=alpha, beta=beta)[0].sum().backward()
    for k in range(3):
        for i in range(5):
            values = [v[i].item() for v in x]
            step = 1e-5
            up, down = list(values), list(values)
            up[k] += step
            down[k] -= step
            numeric = (loss_in_python_floats(*up, alpha, beta)
                       - loss_in_python_floats(*down, alpha, beta)) / (2 * step)
            assert x[k].grad[i].item() == pytest.approx(numeric, abs=1e-7)
    assert all(v.grad is None for v in x[3:])


def test_descending_the_optimism_term_pushes_the_sampled_log_prob_down():
    """The classic sign error: optimism that imitates the old policy."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=g)
    weight = torch.randn(20, 8, generator=g).requires_grad_()
    y = torch.randint(20, (6,), generator=g)
    before = selm.token_logps(hidden, weight, y).sum()
    zero = torch.zeros(1)  # chosen and rejected do not depend on the weight: optimism alone
    loss = selm.selm_loss(zero, zero, before[None], zero, zero, before.detach()[None],
                          alpha=0.5, beta=1.0)[0].mean()
    loss.backward()
    after = selm.token_logps(hidden, (weight - 1e-2 * weight.grad).detach(), y).sum()
    assert after < before


def test_inputs_are_not_mutated():
    """An in-place op that changes the caller's hidden states or log-probs."""
    x = logps(4)
    h, w, b, t = problem(dtype=torch.float32)
    copies = [v.clone() for v in (*x, h, w, b)]
    selm.selm_loss(*x, alpha=0.1, beta=0.1)
    selm.token_logps(h.requires_grad_(), w.requires_grad_(), t, b, softcap=3.0).sum().backward()
    assert all(torch.equal(a, c) for a, c in zip((*x, h, w, b), copies))


@pytest.mark.parametrize("alpha, beta", [(-0.1, 0.1), (0.1, 0.0)])
def test_settings_that_change_the_methods_meaning_are_refused(alpha, beta):
    """A negative alpha (imitation) or beta = 0 (no anchor) that runs without a word."""
    with pytest.raises(AssertionError):
        selm.selm_loss(*logps(5), alpha=alpha, beta=beta)


@pytest.mark.parametrize("name, term", [
    ("selm", lambda p, r, alpha, beta: alpha * beta * (p - r)),
    ("xpo", lambda p, r, alpha, beta: alpha * p),
    ("popo", lambda p, r, alpha, beta: alpha / beta * (1 / (1 + math.exp(-beta * (p - r))) - 0.5))])
def test_each_optimism_term_is_its_papers_formula_and_pushes_y_down(name, term):
    """A factor of another paper; a sign turned, as in a published port of XPO: y would be pulled
    up. Oracle: the formula in Python floats; the derivative by a central difference."""
    alpha, beta = 0.3, 0.7
    for p, r in ((-3.0, -5.0), (-40.0, -2.0), (-1.5, -1.5)):
        zeros = torch.zeros(1)
        y = torch.tensor([p], requires_grad=True)
        losses, _ = selm.selm_loss(zeros, zeros, y, zeros, zeros, torch.tensor([r]), alpha=alpha,
                                   beta=beta, optimism=name)
        assert losses.item() - math.log(2) == pytest.approx(term(p, r, alpha, beta), abs=1e-6)
        losses.sum().backward()
        slope = (term(p + 1e-4, r, alpha, beta) - term(p - 1e-4, r, alpha, beta)) / 2e-4
        assert y.grad.item() == pytest.approx(slope, rel=1e-3, abs=1e-7)
        assert y.grad.item() > 0, "descent lowers log pi(y)"


def test_popo_starts_at_zero_with_slope_alpha_over_four_and_is_bounded():
    """The centre forgotten: a loss that jumps; a bound that is not there."""
    y = torch.tensor([-2.0, -1e4, 1e4], requires_grad=True)
    values = selm.popo_optimism(y, torch.tensor([-2.0, 0.0, 0.0]), alpha=0.3, beta=0.7)
    assert values.tolist() == pytest.approx([0.0, -0.5 * 0.3 / 0.7, 0.5 * 0.3 / 0.7], abs=1e-6)
    values[0].backward()
    assert y.grad[0].item() == pytest.approx(0.3 / 4)


def test_metrics_are_the_implicit_rewards_and_their_margin_in_floats():
    """A plotted reward without beta, or of the policy alone: readers compare it between runs."""
    values = [torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -3.5, -4.0, -6.0)]
    _, metrics = selm.selm_loss(*values, alpha=0.3, beta=0.7)
    assert metrics["chosen_reward"].item() == pytest.approx(0.7 * (-3.0 + 3.5))
    assert metrics["rejected_reward"].item() == pytest.approx(0.7 * (-5.0 + 4.0))
    assert metrics["reward_margin"].item() == pytest.approx(0.7 * 1.5)
    assert metrics["sampled_logratio"].item() == pytest.approx(2.0)
    assert metrics["accuracy"].item() == 1.0
    dpo = math.log(1 + math.exp(-0.7 * 1.5))
    assert metrics["preference_loss"].item() == pytest.approx(dpo, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(dpo + 0.3 * 0.7 * 2.0, rel=1e-5)


def test_the_example_of_the_derivation_has_true_numbers():
    """A story about optimism that the formula does not tell: the promises V printed in selm.py's
    header, and that the log-ratio of answer 0 holds them."""
    ref, beta = [0.9997, 0.0001, 0.0001, 0.0001], 0.05
    assert f"pi_ref = ({', '.join(map(str, ref))})" in selm.__doc__
    found = re.findall(r"r = \(([-\d, ]+)\)   V = ([\d.]+)", selm.__doc__)
    assert len(found) == 3
    for rewards, promise in found:
        weights = [p * math.exp(int(r) / beta) for p, r in zip(ref, rewards.split(","))]
        assert round(beta * math.log(sum(weights)), 2) == float(promise)
        policy_0 = weights[0] / sum(weights)
        assert round(-beta * math.log(policy_0 / ref[0]), 2) == float(promise)

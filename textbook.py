"""All of SELM on one page, slowly. Read this file first: after it you know the whole method.

SELM (Self-Exploring Language Models, arXiv 2405.19332) teaches a language model by preferences that
it makes itself, and makes it curious on the way. It starts from a policy pi that answers prompts, a
set of prompts x with two known answers each (y_w, y_l: "data_chosen", "data_rejected"), and a judge
that can say which of several answers is best. Algorithm 1 of the paper:

    for each portion of the prompts:
        pi_ref = pi, frozen
        y = pi_ref's greedy answer (the paper: y ~ pi_ref)                       `sample`
        chosen, rejected = best, worst of {y, y_w, y_l}, says the judge          `rank`
        minimise over the portion, by gradient steps on pi,                      `loss`
            - log sigmoid( beta * [ log pi(chosen)/pi_ref(chosen)
                                  - log pi(rejected)/pi_ref(rejected) ] )        DPO
            + alpha * beta * log pi(y)/pi_ref(y)                                 optimism

The first term is DPO (arXiv 2305.18290): make chosen more likely than rejected, measured against
pi_ref. The second is what SELM adds: push DOWN what the model already says by habit, so that
probability moves to answers that it has not tried. (Greedy matters: for a random y ~ pi_ref the
term's mean gradient is zero where pi = pi_ref; selm.py says why.) alpha = 0 is iterative DPO, the
comparison that isolates the term.

Everything is as plain as it can be: padded batches, full logits, a copy of the model as reference,
`model.generate`. The other files compute the same numbers several times faster in a fraction of the
memory, and say what of this one they replace. A test runs both and compares them.

    python textbook.py      SELM on the toy world (harness/toy.py), ten seconds; one seed and half
                            of the default run's rows, hence other numbers than README's table

Legend: B prompts, T tokens of the longest row, V vocabulary. Log-probs are in nats.
"""

import copy
import math
import random

import torch
import torch.nn.functional as F


def self_explore(policy, tokenizer, portions, judge, *, alpha, beta, lr, batch_size, max_new_tokens,
                 adam=None, max_grad_norm=1.0, order=None):
    """Algorithm 1; changes `policy` in place. Yields after each portion (examples, losses).

    portions: lists of {"prompt": messages, "data_chosen": text, "data_rejected": text}; judge:
    (prompts, lists of texts) -> lists of scores; lr: one per portion; order(k, n): in which order
    iteration k visits its n examples (at random).
    """
    for k, (portion, peak) in enumerate(zip(portions, lr), 1):
        reference = copy.deepcopy(policy).requires_grad_(False)
        examples = []
        for record in portion:
            prompt, y_w, y_l = tokenise(tokenizer, record)
            y = sample(reference, prompt, max_new_tokens)
            chosen, rejected = rank(tokenizer, judge, record["prompt"], [y_w, y_l, y])
            examples.append((prompt, chosen, rejected, y))
        visits = (order or (lambda k, n: random.Random(k).sample(range(n), n)))(k, len(examples))
        batches = [[examples[i] for i in visits[start:start + batch_size]]
                   for start in range(0, len(visits), batch_size)]
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, **(adam or {}))
        losses = []
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = peak * lr_factor(step, len(batches))
            losses.append(update(policy, reference, optimizer, batch, alpha, beta, max_grad_norm))
        yield examples, losses


def tokenise(tokenizer, record):
    """The prompt's ids up to where the answer begins, and the ids of the data's two answers, each
    up to its end token. (data.py knows what else real chat templates do here.)"""
    def ids(messages, **options):
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    prompt, answers = ids(record["prompt"], add_generation_prompt=True), []
    for text in (record["data_chosen"], record["data_rejected"]):
        answer = ids([*record["prompt"], {"role": "assistant", "content": text}])[len(prompt):]
        answers.append(answer[:answer.index(tokenizer.eos_token_id) + 1])
    return prompt, *answers


@torch.no_grad()
def sample(model, prompt, max_new_tokens):
    """y: the ids that the model answers with, greedily, as the authors' code does."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=max_new_tokens)
    return out[0, len(prompt):].tolist()


def rank(tokenizer, judge, messages, candidates):
    """(ids of the best candidate, ids of the worst one). Of equals the first (rank.py: a hash
    decides). Where all are equal, chosen is rejected, and only the optimism is left."""
    texts = tokenizer.batch_decode(candidates, skip_special_tokens=True)
    [scores] = judge([messages], [texts])
    best, worst = (choose(range(len(texts)), key=scores.__getitem__) for choose in (max, min))
    return candidates[best], candidates[worst]


def logps(model, prompts, responses):
    """log pi(y|x) of B pairs of id lists, (B,): the sum over the tokens of y, not their mean."""
    rows = [x + y for x, y in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (B, T), padded right
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # (B, T)
    lm_logits = model(ids, attention_mask=real, use_cache=False).logits  # (B, T, V)
    # The logits at position t are about token t + 1: drop the last ones, and the first token.
    token_logps = lm_logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    is_response = torch.tensor([[0] * (len(x) - 1) + [1] * len(y) + [0] * (width - len(x) - len(y))
                                for x, y in zip(prompts, responses)])  # (B, T - 1)
    return (token_logps * is_response).sum(1)  # (B,)


def loss(policy, reference, batch, alpha, beta):
    """The SELM loss of a batch of (prompt, chosen, rejected, y), a scalar. Eq. 4.2 of v3."""
    x, chosen, rejected, y = map(list, zip(*batch))
    policy_chosen, policy_rejected = logps(policy, x + x, chosen + rejected).chunk(2)  # (B,) each
    policy_sampled = logps(policy, x, y)  # (B,)
    with torch.no_grad():
        ref_chosen, ref_rejected = logps(reference, x + x, chosen + rejected).chunk(2)
        ref_sampled = logps(reference, x, y)
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,) 0 at the start
    dpo = -F.logsigmoid(beta * margin)  # (B,) ln 2 at the start
    # To minimise: it pushes y down. (Where y is chosen too, its slope at the start is
    # -beta/2 + alpha * beta: below alpha = 1/2 it still rises.) No bound: the loss may go below 0.
    optimism = alpha * beta * (policy_sampled - ref_sampled)  # (B,)
    return (dpo + optimism).mean()


def update(policy, reference, optimizer, batch, alpha, beta, max_grad_norm):
    """One gradient step; returns the loss before it."""
    value = loss(policy, reference, batch, alpha, beta)
    value.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def lr_factor(step, steps):
    """Linear warm-up over the first tenth of the steps, then a cosine that would reach 0 one step
    after the last."""
    warmup = math.ceil(0.1 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


if __name__ == "__main__":
    from harness import toy  # a tiny language whose true reward is known

    torch.set_num_threads(1)
    start, tokenizer, portions, test_prompts = toy.textbook_world(seed=0, rows=256)
    policy, judge = copy.deepcopy(start), toy.oracle()

    def report(name):
        reward = toy.true_measures(policy, start, tokenizer, test_prompts)["reward"]
        print(f"{name}: true reward {reward:.3f}")
    report("start")
    # A tiny model: Adam's large eps keeps its steps proportional to the gradient.
    for k, (examples, losses) in enumerate(self_explore(
            policy, tokenizer, portions, judge, alpha=0.3, beta=1.0, lr=[6e-3] * 3, batch_size=32,
            max_new_tokens=8, adam=dict(betas=(0.9, 0.95), eps=0.1), max_grad_norm=math.inf), 1):
        report(f"iteration {k}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

"""All of SELM on one page, slowly. Read this file first: after it you know the whole method.

SELM (Self-Exploring Language Models, arXiv 2405.19332) trains a policy pi on preferences between
answers, one of which it writes itself, and makes pi try new ones. It needs prompts x with two known
answers each (y_w, y_l: "data_chosen", "data_rejected") and a judge of answers. Algorithm 1:

    for each portion of the prompts:
        pi_ref = pi, frozen
        y = pi_ref's greedy answer (the paper: y ~ pi_ref)                       `sample`
        chosen, rejected = best and worst of {y, y_w, y_l} for the judge         `rank`
        minimise over the portion, by gradient steps on pi,                      `loss`
            - log sigmoid( beta * [ log pi(chosen)/pi_ref(chosen)
                                  - log pi(rejected)/pi_ref(rejected) ] )        DPO
            + alpha * beta * log pi(y)/pi_ref(y)                                 optimism

The first term is DPO (arXiv 2305.18290): it makes chosen more likely than rejected, compared with
pi_ref. The second is what SELM adds: it pushes DOWN the answer that the model gives by habit, so
that probability moves to answers that it has not tried. With alpha = 0, SELM is iterative DPO, the
comparison that isolates the term. selm.py says why "optimism", and why it matters that y is greedy.

Everything here is plain: padded batches, full logits, a copy of the model as reference,
`model.generate`. The other files compute the same numbers faster and in less memory. Each says
which part of this page it replaces, and a test compares the two.

    python textbook.py      SELM and DPO on the toy world (harness/inputs/toy.py), half a minute.
                            With one seed and half the rows, its numbers are not the README's.

Legend: B prompts, T tokens of the longest row, V vocabulary. Log-probs are in nats.
"""

import copy
import math
import random

import torch
import torch.nn.functional as F


def self_explore(policy, tokenizer, portions, judge, *, alpha, beta, lr, batch_size, max_new_tokens,
                 pair_loss="dpo", adam=None, max_grad_norm=1.0, order=None):
    """Algorithm 1. Changes `policy` in place; yields (examples, losses) after each portion.

    portions: lists of {"prompt": messages, "data_chosen": text, "data_rejected": text}; judge:
    (prompts, lists of texts) -> lists of scores; lr: one per portion; adam: options of AdamW;
    order(k, n): the order in which iteration k visits its n examples. Without it: at random.
    """
    for k, (portion, peak) in enumerate(zip(portions, lr), 1):
        reference = copy.deepcopy(policy).requires_grad_(False)
        examples = []
        for record in portion:
            prompt, y_w, y_l = tokenise(tokenizer, record)
            y = sample(reference, prompt, max_new_tokens)
            chosen, rejected = rank(tokenizer, judge, record["prompt"], [y_w, y_l, y])
            examples.append((prompt, chosen, rejected, y))
        n = len(examples)
        visits = random.Random(k).sample(range(n), n)
        if order:
            visits = order(k, n)
        batches = [[examples[i] for i in visits[start:start + batch_size]]
                   for start in range(0, n, batch_size)]
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, **(adam or {}))
        losses = []
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = peak * lr_factor(step, len(batches))
            losses.append(update(policy, reference, optimizer, batch, alpha, beta, max_grad_norm,
                                 pair_loss))
        yield examples, losses


def tokenise(tokenizer, record):
    """The prompt's ids up to where the answer begins, and the ids of the data's two answers, each
    up to its end token. (data.py and the harness handle what other chat templates do.)"""
    def ids(messages, **options):
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))
    prompt, answers = ids(record["prompt"], add_generation_prompt=True), []
    for text in (record["data_chosen"], record["data_rejected"]):
        answer = ids([*record["prompt"], {"role": "assistant", "content": text}])[len(prompt):]
        answers.append(answer[:answer.index(tokenizer.eos_token_id) + 1])
    return prompt, *answers


@torch.no_grad()
def sample(model, prompt, max_new_tokens):
    """y: the ids of the model's greedy answer, as in the authors' code."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=max_new_tokens)
    return out[0, len(prompt):].tolist()


def rank(tokenizer, judge, messages, candidates):
    """(ids of the best candidate, ids of the worst). Among equals the first (in rank.py a hash
    decides). If all are equal, chosen is rejected, and only the optimism term is left."""
    texts = tokenizer.batch_decode(candidates, skip_special_tokens=True)
    [scores] = judge([messages], [texts])
    return candidates[scores.index(max(scores))], candidates[scores.index(min(scores))]


def logps(model, prompts, responses):
    """log pi(y|x) of B pairs of id lists, (B,): the sum over the tokens of y, not their mean."""
    rows = [x + y for x, y in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (B, T), padded right
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # (B, T)
    lm_logits = model(ids, attention_mask=real, use_cache=False).logits  # (B, T, V)
    # The logits at position t predict token t + 1: drop the last logits and the first token.
    token_logps = lm_logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    is_response = torch.tensor([[0] * (len(x) - 1) + [1] * len(y) + [0] * (width - len(x) - len(y))
                                for x, y in zip(prompts, responses)])  # (B, T - 1)
    return (token_logps * is_response).sum(1)  # (B,)


def loss(policy, reference, batch, alpha, beta, pair_loss="dpo"):
    """The SELM loss of a batch of (prompt, chosen, rejected, y), a scalar. Eq. 4.2 of v3."""
    x, chosen, rejected, y = map(list, zip(*batch))
    policy_chosen, policy_rejected = logps(policy, x + x, chosen + rejected).chunk(2)  # (B,) each
    policy_sampled = logps(policy, x, y)  # (B,)
    with torch.no_grad():
        ref_chosen, ref_rejected = logps(reference, x + x, chosen + rejected).chunk(2)
        ref_sampled = logps(reference, x, y)
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,) 0 at the start
    losses = -F.logsigmoid(beta * margin)  # (B,) DPO: ln 2 at the start
    if pair_loss == "ipo":  # in DPO's place: arXiv 2310.12036, Eq. 17
        losses = (margin - 1 / (2 * beta)) ** 2
    # Minimising this term pushes y down. (Where y is chosen too, the slope at the start is
    # -beta/2 + alpha * beta with DPO: below alpha = 1/2, y still rises.)
    optimism = alpha * beta * (policy_sampled - ref_sampled)  # (B,) 0 at the start, no lower bound
    return (losses + optimism).mean()


def update(policy, reference, optimizer, batch, alpha, beta, max_grad_norm, pair_loss="dpo"):
    """One gradient step; returns the loss before it."""
    value = loss(policy, reference, batch, alpha, beta, pair_loss)
    value.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def lr_factor(step, steps):
    """Linear warm-up over a tenth of the steps, then a cosine that reaches 0 after the last one."""
    warmup = math.ceil(0.1 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


if __name__ == "__main__":
    from harness.inputs import toy  # a tiny language whose true reward is known
    torch.set_num_threads(1)
    start, tokenizer, portions, test_prompts = toy.textbook_world(seed=0, rows=256)
    prompt = [{"role": "user", "content": "describe the shark"}]  # one of the test prompts
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)

    def report(name, policy):
        reward = toy.true_measures(policy, start, tokenizer, test_prompts)["reward"]
        answer = tokenizer.decode(sample(policy, ids, 8), skip_special_tokens=True)
        print(f"{name:42} true reward {reward:.3f}   describe the shark: {answer}")

    report("before", start)
    for name, alpha in (("SELM", 0.3), ("DPO", 0.0)):
        policy = copy.deepcopy(start)
        for k, (examples, losses) in enumerate(self_explore(
                policy, tokenizer, portions, toy.oracle(), alpha=alpha, beta=1.0, lr=[6e-3] * 3,
                batch_size=32, max_new_tokens=8, max_grad_norm=math.inf,
                adam=dict(betas=(0.9, 0.95), eps=0.1)), 1):  # large eps: steps ~ gradient
            report(f"{name}, iteration {k}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", policy)
            if losses[-1] < 0:
                print("  (below 0 is no error: log pi(y)/pi_ref(y) in it has no lower bound)")

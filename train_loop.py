"""SELM, Algorithm 1 of arXiv 2405.19332 v3: sample, rank, reference, train, and again.

This is textbook.py's `self_explore`, and computes its numbers (tests/test_textbook.py). What it
deleted: the reference model (its log-probs are numbers on disk), the padding, the logits, the
second forward pass of the policy (y shares one with the pair). What it added: every phase goes from
files to a file or folder, so that a killed run goes on behind its last finished row, or the last
checkpoint of a training; on one process or many.

    1  Algorithm 1     2  Its phases, in the order of the loop     3  One update

No formula of the objective lives here (selm.py), no flag or command (harness/runs/settings.py and
command.py), no file format (rundir.py), and of processes only "mine" and "all" (scale.py).

    python train_loop.py                                   the toy world, about a minute
    python train_loop.py --model zephyr-7b-sft --dry-run   what the paper's run would do
    torchrun --nproc-per-node 8 train_loop.py --model zephyr-7b-sft
Test: pytest tests/test_train_loop.py tests/test_textbook.py.

Legend: B prompts of a micro-batch, R responses of all of them; logps are sums over a response, in
nats; s is the Settings of an iteration, `start` (prepare.Start) what all arms of a run share.
"""

from harness.runs import exits

exits.before(__name__)  # first of all: Ctrl-C while the libraries load is one line, too

import functools
import itertools
import math
import shutil
from dataclasses import replace

import torch
from tqdm import tqdm

import data
import rank
import sample
import selm
from harness.inputs import engine_samples
from harness.judging import duel, held_out
from harness.models import distributed, weights
from harness.runs import command, report
from harness.judging.evaluation import evaluation, ranking
from harness.models.distributed import PROCESS, PROCESSES, gather, say
from harness.runs.settings import stream

CHUNK = 1024  # prompts that are tokenised and judged together

# ----------------------------------------------------------------------------------------------
# 1. Algorithm 1
# ----------------------------------------------------------------------------------------------


def self_explore(run, start, settings):
    """All iterations of one arm (one alpha, one seed).

    run.rows(path, phase, items, ...): if the file is finished and intact, load it. Otherwise
    phase(items, ...), a generator, makes a row for each item. The result is a list on disk, Rows,
    with rows.of(prompt_id). run.folder(path, phase, ...): the same for a folder, which
    phase(path, ...) writes.
    """
    policy = start.policy  # a policy is a PATH here and in section 2
    evaluate(run, start.run.path / "start", policy, start, settings.at(settings.first - 1))
    for k, portion in enumerate(start.portions, settings.first):
        here, s = run.path / f"iter_{k}", settings.at(k)

        # y ~ pi(.|x), then the best and the worst of {y, y_w, y_l}
        draw = engine_samples.samples if s.samples_from else sample_responses
        samples = [run.rows(here / "samples.jsonl", draw, portion, policy, start, s)]
        if s.pairs == "reference":  # XPO's: one of the first model, too, by other random numbers
            samples.append(run.rows(here / "reference_samples.jsonl", draw, portion, start.policy,
                                    start, replace(s, iteration=f"{k}, reference")))
        pairs = run.rows(here / "pairs.jsonl", rank_candidates, portion, samples, start, s)
        # log pi_ref of every response that the loss needs, before the first update
        training_set = TrainingSet(pairs, policy if s.reference == "previous" else start.policy, s)
        # Its micro-batches must be those of update 0: with other ones it is made again, unless a
        # checkpoint lies behind that update, for training goes on with what it began with.
        made_with = (None if distributed.newest_checkpoint(here / "state") else
                     [s.tokens_per_forward, PROCESSES])
        training_set.reference = run.rows(here / "reference.jsonl", reference_logps, pairs,
                                          training_set, made_with=made_with)
        # the SELM loss, one epoch; the new policy is the next reference
        policy = run.folder(here / "policy", train, policy, training_set, start.chat, run)
        shutil.rmtree(here / "state", ignore_errors=True)  # checkpoints: not before it is recorded

        evaluate(run, here, policy, start, s)
        run.log([{"iteration": k, "phase": "rank", **ranking(pairs, s.max_new_tokens)}])
        say("\n".join(report.summary(run.path, k)))


# ----------------------------------------------------------------------------------------------
# 2. The phases, in the order of the loop
# ----------------------------------------------------------------------------------------------


def sample_responses(records, policy, start, s):
    """y ~ pi(.|x): yields {prompt_id, samples: [{ids, text, finished}]} for each record.

    A prompt's samples depend on (seed, iteration, prompt_id) alone, not on its neighbours.
    """
    chat, n, ys = start.chat, s.responses_per_prompt, ()
    if n and len(records):
        ys = start.serve(
            weights.load_frozen(policy, s.compute, start.attention), requests(records, chat, s),
            stop_ids=chat.stop_ids, slots=s.slots, temperature=s.temperature, top_p=s.top_p,
            expected=len(records) * n if PROCESS == 0 else None)
    elif not n:  # offline DPO on the data's own pairs
        yield from ({"prompt_id": record["prompt_id"], "samples": []} for record in records)
    for i, responses in sample.by_prompt(ys, n):
        yield {"prompt_id": records[i]["prompt_id"], "samples": [
            {"ids": y, "text": chat.text(y), "finished": y[-1] in chat.stop_ids}
            for y in responses]}


def requests(records, chat, s):
    """What sampling asks for: yields (prompt ids, most tokens of y, seed), n per record."""
    for chunk in chunks(records, CHUNK):
        for record, ids, room in data.encode_prompts(chunk, chat, s.max_prompt_length,
                                                     s.max_length):
            limit = min(s.max_new_tokens, room)  # so that nothing is cut later
            for j in range(s.responses_per_prompt):
                yield ids, limit, stream(s.seed, s.iteration, record["prompt_id"], j)


def rank_candidates(records, samples, start, s):
    """Best and worst of {y, y_w, y_l}, says the judge: the rows of pairs.jsonl. Without samples the
    data's own pair is the pair. samples: [Rows of samples.jsonl], and of XPO's second one."""
    judge = start.judging(samples[0].path.parent)
    for chunk in chunks(records, CHUNK):
        rows = data.make_rows(
            ((record, prompt, named(responses, record["prompt_id"], samples))
             for record, prompt, responses in data.encode(chunk, start.chat, s.max_prompt_length,
                                                          s.max_length)), start.chat)
        scores = [None] * len(rows)
        if s.responses_per_prompt:
            scores = judge([row["prompt"] for row in rows],
                           [[c["text"] for c in row["candidates"]] for row in rows],
                           [row["prompt_id"] for row in rows])
        yield from map(rank.give_roles, rows, scores)


def named(responses, prompt_id, samples):
    """A prompt's candidates, (source, ids) each: the data's two and y; XPO's are both sampled."""
    ys = [[y["ids"] for y in rows.of(prompt_id)["samples"]] for rows in samples]
    if len(ys) == 2:
        return list(zip(("policy", "reference"), (y for [y] in ys)))
    return [*zip(("data_chosen", "data_rejected"), responses), *(("sampled", y) for y in ys[0])]


@torch.no_grad()
def reference_logps(pairs, training_set):
    """log pi_ref of the candidates in use: yields {prompt_id, logps: one per candidate, or null}.

    In the very micro-batches of the training that follows, with the same code and dtype, so that
    the first update sees policy == reference to the last bits.
    """
    policy, known = training_set.policy(training_set.reference_path), {}
    for batch in tqdm(training_set.epochs[0], "reference", unit="batch", leave=False,
                      disable=PROCESS > 0):
        for micro_batch in batch.micro_batches:
            trees = training_set.trees(micro_batch or [0])  # [] where another process has one more
            logps = forward(policy, trees, training_set.s.plain_rows).tolist()
            for tree in trees if micro_batch else []:
                known[tree.prompt_id] = dict(zip(tree.candidate_indices, logps))
                logps = logps[len(tree.candidate_indices):]
    known = {prompt_id: row for share in gather(known) for prompt_id, row in share.items()}
    for row in pairs:
        logps = known.get(row["prompt_id"], {})
        yield {"prompt_id": row["prompt_id"],
               "logps": [logps.get(c) for c in range(len(row["candidates"]))]}


def train(path, previous, training_set, chat, run):
    """The updates of one iteration, from the policy at `previous` to a new one at `path`. SIGTERM
    ends it between two of them, with a checkpoint for the same command to go on from."""
    s, policy = training_set.s, training_set.policy(previous)
    training_set.loaded = None, None  # training changes it: never hand it out as pi_ref again
    parameters = distributed.trained(policy)
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, betas=s.adam_betas, eps=s.adam_eps,
                                  weight_decay=0.0, fused=True)
    batches = [batch for epoch in training_set.epochs for batch in epoch]
    state, history = path.with_name("state"), []
    if checkpoint := distributed.newest_checkpoint(state):
        history = distributed.load_checkpoint(checkpoint, policy, optimizer)
        say(f"training goes on after update {len(history)} of {len(batches)}")

    bar = tqdm(batches[len(history):], "train", unit="update", leave=False, disable=PROCESS > 0,
               initial=len(history), total=len(batches))
    with exits.sigterm_waits() as asked:
        for u, batch in enumerate(bar, len(history)):
            optimizer.param_groups[0]["lr"] = lr = s.lr * lr_factor(u, len(batches))
            metrics = update(policy, optimizer, training_set, batch, u,
                             from_reference=training_set.reference_path == previous)
            history.append({"iteration": s.iteration, "phase": "train", "update": u, "lr": lr,
                            **metrics})
            run.log(history, finished=False)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
            if any(gather(bool(asked))):
                distributed.save_checkpoint(state / f"{u + 1:06d}", policy, optimizer, history)
                raise exits.Terminated(f"the same command goes on after update {u + 1} of "
                                      f"{len(batches)} of iteration {s.iteration}")
            if s.save_every and (u + 1) % s.save_every == 0 and u + 1 < len(batches):
                distributed.try_checkpoint(state / f"{u + 1:06d}", policy, optimizer, history)

    del optimizer  # its moments: a policy takes memory to be saved
    if not distributed.all_finite(parameters):
        raise FloatingPointError(f"iteration {s.iteration}: the last update left weights that are "
                                 "not finite; lower --lr. Nothing of this training is saved")
    run.log(history)
    weights.save_policy(policy, chat.tokenizer, path, chat.stop_ids, (
        weights.stored_dtype(previous) if s.save_dtype == "start" else torch.float32))


def evaluate(run, here, policy, start, s):
    """Adds a row to metrics.jsonl: the policy on held-out prompts, against the start policy. The
    start is its own opponent, and is evaluated once for all arms of a seed."""
    if start.held_out:
        owner, judge = (start.run if policy == start.policy else run), start.judging(here, True)
        # One random stream for all policies.
        to_answer = replace(s, iteration="eval", responses_per_prompt=1)
        ys = [owner.rows(here / "answers.jsonl", sample_responses, start.held_out, policy, start,
                         to_answer)]
        if start.also_samples(s.temperature):
            hot = replace(to_answer, temperature=1.0)
            ys.append(owner.rows(here / "answers_at_temperature_1.jsonl", sample_responses,
                                 start.held_out, policy, start, hot))
        answers = owner.rows(here / "eval.jsonl", held_out.judge_answers, start.held_out, ys,
                             policy, start, s, judge)
        duels = owner.rows(here / "duels.jsonl", duel.judge_duels, answers,
                           duel.opponents(start.run.path, here, s), judge)
        metrics = evaluation(answers, duels)
        if start.true_measures:
            [truth] = owner.rows(here / "true.jsonl", held_out.measure_truth, [policy], start, s)
            metrics |= truth
        run.log([{"iteration": s.iteration, "phase": "eval", **metrics}])
    start.forget_scores(here)


# ----------------------------------------------------------------------------------------------
# 3. One update
# ----------------------------------------------------------------------------------------------


class TrainingSet:
    """The usable rows of pairs.jsonl, planned once into the batches of every epoch, for the
    reference pass and for training. A tree is made from its row when its micro-batch comes."""

    def __init__(self, pairs, reference_path, s):
        self.pairs, self.reference_path, self.s = pairs, reference_path, s
        self.reference, self.loaded = None, (None, None)

    @functools.cached_property
    def usable(self):
        """(place in pairs.jsonl, size of its tree) of each row that trains."""
        # Without optimism an equal pair has nothing to say.
        found = [(place, data.make_tree(row, self.s.alpha).size)
                 for place, row in enumerate(self.pairs) if not row["dropped"]
                 and (row["chosen"] != row["rejected"] or self.s.alpha > 0)]
        if not found:
            raise ValueError(f"iteration {self.s.iteration}: no example is left to train on; look "
                             f"at {self.pairs.path} to see why")
        return found

    @functools.cached_property
    def epochs(self):
        """Epochs of batches of micro-batches of indices into `usable`; ours among all processes."""
        s, sizes = self.s, [size for _, size in self.usable]
        return [data.plan_updates(sizes, s.batching, stream(s.seed, s.iteration, epoch),
                                  PROCESS, PROCESSES) for epoch in range(s.epochs)]

    def trees(self, micro_batch):
        """The trees of a micro-batch, with their reference log-probs once these are known."""
        rows = [self.pairs[self.usable[i][0]] for i in micro_batch]
        return [data.make_tree(row, self.s.alpha, self.reference and
                               self.reference.of(row["prompt_id"])["logps"]) for row in rows]

    def policy(self, path):
        """The policy at `path`, ready to train; the reference pass and training share one."""
        if self.loaded[0] != path:
            self.loaded = None, None  # before the next one takes its memory
            # LoRA's random half: the same on all processes, and after a kill.
            torch.manual_seed(stream(self.s.seed, self.s.iteration))
            self.loaded = path, weights.load_policy(path, self.s.compute)
        return self.loaded[1]


def update(policy, optimizer, training_set, batch, u, from_reference):
    """Update number u -> its mean metrics, and the gradient's norm before it was clipped.
    from_reference: the training began at pi_ref, so update 0 must see policy == reference.
    FloatingPointError where a number is not finite."""
    s, parameters = training_set.s, optimizer.param_groups[0]["params"]
    terms, optimism_norm = dict(alpha=s.alpha, beta=s.beta, optimism=s.optimism), None
    if u == 0 and s.alpha > 0:  # once per iteration: how much of the gradient is the term's?
        gradient(policy, training_set, batch, functools.partial(optimism_alone, **terms))
        optimism_norm = clip(parameters, math.inf)
        optimizer.zero_grad()
    metrics, farthest = gradient(policy, training_set, batch,
                                 functools.partial(selm.selm_loss, loss=s.loss, **terms))
    if u == 0 and from_reference:
        check_update_zero(metrics["preference_loss"], farthest, s)
    norm = clip(parameters, s.max_grad_norm)
    if optimism_norm and norm:
        metrics["optimism_share"] = optimism_norm / norm
    if not math.isfinite(metrics["loss"] + norm):
        raise FloatingPointError(f"iteration {s.iteration}, update {u}: the loss or gradient "
                                 "is not finite; lower --lr. Finished phases are kept")
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm, **metrics}


def gradient(policy, training_set, batch, loss):
    """Adds up the gradient of one batch, by micro-batches -> its mean metrics, and how far the
    farthest log-prob is from its reference, in nats. loss: roles -> losses (B,), metrics."""
    totals, farthest = {}, 0.0
    for i, micro_batch in enumerate(batch.micro_batches, 1):
        distributed.last_micro_batch(policy, i == len(batch.micro_batches))
        trees = training_set.trees(micro_batch or [0])
        logps = forward(policy, trees, training_set.s.plain_rows)  # (R,)
        if not micro_batch:  # FSDP waits for every process: one tree, in vain
            (0.0 * logps.sum()).backward()
            continue
        ref_logps = torch.tensor([x for tree in trees for x in tree.ref_logps],
                                 device=logps.device)  # (R,)
        losses, metrics = loss(*roles(trees, logps), *roles(trees, ref_logps))
        # Sum over micro-batches of sum / batch: the same gradient as one full batch. FSDP averages
        # over processes, hence PROCESSES.
        (losses.sum() * PROCESSES / batch.examples).backward()
        for name, values in metrics.items():
            totals[name] = totals.get(name, 0.0) + values.sum().item() / batch.examples
        farthest = max(farthest, (logps.detach() - ref_logps).abs().max().item())
    shares = gather(totals)
    return {name: sum(share.get(name, 0.0) for share in shares)
            for name in sorted(set().union(*shares))}, farthest


def roles(trees, logps):
    """Flat log-probs (R,) of the trees' responses -> those of chosen, rejected, sampled, (B,) each.

    Trees with 2 and 3 responses: logps = [a b | c d e]; the second tree's response 1 is at 2 + 1.
    """
    first = [0, *itertools.accumulate(len(tree.responses) for tree in trees)]
    chosen = [begin + tree.chosen for begin, tree in zip(first, trees)]
    rejected = [begin + tree.rejected for begin, tree in zip(first, trees)]
    sampled = None  # of several the mean: the optimism term is linear in them
    if all(tree.sampled for tree in trees):
        sampled = torch.stack([logps[[begin + y for y in tree.sampled]].mean()
                               for begin, tree in zip(first, trees)])
    return logps[chosen], logps[rejected], sampled


def optimism_alone(chosen, rejected, sampled, ref_chosen, ref_rejected, ref_sampled, *, alpha, beta,
                   optimism):
    """The loss without its pair loss: only the optimism term."""
    return selm.OPTIMISM[optimism](sampled, ref_sampled, alpha, beta), {}


def forward(policy, trees, plain_rows):
    """Trees -> log pi(y|x) of all their responses, (R,)."""
    make = data.pad if plain_rows else data.pack
    return policy(make(trees).to(policy.device))


def clip(parameters, max_grad_norm):
    """Clips the gradient to a global norm -> the norm before, in one number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def lr_factor(u, updates):
    """Linear warm-up over the first 10 % of the updates, then a cosine that would reach 0 one
    update after the last; both restart each iteration. DEVIATION: transformers' schedule wastes the
    first update on a rate of 0."""
    warmup = math.ceil(0.1 * updates)
    if u < warmup:
        return (u + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (u - warmup + 1) / (updates - warmup + 1)))


def check_update_zero(preference_loss, farthest, s):
    """Before the first update the policy IS the reference. RuntimeError if it is not."""
    agreed = selm.PREFERENCE_LOSS[s.loss](torch.zeros(1), s.beta).item()  # DPO: ln 2
    # At beta 0.01 the loss hides errors of whole nats, so look at the log-probs as well.
    allowed = 1e-2 if s.dtype == "fp32" else 0.5
    if not (abs(preference_loss - agreed) < 1e-3 * max(1, agreed) and farthest < allowed):
        raise RuntimeError(f"at update 0 the pair loss is {preference_loss:.6f} (it must be "
                           f"{agreed:.6f}) and a log-prob is {farthest:.3g} nats off: policy and "
                           "reference disagree, so no later number can be trusted")


def chunks(items, size):
    """[1, 2, 3, 4, 5], 2 -> [1, 2], [3, 4], [5]; items may be a generator."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def main(argv=None):
    """The command: settings, what a run is made from, and its arms are harness/runs/command.py's."""
    command.main(argv, self_explore)


if __name__ == "__main__":
    exits.run(main)

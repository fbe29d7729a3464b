"""The loop itself: Algorithm 1 against the textbook, recipes, resuming, and what it refuses."""

import datetime
import functools
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import model as policies
import selm
import train_loop
from conftest import ROOT, make_model, make_tokenizer
from harness.inputs import chat_template
from harness.judging import held_out, judges
from harness.models import distributed, weights
from harness.runs import settings, setup
from harness.runs.output_files import Rows, read_jsonl, write_jsonl
from harness.runs.settings import RECIPES, stream
from test_model import make_trees, plain_logps

WORDS = "hello there how are you the cat sat on mat and looked at moon".split()
SMALL = ("--prompts-per-iteration 6 --batch-size 3 --max-length 48 --eval-prompts 2 "
         "--max-prompt-length 24 --max-new-tokens 6 --tokens-per-forward 128 --slots 4 "
         "--beta 0.1 --dtype fp32 --device cpu").split()


def write_model(folder, architecture="llama", style="chatml"):
    policy = policies.Policy(make_model(architecture, scale=3.0))
    weights.save_policy(policy, make_tokenizer(style), folder)
    return str(folder)


def write_preferences(path, rows=20):
    def text(i, k):
        return " ".join(WORDS[(i * 7 + i // 14 + k * 3 + j * (k + 1)) % len(WORDS)]
                        for j in range(3 + k))
    write_jsonl(path, [{
        "prompt": f"{text(i, 0)} {i}", "prompt_id": str(i),
        "chosen": [{"role": "user", "content": f"{text(i, 0)} {i}"},
                   {"role": "assistant", "content": text(i, 1)}],
        "rejected": [{"role": "user", "content": f"{text(i, 0)} {i}"},
                     {"role": "assistant", "content": text(i, 2)}],
    } for i in range(rows)])
    return str(path)


def write_judge(path):
    path.write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(sum(map(ord, c)) % 97) for c in cs] for cs in candidates]\n")
    return f"{path}:judge"


@pytest.fixture
def command(tmp_path):
    """The arguments of a tiny real run: a Llama folder, a preference file, a user's judge."""
    return ["--model", write_model(tmp_path / "model"),
            "--data", write_preferences(tmp_path / "p.jsonl"),
            "--ranker", write_judge(tmp_path / "judge.py"),
            "--run-dir", str(tmp_path / "run"), *SMALL,
            "--iterations", "2", "--lr", "1e-3", "--temperature", "1"]


def weights_of(run_dir, iteration=2):
    folder = Path(run_dir) / f"iter_{iteration}/policy"
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def rows(path):
    return [row for _, row in read_jsonl(path)]


def training(run_dir):
    return [row for row in rows(Path(run_dir) / "metrics.jsonl") if row["phase"] == "train"]


def files_of(folder):
    """name -> content of every file that a run leaves, but for those that hold its own name."""
    named = ("config.json", ".config.json", "report.md", "report.html")
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*"))
            if f.is_file() and str(f.relative_to(folder)) not in named}


# ----------------------------------------------------------------------------------------------
# The whole loop
# ----------------------------------------------------------------------------------------------


def test_the_default_command_runs_as_a_newcomer_would_run_it(tmp_path):
    """An import that only tests have; a figure, table or policy that the last line promises."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_loop.py"), "--run-dir", str(tmp_path / "toy"),
         "--seeds", "1", "--iterations", "1", "--prompts-per-iteration", "64",
         "--eval-prompts", "6"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    run = tmp_path / "toy"
    for name in ("report.md", "figures/evaluation.png", "figures/training.png", "config.json",
                 "iter_1/samples.jsonl", "iter_1/pairs.jsonl", "iter_1/reference.jsonl",
                 "iter_1/policy/config.json", "baseline/iter_1/policy/config.json"):
        assert (run / name).exists(), name
    assert "| SELM | 1 |" in result.stdout and "| DPO | 1 |" in result.stdout
    assert str(run / "report.md") in result.stdout
    sampled = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--model", str(run / "iter_1/policy"),
         "--prompt", "describe the fox"], capture_output=True, text=True, timeout=120)
    assert sampled.returncode == 0 and len(sampled.stdout.split()) >= 1


def test_the_true_reward_of_the_toy_rises_in_both_arms(tmp_path):
    """A loop that runs, reports, and teaches the wrong thing: chosen and rejected swapped."""
    train_loop.main(["--run-dir", str(tmp_path), "--seeds", "1", "--iterations", "2",
                     "--prompts-per-iteration", "256"])
    for folder in (tmp_path, tmp_path / "baseline"):
        rewards = [row["true_reward"] for row in rows(folder / "metrics.jsonl")
                   if row["phase"] == "eval"]
        assert rewards[0] + 0.05 < rewards[1] and rewards[0] + 0.1 < rewards[2], rewards


@pytest.mark.parametrize("recipe, architecture, style", [
    ("zephyr-7b-sft", "mistral", "zephyr"), ("llama-3-8b-instruct", "llama", "llama3"),
    ("phi-3-mini", "phi3", "phi3")])
def test_each_paper_recipe_runs_on_a_tiny_model_of_its_architecture(
        recipe, architecture, style, tmp_path, monkeypatch):
    """A recipe whose first real try is on eight GPUs: its template, iteration 0, learning rates."""
    monkeypatch.setitem(RECIPES, recipe, RECIPES[recipe] | {
        "model": write_model(tmp_path / "model", architecture, style)})
    train_loop.main(["--model", recipe, "--data", write_preferences(tmp_path / "p.jsonl", 30),
                     "--ranker", write_judge(tmp_path / "judge.py"),
                     "--run-dir", str(tmp_path / "run"), *SMALL])
    offline = recipe == "zephyr-7b-sft"
    for k in range(0 if offline else 1, 4):
        pairs = rows(tmp_path / f"run/iter_{k}/pairs.jsonl")
        assert all(bool(row["sampled"]) == (k > 0) for row in pairs)
        if k == 0:  # plain offline DPO on the data's own pairs
            assert all("data_chosen" in row["candidates"][row["chosen"]]["sources"]
                       for row in pairs)
    updates = training(tmp_path / "run")
    peaks = [max(r["lr"] for r in updates if r["iteration"] == k)
             for k in range(0 if offline else 1, 4)]
    assert peaks == pytest.approx([5e-7, 5e-7, 5e-7, 1e-7] if offline else [5e-7, 3e-7, 1e-7])
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iter_3/policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/iter_3/policy")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt",
                                        add_generation_prompt=True, return_dict=False)
    assert final.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_iterations_chain_and_the_reference_is_the_previous_policy(command, tmp_path):
    """Reference log-probs from the wrong policy: here each is recomputed in plain transformers."""
    train_loop.main(command)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "run/iter_1/policy")
    reference, checked = Rows(tmp_path / "run/iter_2/reference.jsonl"), 0
    for row in rows(tmp_path / "run/iter_2/pairs.jsonl"):
        logps = reference.of(row["prompt_id"])["logps"]
        assert len(logps) == len(row["candidates"])
        assert all(logps[row[role]] is not None for role in ("chosen", "rejected"))
        assert all(logps[c] is not None for c in row["sampled"])
        for candidate, logp in zip(row["candidates"], logps):
            if logp is not None:
                tree = data.Tree(row["prompt_ids"], [candidate["ids"]], 0, 0, [])
                assert logp == pytest.approx(plain_logps(before, [tree]).item(), abs=1e-3)
                checked += 1
    assert checked >= 6
    first_losses = [r["preference_loss"] for r in training(tmp_path / "run") if r["update"] == 0]
    assert first_losses == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_reference_initial_keeps_the_first_model_as_the_anchor(command, tmp_path):
    """--reference initial that is previous after all."""
    train_loop.main([*command, "--reference", "initial"])
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    row = next(r for r in rows(tmp_path / "run/iter_2/pairs.jsonl") if not r["dropped"])
    [logps] = [r["logps"] for r in rows(tmp_path / "run/iter_2/reference.jsonl")
               if r["prompt_id"] == row["prompt_id"]]
    tree = data.Tree(row["prompt_ids"], [row["candidates"][row["chosen"]]["ids"]], 0, 0, [])
    assert logps[row["chosen"]] == pytest.approx(plain_logps(start, [tree]).item(), abs=1e-3)


@pytest.mark.parametrize("extra", [
    ["--plain-rows"], ["--lora-rank", "2"], ["--gradient-checkpointing"], ["--dtype", "bf16"],
    ["--responses-per-prompt", "2"], ["--length-penalty", "0.1", "--epochs", "2"],
    ["--alpha", "0"], ["--top-p", "0.5"], ["--compile"], ["--optimism", "popo"]], ids=" ".join)
def test_every_option_takes_effect_and_runs_the_whole_loop(extra, command, tmp_path, monkeypatch):
    """An option that is parsed and then forgotten, or fails after an hour of sampling."""
    made, padded, loras, penalties, nuclei = [], [], [], [], []
    policy, pad, penalise = policies.Policy, data.pad, judges.with_length_penalty
    add_lora, serve = distributed.add_lora, setup.sample.serve
    monkeypatch.setattr(distributed, "add_lora", lambda lm, r: loras.append(r) or add_lora(lm, r))
    # aot_eager traces like inductor, without its minute of C++ compilation.
    monkeypatch.setattr(weights, "Policy", lambda model, *a: made.append((model, *a)) or policy(
        model, *(x if x != "inductor" else "aot_eager" for x in a)))
    monkeypatch.setattr(data, "pad", lambda trees: padded.append(trees) or pad(trees))
    monkeypatch.setattr(judges, "with_length_penalty",
                        lambda judge, by, t: penalties.append(by) or penalise(judge, by, t))
    monkeypatch.setattr(setup.sample, "serve", lambda *a, **k: (
        nuclei.append(k.get("top_p")) or serve(*a, **k)))
    train_loop.main([*command, *extra])
    assert penalties == [0.1 if "--length-penalty" in extra else 0.0]
    assert set(nuclei) == {0.5 if "--top-p" in extra else 1.0}
    made = [a for a in made if len(a) > 1]  # those to be trained
    assert made and all(a[1] == ("--gradient-checkpointing" in extra) for a in made)
    assert all((a[2] is not None) == ("bf16" in extra) for a in made)
    assert all((a[3] == "inductor") == ("--compile" in extra) for a in made)
    assert loras == ([2] * len(made) if "--lora-rank" in extra else [])
    assert bool(padded) == ("--plain-rows" in extra)
    assert not same(weights_of(tmp_path / "run"), weights_of(tmp_path / "run", 1))
    pairs = [r for r in rows(tmp_path / "run/iter_1/pairs.jsonl") if not r["dropped"]]
    if "--responses-per-prompt" in extra:
        assert all(len(row["sampled"]) == 2 for row in pairs)
    updates = training(tmp_path / "run")
    assert all(("sampled_logratio" in r) == ("--alpha" not in extra) for r in updates)
    assert len(updates) == (8 if "--epochs" in extra else 4)


def test_a_policy_is_loaded_once_for_training_and_once_for_sampling(command, monkeypatch):
    """14 GB read four times an iteration."""
    loaded, load = [], weights.load_model
    monkeypatch.setattr(weights, "load_model",
                        lambda path, *a: loaded.append(Path(path).parts[-2:]) or load(path, *a))
    train_loop.main(command)
    assert loaded.count(("iter_1", "policy")) == 2
    assert loaded.count(("iter_2", "policy")) == 1


@pytest.mark.parametrize("extra", [[], ["--gradient-checkpointing"]])
def test_no_trained_policy_outlives_its_iteration(extra, command):
    """Checkpointed layers hold themselves, and each iteration's policy would stay beside the next:
    a run that fits in its first iteration dies in its third."""
    s = settings.read([*command, *extra]).at(1)
    gc.disable()  # by itself it comes some time
    try:
        first = weakref.ref(weights.load_policy(command[1], s.compute).layers[0])
        weights.load_policy.cache_clear()  # as train does
        weights.load_policy(command[1], s.compute)
    finally:
        gc.enable()
    assert first() is None


def test_a_hub_data_set_is_read_by_its_two_splits(command, tmp_path, monkeypatch, capsys):
    """Training on the test split; rows of the hub's schema that the parser does not know."""
    import datasets
    preferences = rows(tmp_path / "p.jsonl")
    splits = {"train_prefs": preferences[:16] + preferences[:2], "test_prefs": preferences[16:]}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, split: asked.append((name, split)) or splits[split])
    command[command.index("--data") + 1] = "org/prefs"
    train_loop.main([*command, "--iterations", "1"])
    assert asked == [("org/prefs", "train_prefs"), ("org/prefs", "test_prefs")]
    assert "2 rows repeat a prompt" in capsys.readouterr().out
    held_out = {r["prompt_id"] for r in rows(tmp_path / "run/iter_1/eval.jsonl")}
    assert held_out == {"16", "17"}


# ----------------------------------------------------------------------------------------------
# One update
# ----------------------------------------------------------------------------------------------


def ready_trees(policy):
    trees = make_trees(3, ((5, (4, 7)), (3, (6, 2, 9)), (11, (1, 3)),
                           (4, (4, 4)), (2, (8, 3)), (6, (5, 2))))
    for tree in trees:
        tree.chosen, tree.rejected, tree.sampled = 0, 1, [len(tree.responses) - 1]
        with torch.no_grad():
            tree.ref_logps = policy(data.pack([tree])).tolist()
    return trees


def one_gradient(policy, trees, budget=10**6, alpha=0.3, beta=0.5, loss="dpo"):
    """(metrics, farthest, micro-batches) of one update on all trees; the gradient stays in .grad."""
    batching = SimpleNamespace(batch_size=6, tokens_per_forward=budget, plain_rows=False)
    [batch] = data.plan_updates(trees, batching, seed=0)
    loss = functools.partial(selm.selm_loss, alpha=alpha, beta=beta, loss=loss)
    return *train_loop.gradient(policy, batch, False, loss), len(batch.micro_batches)


def test_accumulated_micro_batches_equal_one_full_batch():
    """A loss that is averaged over micro-batches of different sizes; a farthest log-prob that is
    the last micro-batch's. The margins are no ties, whose accuracy would be left to rounding."""
    results = []
    for budget in (10**6, 25, 1):
        policy = policies.Policy(make_model(scale=2.0))
        trees = ready_trees(policy)
        for i, tree in enumerate(trees, 1):
            tree.ref_logps[tree.chosen] += 0.1 * i * (-1) ** i
        metrics, farthest, micro_batches = one_gradient(policy, trees, budget)
        assert farthest == pytest.approx(0.6, abs=1e-4)
        assert metrics["accuracy"] == pytest.approx(0.5)  # i odd: the reference is below
        assert micro_batches == {10**6: 1, 25: 5, 1: 6}[budget]
        results.append((metrics, [p.grad for p in policy.parameters()]))
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        for a, b in zip(gradient, results[0][1]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_roles_are_picked_from_the_flat_log_probs_of_trees_of_many_sizes():
    """chosen and rejected swapped, or y taken from a neighbour's tree, where (R,) log-probs are
    indexed. Oracle: the formula in Python floats, tree by tree."""
    random.seed(0)
    trees = make_trees(1, ((2, (1, 2, 3)), (1, (4, 1)), (3, (1, 1, 1, 2)), (2, (2,))))
    for tree, roles in zip(trees, ((2, 0, [1]), (0, 1, [1]), (1, 3, [0, 2]), (0, 0, [0]))):
        tree.chosen, tree.rejected, tree.sampled = roles
    flat = [[random.uniform(-9, 0) for _ in range(10)] for _ in range(2)]
    losses, _ = selm.selm_loss(*(x for logps in flat for x in train_loop.roles(
        trees, torch.tensor(logps))), alpha=0.7, beta=0.2)
    start, expected = 0, []
    for tree in trees:
        ratio = [p - r for p, r in zip(*flat)][start:start + len(tree.responses)]
        margin = 0.2 * (ratio[tree.chosen] - ratio[tree.rejected])
        y = sum(ratio[i] for i in tree.sampled) / len(tree.sampled)
        expected.append(math.log(1 + math.exp(-margin)) + 0.7 * 0.2 * y)
        start += len(tree.responses)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_first_update_raises_chosen_and_lowers_rejected_and_y():
    """A sign turned anywhere between log-probs and weights. Small steps, so that the derivative
    decides; each of the three as far as it is not the same text as another."""
    policy = policies.Policy(make_model(scale=2.0))
    trees = ready_trees(policy)[1:2]  # three distinct responses
    with torch.no_grad():
        before = policy(data.pack(trees))
    one_gradient(policy, trees, alpha=2.0)
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-5 * p.grad
        change = policy(data.pack(trees)) - before
    assert change[0] > 0 > change[1] and change[2] < 0


def test_the_optimism_share_is_what_the_closed_form_says(command, tmp_path):
    """A share of the wrong norm, or of a gradient that was clipped or added to another. At the
    start the DPO part has the gradient beta/2 of the mean difference, hence
    2 alpha |mean grad log pi(y)| / |mean (grad log pi(chosen) - grad log pi(rejected))|."""
    train_loop.main([*command, "--alpha", "1e-3", "--iterations", "1", "--max-grad-norm", "1e-3"])
    [first] = [row for row in training(tmp_path / "run") if row["update"] == 0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    order = random.Random(stream(0, 1, 0)).sample(range(6), 6)[:3]  # the first batch of three
    pairs = rows(tmp_path / "run/iter_1/pairs.jsonl")
    sums = {"y": 0.0, "margin": 0.0}
    for row in (pairs[i] for i in order):
        logp = [plain_logps(model, [data.Tree(row["prompt_ids"], [c["ids"]], 0, 0, [])]).sum()
                for c in row["candidates"]]
        sums["y"] += logp[row["sampled"][0]]
        sums["margin"] += logp[row["chosen"]] - logp[row["rejected"]]
    norms = {}
    for name, value in sums.items():
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        norms[name] = math.sqrt(sum(g.square().sum().item() for g in grads))
    assert first["optimism_share"] == pytest.approx(2e-3 * norms["y"] / norms["margin"], rel=5e-3)
    assert sum("optimism_share" in row for row in training(tmp_path / "run")) == 1


@pytest.mark.parametrize("loss", selm.PREFERENCE_LOSS)
def test_a_wrong_reference_is_stopped_before_the_first_update(loss):
    """Reference log-probs of another model, dtype or tokenisation: every later number is off. A
    check that demands ln 2 of every loss."""
    s = SimpleNamespace(loss=loss, beta=0.01, dtype="fp32")
    policy = policies.Policy(make_model())
    trees = ready_trees(policy)
    metrics, farthest, _ = one_gradient(policy, trees, beta=0.01, loss=loss)
    train_loop.check_update_zero(metrics["preference_loss"], farthest, s)
    with pytest.raises(RuntimeError, match=f"must be {metrics['preference_loss']:.2f}"):
        train_loop.check_update_zero(1.01 * metrics["preference_loss"], farthest, s)
    trees[0].ref_logps[0] += 0.5  # at the paper's beta this moves DPO's loss by 4e-4 only
    metrics, farthest, _ = one_gradient(policy, trees, beta=0.01, loss=loss)
    with pytest.raises(RuntimeError, match="0.5 nats off"):
        train_loop.check_update_zero(metrics["preference_loss"], farthest, s)


def test_the_schedule_warms_up_over_a_tenth_and_ends_near_zero():
    """A first or last update at rate 0; a warm-up in epochs; a division by zero for one update."""
    factors = [train_loop.lr_factor(u, 100) for u in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    middle = 0.5 * (1 + math.cos(math.pi * 46 / 91))  # by hand: update 55 is the 46th of 90 decays
    assert factors[55] == pytest.approx(middle)
    assert [train_loop.lr_factor(0, 1)] == [1.0]


# ----------------------------------------------------------------------------------------------
# Ranking: what is judged, what is dropped
# ----------------------------------------------------------------------------------------------


def test_equal_pairs_keep_their_optimism_term_and_empty_data_is_dropped(command, tmp_path, capsys):
    """Prompts that vanish: where the judge finds all alike, Algorithm 1 still pushes y down; with
    alpha = 0 there is nothing left to learn. An empty response of the data drops the row."""
    preferences = rows(tmp_path / "p.jsonl")
    for row in preferences[::3]:
        row["rejected"][-1]["content"] = " "
    write_jsonl(tmp_path / "p.jsonl", preferences)
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(len(c) if 'the' in p[-1]['content'] else 0) for c in cs]"
        " for p, cs in zip(prompts, candidates)]\n")
    train_loop.main([*command, "--alpha", "0.3", "--baseline"])
    pairs = [row for k in (1, 2) for row in rows(tmp_path / f"run/iter_{k}/pairs.jsonl")]
    dropped = [row for row in pairs if row["dropped"]]
    equal = [row for row in pairs if not row["dropped"] and row["chosen"] == row["rejected"]]
    assert dropped and equal and len(dropped) + len(equal) < 12
    assert all(row["dropped"] == "empty response in the data" for row in dropped)
    assert all(row["chosen"] in row["sampled"] for row in equal)
    counts = [r for r in rows(tmp_path / "run/metrics.jsonl") if r["phase"] == "rank"]
    assert sum(c["equal"] for c in counts) == len(equal)
    assert sum(c["dropped"].get("empty response in the data", 0) for c in counts) == len(dropped)
    assert "empty response in the data" in capsys.readouterr().out
    used = {row["prompt_id"] for k in (1, 2)
            for row in rows(tmp_path / f"run/iter_{k}/reference.jsonl")
            if any(logp is not None for logp in row["logps"])}
    assert used == {row["prompt_id"] for row in pairs} - {row["prompt_id"] for row in dropped}
    pairs = [row for k in (1, 2) for row in rows(tmp_path / f"run/baseline/iter_{k}/pairs.jsonl")]
    equal = {r["prompt_id"] for r in pairs if not r["dropped"] and r["chosen"] == r["rejected"]}
    used = {row["prompt_id"] for k in (1, 2)
            for row in rows(tmp_path / f"run/baseline/iter_{k}/reference.jsonl")
            if any(logp is not None for logp in row["logps"])}
    assert equal and not equal & used


def fake_start(tmp_path, judge):
    chat = chat_template.ChatFormat(make_tokenizer())
    return SimpleNamespace(chat=chat, judging=lambda here: judge), chat


def rank_one(tmp_path, y_ids, judge, **changes):
    """The row of pairs.jsonl of one prompt whose sample has these ids."""
    start, chat = fake_start(tmp_path, judge)
    s = SimpleNamespace(**(dict(max_prompt_length=24, max_length=40, responses_per_prompt=1)
                           | changes))
    write_jsonl(tmp_path / "samples.jsonl", [{"prompt_id": "a", "samples": [{"ids": y_ids}]}])
    record = {"prompt_id": "a", "prompt": [{"role": "user", "content": "hello"}],
              "data_chosen": "the cat sat on the mat and looked", "data_rejected": "moon"}
    [row] = train_loop.rank_candidates([record], [Rows(tmp_path / "samples.jsonl")], start, s)
    return row, chat


def test_a_sample_that_ends_at_once_is_a_response_like_any_other_and_may_lose(tmp_path):
    """A policy that learns to say nothing, while all its empty answers are dropped from training:
    nothing ever teaches it otherwise."""
    end = chat_template.ChatFormat(make_tokenizer()).end_id
    row, _ = rank_one(tmp_path, [end], lambda p, texts, ids: [[float(len(t)) for t in texts[0]]])
    assert row["dropped"] is None and row["rejected"] == row["sampled"][0]
    assert row["candidates"][row["sampled"][0]] == {
        "sources": ["sampled"], "text": "", "ids": [end], "finished": True, "score": 0.0}


def test_what_is_judged_is_the_text_of_the_ids_that_are_trained_on(tmp_path):
    """A cut response judged by its whole text, which the policy never learns to say."""
    seen = []
    row, chat = rank_one(tmp_path, [5, 6, 7], lambda p, texts, ids: (
        seen.extend(texts[0]) or [[1.0, 2.0, 3.0]]), max_length=26, max_prompt_length=24)
    room = 26 - len(row["prompt_ids"])
    assert max(len(c["ids"]) for c in row["candidates"]) == room
    assert seen == [chat.text(c["ids"]) for c in row["candidates"]]
    assert "the cat sat on the mat and looked".startswith(seen[0]) and len(seen[0]) < 33


def test_the_samplers_limit_is_what_the_prompt_leaves(tmp_path, monkeypatch):
    """y cut after it was sampled: judged whole, trained without its end."""
    asked, start = {}, fake_start(tmp_path, None)[0]

    def serve(model, requests, **options):
        asked.update((len(prompt), limit) for prompt, limit, _ in requests)
        return enumerate([[5]] * len(asked))
    start.serve, start.attention = serve, "eager"
    s = SimpleNamespace(max_prompt_length=12, max_length=20, max_new_tokens=9, slots=2, top_p=1.0,
                        responses_per_prompt=1, temperature=0.0, seed=0, iteration=1, compute=None)
    monkeypatch.setattr(weights, "load_frozen", lambda *args: None)
    texts = ["hi", "hello there how are you the cat sat on the mat", "the cat"]
    records = [{"prompt_id": t, "prompt": [{"role": "user", "content": t}]} for t in texts]
    list(train_loop.sample_responses(records, "policy", start, s, 1))
    assert asked and all(limit == min(9, 20 - length) for length, limit in asked.items())
    assert max(asked) == 12


def test_prompts_and_iterations_have_random_streams_of_their_own(tmp_path, monkeypatch):
    """One stream for all prompts: samples of prompts that look alike are alike, and each iteration
    repeats the last one's luck."""
    seeds, start = [], fake_start(tmp_path, None)[0]

    def serve(model, requests, **options):
        for i, (_, _, seed) in enumerate(requests):
            seeds.append(seed)
            yield i, [5]
    start.serve, start.attention = serve, "eager"
    monkeypatch.setattr(weights, "load_frozen", lambda *args: None)
    records = [{"prompt_id": p, "prompt": [{"role": "user", "content": "hi"}]} for p in "abc"]
    for seed, iteration in ((0, 1), (0, 2), (1, 1), (0, 1)):
        s = SimpleNamespace(max_prompt_length=12, max_length=20, max_new_tokens=9, slots=2,
                            top_p=1.0, responses_per_prompt=2, temperature=1.0, seed=seed,
                            iteration=iteration, compute=None)
        list(train_loop.sample_responses(records, "policy", start, s, iteration))
    assert len(set(seeds[:18])) == 18 and seeds[18:] == seeds[:6]


def test_scores_are_joined_by_prompt_id_and_a_judge_that_fails_half_way_loses_nothing(
        command, tmp_path):
    """An expensive judge, asked for everything again; another prompt's scores."""
    log = tmp_path / "asked"
    (tmp_path / "judge.py").write_text(
        "import pathlib\n"
        f"log, flag = pathlib.Path({str(log)!r}), pathlib.Path({str(tmp_path / 'ok')!r})\n"
        "def judge(prompts, candidates):\n"
        "    asked = len(log.read_text().split())\n"
        "    if not flag.exists() and (len(prompts) > 2 or asked > 6):\n"
        "        raise OSError('the service is down')\n"
        "    with log.open('a') as f: f.write('x ' * len(prompts))\n"
        "    return [[float(len(c) * 7 % 13) for c in cs] for cs in candidates]\n")
    log.write_text("")
    command += ["--eval-prompts", "0", "--iterations", "1", "--prompts-per-iteration", "12"]
    with pytest.raises(ValueError, match=r"judge.py:judge, prompt_id \d+.*the service is down"):
        train_loop.main(command)
    kept = len(rows(tmp_path / "run/iter_1/scores0.jsonl"))
    assert kept == 5  # two of seven by the call before the run, which is never kept
    asked = len(log.read_text().split())
    (tmp_path / "ok").write_text("")
    train_loop.main(command)
    assert len(log.read_text().split()) - asked == 12 - kept + 2
    assert not list((tmp_path / "run").rglob("scores*"))


# ----------------------------------------------------------------------------------------------
# Killed, resumed, damaged
# ----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_every_file_is_that_of_the_undisturbed_run(
        command, tmp_path, monkeypatch):
    """A finished phase that is repeated with other random numbers, or a half-written one that is
    taken for finished."""
    train_loop.main(command)
    again = [a.replace("/run", "/killed") for a in command]
    # Where to die, and in which call counted from the last resume.
    for owner, name, call in [
            (train_loop, "forward", 1), (train_loop, "check_update_zero", 1),
            (train_loop, "clip", 2), (held_out, "judge_answers", 1), (train_loop, "ranking", 1),
            (train_loop, "lr_factor", 1), (held_out, "evaluation", 1)]:
        original, calls = getattr(owner, name), []

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            train_loop.main(again)
        monkeypatch.setattr(owner, name, original)
    train_loop.main(again)
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "killed")
    assert list(got) == list(expected)
    assert [name for name in got if got[name] != expected[name]] == []

    def never(*args, **kwargs):
        raise AssertionError("a finished run must not train again")
    monkeypatch.setattr(train_loop, "gradient", never)
    train_loop.main(again)
    assert files_of(tmp_path / "killed") == expected


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"]], ids=" ".join)
def test_a_run_killed_between_two_updates_goes_on_from_its_checkpoint(
        extra, command, tmp_path, monkeypatch):
    """A checkpoint without Adam's moments, a schedule that starts over, an update taken twice."""
    command += [*extra, "--iterations", "1", "--epochs", "3", "--save-every", "2"]
    train_loop.main(command)
    assert not (tmp_path / "run/iter_1/state").exists()
    again = [a.replace("/run", "/killed") for a in command]
    save, gradient, updates = distributed.save_checkpoint, train_loop.gradient, []

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(distributed, "save_checkpoint", save_and_die)
    for _ in range(2):  # after updates 2 and 4 of 6
        with pytest.raises(KeyboardInterrupt):
            train_loop.main(again)
    assert [f.name for f in (tmp_path / "killed/iter_1/state").iterdir()] == ["000004"]
    monkeypatch.setattr(distributed, "save_checkpoint", save)
    monkeypatch.setattr(train_loop, "gradient",
                        lambda *args: updates.append(args) or gradient(*args))
    train_loop.main(again)
    assert len(updates) == 2
    assert same(weights_of(tmp_path / "killed", 1), weights_of(tmp_path / "run", 1))
    assert training(tmp_path / "run") == training(tmp_path / "killed")
    assert not (tmp_path / "killed/iter_1/state").exists()


def test_a_checkpoint_of_another_iteration_is_refused(command, tmp_path, monkeypatch):
    """A state folder that a backup put into the wrong iteration: the training resumes from another
    policy, and nobody is told."""
    command += ["--save-every", "1"]
    save = distributed.save_checkpoint

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(distributed, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_loop.main(command)
    shutil.copytree(tmp_path / "run/iter_1/state", tmp_path / "state")
    monkeypatch.setattr(distributed, "save_checkpoint", save)
    original = train_loop.reference_logps

    def second(*args):
        if args[-1].iteration == 2:
            shutil.copytree(tmp_path / "state", tmp_path / "run/iter_2/state")
        yield from original(*args)
    monkeypatch.setattr(train_loop, "reference_logps", second)
    with pytest.raises(ValueError, match="iter_2/state/000001 is of another iteration; delete it"):
        train_loop.main(command)


def test_smaller_micro_batches_make_the_reference_again_but_never_throw_a_checkpoint_away(
        command, tmp_path, monkeypatch):
    """Memory that ran out in the 50th update, a smaller --tokens-per-forward as the hint says, and
    49 updates gone; or a first update whose policy and reference were summed in another order."""
    command += ["--iterations", "1", "--save-every", "1"]
    path, made = tmp_path / "run/iter_1/reference.jsonl", []
    reference, save = train_loop.reference_logps, distributed.save_checkpoint
    monkeypatch.setattr(train_loop, "reference_logps",
                        lambda *args: made.append(1) or reference(*args))

    def interrupted(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as before_the_first:
        before_the_first.setattr(train_loop, "gradient", interrupted)
        for smaller in ([], [], ["--tokens-per-forward", "64"]):
            with pytest.raises(KeyboardInterrupt):
                train_loop.main([*command, *smaller])
    assert len(made) == 2 and path.exists()  # once, not again, and again

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as after_the_first:
        after_the_first.setattr(distributed, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_loop.main([*command, "--tokens-per-forward", "64"])
    update, updates = train_loop.update, []
    monkeypatch.setattr(train_loop, "update", lambda *args, **kwargs: (
        updates.append(1) or update(*args, **kwargs)))
    train_loop.main(command)
    assert len(made) == 2 and len(updates) == 1  # of two


@pytest.mark.parametrize("extra", [[], ["--save-every", "1"]], ids=" ".join)
def test_sigterm_waits_for_the_update_and_the_same_command_goes_on_behind_it(
        extra, command, tmp_path, monkeypatch):
    """A machine that is taken away with a minute's notice, and hours of updates with it; an update
    that is lost, or taken twice; a second SIGTERM that is not heard either."""
    train_loop.main(command)
    again, gradient = [a.replace("/run", "/killed") for a in command] + extra, train_loop.gradient

    def until(call, times=1):
        """Runs on until SIGTERM comes in the middle of this call of `gradient`."""
        calls = []

        def asked(*args):
            calls.append(args)
            for _ in range(times * (len(calls) == call)):
                signal.raise_signal(signal.SIGTERM)
            return gradient(*args)
        before = signal.signal(signal.SIGTERM, train_loop.exits._terminate)
        monkeypatch.setattr(train_loop, "gradient", asked)
        try:
            with pytest.raises(train_loop.exits.Terminated) as end:
                train_loop.main(again)
            assert signal.getsignal(signal.SIGTERM) == train_loop.exits._terminate
        finally:
            signal.signal(signal.SIGTERM, before)
            monkeypatch.setattr(train_loop, "gradient", gradient)
        states = tmp_path.glob("killed/iter_*/state/*")
        return str(end.value), [str(f.relative_to(tmp_path / "killed")) for f in states], len(calls)

    assert until(1, times=2) == ("", [], 1)  # at once: in the middle of an update
    line = "the same command resumes after update {} of 2 of iteration {}".format
    assert until(1) == (line(1, 1), ["iter_1/state/000001"], 2)  # the first measures optimism, too
    assert until(4) == (line(2, 2), ["iter_2/state/000002"], 4)  # the last one
    train_loop.main(again)
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "killed")
    assert list(got) == list(expected)
    assert [name for name in got if got[name] != expected[name]] == []


def test_a_sigterm_behind_the_last_update_is_not_lost():
    """A command that goes on for hours although it was told to end: the next phase forgets it."""
    with pytest.raises(train_loop.exits.Terminated):
        with train_loop.exits.sigterm_waits():
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(
        command, tmp_path, monkeypatch, capsys):
    """Hours of training lost to a full disk, for the sake of not losing them."""
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(distributed, "save_checkpoint", full)
    train_loop.main([*command, "--iterations", "1", "--save-every", "1"])
    assert "warning: [Errno 28] No space left" in capsys.readouterr().out
    assert (tmp_path / "run/iter_1/policy").exists()


def test_a_killed_sampling_phase_keeps_what_was_finished(command, tmp_path, monkeypatch):
    """An hour of sampling that is lost, because its rows are written when the last one has ended;
    samples that change where the phase goes on."""
    command += ["--prompts-per-iteration", "16", "--iterations", "1", "--slots", "1"]
    train_loop.main(command)
    again, step, steps = [a.replace("/run", "/killed") for a in command], setup.sample.step, []
    samples = rows(tmp_path / "run/iter_1/samples.jsonl")
    total = sum(len(row["samples"][0]["ids"]) for row in samples)

    def dies(*args):
        steps.append(1)
        if (tmp_path / "killed/iter_1").exists() and len(steps) - before > total * 3 // 4:
            raise KeyboardInterrupt
        return step(*args)
    before = sum(len(row["ids"]) for row in rows(tmp_path / "run/start/eval.jsonl"))
    monkeypatch.setattr(setup.sample, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_loop.main(again)
    monkeypatch.setattr(setup.sample, "step", step)
    [part] = (tmp_path / "killed/iter_1").glob("samples.jsonl.part*")
    assert len(part.read_text().split()) >= 8  # of 12 or so
    train_loop.main(again)
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "killed")
    assert [name for name in expected if got[name] != expected[name]] == []


def test_a_judge_that_fails_in_the_evaluation_loses_no_answer(command, tmp_path, monkeypatch):
    """Held-out prompts that are answered once more at every try; other answers at the second."""
    command += ["--iterations", "1"]
    train_loop.main(command)
    again, step = [a.replace("/run", "/failed") for a in command], setup.sample.step

    def fails(*_):
        raise ValueError("the judge is tired")
        yield
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="tired"):
        patch.setattr(held_out, "judge_answers", fails)
        train_loop.main(again)
    sampled = []
    monkeypatch.setattr(setup.sample, "step", lambda model, cache, live: (
        sampled.extend(live) or step(model, cache, live)))
    train_loop.main(again)
    others = [y["ids"] for name in ("iter_1/samples.jsonl", "iter_1/answers.jsonl")
              for row in rows(tmp_path / "run" / name) for y in row["samples"]]
    checked = len(sampled) - sum(map(len, others))  # by the check of the sampler, before the run
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "failed")
    assert [name for name in expected if got[name] != expected[name]] == []
    sampled.clear()
    train_loop.main(again)
    assert len(sampled) == checked


def test_a_data_file_that_lost_a_row_is_refused_before_anything_is_joined(command, tmp_path):
    """Every prompt gets another prompt's sample (14 of 14 rows), exit 0."""
    train_loop.main([*command, "--iterations", "1"])
    preferences = rows(tmp_path / "p.jsonl")
    write_jsonl(tmp_path / "p.jsonl", preferences[1:])
    shutil.rmtree(tmp_path / "run/iter_1/policy")
    with pytest.raises(ValueError, match=r"the data has changed \(rows: was 20, is 19"):
        train_loop.main([*command, "--iterations", "1"])


@pytest.mark.parametrize("what", ["model", "judge", "template"])
def test_a_run_whose_model_judge_or_template_changed_is_refused_by_name(what, command, tmp_path):
    """Half a run by one judge and half by another; b.gguf that trains a.gguf's weights."""
    template = tmp_path / "t.jinja"
    template.write_text(make_tokenizer().chat_template)
    command += ["--iterations", "1", "--chat-template", str(template)]
    train_loop.main(command)
    if what == "model":
        torch.manual_seed(7)
        weights.save_policy(policies.Policy(make_model(seed=7)), make_tokenizer(),
                             tmp_path / "model")
    elif what == "judge":
        (tmp_path / "judge.py").write_text((tmp_path / "judge.py").read_text().replace("97", "89"))
    else:
        template.write_text(make_tokenizer().chat_template + "{# #}")
    with pytest.raises(ValueError, match=f"the .*{what} has changed"):
        train_loop.main(command)


def test_a_run_that_moved_or_is_named_otherwise_is_the_same_run(command, tmp_path, monkeypatch):
    """A relative path today, an absolute one tomorrow: refused, or begun anew."""
    train_loop.main(command)
    monkeypatch.setattr(train_loop, "gradient", None)  # nothing is left to train
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    relative = [a.replace(f"{tmp_path}/run", "elsewhere").replace(f"{tmp_path}/", "")
                for a in command]
    train_loop.main(relative)


@pytest.mark.parametrize("name", ["iter_1/policy/model.safetensors", "iter_2/samples.jsonl",
                                  "iter_1/pairs.jsonl", "start/eval.jsonl",
                                  "iter_2/policy/model.safetensors"])
def test_damaged_files_of_a_run_are_made_again_and_change_nothing(name, command, tmp_path, capsys):
    """A flipped bit in a policy or a lost last line that changes every number after it, exit 0."""
    train_loop.main(command)
    expected = files_of(tmp_path / "run")
    content = bytearray((tmp_path / "run" / name).read_bytes())
    if name.endswith(".jsonl"):
        content = content[:content[:-1].rfind(b"\n") + 1]
    else:
        content[-5] ^= 1
    (tmp_path / "run" / name).write_bytes(content)
    train_loop.main(command)
    assert "is not what this run wrote there; it is made again" in capsys.readouterr().out
    got = files_of(tmp_path / "run")
    assert [n for n in expected if got[n] != expected[n]] == []


def test_weights_that_the_last_update_broke_are_never_saved(command, tmp_path, monkeypatch):
    """43,168 NaN weights, exit 0: the loss of the last update is taken before it."""
    steps, step = [], torch.optim.AdamW.step

    def breaks_at_the_last(self, *args):
        step(self, *args)
        steps.append(1)
        if len(steps) == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][3].view(-1)[0] = math.nan
    monkeypatch.setattr(torch.optim.AdamW, "step", breaks_at_the_last)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_loop.main([*command, "--iterations", "1"])
    assert not (tmp_path / "run/iter_1/policy").exists()


def test_a_full_disk_is_named_and_loses_nothing(command, tmp_path, monkeypatch):
    """Hours of samples gone because the policy did not fit."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights, "save_policy", full)
    with pytest.raises(OSError):
        train_loop.main(command)
    monkeypatch.undo()
    assert (tmp_path / "run/iter_1/samples.jsonl").exists()
    train_loop.main(command)
    assert (tmp_path / "run/iter_2/policy").exists()


# ----------------------------------------------------------------------------------------------
# What is refused, and how a command ends
# ----------------------------------------------------------------------------------------------


def test_a_dry_run_loads_nothing(capsys, monkeypatch):
    """A plan that loads 14 GB of weights to print."""
    monkeypatch.setattr(weights, "load_model", None)
    train_loop.main(["--model", "zephyr-7b-sft", "--dry-run"])
    assert "15283" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
    (["--ranker", "pairrrm"], "pairrrm"),
    (["--ranker", "absent.py:f"], "absent.py"), (["--ranker", "oracle"], "toy"),
    (["--max-length", "100000"], "exceeds the context .* 256"),
    (["--prompts-per-iteration", "6", "--iterations", "50"], "cannot be split into 50")])
def test_inputs_that_cannot_work_are_refused_before_sampling(change, words, command, tmp_path):
    """A run that fails after an hour on what a look at the files could tell; a first try that
    claims the folder, and a corrected second one that is told to use --fresh."""
    with pytest.raises(ValueError, match=words):
        train_loop.main([*command, *change])
    assert not (tmp_path / "run").exists()


def test_a_row_that_a_template_or_a_judge_refuses_is_named_before_sampling(command, tmp_path):
    """A system turn for Gemma, two user turns for PairRM: found after hours of sampling."""
    preferences = rows(tmp_path / "p.jsonl")
    del preferences[4]["chosen"][-1]["content"]
    write_jsonl(tmp_path / "p.jsonl", preferences)
    with pytest.raises(ValueError, match="p.jsonl, line 5.*--skip-bad-rows"):
        train_loop.main(command)
    train_loop.main([*command, "--skip-bad-rows", "--iterations", "1"])


@pytest.mark.parametrize("name, answer", [("rejected", " "), ("chosen", "<think>Hm.</think>\n")])
def test_data_whose_answers_are_all_empty_are_refused_before_sampling(
        name, answer, command, tmp_path):
    """All rows dropped after hours of sampling, and nothing to train on; also where an answer is a
    thought alone. One good row in each iteration is enough for a run."""
    preferences = rows(tmp_path / "p.jsonl")
    for row in preferences:
        row[name][-1]["content"] = answer
    write_jsonl(tmp_path / "p.jsonl", preferences)
    with pytest.raises(ValueError, match="p.jsonl: in iteration 1 every row has an empty answer"):
        train_loop.main(command)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(command, tmp_path):
    """Token ids beyond the embedding: an index error deep inside, or on CUDA a dead process."""
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"knows \d+ tokens, the model only 100.*resize_token"):
        train_loop.main(command)


def test_other_settings_for_the_same_folder_are_named_and_fresh_starts_over(command, tmp_path):
    """A resumed run that mixes two alphas."""
    train_loop.main(command)
    with pytest.raises(ValueError, match="alpha was 0.001, is 0.5.*--fresh"):
        train_loop.main([*command, "--alpha", "0.5"])
    train_loop.main([*command, "--alpha", "0.5", "--fresh", "--iterations", "1"])
    assert not (tmp_path / "run/iter_2").exists()


@pytest.mark.parametrize("mistake", [["--ranker", "absent.py:f"], ["--beta", "-1"],
                                     ["--data", "absent.jsonl"], ["--max-length", "9999"]])
def test_fresh_deletes_nothing_before_everything_else_is_checked(mistake, command, tmp_path):
    """A finished run gone because another flag was mistyped."""
    train_loop.main([*command, "--iterations", "1"])
    with pytest.raises(ValueError):
        train_loop.main([*command, "--iterations", "1", "--fresh", *mistake])
    assert (tmp_path / "run/iter_1/policy/model.safetensors").exists()


def test_an_error_on_the_command_line_is_one_line_and_a_nonzero_exit(command):
    """A traceback for a typing mistake; exit code 0 for a run that did not happen."""
    result = subprocess.run([sys.executable, str(ROOT / "train_loop.py"), *command, "--beta", "-1"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: --beta -1: must be above 0 and at most 1000"


def test_a_bug_of_ours_says_so_and_keeps_its_traceback(command):
    """A traceback that looks like the user's mistake, or a mistake of ours in one useless line."""
    script = ("import sys; sys.argv = ['train_loop.py', *sys.argv[1:]]\n"
              "import train_loop\n"
              "train_loop.forward = None\n"
              "train_loop.exits.run(train_loop.main)")
    result = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "a bug of this program" in result.stderr
    assert "Traceback" in result.stderr and "TypeError" in result.stderr


@pytest.mark.parametrize("sent, code, seconds", [
    (signal.SIGINT, 130, 0.3), (signal.SIGINT, 130, None), (signal.SIGTERM, 143, None)])
def test_ctrl_c_and_sigterm_are_one_line_at_any_moment(sent, code, seconds, command, tmp_path):
    """Forty lines of traceback for a key; an exit code that says all is well."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_loop.py"), *command, "--prompts-per-iteration", "8",
         "--epochs", "200"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment)
    if seconds:  # while the libraries are being imported
        time.sleep(seconds)
    else:
        while not (tmp_path / "run/iter_1/reference.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr[-2000:]
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip() and "it/s" not in line
             and not re.match(r"\s*(train|reference|sample|judge|Writing|Loading)", line)]
    assert len(lines) == 1 and "the same command resumes" in lines[0], lines


@pytest.mark.parametrize("script", [["sample.py"], ["rank.py"], ["-m", "harness.judging.duel"]],
                         ids=" ".join)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_another_commands_libraries_load_is_one_line(script, sent):
    """Forty lines of traceback from the middle of an import."""
    process = subprocess.Popen([sys.executable, *script, "--help"], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.4)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + sent and stderr == "\nstopped; nothing had begun\n"


def test_a_second_command_in_the_same_folder_is_refused(command, tmp_path):
    """Two runs that write into each other's files."""
    with train_loop.command.run_record.locked(tmp_path / "run"):
        result = subprocess.run([sys.executable, str(ROOT / "train_loop.py"), *command],
                                capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "another command is at work" in result.stderr


def test_a_template_that_writes_the_date_writes_one_date_in_all_of_a_run(command, tmp_path,
                                                                         monkeypatch):
    """A run that passes midnight: y sampled behind one prompt, trained behind another."""
    class Day(datetime.date):
        day = 1

        @classmethod
        def today(cls):
            return cls(2026, 1, Day.day)
    monkeypatch.setattr(chat_template.datetime, "date", Day)
    monkeypatch.setattr(chat_template.chat_template_utils, "datetime", datetime.datetime)  # set anew
    tokenizer = make_tokenizer()
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%d') }}" + tokenizer.chat_template)
    command += ["--chat-template", str(tmp_path / "dated.jinja"), "--iterations", "1",
                "--max-prompt-length", "40"]

    def pairs(name):
        train_loop.main([part.replace("/run", f"/{name}") for part in command])
        return (tmp_path / name / "iter_1/pairs.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt
    expected = pairs("undisturbed")
    with monkeypatch.context() as at_the_ranking:
        at_the_ranking.setattr(train_loop, "rank_candidates", killed)
        with pytest.raises(KeyboardInterrupt):
            train_loop.main(command)
    Day.day = 2
    assert pairs("run") == expected != pairs("next_day")


def test_a_judge_whose_neighbour_file_has_changed_is_another_judge(command, tmp_path):
    """One run, half of it judged by one rule and half by its opposite."""
    (tmp_path / "rule.py").write_text("SIGN = 1\n")
    (tmp_path / "judge.py").write_text(
        "import rule\n"
        "def judge(prompts, candidates):\n"
        "    return [[rule.SIGN * len(text) for text in texts] for texts in candidates]\n")
    train_loop.main(command)
    (tmp_path / "rule.py").write_text("SIGN = -1\n")
    with pytest.raises(ValueError, match="the judge has changed .rule: "):
        train_loop.main(command)


def test_the_length_penalty_is_for_training_not_for_held_out_answers(command, tmp_path):
    """A win rate of a judge that nobody has asked for."""
    train_loop.main([*command, "--iterations", "1", "--length-penalty", "5"])
    for row in rows(tmp_path / "run/start/eval.jsonl"):
        assert all(0 <= score < 97 for score in row["scores"])  # write_judge's own
    scores = [c["score"] for row in rows(tmp_path / "run/iter_1/pairs.jsonl")
              for c in row["candidates"]]
    assert min(scores) < 0


def test_memory_that_is_too_small_may_be_saved_in_a_run_that_goes_on(command, tmp_path):
    """A hint to add a flag that the run then refuses."""
    train_loop.main([*command, "--iterations", "1"])
    first = files_of(tmp_path / "run")
    train_loop.main([*command, "--iterations", "1", "--gradient-checkpointing"])
    assert files_of(tmp_path / "run") == first


def test_lost_metrics_are_one_line_that_says_what_to_do(command, tmp_path):
    """An IndexError that calls itself a bug, and a run that nobody can go on with."""
    command += ["--iterations", "1"]
    train_loop.main(command)
    expected = files_of(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="lost the updates of iteration 1.*iter_1/policy"):
        train_loop.main(command)
    shutil.rmtree(tmp_path / "run/iter_1/policy")
    train_loop.main(command)
    assert files_of(tmp_path / "run") == expected

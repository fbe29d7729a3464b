"""textbook.py and train_loop.py, which share no code, compute the same run.

This is the oracle of the whole loop: what is wrong in any file between the rows and the weights
(a shift, a sign, a role, a stale reference, a mask, a schedule) makes the two differ.
"""

import copy
import hashlib
import random
import subprocess
import sys

import pytest
import torch

import textbook
import train_loop
from conftest import ROOT
from harness.inputs import chat_template, toy
from harness.judging import judges
from harness.runs import output_files, run_folder, settings, setup

BETA, LR, BATCH = 0.5, [4e-3, 2e-3], 5
MAX_NORM = 2.2  # clips some of the updates, and not all


@pytest.fixture(scope="module")
def world():
    """A little trained model, its tokenizer, and two portions of 12 and 12 records."""
    steps, toy.SFT_STEPS = toy.SFT_STEPS, 120
    try:
        return toy.textbook_world(seed=0, rows=12, portions=2)[:3]
    finally:
        toy.SFT_STEPS = steps


def judge(prompts, candidates):
    """The toy's true reward; a hash decides between equals, for every pair has to be a pair."""
    def tie(text):
        return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) * 1e-9
    return [[reward + tie(text) for reward, text in zip(rewards, texts)] for rewards, texts in
            zip(toy.oracle()(prompts, candidates), candidates)]


def by_textbook(world, alpha, pair_loss="dpo"):
    model, tokenizer, portions = world
    policy, rounds = copy.deepcopy(model), []
    for examples, losses in textbook.self_explore(
            policy, tokenizer, portions, judge, alpha=alpha, beta=BETA, lr=LR, batch_size=BATCH,
            max_new_tokens=8, adam=dict(betas=(0.9, 0.95), eps=1e-3), max_grad_norm=MAX_NORM,
            pair_loss=pair_loss, order=lambda k, n: random.Random(
                settings.stream(0, k, 0)).sample(range(n), n)):
        rounds.append((examples, losses))
    return rounds, policy


def run_loop(folder, model, tokenizer, portions, flags, judge=judge):
    """train_loop.self_explore over portions of records, which get ids -> (its folder, portions)."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    s = settings.read(["--model", str(folder / "model"), "--data", "a/b", "--run-dir",
                       str(folder / "run"), *flags.split()])
    portions = [[{"prompt_id": f"{k} {i}", **record} for i, record in enumerate(portion)]
                for k, portion in enumerate(portions)]
    run = run_folder.Run(folder / "run")
    run.path.mkdir()
    train_loop.self_explore(run, setup.Start(
        run, s.model, chat_template.ChatFormat(tokenizer), setup.sample.serve, "selm_tree",
        judges.load_judge("oracle", oracle=judge), portions, []), s)
    return run.path, portions


def by_the_loop(world, alpha, pair_loss, folder):
    """The same through files."""
    run, _ = run_loop(
        folder, *world, f"--alpha {alpha} --loss {pair_loss} --beta {BETA} --iterations 2 "
        f"--lr {LR[0]} {LR[1]} "
        f"--batch-size {BATCH} --adam-betas 0.9 0.95 --adam-eps 1e-3 --max-grad-norm {MAX_NORM} "
        "--max-length 40 --eval-prompts 0 --max-prompt-length 20 --max-new-tokens 8 "
        "--tokens-per-forward 60 --slots 5")
    return [read_round(run, k) for k in (1, 2)], train_loop.weights.load_model(
        run / "iter_2/policy")


def read_round(folder, k):
    """(examples, losses) of an iteration's files, as textbook.py gives them."""
    examples = []
    for row in output_files.Rows(folder / f"iter_{k}/pairs.jsonl"):
        ids = [candidate["ids"] for candidate in row["candidates"]]
        [y] = output_files.Rows(folder / f"iter_{k}/samples.jsonl").of(row["prompt_id"])["samples"]
        assert row["sampled"] == [ids.index(y["ids"])]
        examples.append((row["prompt_ids"], ids[row["chosen"]], ids[row["rejected"]], y["ids"]))
    losses = [row["loss"] for _, row in output_files.read_jsonl(folder / "metrics.jsonl")
              if row["phase"] == "train" and row["iteration"] == k]
    return examples, losses


@pytest.mark.parametrize("alpha, pair_loss", [(0.3, "dpo"), (0.0, "dpo"), (0.3, "ipo")])
def test_the_loop_computes_what_the_textbook_computes(alpha, pair_loss, world, tmp_path):
    """Any fault of the method, in any file: two iterations from the same start, prompts and
    settings give the same samples, pairs, losses and weights."""
    expected, policy = by_textbook(world, alpha, pair_loss)
    got, trained = by_the_loop(world, alpha, pair_loss, tmp_path)
    for (examples, losses), (own_examples, own_losses) in zip(expected, got, strict=True):
        assert own_examples == examples
        assert own_losses == pytest.approx(losses, abs=1e-5) and len(losses) == 3
    start = world[0].state_dict()
    for name, weight in policy.state_dict().items():
        moved = (weight - start[name]).norm()
        assert moved > 1e-3, "a run that does not learn compares nothing"
        difference = (trained.state_dict()[name] - weight).norm()
        assert difference < 1e-4 * weight.norm() and difference < 0.01 * moved, name


def test_optimism_and_the_pair_loss_change_the_run(world):
    """alpha or the loss's name dropped on both sides: the comparison above would not see it."""
    with_it, without, ipo = (
        [loss for _, losses in by_textbook(world, *options)[0] for loss in losses]
        for options in ((0.3,), (0.0,), (0.3, "ipo")))
    assert max(abs(a - b) for a, b in zip(with_it, without)) > 0.01
    assert max(abs(a - b) for a, b in zip(with_it, ipo)) > 0.01


def test_the_textbook_shares_no_code_with_what_it_checks():
    """An oracle that repeats the fault which it should find."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, textbook; print(*sys.modules)"], cwd=ROOT,
        capture_output=True, text=True, check=True).stdout.split()
    assert not {"selm", "data", "model", "sample", "rank", "train_loop", "harness"} & set(loaded)


def test_padding_changes_no_log_prob(world):
    """A pad token that is counted, or attended to, in the textbook itself. Oracle: transformers'
    own cross entropy, row by row."""
    model, tokenizer, _ = world
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [17]]
    got = textbook.logps(model, prompts, responses)
    for x, y, logp in zip(prompts, responses, got):
        labels = torch.tensor([[-100] * len(x) + y])
        loss = model(torch.tensor([x + y]), labels=labels).loss
        assert logp.item() == pytest.approx(-loss.item() * len(y), rel=1e-4)

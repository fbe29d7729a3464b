"""--pairs reference --reference initial --optimism xpo: XPO (arXiv 2405.21046), by a plain loop.

As test_textbook.py does for SELM: what is wrong anywhere (whose sample is pushed down, who wins a
tie, a reference that moves on, the sign) makes the loop below and train_loop.py differ.
"""

import copy
import hashlib
import random

import pytest
import torch

import rank
import textbook
import train_loop
from harness.inputs import chat_template, toy
from harness.runs import output_files, settings, setup
from test_textbook import run_loop

ALPHA, BETA, LR, BATCH = 0.2, 0.5, [4e-3, 2e-3], 5
FLAGS = (f"--alpha {ALPHA} --beta {BETA} --lr {LR[0]} {LR[1]} --iterations 2 --batch-size {BATCH} "
         "--pairs reference --reference initial --optimism xpo --temperature 1 --adam-eps 1e-3 "
         "--adam-betas 0.9 0.95 --max-grad-norm 1 --max-length 40 --max-prompt-length 20 "
         "--max-new-tokens 8 --tokens-per-forward 60 --eval-prompts 0")


def judge(prompts, candidates):
    """One bit, so that a third of the pairs are ties."""
    return [[float(hashlib.sha256(text.encode()).digest()[0] % 2) for text in texts]
            for texts in candidates]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(start model, tokenizer, portions, run folder) of a finished run of two iterations."""
    folder = tmp_path_factory.mktemp("xpo")
    steps, toy.SFT_STEPS = toy.SFT_STEPS, 120
    try:
        model, tokenizer, portions, _ = toy.textbook_world(seed=0, rows=12, portions=2)
    finally:
        toy.SFT_STEPS = steps
    run, portions = run_loop(folder, model, tokenizer, portions, FLAGS, judge)
    return model, tokenizer, portions, run


def xpo_loss(policy, initial, batch):
    """XPO's objective on (prompt, chosen, rejected, the initial model's sample), a scalar."""
    x, chosen, rejected, y = map(list, zip(*batch))
    margin = textbook.logps(policy, x, chosen) - textbook.logps(policy, x, rejected)
    with torch.no_grad():
        ref_margin = textbook.logps(initial, x, chosen) - textbook.logps(initial, x, rejected)
    dpo = -torch.nn.functional.logsigmoid(BETA * (margin - ref_margin))
    return (dpo + ALPHA * textbook.logps(policy, x, y)).mean()


def test_the_loop_is_xpo_as_a_plain_loop_computes_it(run):
    """Any fault of the pairs, the roles, the anchor or the term; losses and weights must agree."""
    initial, tokenizer, portions, folder = run
    policy, ties, lost = copy.deepcopy(initial), 0, 0
    for k, portion in enumerate(portions, 1):
        examples, samples = [], [output_files.Rows(folder / f"iter_{k}/{name}.jsonl")
                                 for name in ("samples", "reference_samples")]
        for record in portion:
            prompt, *_ = textbook.tokenise(tokenizer, record)
            ours, its = (rows.of(record["prompt_id"])["samples"][0]["ids"] for rows in samples)
            [[score, its_score]] = judge(None, [tokenizer.batch_decode(
                [ours, its], skip_special_tokens=True)])
            ties, lost = ties + (score == its_score), lost + (score < its_score)
            pair = (its, ours) if score < its_score else (ours, its)
            examples.append((prompt, *pair, its))
        order = random.Random(settings.stream(0, k, 0)).sample(range(12), 12)
        batches = [[examples[i] for i in order[at:at + BATCH]] for at in (0, 5, 10)]
        optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=1e-3,
                                      weight_decay=0.0)
        losses = []
        for u, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = LR[k - 1] * textbook.lr_factor(u, 3)
            losses.append(xpo_loss(policy, initial, batch))
            losses[-1].backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        own = [row["loss"] for _, row in output_files.read_jsonl(folder / "metrics.jsonl")
               if row["phase"] == "train" and row["iteration"] == k]
        assert own == pytest.approx([loss.item() for loss in losses], abs=1e-4)
    assert ties and lost, "without ties and losses half of the roles are not looked at"
    trained = train_loop.weights.load_model(folder / "iter_2/policy").state_dict()
    for name, weight in policy.state_dict().items():
        moved = (weight - initial.state_dict()[name]).norm()
        assert (trained[name] - weight).norm() < 0.01 * moved, name


def test_the_second_sample_is_the_first_models_in_every_iteration(run):
    """Two samples of the same model, or of one random stream: equal pairs that teach nothing.
    Greedily replayed, the stream of each prompt gives the ids in the file."""
    initial, tokenizer, portions, folder = run
    chat = chat_template.ChatFormat(tokenizer)
    policy = train_loop.weights.load_model(folder / "iter_1/policy")
    prompts = [chat.prompt_ids(record["prompt"]) for record in portions[1]]
    ids = [record["prompt_id"] for record in portions[1]]
    sampled = lambda k, name: [row["samples"][0]["ids"] for row in output_files.Rows(
        folder / f"iter_{k}/{name}.jsonl")]
    for name, model, iteration in (("samples", policy, 2),
                                   ("reference_samples", initial, "2, reference")):
        seeds = [settings.stream(0, iteration, prompt_id, 0) for prompt_id in ids]
        again = setup.sample.generate(model, prompts, stop_ids=chat.stop_ids, max_new_tokens=8,
                                        temperature=1.0, seeds=seeds, progress=False)
        assert sampled(2, name) == again
    first = zip(sampled(1, "samples"), sampled(1, "reference_samples"))  # of the same model
    assert sum(a == b for a, b in first) < 6


@pytest.mark.parametrize("scores, chosen", [([1.0, 0.0], 0), ([0.0, 1.0], 1), ([0.5, 0.5], 0)])
def test_a_tie_goes_to_the_policys_sample_and_optimism_is_on_the_other(scores, chosen):
    """A tie that goes by hash, as among the data's responses, or y that follows the winner."""
    row = {"dropped": None, "candidates": [{"sources": ["policy"], "text": "a"},
                                           {"sources": ["reference"], "text": "b"}]}
    rank.give_roles(row, scores)
    assert (row["chosen"], row["rejected"], row["sampled"]) == (chosen, 1 - chosen, [1])
    assert [c["score"] for c in row["candidates"]] == scores
    row = {"dropped": None, "candidates": [{"sources": ["policy", "reference"], "text": "a"}]}
    rank.give_roles(row, [0.5])
    assert (row["chosen"], row["rejected"], row["sampled"]) == (0, 0, [0])


@pytest.mark.parametrize("flags, words", [
    ("--temperature 1", "--reference initial"), ("--reference initial", "--temperature > 0"),
    ("--reference initial --temperature 1 --responses-per-prompt 2", "one sample of each")])
def test_pairs_that_cannot_be_made_are_refused(flags, words):
    """Pairs of two equal greedy samples, found out after the sampling."""
    with pytest.raises(ValueError, match=words):
        settings.read(["--pairs", "reference", *flags.split()])


def test_the_papers_iteration_0_keeps_the_datas_pairs():
    """The Zephyr recipe with XPO's pairs: its offline portion has no samples to compare."""
    s = settings.read("--model zephyr-7b-sft --pairs reference --reference initial "
                      "--temperature 1".split())
    assert [s.at(k).pairs for k in range(3)] == ["data", "reference", "reference"]

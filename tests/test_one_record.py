"""docs/one_record.md: the page is what the code does, and what the code does is right."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT

import textbook
from experiments.checks import one_record

NUMBER = re.compile(r"[+-]?[0-9]+\.[0-9]+")


@pytest.fixture(scope="module")
def trace():
    return one_record.trace()


def test_the_page_is_what_the_code_makes(trace):
    """A page that tells how the code once was. (Another processor may round the third digit.)"""
    kept = (ROOT / "docs/one_record.md").read_text()
    made = one_record.page(trace)
    assert NUMBER.sub("x", kept) == NUMBER.sub("x", made)
    for a, b in zip(map(float, NUMBER.findall(kept)), map(float, NUMBER.findall(made))):
        assert a == pytest.approx(b, abs=0.01)


def test_its_log_probs_loss_and_slopes_are_the_textbooks(trace):
    """Numbers that agree with the code and with nothing else. Oracle: textbook.py on the same model
    before the step; the slopes from the formula."""
    model, tree = trace["start"], trace["tree"]
    expected = textbook.logps(model, [list(tree.prompt_ids)] * 2, list(map(list, tree.responses)))
    assert trace["logps"] == pytest.approx(expected.tolist(), abs=1e-4)
    batch = [(list(tree.prompt_ids), *(list(tree.responses[i]) for i in (
        tree.chosen, tree.rejected, tree.sampled[0])))]
    loss = textbook.loss(model, model, batch, one_record.ALPHA, one_record.BETA)
    assert trace["loss"] == pytest.approx(loss.item(), abs=1e-5) == pytest.approx(math.log(2))
    slopes = [0.0] * len(tree.responses)
    slopes[tree.chosen] -= one_record.BETA / 2
    slopes[tree.rejected] += one_record.BETA / 2
    slopes[tree.sampled[0]] += one_record.ALPHA * one_record.BETA
    assert trace["slopes"] == pytest.approx(slopes, abs=1e-5)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
    after = textbook.logps(model, [list(tree.prompt_ids)] * 2, list(map(list, tree.responses)))
    assert trace["after"] == pytest.approx(after.tolist(), abs=1e-3)


def test_its_ids_are_the_template_by_hand_and_its_places_a_loop(trace):
    """A trace that explains another layout than the one that is computed."""
    words = trace["tokenizer"].get_vocab()
    record, row, tree, batch = (trace[name] for name in ("record", "row", "tree", "batch"))
    question = record["prompt"][0]["content"].split()
    prompt = ["<|user|>", *question, "<|end|>", "<|assistant|>"]
    assert row["prompt_ids"] == [words[word] for word in prompt]
    assert row["candidates"][0]["ids"] == [words[w] for w in [*record["data_chosen"].split(),
                                                              "<|end|>"]]
    assert json.loads(one_record.row_text(row))["candidates"] == row["candidates"]
    line, positions, labels = list(tree.prompt_ids), list(range(len(tree.prompt_ids))), []
    for response in tree.responses:
        before = len(tree.prompt_ids) - 1
        for i, token in enumerate(response):
            labels.append((before, token))
            before = len(line)
            line.append(token)
            positions.append(len(tree.prompt_ids) + i)
    assert batch.input_ids[0].tolist() == line and batch.position_ids[0].tolist() == positions
    assert list(zip(batch.predicted_from.tolist(), batch.targets.tolist())) == labels

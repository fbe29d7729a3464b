"""Tests of harness/outside.py: samples that another engine has drawn."""

import json
import os
from pathlib import Path

import pytest

import train_loop
from conftest import make_tokenizer
from harness import outside, prepare
from harness.rundir import write_jsonl
from harness.template import ChatFormat
from test_train_loop import WORDS, command, files_of, rows  # noqa: F401 (command: a fixture)

END = "<|im_end|>"


def engine(prompt_ids, limit):
    """An engine: (text, finished) for a prompt. Some texts reach the limit, one is empty."""
    n = sum(prompt_ids) % 9
    words = [WORDS[(n + i) % len(WORDS)] for i in range(n)]
    ids = make_tokenizer()(" ".join(words) + END, add_special_tokens=False)["input_ids"]
    return make_tokenizer().decode(ids[:limit], skip_special_tokens=True), len(ids) <= limit


def serve(_, requests, **__):
    """The same engine where our sampler stands: yields ids."""
    for prompt, limit, _ in requests:
        text, finished = engine(prompt, limit)
        yield make_tokenizer()(text + END * finished, add_special_tokens=False)["input_ids"]


def test_samples_of_another_engine_make_the_run_that_our_sampler_would_have_made(
        command, tmp_path, monkeypatch):
    """A sample beside another prompt, a lost or second end token, an end behind what was cut off,
    prompts in other ids than those that are trained."""
    monkeypatch.setattr(prepare.architectures, "choose_sampler", lambda *_: serve)
    train_loop.main(command)
    there = [part.replace("/run", "/there") for part in command]
    for k in (1, 2):
        with pytest.raises(ValueError, match=f"samples_{k}.jsonl is not there yet: .*iter_{k}.*"):
            train_loop.main([*there, "--samples-from", f"{tmp_path}/samples_{{k}}.jsonl"])
        wanted = rows(tmp_path / f"there/iter_{k}/prompts.jsonl")
        answers = [engine(row["prompt_ids"], row["max_new_tokens"]) for row in wanted]
        assert {finished for _, finished in answers} == {True, False}
        write_jsonl(tmp_path / f"samples_{k}.jsonl", [  # in any order, and more than was asked for
            {"prompt_id": row["prompt_id"], "samples": [{"text": text, "finished": finished}]}
            for row, (text, finished) in [*zip(wanted, answers)][::-1]]
            + [{"prompt_id": "nobody's", "samples": [{"text": "x", "finished": True}]}])
    train_loop.main([*there, "--samples-from", f"{tmp_path}/samples_{{k}}.jsonl"])
    expected, got = files_of(tmp_path / "run"), files_of(tmp_path / "there")
    assert {name for name in got if name not in expected} == {
        "iter_1/prompts.jsonl", "iter_2/prompts.jsonl"}
    assert [name for name in expected if got[name] != expected[name]] == []


def test_the_message_names_the_policy_of_the_iteration_and_the_stop_tokens(command, tmp_path):
    """The start policy sampled a second time, by an engine that never stops."""
    write_jsonl(tmp_path / "1", [{"prompt_id": str(i), "samples": [{"text": "x", "finished": True}]}
                                 for i in range(20)])
    stops = sorted(ChatFormat(make_tokenizer()).stop_ids)
    with pytest.raises(ValueError) as error:
        train_loop.main([*command, "--samples-from", f"{tmp_path}/{{k}}"])
    assert f"from {tmp_path}/run/iter_1/policy " in str(error.value)
    assert f"(stop tokens {' '.join(map(str, stops))})" in str(error.value)


GOOD = {"prompt_id": "1", "samples": [{"text": "x", "finished": True}]}


@pytest.mark.parametrize("line, words", [
    (json.dumps(GOOD), "line 2: prompt_id 1 stands there twice"), ("{", "line 2: not valid JSON"),
    ("[]", "line 2: expected an object"), ('{"prompt_id": "2"}', "line 2: expected an object"),
    ('{"prompt_id": "2", "samples": []}', "line 2: 0 samples; --responses-per-prompt is 1"),
    ('{"prompt_id": "2", "samples": ["x"]}', "line 2: a sample must be"),
    ('{"prompt_id": "2", "samples": [{"text": 3, "finished": true}]}', "line 2: a sample must be"),
    ('{"prompt_id": "2", "samples": [{"text": "x"}]}', "line 2: a sample must be")])
def test_a_line_that_is_no_sample_is_refused_by_its_number(line, words, tmp_path):
    """A sample that counts as finished because nobody said otherwise; the second of two lines."""
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=words):
        outside.read(path, 1)


def test_a_pipe_of_samples_is_not_waited_for(tmp_path):
    """A run that hangs without a word."""
    os.mkfifo(tmp_path / "samples.jsonl")
    with pytest.raises(ValueError, match="^--samples-from .*samples.jsonl: a pipe or a device"):
        outside.read(tmp_path / "samples.jsonl", 1)


def test_a_prompt_without_a_sample_is_refused_before_anything_is_written(command, tmp_path):
    """A run on the half of a file that the engine had finished."""
    write_jsonl(tmp_path / "some.jsonl", [GOOD])
    with pytest.raises(ValueError, match="some.jsonl has no line for prompt_id"):
        train_loop.main([*command, "--iterations", "1", "--samples-from",
                         str(tmp_path / "some.jsonl")])
    assert not Path(tmp_path / "run/iter_1/samples.jsonl").exists()


@pytest.mark.parametrize("flags, words", [
    ("--seeds 2 --no-baseline --samples-from {k}", "one arm"),
    ("--seeds 1 --baseline --samples-from {k}", "one arm"),
    ("--seeds 1 --no-baseline --samples-from x", "put {k}"),
    ("--seeds 1 --no-baseline --samples-from {k} --pairs reference --reference initial "
     "--temperature 1", "--pairs reference needs")])
def test_what_one_file_cannot_serve_is_refused(flags, words):
    """The samples of one policy taken for another's."""
    with pytest.raises(ValueError, match=words):
        train_loop.command.flags.read(flags.split())

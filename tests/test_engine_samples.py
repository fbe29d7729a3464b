"""Tests of harness/inputs/engine_samples.py: samples that another engine has drawn."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_loop
from conftest import make_tokenizer
from harness.inputs import engine_samples
from harness.runs import setup
from harness.runs.output_files import write_jsonl
from harness.runs.run_folder import Run
from harness.inputs.chat_template import ChatFormat
from test_chat_template import LONG_ONES, SHAPES, make as tokenizer
from test_train_loop import (  # noqa: F401 (command: a fixture)
    WORDS, command, files_of, rows, write_model)

END = "<|im_end|>"


def engine(prompt_ids, limit):
    """An engine: (text, finished) for a prompt. Some texts reach the limit, one is empty."""
    n = sum(prompt_ids) % 9
    words = [WORDS[(n + i) % len(WORDS)] for i in range(n)]
    ids = make_tokenizer()(" ".join(words) + END, add_special_tokens=False)["input_ids"]
    text = make_tokenizer().decode(ids[:limit], skip_special_tokens=True)
    return text, ids[:limit], len(ids) <= limit


def serve(_, requests, **__):
    """The same engine in place of our sampler."""
    for i, (prompt, limit, _) in enumerate(requests):
        yield i, engine(prompt, limit)[1]


def test_samples_of_another_engine_make_the_run_that_our_sampler_would_have_made(
        command, tmp_path, monkeypatch):
    """A sample beside another prompt, a lost or second end token, an end behind what was cut off,
    prompts in other ids than those that are trained. One half of the samples are ids beside a text
    that is not theirs, the other half texts."""
    monkeypatch.setattr(setup.compatibility, "choose_sampler", lambda *_: serve)
    train_loop.main(command)
    there = [part.replace("/run", "/there") for part in command]
    for k in (1, 2):
        with pytest.raises(ValueError, match=f"samples_{k}.jsonl is not there yet: .*iter_{k}.*"):
            train_loop.main([*there, "--samples-from", f"{tmp_path}/samples_{{k}}.jsonl"])
        wanted = rows(tmp_path / f"there/iter_{k}/prompts.jsonl")
        answers = [engine(row["prompt_ids"], row["max_new_tokens"]) for row in wanted]
        assert {finished for _, _, finished in answers} == {True, False}
        samples = [{"ids": ids, "text": "not this"} if i % 2 else {"text": text, "ids": None}
                   for i, (text, ids, _) in enumerate(answers)]
        write_jsonl(tmp_path / f"samples_{k}.jsonl", [  # in any order, and more than was asked for
            {"prompt_id": row["prompt_id"], "samples": [sample | {"finished": finished}]}
            for row, sample, (_, _, finished) in [*zip(wanted, samples, answers)][::-1]]
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
    (json.dumps(GOOD), "line 2: prompt_id 1 occurs twice"), ("{", "line 2: not valid JSON"),
    ("[]", "line 2: expected an object"), ('{"prompt_id": "2"}', "line 2: expected an object"),
    ('{"prompt_id": "2", "samples": []}', "line 2: 0 samples; --responses-per-prompt is 1"),
    ('{"prompt_id": "2", "samples": ["x"]}', "line 2: a sample must be"),
    ('{"prompt_id": "2", "samples": [{"text": 3, "finished": true}]}', "line 2: a sample must be"),
    ('{"prompt_id": "2", "samples": [{"text": "x"}]}', "line 2: a sample must be"),
    *[(json.dumps({"prompt_id": "2", "samples": [{"finished": True, **sample}]}),
       "line 2: a sample must be") for sample in (
        {}, {"ids": []}, {"ids": 5}, {"ids": [1.0]}, {"ids": ["5"]}, {"ids": [True]},
        {"ids": {"5": 1}, "text": "x"}, {"text": "\ud800"}, {"text": None}, {"text": ["x"]})],
    (json.dumps({"prompt_id": "2", "samples": [{"text": "", "finished": False}]}),
     "line 2: a sample is empty and not finished"),
    *[(json.dumps(GOOD | {"prompt_id": odd}), "line 2: prompt_id must be the string")
      for odd in (["1"], {"a": 1}, 1, 1.0, None, True)],
    ("[" * 100_000, "line 2: not valid JSON .too deep"), ("7" * 5000, "line 2: not valid JSON"),
    ('{"prompt_id": "2", "samples": {"text": "x"}}', "line 2: expected an object"),
    ("null", "line 2: expected an object"), ('"2"', "line 2: expected an object")])
def test_a_line_that_is_no_sample_is_refused_by_its_number(line, words, tmp_path):
    """A sample that counts as finished because nobody said otherwise; the second of two lines."""
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=words):
        engine_samples.read(path, 1)


def test_a_file_in_another_encoding_or_that_is_no_file_is_refused(tmp_path):
    """Python's own words for what Windows' shell has written; a pipe that nobody writes to."""
    path = tmp_path / "1"
    for encoding in ("utf-16", "latin-1"):
        path.write_text(json.dumps(GOOD | {"prompt_id": "é"}, ensure_ascii=False), encoding)
        with pytest.raises(ValueError, match=f"--samples-from {path}: not UTF-8 .byte"):
            engine_samples.read(path, 1)
    path.write_text(json.dumps(GOOD), "utf-8-sig")
    assert engine_samples.read(path, 1) == {"1": GOOD["samples"]}
    path.unlink()
    os.mkfifo(path)
    (tmp_path / "2").mkdir()
    s = SimpleNamespace(samples_from=f"{tmp_path}/{{k}}", first=1, iterations=1)
    for k in (1, 2):
        with pytest.raises(ValueError, match=f"--samples-from {tmp_path}/{k}: .*no regular file"):
            engine_samples.file_of(s, k)
    with pytest.raises(ValueError, match="no regular file"):  # before the run
        engine_samples.files(s)


@pytest.fixture
def phase(tmp_path):
    """(a function that makes iter_1/samples.jsonl from given samples, the chat, the stop id)."""
    model = write_model(tmp_path / "model")
    chat, run = ChatFormat(make_tokenizer()), Run(tmp_path / "run")
    records = [{"prompt_id": str(i), "prompt": [{"role": "user", "content": word}]}
               for i, word in enumerate(WORDS[:5])]
    s = SimpleNamespace(samples_from=str(tmp_path / "file"), iteration=1, first=1, iterations=1,
                        responses_per_prompt=1, max_prompt_length=24, max_length=48,
                        max_new_tokens=6)

    def make(samples, stop_after=9, tokenizer=None):
        start = SimpleNamespace(run=run, portions=[records],
                                chat=ChatFormat(tokenizer) if tokenizer else chat)

        def draw(*args):
            for i, row in enumerate(engine_samples.samples(*args)):
                if i == stop_after:
                    raise ValueError("killed")
                yield row
        if samples is not None:
            write_jsonl(tmp_path / "file", [{"prompt_id": str(i), "samples": [sample]}
                                            for i, sample in enumerate(samples)])
        rows = run.rows(tmp_path / "run/iter_1/samples.jsonl", draw, records, model, start, s)
        return [row["samples"][0]["ids"] for row in rows]
    return make, chat.end_id


FINE = [{"ids": [70, 71], "finished": False}] * 4


@pytest.mark.parametrize("ids, finished, words", [
    ([70, -1], False, "id -1 is not in the policy's vocabulary of 384"),
    ([384], False, "id 384 is not in the policy's vocabulary"),
    ([70] * 7, False, "7 ids; its max_new_tokens is 6"),
    ([70, "end", 71], False, "continue after a stop token; stop at one of"),
    ([70, "end", "end"], True, "continue after a stop token; stop at one of"),
    ([70, 71], True, "finished, but the last id, 71, is no stop token; .* keep it"),
    ([70] * 6, True, "finished, but the last id"),
    ([70, "end"], False, "not finished, but the last id is a stop token"),
    ([70] * 5 + ["end"], False, None), ([70] * 5 + ["end"], True, None), (["end"], True, None),
    ([70, 383], False, None)])
def test_ids_that_the_policy_cannot_have_said_are_refused_before_the_first_is_used(
        ids, finished, words, phase, tmp_path):
    """An engine without the stop tokens or the limit: y goes on after its end, and is trained. An
    id beyond the vocabulary: an error of the GPU's, hours later."""
    make, end = phase
    ids = [end if i == "end" else i for i in ids]
    if words is None:
        assert make([*FINE, {"ids": ids, "finished": finished}]) == [[70, 71]] * 4 + [ids]
        return
    with pytest.raises(ValueError, match=f"prompt_id 4: .*{words}"):
        make([*FINE, {"ids": ids, "finished": finished}])
    [part] = (tmp_path / "run/iter_1").glob("samples.jsonl*")
    assert part.stat().st_size == 0


def test_a_file_that_changes_between_a_kill_and_the_next_command_is_noticed(phase, tmp_path):
    """Samples of two policies in one samples.jsonl. Once that is whole a change has no effect."""
    make, _ = phase
    first, second = ([{"ids": [i, 71], "finished": False}] * 5 for i in (70, 72))
    with pytest.raises(ValueError, match="killed"):
        make(first, stop_after=2)
    with pytest.raises(ValueError, match="has changed since .* put the old one back, or delete"):
        make(second)
    assert make(first) == [[70, 71]] * 5
    assert [file.name for file in (tmp_path / "run/iter_1").iterdir()] == ["samples.jsonl"]
    assert make(second) == [[70, 71]] * 5  # it is made from the first
    (tmp_path / "file").unlink()
    assert make(None) == [[70, 71]] * 5


@pytest.mark.parametrize("samples, shape, said", [
    ([{"text": "hello", "finished": True}] * 5, "gpt_oss_channel", True),
    (FINE + FINE[:1], "gpt_oss_channel", False),
    ([{"text": "hello", "finished": True}] * 5, "chatml", False)])
def test_text_that_lost_the_channel_before_the_answer_is_reported(
        samples, shape, said, phase, capsys):
    """gpt-oss: 'analysisI think...assistantfinalHello' is judged and trained as the answer."""
    make, _ = phase
    make(samples, tokenizer=tokenizer(SHAPES[shape][0]))
    out = capsys.readouterr().out
    assert ('file has samples without "ids"; ' in out) == said and out.count("note:") == said
    assert ("<|channel|>, <|message|>" in out) == said and out.count("\n") == said


def test_a_text_that_the_template_changes_is_refused_with_its_prompt(phase):
    """'TOO LONG' is trained instead of the sample, in the middle of an iteration."""
    make, _ = phase
    texts = [{"text": "hello", "finished": True}] * 4
    with pytest.raises(ValueError, match="prompt_id 4: the chat template changes this answer"):
        make([*texts, {"text": "hello there, how are you?", "finished": True}],
             tokenizer=tokenizer(LONG_ONES.replace("{}", "'TOO LONG'")))


def test_fresh_does_not_delete_the_files_that_the_run_reads(command, tmp_path):
    """Hours of another engine's work, deleted by the command that was to use it."""
    (tmp_path / "run").mkdir()
    write_jsonl(tmp_path / "run/samples_2.jsonl", [GOOD])
    write_jsonl(tmp_path / "run/config.json", [{"made_from": {}, "settings": {}}])
    with pytest.raises(ValueError, match="--fresh would delete .*run/samples_2.jsonl, which "
                                         "--samples-from reads"):
        train_loop.main([*command, "--fresh", "--samples-from",
                         f"{tmp_path}/run/samples_{{k}}.jsonl"])
    assert (tmp_path / "run/samples_2.jsonl").exists()
    assert (tmp_path / "run/config.json").exists()


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
    ("--seeds 1 --no-baseline --samples-from x", "write {k}"),
    ("--seeds 1 --no-baseline --samples-from {k} --pairs reference --reference initial "
     "--temperature 1", "--pairs reference needs")])
def test_what_one_file_cannot_serve_is_refused(flags, words):
    """The samples of one policy taken for another's."""
    with pytest.raises(ValueError, match=words):
        train_loop.command.flags.read(flags.split())

"""Tests of harness/judging/judges.py: whoever scores, and the command line `python rank.py`."""

import dataclasses
import http.server
import itertools
import json
import math
import os
import re
import pickle
import random
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ARCHITECTURES, ROOT, TEMPLATES, make_tokenizer

import data as our_data
from harness.judging import evaluation, judge_models, judges
from harness.runs import exits, rank_command, setup
from harness.judging.judges import load_judge, with_length_penalty
from harness.runs.output_files import printable

PROMPTS = ["hello, how are you!", "I love you!", "Write a line\nabout  the sea, please."]
CANDIDATES = [["get out!", "hi! I am fine, thanks!", "bye!"],
              ["I love you too!", "I hate you!", "Thanks! You're a good guy!"],
              ["The sea is wide and the sea is blue. " * 4, "No.", "The sea\n\nis here [SEP] now."]]
LENGTHS = [[float(len(text)) for text in texts] for texts in CANDIDATES]


def user(text):
    return [{"role": "user", "content": text}]


MESSAGES = [user(text) for text in PROMPTS]
BY_HAND = f"{ROOT}/examples/by_hand.py:judge"
BY_LENGTH = "    return [[len(text) for text in texts] for texts in candidates]\n"


@pytest.fixture(autouse=True)
def one_thread():
    """On models this small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_judge(tmp_path):
    """Writes a file with a function `judge` of this body -> its --ranker spec."""
    def make(body=BY_LENGTH, before="", name="judge.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{before}\ndef judge(prompts, candidates):\n{body}")
        return f"{path}:judge"
    return make


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# --- Judges may do anything -------------------------------------------------------------------


def test_a_users_function_is_called_with_messages_and_distinct_texts(make_judge):
    """Catches a judge with moods that scores two identical texts differently."""
    spec = make_judge("    assert prompts[0][0]['role'] == 'user'\n"
                      "    return [[next(count) for _ in texts] for texts in candidates]\n",
                      "import itertools\ncount = itertools.count()")
    assert load_judge(spec)(MESSAGES[:1], [["b", "a", "b"]]) == [[0.0, 1.0, 0.0]]


def test_a_judge_that_adds_to_its_copies_changes_nothing(make_judge):
    """Catches a judge that notes something in a message, in the caller's own data."""
    spec = make_judge("    for prompt in prompts:\n        prompt[0]['tokens'] = 3\n" + BY_LENGTH)
    prompts, candidates = json.loads(json.dumps([MESSAGES, CANDIDATES]))
    assert load_judge(spec)(prompts, candidates) == LENGTHS
    assert [prompts, candidates] == [MESSAGES, CANDIDATES]


@pytest.mark.parametrize("change", [
    "[texts.reverse() for texts in candidates]", "[texts.sort() for texts in candidates]",
    "candidates.reverse()", "prompts.reverse()", "candidates[-1].append('mine')",
    "candidates[-1][0] = candidates[-1][0].strip()[1:]", "candidates[-1].pop()", "prompts.clear()",
    "prompts[0].append({})", "prompts[0][0]['content'] += ' Be brief.'", "prompts[0].reverse()",
    "prompts[0][0].pop('role')", "prompts[0] = 'user: hello'", "prompts[0][0] = None"])
@pytest.mark.parametrize("end", ["return", "yield from"])
def test_a_judge_that_changes_the_lists_it_was_given_is_refused(make_judge, change, end, tmp_path):
    """Catches scores in the order of a list that the judge has sorted in place, which went to the
    wrong candidates without a word; and the caller's own data changed."""
    spec = make_judge(f"    {change}\n" + BY_LENGTH.replace("return", end))
    more = [{"role": "assistant", "content": ""}, *user("And?")]
    prompts = [prompt + more for prompt in MESSAGES]
    given, kept = json.loads(json.dumps([prompts, CANDIDATES])), tmp_path / "scores"
    with pytest.raises(ValueError, match="prompt_id a to c: the judge changed the lists") as error:
        load_judge(spec)(*given, "abc", kept)
    assert spec in str(error.value) and given == [prompts, CANDIDATES]
    assert not any(judges.Kept(kept).scores.values())


@pytest.mark.parametrize("fault, words", [
    ("sys.exit(0)", "SystemExit: 0"), ("raise SystemExit", "SystemExit"),
    ("1 / 0", "ZeroDivisionError"), ("raise RuntimeError('two\\nlines')", "two lines"),
    ("raise asyncio.CancelledError", "CancelledError"), ("assert False", "AssertionError"),
    ("raise ValueError('\\033[2J\\033[H good')", "good"), ("{}['x']", "KeyError: 'x'"),
    ("raise type('Mute', (Exception,), {'__str__': None})", "Mute: <exception str() failed>")])
def test_whatever_a_judge_raises_is_one_line_that_names_judge_and_prompt(make_judge, fault, words):
    """Catches tracebacks, a run that sys.exit(0) ends as a success, and an error that names 64
    prompts where one is at fault."""
    spec = make_judge(f"    for prompt in prompts:\n        if 'love' in prompt[0]['content']:\n"
                      f"            {fault}\n{BY_LENGTH}", "import asyncio, sys")
    with pytest.raises(ValueError) as error:
        load_judge(spec)(MESSAGES, CANDIDATES, ["first", "second", "third"])
    message = str(error.value)
    assert spec in message and "prompt_id second:" in message and words in message
    assert "judge.py, line 5)" in message and message.isprintable()


@pytest.mark.parametrize("fault", ["raise SystemExit(0)", "import no_such_module", "def",
                                   "raise BaseException('no')"])
def test_a_file_that_cannot_be_imported_is_one_line_that_names_it(make_judge, fault):
    """Catches sys.exit(0) at the top of a judge's file, which ends the run as a success."""
    spec = make_judge(before=fault)
    with pytest.raises(ValueError, match="importing .*judge.py failed, ") as error:
        load_judge(spec)
    assert spec in str(error.value) and str(error.value).isprintable()


def test_ctrl_c_passes_through_a_judge(make_judge):
    """Catches a Ctrl-C that is taken for the judge's fault, or retried."""
    spec = make_judge("    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_judge(spec)(MESSAGES, CANDIDATES)
    with pytest.raises(KeyboardInterrupt):
        load_judge(make_judge(before="raise KeyboardInterrupt"))


def test_a_call_that_only_fails_as_a_whole_is_an_error_and_loses_nothing(make_judge, tmp_path):
    """Catches a judge for many prompts that is taken at its word for one, without a warning."""
    spec = make_judge("    if len(prompts) > 1: raise RuntimeError('too many')\n" + BY_LENGTH)
    kept = tmp_path / "scores.jsonl"
    with pytest.raises(ValueError, match="prompt_id a to c: RuntimeError: too many"):
        load_judge(spec)(MESSAGES, CANDIDATES, "abc", kept)
    assert [row["prompt_id"] for row in lines(kept)] == ["a", "b", "c"]


@pytest.mark.parametrize("value", [
    "'12'", "b'12'", "{1: 1, 2: 2}", "{1, 2}", "['1', '2']", "[b'1', b'2']", "[None, 1]", "None",
    "3", "(x for x in [1, 2])", "[{}, {}]", "[[1], [2]]", "[1j, 1]", "[10 ** 400, 1]", "iter([1])",
    "numpy.array(['1', '2'])", "numpy.array(3.0)", "bytearray(b'12')", "[1, [2]]",
    "['1', 2, 3]", "[bytearray(b'1'), 2]", "[1, 2, None]", "[]", "[1, 2, 3]",
    "[numpy.complex64(3 + 3j), 2]", "[numpy.array('3'), 2]"])
def test_what_is_no_list_of_numbers_is_refused(make_judge, value):
    """Catches '12', a dict and a set, which Python would read as the scores 1.0 and 2.0."""
    texts = [["a", "b"]]
    for result in (f"[{value}]", value):
        spec = make_judge(f"    return {result}\n", "import numpy")
        with pytest.raises(ValueError, match="judge .*:judge, prompt_id x: .* list of lists of"):
            load_judge(spec)(MESSAGES[:1], texts, ["x"])


@pytest.mark.parametrize("value", [
    [[1, 0.5]], ((True, 0.5),), numpy.array([[1, 0.5]]), [numpy.float32([1, 0.5])],
    torch.tensor([[1, 0.5]], requires_grad=True), [torch.tensor([1, 0.5], dtype=torch.bfloat16)],
    [[torch.tensor(1), torch.tensor([0.5])]], [[numpy.bool_(True), Fraction(1, 2)]]], ids=repr)
def test_numbers_of_every_kind_are_scores(value):
    """Catches a check that only knows lists of float."""
    scores = load_judge("oracle", oracle=lambda prompts, candidates: value)(
        MESSAGES[:1], [["a", "b"]])
    assert scores == [[1.0, 0.5]] and all(type(score) is float for score in scores[0])


@pytest.mark.parametrize("hook", ["__float__", "tolist", "__len__", "__iter__", "__repr__"])
@pytest.mark.parametrize("place", ["[[Odd() for _ in texts] for texts in candidates]",
                                   "[Odd() for _ in candidates]", "Odd()"])
@pytest.mark.parametrize("fault", ["SystemExit(0)", "BaseException('no')"])
def test_a_result_that_exits_when_it_is_looked_at_is_an_error(make_judge, hook, place, fault):
    """Catches sys.exit(0) in a method of what a judge returns, which ended the run as a success."""
    spec = make_judge(f"    return {place}\n", f"class Odd(list):\n    def {hook}(self, *_):\n"
                                               f"        raise {fault}\n")
    with pytest.raises(ValueError, match="prompt_id a") as error:
        load_judge(spec)(MESSAGES, CANDIDATES, "abc")
    assert spec in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("value", [1e101, 1e160, -1e300, 10 ** 200])
def test_a_score_too_large_to_be_averaged_is_refused_and_smaller_ones_are_not(value, tmp_path):
    """Catches the OverflowError of a variance, hours later: 1e160 ** 2 is no float."""
    judge = load_judge("oracle", oracle=lambda p, c: [[0.0, value], [0.0, 1e100]])
    with pytest.raises(ValueError, match="judge oracle, prompt_id first: .* too large"):
        judge(MESSAGES[:2], [["a", "b"], ["c", "d"]], ["first", "second"], tmp_path / "scores")
    [row] = lines(tmp_path / "scores")
    assert row["scores"] == [0.0, 1e100]
    assert all(map(math.isfinite, evaluation.mean_interval([-1e100, 1e100, 1e100])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_stops_with_the_prompts_id(bad, tmp_path):
    """Catches a NaN that sorts anywhere and trains on noise; good scores lost with a bad one."""
    judge = load_judge("oracle", oracle=lambda p, c: [[1.0], [0.0, bad], [3.0]])
    with pytest.raises(ValueError, match="judge oracle, prompt_id second: .* not finite"):
        judge(MESSAGES, [["a"], ["b", "c"], ["d"]], ["first", "second", "third"],
              tmp_path / "scores")
    assert [row["prompt_id"] for row in lines(tmp_path / "scores")] == ["first", "third"]


@pytest.mark.parametrize("spec, parts", [
    ("pairrm", ("pairrm", "", "")), ("pairrm:a/b", ("pairrm", "a/b", "")),
    ("reward:/a:b/c", ("reward", "/a:b/c", "")), ("word", ("word", "", "")), ("", ("", "", "")),
    ("judge.py:f", ("file", "judge.py", "f")), ("a:b/judge.py:f", ("file", "a:b/judge.py", "f")),
    ("C:\\jobs\\judge.py:f", ("file", "C:\\jobs\\judge.py", "f")),
    ("x.py:g/judge.py:f", ("file", "x.py:g/judge.py", "f"))])
def test_a_ranker_is_taken_apart_at_the_right_colon(spec, parts):
    """Catches a path that ends at its own colon."""
    assert judges.parse_spec(spec) == parts


@pytest.mark.parametrize("spec, message", [
    ("nonsense", "pairrm"), ("", "pairrm"), ("reward:", "reward:ID"), ("missing.py:f", "no file"),
    ("judge.py:absent", "no function absent"), ("broken.py:f", "importing broken.py failed"),
    ("oracle", "toy world"), ("human", "use examples/by_hand.py:judge"),
    ("judge.py:flat", "list of lists"), ("judge.py:short", "candidates"),
    ("judge.py:words", "list of lists"), ("judge.py:fewer", "1 lists for 2 prompts"),
    ("judge.py:later", "list of lists"), ("judge.py:number", "no function number")])
def test_a_judge_that_cannot_be_used_says_why_in_one_line(tmp_path, monkeypatch, spec, message):
    """Catches tracebacks, and wrong shapes that only fail in the middle of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "judge.py").write_text(
        "flat = lambda p, c: [1.0, 2.0]\nnumber = 3\n"
        "short = lambda p, c: [[1.0], [1.0]]\nfewer = lambda p, c: [[1.0, 2.0]]\n"
        "words = lambda p, c: [['good'] * len(t) for t in c]\n"
        "def later(p, c):\n    yield from [1.0, 2.0]\n")
    with pytest.raises(ValueError, match=message) as error:
        load_judge(spec)(MESSAGES[:2], [["a", "b"], ["c", "d"]])
    assert "\n" not in str(error.value)


# --- The room of a user's function ------------------------------------------------------------


def test_a_judge_imports_its_neighbours_also_where_they_are_called_like_ours(make_judge, tmp_path):
    """Catches ModuleNotFoundError; `import data` that finds ours, or that leaves the judge's to us;
    and two judges of which the second gets the first one's neighbours."""
    for folder, factor in (("one", 1), ("two", 2)):
        spec = make_judge(
            "    from words.more import offset\n    import late\n"
            "    return [[data.factor * len(t) + offset + late.zero for t in texts]"
            " for texts in candidates]\n", "import data", f"{folder}/rank.py")
        (tmp_path / folder / "data.py").write_text(f"factor = {factor}\n")
        (tmp_path / folder / "late.py").write_text("zero = 0\n")
        (tmp_path / folder / "words").mkdir()
        (tmp_path / folder / "words/__init__.py").write_text("")
        (tmp_path / folder / "words/more.py").write_text("offset = 7\n")
        judge, path, modules = load_judge(spec), sys.path[:], dict(sys.modules)
        for _ in range(2):
            expected = [[factor * length + 7 for length in row] for row in LENGTHS]
            assert judge(MESSAGES, CANDIDATES) == expected
        assert sys.path == path and sys.modules == modules
    assert sys.modules["data"] is our_data


def test_dataclasses_and_pickle_work_in_a_judge(make_judge):
    """Catches a module that Python cannot find under its own name."""
    spec = make_judge(
        "    rows = pickle.loads(pickle.dumps([Row(text) for text in candidates[0]]))\n"
        "    assert __name__ == 'my-judge' and __file__.endswith('my-judge.py')\n"
        "    return [[len(row.text) for row in rows]]\n",
        "from __future__ import annotations\nimport dataclasses, pickle\n"
        "@dataclasses.dataclass\nclass Row:\n    text: str\n", "my-judge.py")
    assert load_judge(spec)(MESSAGES[:1], CANDIDATES[:1]) == LENGTHS[:1]


# What a judge does, and what the run would see of it.
CHANGES = [
    ("os.chdir('/')", "os.getcwd()"), ("sys.path.clear()", "len(sys.path)"),
    ("sys.stdout = io.StringIO()", "id(sys.stdout)"), ("sys.stderr = None", "id(sys.stderr)"),
    ("contextlib.redirect_stdout(io.StringIO()).__enter__()", "id(sys.stdout)"),
    ("os.environ['SELM_TEST'] = '1'", "os.environ.get('SELM_TEST')"),
    ("os.environ.pop('PATH', None)", "os.environ.get('PATH')"),
    ("warnings.simplefilter('error')", "warnings.filters[:]"),
    ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "signal.getsignal(signal.SIGINT)"),
    ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signal.getsignal(signal.SIGTERM)"),
    ("random.seed(0)", "random.getstate()"), ("random.random()", "random.getstate()"),
    ("numpy.random.seed(0)", "numpy.random.get_state()[1].tolist()"),
    ("numpy.seterr(all='raise')", "numpy.geterr()"),
    ("torch.manual_seed(0)", "torch.get_rng_state().tolist()"),
    ("torch.rand(1)", "torch.get_rng_state().tolist()"),
    ("torch.set_grad_enabled(False)", "torch.is_grad_enabled()"),
    ("torch.no_grad().__enter__()", "torch.is_grad_enabled()"),
    ("keep.append(torch.inference_mode()); keep[-1].__enter__()",
     "torch.is_inference_mode_enabled()"),
    ("torch.set_default_dtype(torch.float64)", "torch.zeros(1).dtype"),
    ("torch.set_default_device('meta')", "torch.zeros(1).device"),
    ("torch.device('meta').__enter__()", "torch.zeros(1).device"),
    ("torch.set_default_device('meta'); torch.device('meta').__enter__()", "torch.zeros(1).device"),
    ("torch.set_num_threads(torch.get_num_threads() + 1)", "torch.get_num_threads()"),
    ("torch.autograd.set_detect_anomaly(True)", "torch.is_anomaly_enabled()"),
    ("torch.use_deterministic_algorithms(True)", "torch.are_deterministic_algorithms_enabled()"),
    ("torch.use_deterministic_algorithms(True, warn_only=True)",
     "torch.is_deterministic_algorithms_warn_only_enabled()"),
    ("torch.autocast('cpu', torch.bfloat16).__enter__()", "(ones @ ones).dtype"),
    ("torch.autocast('cpu', torch.float16).__enter__()", "torch.get_autocast_dtype('cpu')"),
    ("torch.autocast('cpu', torch.float16).__enter__()", "torch.autocast_increment_nesting() - "
     "torch.autocast_decrement_nesting(), torch.autocast_decrement_nesting(), "
     "torch.autocast_increment_nesting()"),
    ("torch.set_autocast_enabled('cuda', True)", "torch.is_autocast_enabled('cuda')"),
    ("torch.set_float32_matmul_precision('medium')", "torch.get_float32_matmul_precision()"),
    ("torch.backends.fp32_precision = 'tf32'", "torch.backends.cuda.matmul.fp32_precision"),
    ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
     "torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32"),
    ("torch.backends.cudnn.allow_tf32 = False", "torch.backends.cudnn.allow_tf32"),
    ("torch.backends.cudnn.deterministic = True", "torch.backends.cudnn.deterministic"),
    ("torch.backends.cudnn.benchmark = True", "torch.backends.cudnn.benchmark"),
    ("torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
     "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction"),
    ("torch.backends.cuda.enable_flash_sdp(False)", "torch.backends.cuda.flash_sdp_enabled()")]
IMPORTS = "import contextlib, io, numpy, os, random, signal, sys, torch, warnings\nkeep = []\n"


@pytest.mark.parametrize("change, look", CHANGES)
@pytest.mark.parametrize("end", ["return", "yield from"])
def test_a_judge_leaves_the_process_as_it_was(make_judge, change, look, end):
    """Catches relative paths of the run that move with a judge's chdir, training without gradients,
    log-probs in the judge's dtype, autocast or matmul precision, seeds that a judge resets."""
    names = {"ones": torch.ones(2, 2)}
    exec(IMPORTS, names)
    before = eval(look, names)
    judge = load_judge(make_judge(f"    {change}\n{BY_LENGTH.replace('return', end)}",
                                  IMPORTS + change))
    assert eval(look, names) == before, "importing it"
    for _ in range(2):
        assert judge(MESSAGES, CANDIDATES) == LENGTHS
        assert eval(look, names) == before, "calling it"
    with pytest.raises(ValueError, match="No"):
        load_judge(make_judge("    raise ValueError('No')\n", IMPORTS + change))(
            MESSAGES, CANDIDATES)
    assert eval(look, names) == before, "an error of its own"


def test_what_a_judge_sets_when_it_is_imported_holds_when_it_is_called(make_judge):
    """Catches a key of a .env file that is gone, a seed that is not the judge's own, and tensors on
    another device than its model: what the run must not see is the judge's all the same."""
    spec = make_judge(
        "    assert os.environ['SELM_TEST'] == 'key' and torch.zeros(1).device.type == 'meta'\n"
        "    assert 'neighbours' in sys.path and os.getcwd() == '/'\n"
        "    return [[random.random() for _ in texts] for texts in candidates]\n",
        IMPORTS + "os.environ['SELM_TEST'] = 'key'; torch.set_default_device('meta')\n"
        "sys.path.append('neighbours'); os.chdir('/'); random.seed(5)")
    judge, drawn = load_judge(spec), random.Random(5)
    for _ in range(2):
        random.seed(7)  # of the run
        assert judge(MESSAGES[:1], [["a", "b"]]) == [[drawn.random(), drawn.random()]]
    assert random.random() == random.Random(7).random()


def test_a_judge_that_was_edited_within_the_second_is_read_anew(make_judge):
    """Catches bytecode of the older version: same size, same second, other scores."""
    for number in "123":
        spec = make_judge(f"    return [[{number} for _ in texts] for texts in candidates]\n")
        assert load_judge(spec)(MESSAGES[:1], [["a"]]) == [[float(number)]]


# --- Finished scores --------------------------------------------------------------------------


@pytest.fixture
def counting(make_judge, tmp_path):
    """A judge that notes every prompt it is asked, fails while the file `fault` exists and the
    prompt is the third, and is fine otherwise -> (load_judge's result, asked())."""
    spec = make_judge(
        "    for prompt in prompts:\n"
        "        open('{0}/asked', 'a').write(prompt[0]['content'][0])\n"
        "        if os.path.exists('{0}/fault') and prompt[0]['content'][0] == 'W':\n"
        "            sys.exit(0)\n".format(tmp_path) + BY_LENGTH, "import os, sys")

    def asked():
        text = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
        (tmp_path / "asked").write_text("")
        return text
    return load_judge(spec), asked


def test_a_judge_that_fails_half_way_loses_nothing(counting, tmp_path):
    """Catches scores that were paid for and are asked for again."""
    (judge, asked), kept = counting, tmp_path / "deep/scores.jsonl"
    (tmp_path / "fault").touch()
    with pytest.raises(ValueError, match="prompt_id c: SystemExit"):
        judge(MESSAGES, CANDIDATES, "abc", kept)
    asked(), (tmp_path / "fault").unlink()
    assert judge(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS
    assert asked() == "W"
    backwards = judge(MESSAGES[::-1], [texts[::-1] for texts in CANDIDATES[::-1]], "cba", kept)
    assert [row[::-1] for row in backwards[::-1]] == LENGTHS and asked() == ""


def test_scores_that_other_processes_have_left_are_not_asked_for_again(counting, tmp_path):
    """A judge that is paid by the question, on eight processes today and on four tomorrow."""
    judge, asked = counting
    judge(MESSAGES, CANDIDATES, "abc", tmp_path / "scores7.jsonl")
    asked()
    start = setup.Start(SimpleNamespace(folder=tmp_path), "", None, None, "", judge, [], [])
    assert start.judging(tmp_path)(MESSAGES, CANDIDATES, "abc") == LENGTHS and asked() == ""


def test_finished_scores_belong_to_one_judge_id_prompt_and_texts(counting, make_judge, tmp_path):
    """Catches scores that are joined by position or by a prompt_id alone."""
    (judge, asked), kept = counting, tmp_path / "scores.jsonl"
    judge(MESSAGES[:1], CANDIDATES[:1], "a", kept)
    for prompts, texts, ids in ((MESSAGES[1:2], CANDIDATES[:1], "a"),
                                (MESSAGES[:1], [CANDIDATES[0][:2]], "a"),
                                (MESSAGES[:1], CANDIDATES[:1], "b")):
        asked()
        assert judge(prompts, texts, ids, kept) == [[float(len(t)) for t in texts[0]]]
        assert len(asked()) == 1
    other = load_judge(make_judge("    return [[-1] * len(t) for t in candidates]\n", "", "o.py"))
    assert other(MESSAGES[:1], CANDIDATES[:1], "a", kept) == [[-1.0] * 3]


def test_a_damaged_line_is_asked_for_again_and_the_others_stand(counting, tmp_path):
    """Catches half a line after a kill that stops the run or swallows the next line, and a changed
    digit that is believed."""
    (judge, asked), kept = counting, tmp_path / "scores.jsonl"
    judge(MESSAGES, CANDIDATES, "abc", kept)
    whole = kept.read_text()
    for change in (lambda text: text[:-30], lambda text: text.replace("27.0", "28.0"),
                   lambda text: text.replace('"prompt_id": "b"', '"prompt_id": "x"'),
                   lambda text: text.replace("22.0", "2\0.0"),
                   lambda text: text + "\n[1]\n3\nnull"):
        asked(), kept.write_text(change(whole))
        assert judge(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS
        assert len(asked()) == (change(whole)[:len(whole)] != whole), "the damaged one, and only it"
        assert judge(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS and asked() == ""
    kept.write_bytes(b"\xff\xfe\0" + os.urandom(200))
    assert judge(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS and len(asked()) == 3


def test_scores_are_on_disk_before_the_next_call(make_judge, tmp_path, monkeypatch):
    """Catches a file that is written at the end, of which a kill (a power cut) leaves nothing."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or fsync(number))
    load_judge(make_judge())(MESSAGES, CANDIDATES, kept=tmp_path / "synced.jsonl")
    assert len(synced) == 1
    kept = tmp_path / "scores.jsonl"
    spec = make_judge(f"    if os.path.exists('{kept}'): os._exit(7)\n" + BY_LENGTH, "import os")
    code = ("from harness.judging.judges import load_judge\n"
            f"load_judge({spec!r})([{MESSAGES[0]!r}] * 65, [['a', 'b']] * 65, kept={str(kept)!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 7 and [row["prompt_id"] for row in lines(kept)] == [
        str(b) for b in range(64)]


# --- Judges that cost money -------------------------------------------------------------------


@pytest.fixture
def server():
    """Speaks as much of OpenAI's protocol as a judge needs: scores are lengths. -> asked, the
    prompts in the order of their answers; fails(prompt), an HTTP status or None, may be replaced;
    url."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = json.loads(body["messages"][0]["content"].split("\n", 1)[1])
            prompt = question["conversation"][0]["content"]
            status = self.server.fails(prompt)
            if status is None:
                self.server.asked.append(prompt)
            reply = json.dumps([len(text) for text in question["answers"]])
            reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                                "choices": [{"index": 0, "finish_reason": "stop", "message": {
                                    "role": "assistant", "content": reply}}]}).encode()
            self.send_response(status or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.fails = [], lambda prompt: None
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BY_URLLIB = r'''
import json, urllib.request
from concurrent.futures import ThreadPoolExecutor

def ask(prompt, texts):
    try:
        task = "Rate:\n" + json.dumps({"conversation": prompt, "answers": texts})
        body = json.dumps({"messages": [{"role": "user", "content": task}]}).encode()
        open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        with open_url(urllib.request.Request(URL, body), timeout=10) as reply:
            return json.loads(json.load(reply)["choices"][0]["message"]["content"])
    except OSError as error:
        return error

def judge(prompts, candidates):
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(ask, prompts, candidates)

def one_by_one(prompts, candidates):  # raises what it meets
    for prompt, texts in zip(prompts, candidates):
        scores = ask(prompt, texts)
        if isinstance(scores, OSError):
            raise scores
        yield scores

judge.prompts_a_call = 36
'''
MANY = [[user(f"Question {i}?") for i in range(40)], [["a" * i, "b" * 3] for i in range(5, 45)],
        [f"p{i}" for i in range(40)]]


@pytest.mark.parametrize("function, faults", [
    ("judge", [(7, 429), (7, 500)]), ("one_by_one", [(0, 429), (35, 500), (39, 503)])])
def test_an_answer_that_was_paid_for_is_never_asked_for_again(server, tmp_path, function, faults):
    """Catches 36 answers of a call that are lost, and paid for again, because of one 429 among
    them; also where it is the last of a call, and where the server fails again and again."""
    path, kept = tmp_path / "judge.py", tmp_path / "scores.jsonl"
    path.write_text(BY_URLLIB.replace("URL", repr(f"{server.url}/chat/completions"), 1))
    assert "Request('http" in path.read_text()
    judge = load_judge(f"{path}:{function}")
    for broken, status in faults:
        server.fails = lambda prompt: status if prompt == f"Question {broken}?" else None
        with pytest.raises(ValueError, match=f"prompt_id p{broken}: .*HTTP Error {status}"):
            judge(*MANY, kept)
        assert len(set(server.asked)) == len(server.asked) >= broken
    server.fails = lambda prompt: None
    assert judge(*MANY, kept) == [[float(i), 3.0] for i in range(5, 45)]
    assert sorted(server.asked) == sorted(prompt[0]["content"] for prompt in MANY[0])


def test_the_example_of_a_judge_over_http_survives_a_server_that_fails(
        server, tmp_path, monkeypatch):
    """Catches an example that does not run: examples/judge_http.py by the real client, whose
    retries take the faults that pass, and whose last word on one prompt loses no other."""
    pytest.importorskip("openai", reason="pip install openai to try examples/judge_http.py")
    for name, value in (("OPENAI_API_KEY", "none"), ("OPENAI_BASE_URL", server.url),
                        ("JUDGE_MODEL", "m"), ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    met = Counter()

    def fails(prompt):
        met[prompt] += 1
        if prompt == "Question 7?":
            return 400
        return {0: 429, 1: 500}.get(met[prompt] - 1) if prompt.endswith("3?") else None
    server.fails = fails
    judge, kept = load_judge(f"{ROOT}/examples/judge_http.py:judge"), tmp_path / "scores.jsonl"
    with pytest.raises(ValueError, match="prompt_id p7: .*BadRequest"):
        judge(*MANY, kept)
    assert met["Question 3?"] == 3 and met["Question 7?"] == 1 and len(server.asked) == 39
    server.fails = lambda prompt: None
    assert judge(*MANY, kept) == [[float(i), 3.0] for i in range(5, 45)]
    assert len(set(server.asked)) == len(server.asked) == 40


@pytest.mark.parametrize("body, words", [
    ("    yield from [[1, 2, 3]] * (len(prompts) - 1)\n", "2 lists for 3 prompts"),
    ("    while True: yield [1, 2, 3]\n", "4 lists for 3 prompts"),
    ("    return map(lambda texts: [1, 2, 3], candidates[1:])\n", "2 lists for 3 prompts")])
def test_of_a_generator_that_leaves_out_a_prompt_nothing_is_kept(make_judge, body, words, tmp_path):
    """Catches scores that were kept as they came for the prompt before theirs, and that the mended
    judge is not asked for."""
    kept = tmp_path / "scores"
    with pytest.raises(ValueError, match=f"prompt_id a to c: .*{words}"):
        load_judge(make_judge(body))(MESSAGES, CANDIDATES, "abc", kept)
    assert load_judge(make_judge())(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS


def test_a_generators_scores_are_on_disk_before_its_next_step(make_judge, tmp_path):
    """Catches paid answers that are lost when the process is killed in the middle of a call."""
    kept = tmp_path / "scores"
    spec = make_judge("    for number, texts in enumerate(candidates):\n"
                      f"        path = pathlib.Path({str(kept)!r})\n"
                      "        lines = path.read_text().split() if path.exists() else []\n"
                      "        assert sum('question' in line for line in lines) == number\n"
                      "        yield [len(text) for text in texts]\n", "import pathlib")
    assert load_judge(spec)(MESSAGES, CANDIDATES, "abc", kept) == LENGTHS


def test_a_function_says_how_many_prompts_a_call_it_takes(make_judge, tmp_path):
    """Catches a limit that only the source code could set, and one that is no number of prompts."""
    text = "calls = []\n"
    spec = make_judge("    calls.append(len(prompts))\n" + BY_LENGTH, text)
    path = tmp_path / "judge.py"
    source = path.read_text()
    for limit, calls in ((1, [1, 1, 1]), (2, [2, 1]), (500, [3])):
        path.write_text(f"{source}judge.prompts_a_call = {limit}\n")
        judge = load_judge(spec)
        assert judge(MESSAGES, CANDIDATES) == LENGTHS
        assert judge.score.function.__globals__["calls"] == calls
    for limit in ("0", "-1", "True", "2.0", "'8'", "None"):
        path.write_text(f"{source}judge.prompts_a_call = {limit}\n")
        with pytest.raises(ValueError, match="prompts_a_call is .* at least 1"):
            load_judge(spec)


# --- The call before the run ------------------------------------------------------------------

RECORDS = [{"prompt_id": f"p{i}", "prompt": MESSAGES[i], "data_chosen": CANDIDATES[i][0],
            "data_rejected": CANDIDATES[i][1]} for i in range(3)]


@pytest.mark.parametrize("body, words", [
    ("    return [[float('nan')] * len(t) for t in candidates]\n", "not finite"),
    ("    return [[1.0, 2.0] for t in candidates]\n", "1.0, 2.0. for 3 candidates"),
    ("    return [[len(t) / len(t) for t in ts] for ts in candidates]\n", "ZeroDivisionError"),
    ("    return [[ord(t[0]) for t in ts] for ts in candidates]\n", "IndexError")])
def test_a_dry_call_finds_what_would_fail_hours_later(make_judge, body, words):
    """Catches NaN, fixed numbers of candidates, and a judge that an empty sample would break."""
    with pytest.raises(ValueError, match=f"{words}.*before the run") as error:
        load_judge(make_judge(body)).dry_call(RECORDS)
    assert "prompt_id p" in str(error.value) and "\n" not in str(error.value)


def test_a_dry_call_asks_about_two_short_prompts_of_the_data_and_no_person(make_judge, monkeypatch):
    """Catches made-up prompts, which a judge that looks answers up would refuse; questions to a
    person whose answers are not kept."""
    judge = load_judge(make_judge(
        "    assert len(prompts) <= 2\n    known = {0!r}\n"
        "    return [[known[p[0]['content']]] * len(t) for p, t in zip(prompts, candidates)]\n"
        .format({text: 1.0 for text in PROMPTS})))
    for number in (1, 2, 3):
        judge.dry_call(RECORDS[:number])
    monkeypatch.setattr("builtins.input", None)
    load_judge(BY_HAND).dry_call(RECORDS)


# --- Oracle, penalty, order of prompts --------------------------------------------------------


def test_the_oracle_is_the_callable_that_was_handed_in():
    """Catches an oracle that is looked up elsewhere."""
    judge = load_judge("oracle", oracle=lambda prompts, candidates: [[len(t) for t in c]
                                                                     for c in candidates])
    assert judge(MESSAGES[:1], [["a", "bbb"]]) == [[1.0, 3.0]]


def test_the_length_penalty_takes_lambda_for_every_token(tmp_path):
    """Catches a penalty in characters, with the special tokens, with the wrong sign, or that is in
    the scores on disk, so that another lambda would be added to it."""
    tokenizer, kept = make_tokenizer(), tmp_path / "kept"
    judge = load_judge("oracle", oracle=lambda p, c: [[5.0] * len(t) for t in c])
    texts = ["hello", "hello, how are you!"]
    for weight in (0.5, 0.25, 0.0):
        expected = [5.0 - weight * len(tokenizer.tokenize(text)) for text in texts]
        assert with_length_penalty(judge, weight, tokenizer)(
            MESSAGES[:1], [texts], "a", kept) == [expected]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        with_length_penalty(judge, 0.5, None)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--length-penalty"):
            with_length_penalty(judge, weight, tokenizer)


# --- Reward models ----------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
ALTERNATING = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system "
               "role\\n\033[2J here') }}{% endif %}{{ m['content'] }}{% endfor %}")


def save_reward_model(folder, architecture="llama", labels=1, pad=0, template=TEMPLATE,
                      causal=False, adds_bos=False):
    """A tiny random reward model of 64 positions. Its weights are scaled up: else all scores are
    nearly equal, and a wrong row would hardly show."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    torch.manual_seed(1)
    config = ARCHITECTURES[architecture]()
    config.num_labels, config.pad_token_id, config.max_position_embeddings = labels, pad, 64
    model = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_config(
        config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_scores_of_a_bf16_body_are_not_rounded_to_bf16(tmp_path, monkeypatch):
    """On a GPU: scores near 20 in steps of 1/8, so that good candidates tie, and a hash decides."""
    folder = save_reward_model(tmp_path / "reward")
    whole = load_judge(f"reward:{folder}")
    monkeypatch.setattr(judge_models, "body_dtype", lambda _: torch.bfloat16)
    half, texts = load_judge(f"reward:{folder}"), [["hello", "the cat", "the moon", "how are you"]]
    question = [[{"role": "user", "content": "hello there"}]]
    [got], [expected] = half(question, texts), whole(question, texts)
    assert torch.tensor(got).bfloat16().float().tolist() != got
    assert got == pytest.approx(expected, rel=0.2, abs=0.2) and got != expected


def test_scores_that_a_user_names_are_not_mixed_with_their_neighbours(tmp_path):
    """Alice's answers given for Bob's, or a judge's before it was mended, because both files are
    called scores*.jsonl. A phase names what it reads beside its own."""
    row = {"prompt_id": "1", "question": "q", "scores": [1.0, 2.0]}
    judges.Kept(tmp_path / "scores1.jsonl").add([row])
    assert judges.Kept(tmp_path / "scores2.jsonl").scores == {}
    assert judges.Kept(tmp_path / "scores2.jsonl", tmp_path.glob("*")).scores == {"q": [1.0, 2.0]}


@pytest.mark.parametrize("architecture, pad, bos", [
    ("llama", None, "template"), ("llama", 0, "tokenizer"), ("qwen3", 0, ""),
    ("qwen3", 0, "template"), ("qwen3", 0, "tokenizer"), ("qwen3", 0, "template, tokenizer")])
def test_a_reward_model_scores_as_one_by_one_in_transformers(architecture, pad, bos, tmp_path):
    """Catches a score read at padding, a swapped row, a prompt without its template, no BOS or two,
    and an answer (or BOS) that is cut where the conversation exceeds the model's 64 positions."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    template = "{{ bos_token }}" * ("template" in bos) + TEMPLATES["chatml"]
    folder = save_reward_model(tmp_path / "reward", architecture, 1, pad, template, False,
                               "tokenizer" in bos)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded, expected, lengths = AutoTokenizer.from_pretrained(folder), [], []
    assert type(model).__name__.lower() == f"{architecture}forsequenceclassification"
    for prompt, texts in zip(PROMPTS, CANDIDATES):
        expected.append([])
        for text in texts:
            ids = loaded(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{text}"
                         "<|im_end|>\n", add_special_tokens=False)["input_ids"]
            first = [loaded.bos_token_id] if bos else []
            lengths.append(len(ids))
            with torch.no_grad():
                row = first + ids[-(64 - len(first)):]
                expected[-1].append(model(torch.tensor([row])).logits.item())
    assert torch.tensor(expected).std() > 0.1 and min(lengths) < 64 < max(lengths)
    scores = load_judge(f"reward:{folder}")(MESSAGES, CANDIDATES)
    for row, wanted in zip(scores, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


def test_our_models_meet_the_longest_prompts_first(tmp_path):
    """Catches memory that runs out in the last hour, and scores that follow the order of calls."""
    judge = load_judge(f"reward:{save_reward_model(tmp_path / 'reward')}")
    met = []
    by_length = lambda p, c: met.append(p[0]) or [[len(text) for text in texts] for texts in c]
    spy = dataclasses.replace(judge, prompts_a_call=1, score=by_length)
    assert spy(MESSAGES, CANDIDATES) == LENGTHS
    assert met == [MESSAGES[2], MESSAGES[1], MESSAGES[0]]


def test_what_is_not_a_reward_model_is_refused_in_one_line(tmp_path):
    """Catches a classifier of two classes, a random head on a language model, no template, a
    pickle, a damaged file, and a GPU that is not there."""
    def refused(folder, words, device="cpu"):
        with pytest.raises(ValueError, match=words) as error:
            load_judge(f"reward:{folder}", device)
        assert str(error.value).startswith(f"--ranker reward:{folder}: ")
        assert str(error.value).isprintable()
    refused(save_reward_model(tmp_path / "two", labels=2), "2 outputs")
    refused(save_reward_model(tmp_path / "causal", causal=True), "no trained head")
    refused(save_reward_model(tmp_path / "plain", template=None), "chat template")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no sequence classifier")
    folder = tmp_path / "model"
    save_reward_model(folder)
    if not torch.cuda.is_available():
        refused(folder, "CUDA", "cuda")
    refused(folder, "nonsense", "nonsense")
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(folder, "no sequence classifier")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(folder, "no .safetensors file")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_reward_model_that_is_not_whole_is_refused_with_a_remedy(tmp_path):
    """Catches weights that are left out in silence (a gating head beside the score, layers that the
    config does not count), an adapter that is taken for a model, git-LFS pointers, and advice that
    does not help."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "model"
    save_reward_model(folder)
    weights, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()

    def refused(*words):
        with pytest.raises(ValueError) as error:
            load_judge(f"reward:{folder}")
        assert all(word in str(error.value) for word in words) and str(error.value).isprintable()
    change_json(folder / "config.json", num_hidden_layers=1)
    refused("no place", "layers.1.", "FILE.py:FUNCTION")
    (folder / "config.json").write_text(config)
    save_file(weights | {"gating.0.weight": torch.ones(3)}, folder / "model.safetensors")
    refused("no place", "gating.0.weight", "FILE.py:FUNCTION")
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
              folder / "model.safetensors")
    load_judge(f"reward:{folder}")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        refused(name, "git lfs pull")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(name, "no regular file")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    refused("LoRA adapter", "merge")
    save_reward_model(tmp_path / "many", labels=19)
    folder = tmp_path / "many"
    refused("19 outputs", "FILE.py:FUNCTION", "picks one")


@pytest.mark.parametrize("architecture, named, positions, limit", [
    ("llama", None, 64, 64), ("llama", 40, 64, 64), ("llama", 64, 64, 64), ("llama", 90, 64, 90),
    ("gpt2", 40, 64, 40), ("gpt2", 90, 64, 64), ("gpt2", None, 64, 64)])
def test_a_reward_model_reads_as_much_as_it_can_and_says_what_it_cuts(
        architecture, named, positions, limit, tmp_path, capsys):
    """Catches conversations that are cut, without a word, at a number in the tokenizer's files that
    is smaller than the model's context; an index beyond a table of positions."""
    from transformers import AutoModelForSequenceClassification, GPT2Config
    folder = tmp_path / "model"
    save_reward_model(folder)
    if architecture == "gpt2":
        AutoModelForSequenceClassification.from_config(GPT2Config(
            vocab_size=384, n_positions=positions, n_embd=16, n_layer=1, n_head=2, num_labels=1,
            pad_token_id=0)).save_pretrained(folder)
    if named:
        change_json(folder / "tokenizer_config.json", model_max_length=named)
    judge = load_judge(f"reward:{folder}")
    told = capsys.readouterr().out
    assert (f"says at most {named} tokens, its config {positions}; {limit} is used" in told) == (
        named not in (None, positions)), told
    ids = judge.score.__self__.ids
    texts = ["a" * n for n in (1, 150)]
    assert len(ids(MESSAGES[0], texts[0])) <= limit < len(ids(MESSAGES[0], texts[1]))
    assert len(judge.score.__self__.row(MESSAGES[0], texts[1])) == limit
    judge.score.__self__.report(), capsys.readouterr()
    judge.check(user("long " * 100))  # is asked, not judged
    judge(MESSAGES[:1], [texts])
    assert f"1 of 2 conversations have more than its {limit} tokens" in capsys.readouterr().out
    judge(MESSAGES[:1], [texts[:1]])
    assert "conversations" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["AutoModelForSequenceClassification", "AutoTokenizer"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(what, tmp_path, monkeypatch):
    """Catches transformers' question on stdin, after which a `y` runs a stranger's code."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on stdin"))
    folder = tmp_path / "model"
    save_reward_model(folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Any: pass\n")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        content | {"model_type": "new", "auto_map": {"AutoConfig": "code.Any", what: "code.Any"}}))
    if what == "AutoTokenizer":
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "Any", "auto_map": {what: ["code.Any", None]}}))
    with pytest.raises(ValueError, match="no sequence classifier"):
        load_judge(f"reward:{folder}")
    assert not (tmp_path / "ran").exists()


def test_a_prompt_that_a_model_cannot_judge_is_found_by_check(tmp_path):
    """Catches a role that a reward model's template refuses, after an hour of sampling."""
    folder = save_reward_model(tmp_path / "reward", template=ALTERNATING)
    judge = load_judge(f"reward:{folder}")
    judge.check(MESSAGES[0])
    with pytest.raises(ValueError, match="refuses it: .*no system role") as error:
        judge.check([{"role": "system", "content": "Be brief."}, *MESSAGES[0]])
    assert str(error.value).isprintable()
    load_judge(BY_HAND).check([{"role": "anyone", "content": ""}])


# --- A judge by hand --------------------------------------------------------------------------


def answer(monkeypatch, replies):
    replies = iter(replies)
    monkeypatch.setattr("builtins.input", lambda _: next(replies))


def shown(capsys):
    """The candidates in the order in which they were printed."""
    return [text for text in capsys.readouterr().out.split("\n") if text.startswith("text ")]


def test_a_judge_by_hand_stops_and_resumes_with_the_next_question(monkeypatch, capsys, tmp_path):
    """Catches answers that are lost on 'q', asked twice, or given to the wrong candidate."""
    candidates = [["text a", "text b", "text c"], ["text d", "text e"], ["text f", "text f"]]
    path = tmp_path / "answers.jsonl"
    answer(monkeypatch, ["0", "x", "2", "2", "1", "q"])  # two bad numbers; worst may not be best
    with pytest.raises(KeyboardInterrupt, match="the same command asks the other questions"):
        load_judge(BY_HAND)(MESSAGES, candidates, kept=path)
    order = shown(capsys)[:3]
    with open(path, "a") as file:
        file.write('\n{"key": "cut o')  # killed while it wrote
    answer(monkeypatch, ["1"])
    scores = load_judge(BY_HAND)(MESSAGES, candidates, kept=path)
    second = shown(capsys)
    expected = {order[1]: 1.0, order[0]: -1.0, order[2]: 0.0, second[0]: 1.0, second[1]: -1.0}
    assert scores[:2] == [[expected[text] for text in texts] for texts in candidates[:2]]
    assert scores[2] == [0.0, 0.0], "identical candidates need no answer"
    answer(monkeypatch, [])
    again = load_judge(BY_HAND)(MESSAGES, [t[::-1] for t in candidates], kept=path)
    assert [row[::-1] for row in again] == scores


def test_a_judge_by_hand_shows_one_order_whatever_order_the_candidates_come_in(
        monkeypatch, capsys):
    """Catches a shuffle of the incoming order, by which a second session would show the sources,
    and an order that is the same for every prompt."""
    def order(prompt, texts):
        answer(monkeypatch, ["q"])
        with pytest.raises(KeyboardInterrupt):
            load_judge(BY_HAND)([user(prompt)], [list(texts)])
        return tuple(shown(capsys))
    texts = ["text a", "text b", "text c"]
    assert len({order(f"prompt {i}", texts) for i in range(60)}) == 6, "60 prompts show every order"
    assert len({order("Why?", permuted) for permuted in itertools.permutations(texts)}) == 1


def test_a_judge_by_hand_refuses_several_processes(monkeypatch):
    """Catches processes that all wait for one keyboard."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in a single process"):
        load_judge(BY_HAND)


def test_nothing_that_data_or_model_wrote_controls_the_terminal(monkeypatch, capsys):
    """Catches an escape sequence that clears the screen, moves the cursor or hides a candidate, and
    half a surrogate pair, which cannot be printed at all."""
    evil = "\033[2J\033]0;title\a\x9b31m\rwin\b\b\u202e \ud800"
    prompt = [{"role": f"user{evil}", "content": f"Why?\n\tyes é 🙂 {evil}"}]
    answer(monkeypatch, ["1"])
    load_judge(BY_HAND)([prompt], [[f"a{evil}", f"b{evil}"]])
    out = capsys.readouterr().out
    assert all(char.isprintable() or char in "\n\t" for char in out)
    assert "Why?\n\tyes é 🙂 " in out and "[2J]0;title31mwin" in out
    assert printable("a\tb\nc\r\x7f\x85") == "a\tb\nc"


# --- The command line -------------------------------------------------------------------------


def run_cli(*arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / "rank.py"), *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT, **options)


GOOD = '{"prompt": "Why?", "candidates": ["a", "bb"]}\n'


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """Runs the command line here -> its error message, or None. GOOD is the input."""
    (tmp_path / "in.jsonl").write_text(GOOD)

    def run(spec, *extra):
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        monkeypatch.setattr(sys, "argv", ["rank.py", *files, "--ranker", spec, *extra])
        monkeypatch.setattr(exits.signal, "signal", lambda *handler: None)  # pytest keeps its own
        with pytest.raises(SystemExit) as stop:
            exits.run(rank_command.main)
        return stop.value.code
    return run


def test_the_command_line_ranks_a_file_and_keeps_what_was_in_it(tmp_path, make_judge):
    """Catches lost fields, lost candidates, and best that is not the highest score."""
    rows = [{"prompt_id": "p1", "prompt": "Why?", "candidates": ["ab", "a", "abc"], "extra": 1},
            {"prompt": user("Who?\u2028"), "candidates": ["x", "y"]}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes it
    done = run_cli("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                   "--ranker", make_judge())
    assert done.returncode == 0, done.stderr
    result = lines(tmp_path / "out.jsonl")
    assert result[0] == {**rows[0], "scores": [2.0, 1.0, 3.0], "best": 2, "worst": 1}
    assert result[1] == {**rows[1], "prompt_id": "line 2", "scores": [1.0, 1.0], "best": None,
                         "worst": None}
    assert "1 of them all equal" in done.stdout
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


def test_a_bad_line_is_named_and_an_old_output_stays(tmp_path, rank, make_judge):
    """Catches a traceback, and an output that is opened before the work is done."""
    nan = make_judge("    return [[float('nan')] * len(t) for t in candidates]\n")
    cases = [("{not json", "line 2"), ('{"prompt": "Why?"}', "line 2"), ("[1]", "line 2"),
             ('{"prompt": 3, "candidates": ["a"]}', "line 2: prompt"),
             ('{"prompt": "Why?", "candidates": []}', "line 2: candidates"),
             ('{"prompt": "Why?", "candidates": [1]}', "line 2: candidates"),
             ('{"prompt": "\\ud800", "candidates": ["a"]}', "line 2: half a surrogate"),
             ('{"prompt": "?", "candidates": ["a"], "x": "\\udfff"}', "line 2: half a surrogate"),
             ('{"prompt": "?", "candidates": ["a"], "candidates": ["b"]}', "'candidates' occurs"),
             ("[" * 100_000, "line 2: not valid JSON"),
             ('{"prompt_id": "bad", "prompt": "?", "candidates": ["a"]}', "prompt_id line 1")]
    for line, message in cases:
        (tmp_path / "out.jsonl").write_text("old")
        (tmp_path / "in.jsonl").write_text(GOOD + line + "\n")
        error = rank(nan)
        assert message in error and error.isprintable()
        assert (tmp_path / "out.jsonl").read_text() == "old"


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), ("folder", "Is a directory"), ("pipe", "a pipe or a device"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"", "no line"), (b" \n\n", "no line"),
    (b'[{"prompt": "?", "candidates": ["a"]}]', "JSON array"), (b"[\n  {\n", "JSON array"),
    ("Wozu? Für".encode("latin-1"), "not UTF-8"), (GOOD.encode("utf-16"), "not UTF-8"),
    (b"prompt,candidates\nWhy,a\n", "line 1: not valid JSON")])
def test_an_input_of_another_kind_is_refused_with_its_name(content, words, rank, tmp_path):
    """Catches tracebacks and 'no such file' for a folder, an array, another encoding, a table."""
    path = tmp_path / "in.jsonl"
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    error = rank("nobody.py:calls")
    assert words in error and str(path) in error and error.isprintable()


@pytest.mark.parametrize("extra, words", [
    (["--length-penalty", "-1"], "--length-penalty -1"), (["--length-penalty", "nan"], "nan"),
    (["--length-penalty", "inf"], "inf"), (["--length-penalty", "1"], "needs a tokenizer"),
    (["--tokens-per-forward", "0"], "--tokens-per-forward 0"),
    (["--tokens-per-forward", "-5"], "--tokens-per-forward -5"),
    (["--output", "/nowhere/out"], "/nowhere/out: cannot be written"),
    (["--output", "."], "folder"), (["--output", ""], "cannot be written"),
    (["--length-penalty", "1", "--tokenizer", "/nowhere"], "--tokenizer /nowhere")])
def test_what_cannot_work_is_refused_before_the_judge_is_asked(extra, words, rank, make_judge):
    """Catches hours of judging whose result cannot be written, and numbers that are nonsense."""
    error = rank(make_judge("    raise RuntimeError('asked')\n"), *extra)
    assert words in error and "asked" not in error and error.isprintable()


def test_no_output_takes_the_place_of_what_the_command_reads(rank, make_judge, tmp_path):
    """Catches candidates, a judge or kept scores that are replaced by the ranked file, or removed
    with the scores of a finished command."""
    judge = make_judge("    raise RuntimeError('asked')\n")
    given, file = str(tmp_path / "in.jsonl"), judge.rpartition(":")[0]
    (tmp_path / "scores").write_text("")
    (tmp_path / "x.scores.jsonl").symlink_to("in.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for extra, words in [
            (["--output", given], "--input"), (["--output", file], "--ranker"),
            (["--output", str(tmp_path / "x")], "--input"), (["--scores", given], "--input"),
            (["--scores", file], "--ranker"), (["--scores", str(tmp_path / "out.jsonl")],
                                               "--output"),
            (["--output", str(tmp_path / "scores"), "--scores", str(tmp_path / "scores")],
             "--output"), (["--scores", str(tmp_path)], "it is a folder")]:
        error = rank(judge, *extra)
        assert words in error and "asked" not in error and error.isprintable()
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_output_that_is_a_pipe_gets_the_ranked_lines_and_no_other(make_judge, tmp_path):
    """Catches a pipe or device that a file replaces, with a file of scores beside it; and a last
    word of ours among the lines that another program reads."""
    (tmp_path / "in.jsonl").write_text(GOOD)
    (tmp_path / "out").symlink_to("/dev/fd/1")  # never the device itself: root could replace it
    done = run_cli("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--ranker",
                   make_judge())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"] == [1.0, 2.0] and "1 prompts ranked" in done.stderr
    assert (tmp_path / "out").is_symlink() and not list(tmp_path.glob("*scores*"))


def test_a_prompt_that_the_judge_cannot_read_is_refused_by_line(rank, tmp_path):
    """Catches a conversation that fails when everything before it has been judged."""
    folder = save_reward_model(tmp_path / "reward", template=ALTERNATING)
    turns = [{"role": "system", "content": "x"}, *user("Why?")]
    (tmp_path / "in.jsonl").write_text(
        GOOD + json.dumps({"prompt": turns, "candidates": ["a"]}) + "\n")
    error = rank(f"reward:{folder}", "--device", "cpu")
    assert "in.jsonl, line 2: the reward model's chat template" in error and error.isprintable()
    assert not (tmp_path / "out.jsonl.scores.jsonl").exists()


def test_the_same_command_goes_on_from_finished_scores(rank, make_judge, tmp_path, capsys):
    """Catches work that a failure half way throws away; scores of a finished file that a second
    command with a changed judge gets again; your own answers thrown away."""
    (tmp_path / "in.jsonl").write_text(GOOD + GOOD.replace("Why", "Who"))
    failing = "    if 'Who' in prompts[-1][0]['content']: raise RuntimeError('half way')\n"
    assert "prompt_id line 2: RuntimeError: half way" in rank(make_judge(failing + BY_LENGTH))
    assert len(lines(tmp_path / "out.jsonl.scores.jsonl")) == 1
    fixed = make_judge("    assert len(prompts) == 1\n" + BY_LENGTH)
    assert rank(fixed) is None and "finished scores are in" in capsys.readouterr().out
    assert [row["scores"] for row in lines(tmp_path / "out.jsonl")] == [[1.0, 2.0]] * 2
    assert rank(make_judge("    return [[7, 8]] * len(prompts)\n"), "--scores",
                str(tmp_path / "mine")) is None
    assert [row["scores"] for row in lines(tmp_path / "out.jsonl")] == [[7.0, 8.0]] * 2
    assert len(lines(tmp_path / "mine")) == 2 and not list(tmp_path.glob("out.jsonl.scores*"))


def test_ctrl_c_and_a_judge_that_exits_end_in_one_line_and_no_success(make_judge, tmp_path):
    """Catches a traceback on Ctrl-C, and exit code 0 for a file that was not ranked."""
    (tmp_path / "in.jsonl").write_text(GOOD)
    for fault, code, words in (("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped"),
                               ("sys.exit(0)", 1, ":judge, prompt_id line 1: SystemExit: 0")):
        done = run_cli("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                       "--ranker", make_judge(f"    {fault}\n", "import os, signal, sys"))
        lines = [line.strip() for line in re.split(r"[\r\n]", done.stderr)]
        (message,) = [line for line in lines if line and "judge: " not in line]
        assert done.returncode == code and words in message, done.stderr
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("fault, code", [("", 0), ("raise ValueError('no')", 1),
                                         ("raise KeyboardInterrupt", 130)])
def test_a_thread_that_never_ends_keeps_no_command_alive(fault, code):
    """Catches a finished run that hangs for ever on a judge's thread, and output that is lost or an
    exit code that changes because it does not wait. A thread that ends is waited for."""
    script = ("import threading, time\nfrom harness.runs import exits\nexits.LEAVE_AFTER = 0.2\n"
              "def main():\n"
              "    threading.Thread(target=time.sleep, args=[20], name='poller').start()\n"
              f"    print('all is done')\n    {fault}\nexits.run(main)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=10)
    assert (done.returncode, done.stdout) == (code, "all is done\n")
    assert "thread that does not end: poller" in done.stderr
    script = script.replace("20]", "0.1]").replace("0.2", "5")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "thread" not in done.stderr


def test_an_input_that_is_a_pipe_is_refused(rank, tmp_path):
    """Catches a command that waits for ever."""
    (tmp_path / "in.jsonl").unlink()
    os.mkfifo(tmp_path / "in.jsonl")
    assert "no regular file" in rank("nobody.py:calls")
    os.mkfifo(tmp_path / "judge.py")
    with pytest.raises(ValueError, match="no file"):
        load_judge(f"{tmp_path}/judge.py:f")


def test_a_judge_by_hand_without_a_terminal_ends_in_one_line_and_no_success(tmp_path):
    """Catches EOFError's traceback, and exit code 0 for questions that nobody answered."""
    (tmp_path / "in.jsonl").write_text(GOOD)
    done = run_cli("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                   "--ranker", BY_HAND, stdin=subprocess.DEVNULL)
    assert done.returncode == 130 and "stopped; your answers are kept" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.jsonl").exists()

"""Duels: a run's policies against each other, another judge for them, and two files of outputs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train_loop
from harness.judging import duel
from harness.runs import exits, sample_command
from harness.judging.evaluation import length_controlled, wilson
from harness.judging.judges import load_judge
from harness.runs.output_files import Rows, write_jsonl
from harness.runs.run_record import read_record
from test_judges import save_reward_model
from test_train_loop import command, rows, write_model  # noqa: F401 (command is a fixture)

# ----------------------------------------------------------------------------------------------
# The policies of a run
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here, iteration, names", [
    ("start", 0, "start"), ("iter_1", 1, "start"), ("iter_3", 3, "start iter_1 iter_2"),
    ("baseline/iter_1", 1, "start iter_1 iter_2 iter_3 iter_4 iter_5"),
    ("baseline/iter_2", 2, "start iter_1 iter_2 iter_3 iter_4 iter_5 iter_6 baseline/iter_1"),
    ("iter_7", 7, "start iter_3 iter_4 iter_5 iter_6")])
def test_a_policy_meets_the_start_the_earlier_arm_and_its_own_past(here, iteration, names):
    """A duel against an evaluation that is still to come (a file that is not there), or against
    itself; a number of duels that grows with the square of the iterations."""
    s = SimpleNamespace(first=1, iterations=7, iteration=iteration)
    home = Path("run")
    assert duel.opponents(home, home / here, s) == {name: home / name for name in names.split()}


def write_answers(folder, texts, hot=None):
    folder.mkdir(parents=True)
    write_jsonl(folder / "eval.jsonl", [
        {"prompt_id": i, "prompt": [{"role": "user", "content": i}], "response": text,
         **({"response_at_temperature_1": hot[i]} if hot else {})} for i, text in texts.items()])


def test_duels_are_joined_by_prompt_and_say_ours_first(tmp_path):
    """Answers of neighbours that meet; [theirs, ours]; samples that meet greedy answers; scores of
    one list for three that are taken for a duel."""
    write_answers(tmp_path / "start", {"a": "1", "b": "22"}, {"a": "4444", "b": "55555"})
    write_answers(tmp_path / "iter_1", {"b": "666666", "a": "7777777"})
    write_answers(tmp_path / "iter_2", {"a": "x" * 8, "b": "y" * 9}, {"a": "z" * 10, "b": ""})
    asked = []

    def judge(prompts, texts, ids):
        asked.extend(texts)
        assert [[turn["content"] for turn in prompt] for prompt in prompts] == [[i] for i in ids]
        return [[float(len(text)) for text in pair] for pair in texts]
    found = list(duel.judge_duels(Rows(tmp_path / "iter_2/eval.jsonl"), {
        name: tmp_path / name for name in ("start", "iter_1")}, judge))
    assert found == [
        {"prompt_id": "a", "duels": {"start": [8, 1], "iter_1": [8, 7]},
         "at_temperature_1": [10, 4], "characters": [8, 1]},
        {"prompt_id": "b", "duels": {"start": [9, 2], "iter_1": [9, 6]},
         "at_temperature_1": [0, 5], "characters": [9, 2]}]
    assert all(len(pair) == 2 for pair in asked)
    [row, _] = duel.judge_duels(Rows(tmp_path / "iter_1/eval.jsonl"),
                                {"start": tmp_path / "start"}, judge)
    assert row["at_temperature_1"] is None and row["duels"] == {"start": [6, 2]}


# ----------------------------------------------------------------------------------------------
# A judge of the evaluation's own
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def other_judge(tmp_path):
    """Prefers the shorter answer and says so in scores below -1000."""
    (tmp_path / "other.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[-1000.0 - len(c) for c in cs] for cs in candidates]\n")
    return f"{tmp_path / 'other.py'}:judge"


def test_held_out_answers_are_judged_by_the_judge_of_the_evaluation_alone(
        command, other_judge, tmp_path, capsys):  # noqa: F811
    """A policy that is graded by the judge it was trained to please, or trained by the judge that
    is to grade it; a report that does not say which."""
    train_loop.main([*command, "--iterations", "1", "--eval-ranker", other_judge,
                     "--length-penalty", "0.5"])
    run = tmp_path / "run"
    pairs, answers, duels = (rows(run / f"iter_1/{name}.jsonl") for name in
                             ("pairs", "eval", "duels"))
    assert all(c["score"] > -1000 for row in pairs for c in row["candidates"])
    for row, met in zip(answers, duels):
        assert row["scores"][2] == met["duels"]["start"][0] == -1000.0 - len(row["response"])
    [metrics] = [r for r in rows(run / "metrics.jsonl")
                 if (r["phase"], r["iteration"]) == ("eval", 1)]
    assert metrics["score"] == sum(row["scores"][2] for row in answers) / len(answers)
    assert set(read_record(run / "config.json")["made_from"]["judge of the evaluation"]) == {
        "", "function"}
    report = (run / "report.md").read_text()
    assert f"judged by `{other_judge}`" in report and "which training did not use" in report
    train_loop.main([*command, "--iterations", "1", "--run-dir", str(tmp_path / "same")])
    assert "also chose the pairs" in (tmp_path / "same/report.md").read_text()


def test_another_judge_of_the_evaluation_is_another_run(
        command, other_judge, tmp_path):  # noqa: F811
    """Half of the win rates by one judge and half by another; a judge that fails after hours of
    training; --fresh that deletes the judge."""
    command += ["--iterations", "1", "--eval-ranker", other_judge]
    train_loop.main(command)
    with pytest.raises(ValueError, match="the judge of the evaluation has changed"):
        train_loop.main(command[:-2])
    (tmp_path / "other.py").write_text((tmp_path / "other.py").read_text() + "# mended\n")
    with pytest.raises(ValueError, match="the judge of the evaluation has changed"):
        train_loop.main(command)
    (tmp_path / "other.py").write_text("def judge(prompts, candidates):\n    return 1\n")
    with pytest.raises(ValueError, match="other.py:judge, prompt_id .* list of lists.*before"):
        train_loop.main([*command, "--run-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    inside = tmp_path / "run/other.py"
    inside.write_text("def judge(p, c):\n    return [[0.0] * len(x) for x in c]\n")
    with pytest.raises(ValueError, match="which --eval-ranker reads"):
        train_loop.main([*command[:-1], f"{inside}:judge", "--fresh"])


def test_a_judge_whose_path_has_a_colon_is_known_by_its_content(command, tmp_path):  # noqa: F811
    """An edited judge that is accepted on resume, and a judge that --fresh deletes, because its
    name was split at the first colon."""
    folder = tmp_path / "run/iter_1/a:b"
    spec = f"{tmp_path}/C:\\jobs/my:judge.py:judge"
    Path(spec).parent.mkdir()
    path = Path(spec.removesuffix(":judge"))
    path.write_text("def judge(p, c):\n    return [[len(x) for x in texts] for texts in c]\n")
    command += ["--iterations", "1", "--ranker", spec, "--eval-prompts", "0"]
    train_loop.main(command)
    assert set(read_record(tmp_path / "run/config.json")["made_from"]["judge"]) == {"", "function"}
    path.write_text(path.read_text().replace("len(x)", "-len(x)"))
    with pytest.raises(ValueError, match="the judge has changed"):
        train_loop.main(command)
    folder.mkdir()
    (folder / "judge.py").write_text(path.read_text())
    for flag in ("--ranker", "--eval-ranker"):
        with pytest.raises(ValueError, match=f"which {flag} reads"):
            train_loop.main([*command, flag, f"{folder}/judge.py:judge", "--fresh"])
    assert (folder / "judge.py").exists()


def test_an_error_of_the_judge_of_the_evaluation_names_its_own_flag(command):  # noqa: F811
    """--ranker blamed for what --eval-ranker says."""
    for spec in ("oracle", "nonsense", "absent.py:f", "reward:/nowhere"):
        with pytest.raises(ValueError, match=f"^--eval-ranker {spec}: "):
            train_loop.main([*command, "--eval-ranker", spec])


def test_where_it_is_cheap_answers_at_temperature_1_meet_as_well(command, tmp_path):  # noqa: F811
    """A win rate of modes alone, which moves while no sample does; twice the sampling of a run
    whose evaluation is as large as its training."""
    command[command.index("--temperature") + 1] = "0"
    command += ["--iterations", "1"]
    train_loop.main(command)  # 2 held-out prompts, 6 to train on: not cheap
    assert not any("response_at_temperature_1" in row
                   for row in rows(tmp_path / "run/iter_1/eval.jsonl"))
    train_loop.main([*command, "--prompts-per-iteration", "8", "--run-dir", str(tmp_path / "b")])
    start, answers, duels = (rows(tmp_path / "b" / name) for name in (
        "start/eval.jsonl", "iter_1/eval.jsonl", "iter_1/duels.jsonl"))
    assert any(row["response_at_temperature_1"] != row["response"] for row in start + answers)
    for old, new, met in zip(start, answers, duels):
        expected = [float(sum(map(ord, row["response_at_temperature_1"])) % 97)
                    for row in (new, old)]
        assert met["at_temperature_1"] == expected and new["score_at_temperature_1"] == expected[0]
    evals = [r for r in rows(tmp_path / "b/metrics.jsonl") if r["phase"] == "eval"]
    assert [0 <= r["win_rate_at_temperature_1"] <= 1 for r in evals] == [True, True]


# ----------------------------------------------------------------------------------------------
# Two files of outputs
# ----------------------------------------------------------------------------------------------


def outputs(path, texts):
    path.write_text(json.dumps([{"instruction": a, "output": b, "generator": "x"}
                                for a, b in texts]))
    return str(path)


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "harness.judging.duel", *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


def test_two_files_of_outputs_give_win_rates_with_intervals(tmp_path):
    """Outputs joined by position; a second output to one instruction that replaces the first; a
    thought that is judged; ours and theirs swapped; ties that count as losses."""
    (tmp_path / "count.py").write_text(
        "def the_letter_a(prompts, candidates):\n"
        "    assert all(p[0]['role'] == 'user' and 'do' in p[0]['content'] for p in prompts)\n"
        "    return [[c.count('a') for c in cs] for cs in candidates]\n")
    mine = outputs(tmp_path / "mine.json", [
        ("do 1", "a"), ("do 2", "<think>aaaa</think>b a"), ("do 2", "aaa"), ("do 3", "aabbbb")])
    theirs = outputs(tmp_path / "theirs.json", [
        ("do 3", "a"), ("do 2", "aa"), ("do 1", "a"), ("do 2", "a")])
    done = run("--outputs", mine, "--reference", theirs,
               "--ranker", f"{tmp_path / 'count.py'}:the_letter_a")
    assert done.returncode == 0, done.stderr
    wins, longer = [0.5, 0, 1, 1], [0, 1, 2, 5]  # by hand: a-a, "b a"-aa, aaa-a, aabbbb-a
    for line, values in (("win rate", (0.625, *wilson(0.625, 4))),
                         ("length-controlled win rate", length_controlled(wins, longer))):
        numbers = "{:.3f}  (95 % interval {:.3f} to {:.3f})".format(*values)
        assert any(text.startswith(line) and text.endswith(numbers)
                   for text in done.stdout.splitlines()), done.stdout
    assert "4 instructions, 1 ties; 3 characters an output against 1" in done.stdout


def test_what_sample_py_writes_is_judged_by_a_reward_model(tmp_path, capsys):
    """A file that the other command cannot read; a score of the text without its instruction."""
    instructions = ["the cat", "hello there", "the moon"]
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": x} for x in instructions]))
    mine = str(tmp_path / "mine.json")
    sample_command.main(["--model", write_model(tmp_path / "model"), "--max-new-tokens", "6",
               "--alpaca-eval", str(tmp_path / "in.json"), "--output", mine])
    theirs = outputs(tmp_path / "theirs.json", [(x, "how are you?") for x in instructions[::-1]])
    reward = f"reward:{save_reward_model(tmp_path / 'reward', 'qwen3')}"
    duel.main(["--outputs", mine, "--reference", theirs, "--ranker", reward])
    texts = [row["output"] for row in json.loads(Path(mine).read_text())]
    scores = load_judge(reward)([sample_command.user_turn(x) for x in instructions],
                                [[text, "how are you?"] for text in texts])
    wins = sum(a > b for a, b in scores)
    assert f"win rate                    {wins / 3:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("theirs, words", [
    ([("do 1", "b")], "theirs.json has no output for 1 of .* the first is 'do 2'"),
    ([("do 1", "b"), ("do 2", "b"), ("do 2", "c")], "mine.json has no output .* 'do 2'"),
    ([("do 1", "b"), ("do it", "b")], "theirs.json has no output .* 'do 2'"),
    ([("do 1", "b"), ("do 2", 3)], "--reference .*theirs.json: entry 1 has no string 'output'"),
    ([], "--reference .*theirs.json: expected a list")])
def test_files_that_do_not_belong_together_are_refused_by_name(theirs, words, tmp_path,
                                                               monkeypatch):
    """A win rate of answers to different questions."""
    mine = outputs(tmp_path / "mine.json", [("do 1", "a"), ("do 2", "a")])
    with pytest.raises(ValueError, match=words):
        duel.matched(mine, outputs(tmp_path / "theirs.json", theirs))
    monkeypatch.setattr(exits.signal, "signal", lambda *handler: None)  # pytest keeps its own
    files = ["--outputs", mine, "--reference", str(tmp_path / "theirs.json")]
    with pytest.raises(SystemExit, match="error: "):
        exits.run(lambda: duel.main(files))


def test_scores_are_not_kept_in_what_is_judged(tmp_path):
    """Lines of scores behind the outputs of a model, which no program reads any more."""
    mine, theirs = (outputs(tmp_path / name, [("do 1", "a")]) for name in ("mine", "theirs"))
    for path, flag in ((mine, "--outputs"), (theirs, "--reference")):
        with pytest.raises(ValueError, match=f"--scores {path}: the same file as .*{flag}"):
            duel.main(["--outputs", mine, "--reference", theirs, "--scores", path,
                       "--ranker", "nobody.py:calls"])

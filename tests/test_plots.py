"""The numbers behind the figures, from files made by hand; and figures of every kind of run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib import pyplot

import train_loop
from harness.runs import plots, report_page
from harness.runs.output_files import write_jsonl
from harness.runs.settings import RECIPES
from test_train_loop import SMALL, write_judge, write_model, write_preferences


def write_iteration(folder, ids, score, logp, duels=None, text="a {}", hot=None):
    """eval.jsonl of an iteration or start: prompt i scores score + i, data_chosen has the log-prob
    logp + i, data_rejected -logp; and duels.jsonl: {opponent: margin of the first prompt}."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "eval.jsonl", [
        {"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": f"say {i}"}],
         "response": text.format(i), "ids": [1, 2], "finished": i > 0,
         "scores": [0.0, 0.0, score + i], "policy_logps": [logp + i, -logp, -3.0 * score],
         "start_logps": [0.0, 0.0, -1.0],
         **({} if hot is None else {"score_at_temperature_1": hot})} for i in ids])
    write_jsonl(folder / "duels.jsonl", [
        {"prompt_id": f"p{i}", "duels": {name: [margin - i, 0] for name, margin in duels.items()},
         "at_temperature_1": None, "characters": [1, 1]} for i in ids] if duels else [])


def write_pairs(folder, texts=("good", "bad", "mine"), rows=2, scores=(0.5, -1.0, 0.25)):
    """pairs.jsonl and reference.jsonl of an iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", [
        {"prompt_id": f"q{i}", "prompt": [{"role": "user", "content": f"tell {i}"}],
         "prompt_ids": [1], "dropped": None, "chosen": 0, "rejected": 1, "sampled": [2],
         "candidates": [{"sources": [source], "text": f"{text} {i}", "ids": [1] * 3,
                         "finished": c < 2, "score": score} for c, (source, text, score) in
                        enumerate(zip(("data_chosen", "data_rejected", "sampled"), texts, scores))]}
        for i in range(rows)])
    write_jsonl(folder / "reference.jsonl", [
        {"prompt_id": f"q{i}", "logps": [-1.5 - i, -2.5, None]} for i in reversed(range(rows))])


def write_config(folder, alpha, evaluated=False, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "settings": {"name": "x", "alpha": alpha, "beta": 0.5, "ranker": "r", "temperature": 0.0,
                     "eval_ranker": None} | settings, "command": ["train_loop.py", "<b>"],
        "git_revision": None, "torch": "", "transformers": ""}))
    write_jsonl(folder / "metrics.jsonl", [
        {"iteration": 1, "phase": "rank", "prompts": 2, "pairs": 2, "equal": 0, "dropped": {},
         "sampled": 2, "sampled_best": 0, "sampled_worst": 0, "cut": 2, "cut_by_max_length": 0,
         "empty": 0, "tokens": 6},
        {"iteration": 1, "phase": "train", "update": 0, "loss": 0.69, "accuracy": 0.5},
        *({"iteration": k, "phase": "eval", "score": 2.0 * k} for k in (0, 1) if evaluated)])


@pytest.fixture
def home(tmp_path):
    """A run of one iteration and its baseline, whose files name the prompts in different orders."""
    home = tmp_path / "run"
    write_config(home, 0.3, evaluated=True)
    write_config(home / "baseline", 0.0, evaluated=True)
    write_iteration(home / "start", (0, 1), 0.0, 0.0)
    write_iteration(home / "iter_1", (1, 0), 10.0, 1.0, {"start": 1})
    write_iteration(home / "baseline/iter_1", (0, 1), 20.0, 5.0, {"start": -1, "iter_1": 0.5})
    write_pairs(home / "iter_1")
    write_pairs(home / "baseline/iter_1")
    return home


def test_scores_are_those_of_held_out_answers_by_arm_and_iteration_and_else_of_samples(home):
    """The data's scores instead of the policy's; a start that is missing, or one arm's alone; the
    iterations 10 and 9 in the order of their names."""
    runs = plots.find_runs(home)
    assert plots.scores_by_iteration(runs) == {"held-out, temperature 0": {
        0: {"SELM": [0, 1], "DPO": [0, 1]}, 1: {"SELM": [11, 10], "DPO": [20, 21]}}}
    for k in (9, 10):
        write_iteration(home / f"iter_{k}", (0,), float(k), 0.0)
    assert list(plots.by_iteration(home, "eval.jsonl")) == [0, 1, 9, 10]
    for path in home.rglob("eval.jsonl"):
        path.unlink()
    assert plots.scores_by_iteration(runs) == {"training samples y": {
        1: {"SELM": [0.25, 0.25], "DPO": [0.25, 0.25]}}}


def test_duels_count_for_both_sides_and_are_named_by_arm_and_iteration(home):
    """A win of the column; the baseline's iteration 1 taken for SELM's; ties that are losses."""
    found = plots.duel_results(plots.find_runs(home))
    start, selm, dpo = ("", 0), ("SELM", 1), ("DPO", 1)
    assert {pair: sorted(wins) for pair, wins in found.items()} == {
        (selm, start): [0.5, 1], (start, selm): [0, 0.5],
        (dpo, start): [0, 0], (start, dpo): [1, 1], (dpo, selm): [0, 1], (selm, dpo): [0, 1]}


def test_implicit_rewards_are_compared_prompt_by_prompt_and_in_units_of_beta(home):
    """Prompts joined by position (here the files' orders differ); DPO minus SELM; nats without
    beta; a start minus itself among the differences."""
    found = plots.implicit_differences(plots.find_runs(home))
    assert found == {1: {"data_chosen": [0.5 * (1 - 5)] * 2, "data_rejected": [0.5 * (5 - 1)] * 2}}
    assert plots.implicit_differences(plots.find_runs(home)[:1]) == {}


def test_the_matrix_shows_the_win_rate_of_the_row(home, tmp_path, monkeypatch):
    """A transposed matrix, with all numbers turned into their opposite."""
    shown = []
    monkeypatch.setattr(pyplot.Axes, "imshow", lambda self, matrix, **k: (
        shown.append(matrix) or imshow(self, matrix, **k)))
    plots.draw_duels(plots.find_runs(home), tmp_path / "duels.png")
    np.testing.assert_equal(shown[0], [  # start, DPO 1, SELM 1
        [np.nan, 1, 0.25], [0, np.nan, 0.5], [0.75, 0.5, np.nan]])


imshow = pyplot.Axes.imshow


def test_a_run_without_numbers_for_a_figure_gets_none(tmp_path, figures):
    """A crash at the end of a run without held-out prompts, or an empty figure."""
    write_config(tmp_path, 0.3)
    runs = plots.find_runs(tmp_path)
    assert [path.name for path in plots.draw_all(runs, tmp_path)] == ["training.png"]
    write_pairs(tmp_path / "iter_1", scores=(1.0, 1.0, 1.0))  # a judge of one opinion
    assert [path.name for path in plots.draw_all(runs, tmp_path)] == ["rewards.png", "training.png"]
    (tmp_path / "metrics.jsonl").write_text("")
    assert [path.name for path in plots.draw_all(runs, tmp_path)] == ["rewards.png"]


def png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_the_command_draws_every_figure_again_from_the_files_alone(home):
    """A figure that needs the process that made the numbers."""
    write_config(home, 0.3, True, ranker="a/very/long/path/of/a/person/$\\frac{$/judge.py:f")
    result = subprocess.run([sys.executable, "-m", "harness.runs.plots", str(home)], cwd=ROOT,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr, result.stderr
    names = "evaluation rewards duels implicit training".split()
    assert result.stdout.split() == [str(home / f"figures/{name}.png") for name in names]
    assert all(png(home / f"figures/{name}.png") for name in names)


def test_a_paper_recipe_with_its_offline_iteration_gets_every_figure_and_the_page(
        tmp_path, monkeypatch, figures):
    """Figures for runs that begin at iteration 1 only: Zephyr's begins at 0, whose start is -1."""
    monkeypatch.setitem(RECIPES, "zephyr-7b-sft", RECIPES["zephyr-7b-sft"] | {
        "model": write_model(tmp_path / "model", "mistral", "zephyr")})
    train_loop.main([
        "--model", "zephyr-7b-sft", "--data", write_preferences(tmp_path / "p.jsonl", 30),
        "--ranker", write_judge(tmp_path / "judge.py"), "--run-dir", str(tmp_path / "run"), *SMALL,
        "--baseline", "--iterations", "2", "--prompts-per-iteration", "8"])
    run = tmp_path / "run"
    for name in ("evaluation", "rewards", "duels", "implicit", "training"):
        assert png(run / f"figures/{name}.png"), name
    players = {player for pair in plots.duel_results(plots.find_runs(run)) for player in pair}
    assert players == {("", 0), ("SELM", 0), ("SELM", 1), ("DPO", 0), ("DPO", 1)}
    assert list(plots.by_iteration(run, "eval.jsonl")) == [-1, 0, 1]
    text = (run / "report.html").read_text()
    assert text.count("<img ") == 5 and "SELM, iteration 0: candidates" in text


@pytest.mark.parametrize("command", [plots.main, report_page.main])
def test_a_wrong_command_line_has_exit_code_2(command, tmp_path, capsys):
    """Usage errors that a script cannot tell from a failure."""
    for arguments in ([], [str(tmp_path)], ["a", "b"]):
        with pytest.raises(SystemExit) as end:
            command(arguments)
        assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: ")

"""The experiments: their world is train_loop.py's, their arithmetic done by hand, --quick runs."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train_loop
from experiments.checks import gpu
from experiments.evidence import ablation, common, mechanism, open_questions, what_for
from harness.inputs import toy
from harness.models import weights
from harness.runs.report import rows_of


@pytest.fixture
def short(monkeypatch):
    """A base model of 60 steps, and no trace of what --quick sets."""
    monkeypatch.setattr(toy, "SFT_STEPS", 60)
    monkeypatch.setattr(common, "SAMPLES", 16)  # as many as train_loop.py draws
    monkeypatch.setattr(common, "ITERATIONS", 3)


def test_a_world_reproduces_the_numbers_of_the_command(short, tmp_path):
    """Another order of the prompts, another stream, another setting: results of a world that no
    reader can run."""
    train_loop.main(["--model", "toy-neutral", "--seeds", "1", "--no-baseline", "--alpha", "0.3",
                     "--lr", "6e-3", "--run-dir", str(tmp_path / "run")])
    course = common.World(tmp_path, 0, "neutral").course(alpha=0.3)
    for k, row in enumerate(rows_of(tmp_path / "run", "eval")[1:]):
        for name in ("reward", "kl", "entropy", "coverage", "share_good"):
            assert course[k][name] == pytest.approx(row[f"true_{name}"], rel=1e-5), (k, name)
    first = [row for row in rows_of(tmp_path / "run", "train") if row["update"] == 0]
    assert [c["share"] for c in course] == pytest.approx([r["optimism_share"] for r in first])


@pytest.mark.parametrize("script, panels", [
    (mechanism, {"temperature 1", "habit", "size"}), (ablation, {"worlds", "path", "long"}),
    (open_questions, {"sizes", "turns", "ensemble"})])
def test_the_quick_form_of_each_script_measures_draws_and_tabulates(script, panels, short, tmp_path,
                                                                    capsys):
    """A script that no longer runs, found out after its hour; an arm without its comparison."""
    name = Path(script.__file__).stem
    script.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert panels < set(results) and results["seeds"] == [0, 1]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| --- |") >= 3


def test_the_first_figure_is_drawn_from_a_run_and_the_results(short, tmp_path):
    """A figure that nobody can make again."""
    train_loop.main(["--seeds", "1", "--iterations", "1", "--eval-prompts", "4",
                     "--prompts-per-iteration", "32", "--run-dir", str(tmp_path / "run")])
    for name in ("regret", "mechanism"):
        shutil.copy(ROOT / f"experiments/results/{name}.json", tmp_path)
    what_for.main(["--run-dir", str(tmp_path / "run"), "--results", str(tmp_path)])
    assert (tmp_path / "what_for.png").stat().st_size > 10_000


def test_what_a_gpu_has_to_show_runs_and_is_right_on_a_cpu(monkeypatch, capsys):
    """A script that fails on the day when somebody lends a GPU; verdicts that are always good."""
    for name in ("load_model", "save_policy", "stored_dtype"):  # which it replaces
        monkeypatch.setattr(weights, name, getattr(weights, name))
    for name in ("attention", "sampling", "offload"):
        assert gpu.PARTS[name]("cpu", True)["ok"] is True
    found = gpu.memory("cpu", True)
    assert len(found) == 4 and all(planned > 0 for _, planned, _ in found.values())
    assert all(value > 0 for row in gpu.speed("cpu", True).values() for value in row.values())
    with pytest.raises(SystemExit) as end:
        gpu.main(["--rehearse", "products"])
    assert end.value.code == 0 and "products   ok" in capsys.readouterr().out
    monkeypatch.setattr(gpu.sample.SlotCache, "move", lambda *_: None)
    assert gpu.sampling("cpu", True)["ok"] is False
    monkeypatch.setattr(gpu.selm, "token_logps", lambda h, w, t, **_: (h @ w.t()).gather(
        1, t[:, None]).squeeze(1))
    assert gpu.products("cpu", True)["ok"] is False


def test_greedy_answers_are_compared_with_sampled_ones_of_the_same_prompts(short, tmp_path):
    """A sample beside another prompt's greedy answer; a tie that counts as a win. At temperature 1
    an untrained model hardly ever repeats its greedy answer, so that a judge of equality decides
    what is beaten: every answer that is not the greedy one."""
    toy.build_world(tmp_path / "w", 0, prompts=96, progress=False)
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, candidates):\n"
        "    return [[float(t != texts[0]) for t in texts] for texts in candidates]\n")
    table = mechanism.habit_of(str(tmp_path / "w/base"), str(tmp_path / "w/train.jsonl"),
                               f"{tmp_path / 'judge.py'}:judge", prompts=6, samples=4, limit=8)
    numbers = [float(line.split("|")[2].replace("*", "").split()[0])
               for line in table.splitlines()[2:]]
    greedy, sampled, difference, beaten = numbers
    assert (greedy, difference) == (0, -sampled) and 0 < sampled < 1
    assert beaten == pytest.approx(sampled + (1 - sampled) / 2, abs=4e-3)  # two decimals


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_run_that_is_killed_anywhere_ends_in_the_files_of_one_that_was_not(tmp_path):
    """A phase that a kill leaves half done and the next try takes for whole. Two kills here; the
    script's own command makes more."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "experiments/checks/kill_test.py"), "2", "--processes", "1",
         "--seed", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "2 kills, 2 identical"
    assert len(set(re.findall(r"killed in (\S+),", result.stdout))) == 2


def test_the_closed_form_is_that_of_two_vectors():
    """beta, a factor of two, the sign of the product. g_y = (3, 4), g_m = (6, 0), alpha = 0.5: the
    total is alpha g_y - g_m / 2 = (-1.5, 2) of norm 2.5, and so is alpha g_y."""
    norms = {"y": 5.0, "margin": 6.0, "product": 18.0}
    assert mechanism.closed_form(norms, 0.5) == pytest.approx((5 / 6, 1.0))


def test_at_equal_finds_the_last_crossing_between_two_stops():
    """The first crossing, a nearest stop instead of the line between two, a guess where none is."""
    points = [{"kl": kl, "reward": r} for kl, r in ((0, 0), (2, 4), (1, 5), (3, 9))]
    assert ablation.at_equal(points, "kl", 1.5) == {"kl": 1.5, "reward": 6.0}
    assert ablation.at_equal(points, "kl", 3.1) is None
    assert ablation.at_equal(points[:2], "reward", 1.0) == {"kl": 0.5, "reward": 1.0}


def test_the_jackknife_of_a_mean_is_students_interval():
    """The factor n - 1 forgotten. For a mean the two are the same number."""
    values = [1.0, 2.0, 4.0, 9.0]
    mean, width = common.jackknife(lambda rows: sum(rows) / len(rows), values)
    assert mean == 4.0 and width == pytest.approx(3.18 * math.sqrt(38 / 3 / 4))


def test_the_gain_crosses_zero_where_the_line_through_the_tastes_does():
    """Slope and intercept swapped. Gains 3 - 2 x at x = 0, 1, 2, each the mean of two seeds."""
    def seed(noise):
        return {str(x): {"start": {"greedy_reward": 1.0 + x + noise, "reward": 1.0},
                         "alpha 0": [{"reward": 5.0}], "alpha 0.3": [{"reward": 8.0 - 2 * x}]}
                for x in (0, 1, 2)}
    assert mechanism.crossing(1, [seed(0.5), seed(-0.5)]) == pytest.approx(1.5)


def test_differences_are_taken_within_seeds_and_bold_without_zero():
    """Unpaired intervals; bold for an interval that holds zero."""
    a = [[{"reward": 0.2}], [{"reward": 0.8}], [{"reward": 0.5}]]
    base = [[{"reward": 0.1}], [{"reward": 0.69}], [{"reward": 0.41}]]  # less .10, .11, .09
    assert common.differences(a, base, "reward", [1]) == "**+0.100 ± 0.025**"
    assert common.differences(a, a[::-1], "reward", [1]) == "+0.00 ± 0.74"

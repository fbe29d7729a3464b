"""The command line: recipes, ranges, and what is refused before anything runs."""

import math
from dataclasses import dataclass, fields

import pytest

from harness.runs import settings, setup
from harness.runs.settings import RECIPES

NUMERIC = {entry.name: entry.metadata for entry in fields(settings.Settings)
           if entry.metadata.get("options", {}).get("type") in (int, float)}


@pytest.mark.parametrize("flags, words", [
    ("--model zefyr", "no such recipe.*zephyr-7b-sft"), ("--lr 1 2", "2 rates for 3"),
    ("--max-prompt-length 64", "no room is left"),
    ("--responses-per-prompt 2", "--temperature > 0"), ("--run-dir=", "--run-dir"),
    ("--data mine.jsonl", "the toy makes its own")])
def test_flags_that_cannot_work_are_refused_before_anything_runs(flags, words):
    """A run that fails after an hour on what was known at its first second."""
    with pytest.raises(ValueError, match=words):
        settings.read(flags.split())


def test_every_numeric_flag_has_a_range():
    """A new flag that takes any number."""
    for name, entry in NUMERIC.items():
        assert (entry["above"] is None) != (entry["at_least"] is None), name


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_a_number_out_of_range_is_refused_by_the_name_of_its_flag(name):
    """Gradient ascent (--max-grad-norm -1), nothing trained (--adam-eps inf), a negative count that
    slices from the wrong end, nan that compares as false with everything."""
    entry, flag = NUMERIC[name], f"--{name.replace('_', '-')}"
    kind, high, above = entry["options"]["type"], entry["at_most"], entry["above"]
    bad = [entry["at_least"] - 1] if above is None else [above - 1, above]
    bad += [math.nan, -math.inf] if kind is float else [-10**9]
    if high != math.inf:
        bad += [high * 2 + 1] + [math.inf] * (kind is float)
    for value in bad:
        words = [flag, repr(value)] + [repr(value)] * (name == "adam_betas")
        if value < 0 and kind is float or math.isnan(value):
            words = [f"{flag}={value!r}"] if name not in ("lr", "adam_betas") else words
        try:
            with pytest.raises(ValueError, match=f"{flag}.*must be"):
                settings.read(words)
        except SystemExit:  # argparse takes "-inf" for a flag where several values may follow
            assert value < 0


def test_a_new_setting_is_one_entry(monkeypatch, capsys):
    """A flag that must be declared in a second place, or is forgotten there: in --help, among the
    ranges, among the defaults, or among what a resumed run may change."""
    @dataclass(frozen=True, kw_only=True)
    class More(settings.Settings):
        noise: float = settings.method(float, "added to scores", default=0.5, above=0, at_most=2)
    monkeypatch.setattr(settings, "Settings", More)
    assert settings.read([]).noise == 0.5 and settings.read(["--noise", "1"]).noise == 1
    monkeypatch.setitem(RECIPES, "toy", RECIPES["toy"] | {"noise": 1.5})
    assert settings.read([]).noise == 1.5
    assert settings.read(["--noise", "1"]).as_dict()["noise"] == 1
    for value in "0", "3", "nan":
        with pytest.raises(ValueError, match="--noise .*: must be above 0 and at most 2"):
            settings.read(["--noise", value])
    with pytest.raises(SystemExit):
        settings.read(["--help"])
    text = capsys.readouterr().out
    start = text.index("the method:")
    assert "added to scores (default: 0.5)" in text[start:text.index("optimiser:", start)]


def test_what_a_resumed_run_may_change_is_what_changes_no_number():
    """A run that is resumed with another alpha, or refused because of another --slots. What the
    paths name is compared by its content (`made_from` of config.json)."""
    paths = {"model", "data", "ranker", "eval_ranker", "chat_template", "run_dir", "name"}
    speed = {"slots", "tokens_per_forward", "gradient_checkpointing", "offload", "compile"}
    others = {"fresh", "dry_run", "processes", "track", "baseline", "seeds", "save_every"}
    assert set(settings.NO_DIFFERENCE) == paths | speed | others


def test_the_ends_of_each_range_are_accepted_where_the_table_says_so():
    """A range that refuses alpha 0 (iterative DPO) or a top-p of 1."""
    for flags in ("--alpha 0", "--top-p 1", "--temperature 0", "--eval-prompts 0", "--lora-rank 0",
                  "--max-grad-norm inf", "--iterations 1 --lr 1e-9", "--adam-betas 0 0"):
        settings.read(flags.split())


def test_settings_of_an_iteration_have_its_rate_and_iteration_0_is_plain_dpo():
    """The Zephyr recipe's first portion trained with optimism; the third rate in iteration 2."""
    zephyr = settings.read(["--model", "zephyr-7b-sft"])
    assert [zephyr.at(k).lr for k in range(4)] == [5e-7, 5e-7, 5e-7, 1e-7]
    assert [zephyr.at(k).alpha for k in range(4)] == [0.0, 1e-3, 1e-3, 1e-3]
    assert [zephyr.at(k).responses_per_prompt for k in range(4)] == [0, 1, 1, 1]
    llama = settings.read(["--model", "llama-3-8b-instruct"])
    assert [llama.at(k).lr for k in (1, 2, 3)] == [5e-7, 3e-7, 1e-7] and llama.first == 1


def test_a_flag_that_is_given_beats_the_recipe_and_zero_is_given():
    """`--eval-prompts 0` or `--no-baseline` overwritten by the recipe, as 0 and False are falsy."""
    s = settings.read("--eval-prompts 0 --no-baseline --alpha 0 --lr 1e-3".split())
    assert (s.eval_prompts, s.baseline, s.alpha, s.lr) == (0, False, 0.0, (1e-3,) * 3)
    assert s.beta == RECIPES["toy"]["beta"] and s.max_new_tokens == 8
    assert s.compute.device == s.device


def test_an_unknown_flag_or_an_abbreviation_is_an_error():
    """`--iter 5` that means something else once a new flag begins the same."""
    with pytest.raises(SystemExit):
        settings.read(["--iter", "5"])


@pytest.mark.parametrize("recipe, expected", [
    # 61,135 // 4 = 15,283 prompts; / 256 = 60 updates; a tenth = 6
    ("zephyr-7b-sft", [("0", "15283", "0", "0", "5e-07", "60", "6"),
                       ("3", "15283", "15283", "0.001", "1e-07", "60", "6")]),
    # 61,135 // 3 = 20,378; / 128 = 160 updates
    ("llama-3-8b-instruct", [("1", "20378", "20378", "0.0001", "5e-07", "160", "16")]),
    ("phi-3-mini", [("2", "20378", "20378", "0.001", "3e-07", "160", "16")])])
def test_the_dry_run_has_the_papers_numbers(recipe, expected):
    """Recipe figures that drift from the paper."""
    s = settings.read(["--model", recipe])
    text = settings.dry_run_text(s, settings.KNOWN_PROMPTS[s.data], "the paper's count")
    lines = [tuple(line.split()[:7]) for line in text.splitlines() if line[:1].isdigit()]
    for row in expected:
        assert row in lines


@pytest.mark.parametrize("flags, words", [
    ("--max-length 2147483648", "exceeds the context of the toy's model, 64"),
    ("--chat-template missing.jinja", "missing.jinja: no such file")])
def test_the_toy_is_refused_before_its_world_is_made(flags, words):
    """What read_model finds of other models, found here after a minute of training."""
    with pytest.raises(ValueError, match=words):
        setup.read_inputs(settings.read(flags.split()))


def test_paths_are_text_and_begin_at_home_where_they_say_so(monkeypatch, tmp_path, capsys):
    """`--data=~/prefs.jsonl`, which no shell expands; a run that fails when its name is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    s = settings.read(["--model=~/model", "--data=~/d.jsonl", "--ranker=~/a:b/judge.py:f",
                       "--eval-ranker=reward:~/rm", "--chat-template=~/t", "--run-dir=~/run",
                       "--samples-from=~/{k}"])
    home = str(tmp_path)
    assert [s.model, s.data, s.ranker, s.eval_ranker, s.chat_template, str(s.run_dir),
            s.samples_from] == [f"{home}/model", f"{home}/d.jsonl", f"{home}/a:b/judge.py:f",
                                f"reward:{home}/rm", f"{home}/t", f"{home}/run", home + "/{k}"]
    for flag in ("--model", "--data", "--ranker", "--run-dir", "--samples-from"):
        with pytest.raises(SystemExit) as end:
            settings.read([f"{flag}=a\udcff"])
        assert end.value.code == 2 and f"{flag}: not UTF-8 text" in capsys.readouterr().err
    (tmp_path / "\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "\udcff")
    with pytest.raises(ValueError, match="not UTF-8 text; give --run-dir"):
        settings.read(["--model", ".", "--data", "d.jsonl"])

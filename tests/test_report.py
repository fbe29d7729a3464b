"""Tables, warnings and the report, from files made by hand."""

import json
import re

import pytest

from harness.runs import report
from harness.runs.output_files import read_jsonl, write_jsonl


def make_run(folder, iteration=1, tokens=10, accuracy=0.7, logratio=-1.0, text="fresh", logp=-3.0,
             evals=None, **counts):
    """A run folder with ten prompts in one iteration, as train_loop.py would leave it."""
    (folder / f"iter_{iteration}").mkdir(parents=True)
    write_jsonl(folder / f"iter_{iteration}/eval.jsonl", [
        {"prompt_id": str(i), "response": f"{text} {i}", "policy_logps": [-9.0, -9.0, logp]}
        for i in range(10)])
    old = [r for _, r in read_jsonl(folder / "metrics.jsonl")] if iteration > 1 else []
    counts = dict(prompts=10, pairs=8, equal=2, dropped={}, sampled=10, sampled_best=4,
                  sampled_worst=0, cut=0, cut_by_max_length=0, empty=0, tokens=10 * tokens) | counts
    write_jsonl(folder / "metrics.jsonl", old + [
        {"iteration": iteration, "phase": "rank"} | counts] + [
        {"iteration": iteration, "phase": "train", "update": u, "loss": 0.69 - u / 100,
         "preference_loss": 0.6, "accuracy": accuracy, "sampled_logratio": logratio, "reward_margin": 0.1,
         "grad_norm": 1.0} for u in range(5)] + [
        {"iteration": iteration, "phase": "eval", "score": 0.5, **(evals or {})}])
    return folder


def test_the_summary_counts_pairs_drops_and_the_fate_of_the_samples(tmp_path):
    """Shares taken over all prompts instead of the kept ones; drops that are not mentioned."""
    line = report.summary(make_run(tmp_path, pairs=7, dropped={"empty response": 1},
                                   sampled_best=0, sampled_worst=7), 1)[0]
    assert ("7 pairs of 10 prompts (1 empty response, 2 equal for the judge), y best 0% worst 100%"
            in line)
    assert "loss 0.690 -> 0.650, log-ratio of y -1.00" in line


@pytest.mark.parametrize("changes, words", [
    (dict(logratio=-20.0, accuracy=0.5), "optimism is too strong.*-20.0 nats.*--alpha"),
    (dict(cut=4), "40% of the samples hit the length limit; raise --max-new-tokens"),
    (dict(cut=4, cut_by_max_length=3), "40% of the samples hit .*; raise --max-length"),
    (dict(empty=4), "40% of the samples are empty"),
    (dict(equal=6, pairs=4), "for 60% of the prompts all candidates are equal"),
    (dict(evals={"logratio_to_start": 50.0, "response_tokens": 10}),
     "50 nats from the start.*--beta")])
def test_each_failure_signature_gives_one_warning_with_its_figure(changes, words, tmp_path):
    """A run that fails as the paper says runs do, without a word."""
    lines = report.summary(make_run(tmp_path, **changes), 1)[1:]
    assert len(lines) == 1 and re.search(words, lines[0])


def test_a_healthy_run_gives_no_warning(tmp_path):
    """Warnings that everybody learns to ignore."""
    assert report.summary(make_run(tmp_path), 1)[1:] == []


@pytest.mark.parametrize("share, words", [
    (9e-4, "optimism is 0.0009 of .*--alpha 0; for a share of 0.1 multiply alpha by 1.1e[+]02"),
    (0.0, "optimism is 0 of"), (0.51, "optimism is 51% of .* lower --alpha"),
    (1.1, "optimism is 110% of .*opposes the preferences; .* lower --alpha"),
    (1e-3, None), (0.5, None), (None, None)])
def test_an_alpha_whose_share_of_the_gradient_says_nothing_or_all_is_named(share, words, tmp_path):
    """An alpha of the paper in another model's units: a run that is DPO, or none of it. The share
    stands in the first update's row alone; without optimism in none."""
    make_run(tmp_path)
    rows = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    if share is not None:
        next(row for row in rows if row["phase"] == "train")["optimism_share"] = share
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    lines = report.summary(tmp_path, 1)[1:]
    assert len(lines) == (words is not None) and all(re.search(words, line) for line in lines)


def test_growth_and_standstill_are_seen_across_iterations(tmp_path):
    """Length that grows by a third an iteration; a policy that repeats itself word for word. One
    whose likeliest answers stay, but become likelier, learns and is not stuck."""
    make_run(tmp_path, 1, tokens=10)
    grown = report.summary(make_run(tmp_path, 2, tokens=14, text="other"), 2)[1:]
    assert len(grown) == 1 and "10 -> 14 tokens" in grown[0]
    stuck = report.summary(make_run(tmp_path, 3, tokens=14, text="other"), 3)[1:]
    assert len(stuck) == 1 and "100% of the held-out responses are those" in stuck[0]
    assert not report.summary(make_run(tmp_path, 4, tokens=14, text="other", logp=-2.9), 4)[1:]


def test_the_table_averages_over_seeds_and_shows_the_start_once(tmp_path):
    """A start row an arm; a mean over arms."""
    runs = []
    for name, seed, score in (("SELM", 0, 0.4), ("SELM", 1, 0.8), ("DPO", 0, 0.1), ("DPO", 1, 0.3)):
        folder = tmp_path / f"{name}{seed}"
        folder.mkdir()
        write_jsonl(folder / "metrics.jsonl", [
            {"iteration": k, "phase": "eval", "score": score * k} for k in (0, 1)])
        runs.append((name, folder))
    table = report.table(runs)
    assert table.count("| start | 0 |") == 1
    assert "| SELM | 1 | 0.6 ± 2.5 |" in table  # 12.71 * 0.2828 / sqrt(2)
    assert "| DPO | 1 | 0.2 ± 1.3 |" in table
    assert "over 2 seeds" in table


def test_one_run_shows_the_intervals_over_its_prompts(tmp_path):
    """± 0 for five wins of five, or an interval that reaches beyond 1."""
    write_jsonl(tmp_path / "metrics.jsonl", [
        {"iteration": 1, "phase": "eval", "score": 0.4, "win_rate": 1.0, "win_rate_low": 0.57,
         "win_rate_high": 1.0}])
    table = report.table([("SELM", tmp_path)])
    assert "| 0.4 | 1 (0.57 to 1) |" in table and "over the evaluation prompts" in table


def test_few_distinct_answers_are_said_beside_the_intervals(tmp_path):
    """48 duels of which 4 are distinct, with the interval of 48: a win rate that falls by a quarter
    is then one answer."""
    for distinct, said in ((4, True), (40, False)):
        write_jsonl(tmp_path / "metrics.jsonl", [
            {"iteration": k, "phase": "eval", "score": 0.4, "prompts": 48,
             "distinct_answers": distinct + k} for k in (0, 1)])
        table = report.table([("SELM", tmp_path)])
        assert ("The 48 held-out prompts got 4 to 5 distinct answers" in table) == said


@pytest.mark.parametrize("settings, words", [
    ({"ranker": "oracle"}, "the toy world's true reward, which also chose the pairs"),
    ({"ranker": "pairrm", "eval_ranker": None}, "`pairrm`, which also chose .*--eval-ranker takes"),
    ({"ranker": "pairrm", "eval_ranker": "f.py:g"}, "`f.py:g`, which training did not use.*`pairrm`"),
    ({"ranker": "pairrm", "eval_ranker": "pairrm"}, "`pairrm`, which also chose the pairs"),
    ({"ranker": "f.py:g", "eval_ranker": "oracle"}, "`oracle`, which training did not use")])
def test_the_report_says_who_judged_and_what_that_is_worth(settings, words):
    """Win rates by the judge that trained the policy, without a word."""
    assert re.search(words, report.judged(settings))


def test_the_report_holds_table_judge_figures_and_each_iteration(tmp_path):
    """A figure that is linked by a path of this machine; settings that nobody can look up."""
    run = make_run(tmp_path, evals={"win_rate": 0.6})
    (run / "config.json").write_text(json.dumps({
        "settings": {"name": "x", "alpha": 0.3, "ranker": "pairrm"}, "command": ["x"],
        "git_revision": None, "torch": "", "transformers": ""}))
    runs = [("SELM", run)]
    assert report.write(runs, run / "report.md", [run / "figures/training.png"]) == (
        report.table(runs))
    text = (run / "report.md").read_text()
    for words in (report.table(runs), "![training](figures/training.png)", "| alpha | 0.3 |",
                  "`pairrm`, which also chose", "- iteration 1: 8 pairs of 10 prompts"):
        assert words in text

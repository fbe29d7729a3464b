"""Means, shares and counts against arithmetic by hand and against numpy."""

import math

import numpy
import pytest

from harness.judging.evaluation import evaluation, length_controlled, mean_interval, ranking, wilson


def test_intervals_are_students_over_seeds():
    """A normal quantile for five seeds: intervals a third too narrow."""
    values = [1.0, 2.0, 4.0, 4.0, 9.0]  # mean 4, variance (9 + 4 + 0 + 0 + 25) / 4 = 9.5
    mean, width = mean_interval(values)
    assert mean == 4.0 and width == pytest.approx(2.776 * math.sqrt(9.5 / 5), rel=2e-3)
    assert math.isnan(mean_interval([3.0])[1])


@pytest.mark.parametrize("share, n", [(1.0, 5), (0.0, 5), (0.5, 1), (0.3, 40)])
def test_a_share_has_an_interval_also_where_all_trials_agree(share, n):
    """Five wins of five that print ± 0. Oracle: the interval's ends are where the score test
    |share - p| = z sqrt(p (1 - p) / n) turns; found here by a scan."""
    grid = numpy.linspace(0, 1, 200_001)
    inside = grid[numpy.abs(share - grid) <= 1.96 * numpy.sqrt(grid * (1 - grid) / n)]
    low, high = wilson(share, n)
    assert low == pytest.approx(max(inside[0], 0), abs=1e-5)
    assert high == pytest.approx(inside[-1], abs=1e-5) and high - low > 0.2


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


def every_outcome(intercept, slope, differences):
    """Wins and differences, each twice over with weights that are whole numbers: as many wins as
    the logistic model expects, so that its maximum-likelihood fit is the model itself."""
    d = numpy.tanh(differences / differences.std())
    counts = numpy.round(1000 * sigmoid(intercept + slope * d)).astype(int)
    wins = numpy.concatenate([numpy.repeat([1.0, 0.0], [k, 1000 - k]) for k in counts])
    return wins, numpy.repeat(differences, 1000)


@pytest.mark.parametrize("intercept, slope", [(0.0, 3.0), (1.0, 0.0), (-0.7, 2.0), (0.5, -1.5)])
def test_the_length_controlled_rate_takes_out_what_length_explains_and_no_more(intercept, slope):
    """A length effect with its sign turned, left in, or taken off twice; lengths that are centred
    (the rate is that at EQUAL lengths, not at the usual difference). Oracle: data made of the
    model itself. A pure length effect gives 0.5, none the raw rate."""
    wins, differences = every_outcome(intercept, slope, numpy.array([-200, -50, 0, 30, 300, 700.]))
    rate, low, high = length_controlled(wins, differences)
    assert rate == pytest.approx(sigmoid(intercept), abs=1e-3)
    assert low < rate < high and high - low < 0.1
    if slope == 0:
        assert rate == pytest.approx(wins.mean(), abs=1e-3)
    else:
        assert abs(wins.mean() - rate) > 0.05  # or the test could not fail


@pytest.mark.parametrize("wins", [[1.0] * 5, [0.0] * 7, [1, 0, 0, 0.5, 0.5], [0.5]])
def test_answers_of_equal_length_have_the_raw_rate_and_its_interval(wins):
    """A division by a spread of 0; ± 0 from five wins of five; ties that count as losses."""
    share = sum(wins) / len(wins)
    assert length_controlled(wins, [0] * len(wins)) == pytest.approx(
        (share, *wilson(share, len(wins))), abs=1e-5)


def test_the_interval_holds_the_true_rate_in_19_of_20_samples():
    """An interval of the raw rate, or of a fit that takes the slope for known: far too narrow."""
    rng, inside = numpy.random.default_rng(0), 0
    for _ in range(200):
        differences = rng.normal(100, 100, 50)  # mostly longer
        wins = rng.random(50) < sigmoid(0.4 + numpy.tanh(differences / differences.std()))
        _, low, high = length_controlled(wins, differences)
        inside += low <= sigmoid(0.4) <= high
    assert 0.92 < inside / 200 < 0.98


def test_lengths_that_decide_everything_or_never_differ_do_not_blow_up():
    """Weights that run to infinity on separable data; a singular matrix, where a rate without an
    interval would be an invention."""
    differences = numpy.arange(-40.0, 41.0)
    rate, low, high = length_controlled((differences > 0) + 0.5 * (differences == 0), differences)
    assert rate == pytest.approx(0.5, abs=1e-6) and low < 0.45 and high > 0.55
    rate, low, high = length_controlled([1, 1, 1, 0] * 50, [30] * 200)
    assert rate == pytest.approx(0.75, abs=1e-3) and low < 0.1 and high > 0.9


def rows_of(score, duel, tokens, policy, start, finished=True, text="a", sampled=None):
    """A row of eval.jsonl and its row of duels.jsonl; the start's answer has 3 characters."""
    return ({"scores": [0.1, 0.2, score], "ids": [5] * tokens, "finished": finished,
             "policy_logps": policy, "start_logps": start, "response": text,
             "score_at_temperature_1": 7.0},
            {"duels": {"start": duel, "iter_1": duel[::-1]}, "at_temperature_1": sampled,
             "characters": [len(text), 3]})


def test_the_evaluation_counts_wins_ties_and_preferences():
    """A win rate that takes ties for losses; an accuracy of the policy's log-probs without the
    start's; a score of the data's answer instead of the policy's."""
    metrics = evaluation(*zip(
        rows_of(0.9, [1.0, 0.0], 4, [-5.0, -6.0, -1.0], [-5.0, -9.0, -2.0]),  # 0 < 3: wrong
        rows_of(0.5, [0.3, 0.3], 6, [-5.0, -9.0, -1.5], [-6.0, -9.0, -2.0]),  # 1 > 0: right
        rows_of(0.1, [0.0, 1.0], 8, [-5.0, -9.0, -1.0], [-5.0, -9.0, -1.0], False)))  # a tie
    assert metrics["prompts"] == 3
    assert metrics["win_rate"] == metrics["preference_accuracy"] == 0.5
    assert metrics["score"] == pytest.approx(0.5) and metrics["response_tokens"] == 6.0
    assert metrics["logratio_to_start"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert metrics["finished"] == pytest.approx(2 / 3)
    width = 4.303 * numpy.std([0.9, 0.5, 0.1], ddof=1) / math.sqrt(3)
    assert metrics["score_high"] - metrics["score"] == pytest.approx(width, rel=1e-3)
    assert metrics["win_rate_low"] == pytest.approx(wilson(0.5, 3)[0])
    assert metrics["distinct_answers"] == 1 and "win_rate_at_temperature_1" not in metrics


def test_the_win_rate_of_sampled_answers_and_that_at_equal_lengths_stand_beside_the_greedy_one():
    """Greedy duels counted twice; lengths of one side only, or in tokens of one and characters of
    the other."""
    rows = [rows_of(0.9, duel, 4, [0.0] * 3, [0.0] * 3, text=text, sampled=sampled)
            for duel, text, sampled in (([1.0, 0.0], "abcd", [0.0, 1.0]), ([0.0, 1.0], "", [0, 0]),
                                        ([1.0, 0.0], "abcdefg", [0.0, 1.0]))]
    metrics = evaluation(*zip(*rows))
    assert metrics["win_rate"] == pytest.approx(2 / 3)
    assert metrics["win_rate_at_temperature_1"] == pytest.approx(1 / 6)
    assert metrics["win_rate_at_temperature_1_high"] == pytest.approx(wilson(1 / 6, 3)[1])
    assert metrics["score_at_temperature_1"] == 7.0
    expected = length_controlled([1, 0, 1], [1, -3, 4])
    assert [metrics[f"lc_win_rate{end}"] for end in ("", "_low", "_high")] == list(expected)
    assert metrics["distinct_answers"] == 3


def test_one_held_out_prompt_has_no_interval_of_its_mean_and_a_wide_one_of_its_share():
    """± 0 from a single prompt."""
    metrics = evaluation(*zip(
        rows_of(0.9, [1.0, 0.0], 4, [-5.0, -6.0, -1.0], [-5.0, -9.0, -2.0])))
    assert "score_low" not in metrics
    assert metrics["win_rate"] == 1.0 and metrics["win_rate_low"] < 0.3


def test_the_ranking_is_counted_by_fate():
    """Samples that are best counted over all prompts; a tie or a drop that is not mentioned."""
    def row(chosen, rejected, sampled, dropped=None, tokens=8, finished=True, text="a"):
        y = {"text": text, "ids": [1] * tokens, "finished": finished}
        other = {"text": "b", "ids": [1], "finished": True}
        return {"candidates": [other, other, y], "chosen": chosen, "rejected": rejected,
                "sampled": sampled, "dropped": dropped}
    counts = ranking([row(2, 0, [2]), row(0, 2, [2], finished=False), row(0, 1, [2], text=" "),
                      row(1, 1, [2], finished=False, tokens=5), row(0, 1, [2], "empty"),
                      row(1, 0, [])], max_new_tokens=8)
    assert counts == {"prompts": 6, "pairs": 4, "equal": 1, "sampled": 5, "sampled_best": 1,
                      "sampled_worst": 1, "cut": 2, "cut_by_max_length": 1, "empty": 1,
                      "tokens": 37, "dropped": {"empty": 1}}

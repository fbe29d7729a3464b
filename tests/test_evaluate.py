"""Means, shares and counts against arithmetic by hand and against numpy."""

import math

import numpy
import pytest

from harness.evaluate import evaluation, mean_interval, ranking, wilson


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


def answer_row(score, duel, tokens, policy, start, finished=True):
    return {"scores": [0.1, 0.2, score], "duel": duel, "ids": [5] * tokens, "finished": finished,
            "policy_logps": policy, "start_logps": start}


def test_the_evaluation_counts_wins_ties_and_preferences():
    """A win rate that takes ties for losses; an accuracy of the policy's log-probs without the
    start's; a score of the data's answer instead of the policy's."""
    metrics = evaluation([
        answer_row(0.9, [1.0, 0.0], 4, [-5.0, -6.0, -1.0], [-5.0, -9.0, -2.0]),  # 0 < 3: wrong
        answer_row(0.5, [0.3, 0.3], 6, [-5.0, -9.0, -1.5], [-6.0, -9.0, -2.0]),  # 1 > 0: right
        answer_row(0.1, [0.0, 1.0], 8, [-5.0, -9.0, -1.0], [-5.0, -9.0, -1.0], False)])  # a tie
    assert metrics["prompts"] == 3
    assert metrics["win_rate"] == metrics["preference_accuracy"] == 0.5
    assert metrics["score"] == pytest.approx(0.5) and metrics["response_tokens"] == 6.0
    assert metrics["logratio_to_start"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert metrics["finished"] == pytest.approx(2 / 3)
    width = 4.303 * numpy.std([0.9, 0.5, 0.1], ddof=1) / math.sqrt(3)
    assert metrics["score_high"] - metrics["score"] == pytest.approx(width, rel=1e-3)
    assert metrics["win_rate_low"] == pytest.approx(wilson(0.5, 3)[0])


def test_one_held_out_prompt_has_no_interval_of_its_mean_and_a_wide_one_of_its_share():
    """± 0 from a single prompt."""
    metrics = evaluation([answer_row(0.9, [1.0, 0.0], 4, [-5.0, -6.0, -1.0], [-5.0, -9.0, -2.0])])
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

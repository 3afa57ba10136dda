"""How often intervals hold the truth, and how often equal models are called different."""

import numpy
import pytest

from common.eval.statistics import change_interval, loss_interval, mean_interval, wilson_interval


def compare(difference, simulations, questions=80, answer_noise=1.0, judge_noise=0.7, seed=0):
    """The share of simulated comparisons in which two models are called different.

    Grades of 1 to 10: a question's difficulty, what a model makes of it, and the judge's noise; two turns, two repeats.
    """
    rng, different = numpy.random.default_rng(seed), 0
    for _ in range(simulations):
        difficulty, means = rng.normal(5.5, 2.0, (questions, 2)), []
        for quality in (0.0, difference):
            answers = difficulty + quality + rng.normal(0, answer_noise, (questions, 2))
            grades = (answers[..., None] + rng.normal(0, judge_noise, (questions, 2, 2))).round().clip(1, 10)
            means.append(numpy.median(grades, axis=-1).mean(axis=1))
        low, high = mean_interval(means[1] - means[0])
        different += not low <= 0 <= high
    return different / simulations


def test_equal_models_are_rarely_called_different_and_unequal_ones_are():
    assert compare(0.0, 5000) <= 0.055
    assert compare(0.5, 1000) >= 0.9
    assert compare(0.0, 5000, questions=24) <= 0.055


@pytest.mark.parametrize("units", [2, 3, 5, 9, 24])
def test_intervals_of_few_units_hold_the_mean_in_95_percent(units):
    rng = numpy.random.default_rng(0)
    intervals = [mean_interval(rng.normal(0, 1, units)) for _ in range(4000)]
    assert 0.04 < numpy.mean([not low <= 0 <= high for low, high in intervals]) < 0.06


def test_losses_of_chats_of_any_length_lie_in_their_intervals():
    """Difficulty differs by chat, lengths by more; a model that is 3 % worse."""
    rng, misses = numpy.random.default_rng(0), numpy.zeros(2)
    for _ in range(2000):
        tokens = rng.geometric(1 / 120, 60) + 3
        nats = tokens * rng.gamma(8, 2.0 / 8, 60)
        before = list(zip(nats.tolist(), tokens.tolist(), strict=True))
        after = list(zip((nats * rng.normal(1.03, 0.05, 60)).tolist(), tokens.tolist(), strict=True))
        for i, (truth, (low, high)) in enumerate(
            ((2.0, loss_interval(before)), (0.03, change_interval(before, after)))
        ):
            misses[i] += not low <= truth <= high
    assert all(0.03 < share < 0.08 for share in misses / 2000)


def test_a_single_chat_has_no_interval_and_chats_without_answers_do_not_matter():
    losses = [(20.0, 10), (33.0, 11), (0.0, 0)]
    assert loss_interval(losses) == loss_interval(losses[:2])
    assert loss_interval([losses[0], losses[2]]) is None


def test_a_share_lies_in_its_interval():
    """Rounding put the lower end of 0 of 40 above 0, and the picture of such scores could not be drawn."""
    for trials in range(1, 80):
        for hits in (0, 1, trials - 1, trials):
            low, high = wilson_interval(hits, trials)
            assert 0 <= low <= hits / trials <= high <= 1

"""How often intervals hold the truth, and how often equal models are called different."""

import numpy
import pytest

from common.eval import statistics
from common.eval.statistics import bootstrap_mean, wilson_interval


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
        low, high = bootstrap_mean(means[1] - means[0])
        different += not low <= 0 <= high
    return different / simulations


def test_equal_models_are_rarely_called_different_and_unequal_ones_are(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    assert numpy.mean([compare(0.0, 400, seed=seed) for seed in range(6)]) <= 0.05  # measured: 4.8 % of 2,400
    assert compare(0.5, 400) >= 0.8
    assert numpy.mean([compare(0.0, 400, questions=24, seed=seed) for seed in range(6)]) <= 0.055


@pytest.mark.parametrize("units", [2, 3, 5, 9, 24])
def test_intervals_of_few_units_hold_the_mean_in_95_percent(units, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = numpy.random.default_rng(0)
    intervals = [bootstrap_mean(rng.normal(0, 1, units)) for _ in range(1000)]
    assert 0.035 < numpy.mean([not low <= 0 <= high for low, high in intervals]) < 0.07


def test_a_share_lies_in_its_interval():
    """Rounding put the lower end of 0 of 40 above 0, and the picture of such scores could not be drawn."""
    for trials in range(1, 80):
        for hits in (0, 1, trials - 1, trials):
            low, high = wilson_interval(hits, trials)
            assert 0 <= low <= hits / trials <= high <= 1

"""95 % intervals of shares, of losses over chats, and of means over questions."""

import math
import statistics

import numpy

from common.cli import UserError

RESAMPLES = 10_000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # 97.5 % points, 1 to 8 degrees of freedom


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right for small numbers and near 0 and 1."""
    share, scale = hits / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # 0 of 40: middle - half = 7e-18


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Nats per token over all chats."""
    totals, tokens = zip(*losses, strict=True)
    if not sum(tokens):
        raise UserError("MAX_LENGTH: no answer of CHATS begins before it. Raise it.")
    return sum(totals) / sum(tokens)


def bootstrap_loss(losses: list[tuple[float, int]]) -> tuple[float, float]:
    """95 % interval of mean_loss, resampling whole chats."""
    sums = resample(numpy.array(losses)).sum(axis=1)  # (resamples, 2)
    return percentiles(sums[:, 0] / sums[:, 1], len(losses))


def bootstrap_change(before: list, after: list) -> tuple[float, float]:
    """95 % interval of mean_loss(after) / mean_loss(before) - 1 on the same chats, resampling whole chats in pairs."""
    sums = resample(numpy.concatenate([numpy.array(before), numpy.array(after)], axis=1)).sum(axis=1)  # (resamples, 4)
    return percentiles((sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1]) - 1, len(before))


def means_by_question(values) -> list[float]:
    """The mean of each question's values, from pairs (question, value)."""
    by_question: dict = {}
    for question, value in values:
        by_question.setdefault(question, []).append(value)
    return [statistics.fmean(found) for found in by_question.values()]


def bootstrap_mean(values) -> tuple[float, float]:
    """95 % interval of the mean of values, one a question: of grades, or of differences of two models' grades.

    Fewer than ten are too few for a bootstrap: Student's.
    """
    if 2 <= len(values) < 10:
        half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        return statistics.fmean(values) - half, statistics.fmean(values) + half
    return percentiles(resample(numpy.array(values, dtype=float)).mean(axis=1), len(values))


def resample(units: numpy.ndarray) -> numpy.ndarray:
    """(RESAMPLES, n, ...): units drawn with replacement, n at a time."""
    return units[numpy.random.default_rng(0).integers(len(units), size=(RESAMPLES, len(units)))]


def percentiles(estimates: numpy.ndarray, units: int) -> tuple[float, float]:
    """A 95 % interval from bootstrap estimates: expanded percentiles (Hesterberg 2015, arxiv.org/abs/1411.5279).

    Plain percentiles are too narrow for few units, as a normal interval is beside Student's.
    """
    if units < 2:
        return float("-inf"), float("inf")
    z, freedom = 1.959964, units - 1
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # t's 97.5 % point
    tail = statistics.NormalDist().cdf(-student * math.sqrt(units / freedom))
    low, high = numpy.quantile(estimates, (tail, 1 - tail))
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval of a difference shows."""
    return "no difference shown" if low <= 0 <= high else "better" if low > 0 else "worse"

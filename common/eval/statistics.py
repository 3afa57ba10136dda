"""95 % intervals of shares, of losses over chats, and of means over questions."""

import math
import statistics

import numpy

from common.cli import UserError

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # 97.5 % points, 1 to 8 degrees of freedom


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right for small numbers and near 0 and 1."""
    share, scale = hits / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # 0 of 40: middle - half = 7e-18


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Nats per token over all chats, from the summed nats and tokens of each."""
    nats, tokens = map(sum, zip(*losses, strict=True))
    if not tokens:
        raise UserError("MAX_LENGTH: no answer of CHATS begins before it. Raise it.")
    return nats / tokens


def loss_interval(losses: list[tuple[float, int]]) -> tuple[float, float]:
    """Of mean_loss."""
    return jackknife(losses, lambda nats, tokens: nats / tokens)


def change_interval(before: list[tuple[float, int]], after: list[tuple[float, int]]) -> tuple[float, float]:
    """Of mean_loss(after) / mean_loss(before) - 1 on the same chats."""
    pairs = [(*one, *other) for one, other in zip(before, after, strict=True)]
    return jackknife(
        pairs, lambda nats, tokens, nats_after, tokens_after: nats_after / tokens_after * tokens / nats - 1
    )


def mean_interval(values) -> tuple[float, float]:
    """Of the mean of values, one a question: grades, or differences of two models' grades."""
    return jackknife([(value, 1) for value in values], lambda total, count: total / count)


def jackknife(units: list[tuple], statistic) -> tuple[float, float]:
    """Of a statistic of the sums of units' columns, by leaving out each unit once (Tukey 1958), with Student's t.

    For a mean it is Student's interval. Units whose second column, a count, is 0 do not matter.
    """
    table = numpy.array([unit for unit in units if unit[1]], dtype=float)  # (units, columns)
    freedom = len(table) - 1
    if freedom < 1:
        return -math.inf, math.inf
    if freedom <= len(STUDENT):
        student = STUDENT[freedom - 1]
    else:  # by its expansion (Abramowitz and Stegun 26.7.5)
        student = 1.959964 + 2.372271 / freedom + 2.822499 / freedom**2
    sums = table.sum(axis=0)
    left_out = statistic(*(sums - table).T)  # (units,)
    value, half = float(statistic(*sums)), student * math.sqrt(freedom * left_out.var())
    return value - half, value + half


def means_by_question(values) -> list[float]:
    """The mean of each question's values, from pairs (question, value)."""
    by_question: dict = {}
    for question, value in values:
        by_question.setdefault(question, []).append(value)
    return [statistics.fmean(found) for found in by_question.values()]


def verdict(low: float, high: float) -> str:
    """What the interval of a difference shows."""
    return "no difference shown" if low <= 0 <= high else "better" if low > 0 else "worse"

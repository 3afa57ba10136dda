"""Scores with their 95 % intervals: computed, printed, compared and drawn."""

import math
import statistics
from pathlib import Path

import numpy

from common.cli import UserError

Losses = list[tuple[float, int]]  # of each chat: summed nats, and tokens
Interval = tuple[float, float]
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # 97.5 % points, from 1 degree of freedom


def wilson_interval(hits: float, trials: int) -> Interval:
    """Of a share (Wilson, J. Am. Stat. Assoc. 22, 1927), also for small numbers and near 0 and 1."""
    z = 1.96
    share, scale = hits / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # For 0 of 40, middle - half is 7e-18.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def mean_loss(losses: Losses) -> float:
    """Nats per token over all chats."""
    nats, tokens = map(sum, zip(*losses, strict=True))
    if not tokens:
        raise UserError("MAX_LENGTH: no answer of CHATS begins before it. Raise it.")
    if not math.isfinite(nats):
        raise UserError("MODEL: its loss is not finite. Its weights are damaged, or DTYPE=float32 is needed.", code=4)
    return nats / tokens


def loss_interval(losses: Losses) -> Interval | None:
    """Of mean_loss."""
    return jackknife(losses, lambda nats, tokens: nats / tokens)


def change_interval(before: Losses, after: Losses) -> Interval | None:
    """Of mean_loss(after) / mean_loss(before) - 1 on the same chats."""
    pairs = [(*one, *other) for one, other in zip(before, after, strict=True)]
    return jackknife(pairs, lambda nats, tokens, later, later_tokens: later / later_tokens * tokens / nats - 1)


def mean_interval(values) -> Interval | None:
    """Of the mean of values, one for each question."""
    return jackknife([(value, 1) for value in values], lambda total, count: total / count)


def jackknife(units: list[tuple], statistic) -> Interval | None:
    """Of a statistic of the sums of units' columns, leaving out each unit once (Tukey 1958), with Student's t.

    None for a single unit. Units whose second column, a count, is 0 do not matter.
    """
    table = numpy.array([unit for unit in units if unit[1]], dtype=float)  # (units, columns)
    freedom = len(table) - 1
    if freedom < 1:
        return None
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


def verdict(interval: Interval | None, equal: float = 0, less_is_better: bool = False) -> str:
    """What the interval of a difference shows; equal: its value where there is none."""
    if interval is None:
        return "nothing shown"
    low, high = interval
    if low <= equal <= high:
        return "no difference shown"
    return "better" if (low > equal) != less_is_better else "worse"


def describe(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "no interval: it takes two chats or questions"
    return f"95 % interval {interval[0]:{form}} to {interval[1]:{form}}"


def put(result: dict, name: str, value: float, interval: Interval | None, form: str, more: str = "") -> None:
    """Keep a score with its interval, and print it."""
    result["scores"][name], result["intervals"][name] = value, interval
    print(f"  {name}: {value:{form}} ({describe(interval, form)}){more}")


def put_share(result: dict, name: str, hits: float, trials: int) -> None:
    interval = wilson_interval(hits, trials)
    put(result, name, hits / trials, interval, ".0%", f", {hits:g} of {trials}")


def compare(first: str, name: str, results: dict) -> None:
    """Print whether a model differs from the first one."""
    before, after = results[first], results[name]
    versus = f"{name} against {first}"
    for source, losses in after.get("losses", {}).items():
        earlier = before["losses"][source]
        interval = change_interval(earlier, losses)
        what = "that loss" if len(after["losses"]) == 1 else f"the loss on {source}"
        print(f"\n{versus}: {verdict(interval, less_is_better=True)}")
        put(after, f"change of {what}", mean_loss(losses) / mean_loss(earlier) - 1, interval, "+.1%")
        if [tokens for _, tokens in earlier] != [tokens for _, tokens in losses]:
            print("  their tokenizers or templates differ, and so do their tokens: such losses do not compare")
    grades, earlier = after.get("judged", {}), before.get("judged", {})
    both = [(at.partition(",")[0], grades[at] - earlier[at]) for at in grades if at in earlier]
    if both:
        differences = means_by_question(both)
        interval = mean_interval(differences)
        found = f"{statistics.fmean(differences):+.2f} ({describe(interval, '+.2f')})"
        print(f"\n{versus}: grades {found}: {verdict(interval)}")


def draw(file: Path, title: str, result: dict) -> None:
    """A picture of the scores with their intervals, a panel for each kind of number."""
    from matplotlib.figure import Figure  # slow import

    panels = {}
    for name, value in result["scores"].items():
        kind = name.split()[0] if name.startswith(("judge", "change", "loss")) else "share"
        low, high = result["intervals"][name] or (value, value)
        row = name.removeprefix("judge "), value, value - low, high - value
        panels.setdefault(kind, []).append(row)
    if not panels:
        return
    sizes = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(8, 1 + 0.5 * sum(sizes) + len(panels)), layout="tight")
    axes = figure.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for panel, (kind, rows) in zip(axes, panels.items(), strict=True):
        labels, values, *around = zip(*rows, strict=True)
        panel.errorbar(values, range(len(rows)), xerr=around, fmt="o", capsize=4)
        panel.set_yticks(range(len(rows)), labels)
        panel.invert_yaxis()
        panel.set_xlabel(kind)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)

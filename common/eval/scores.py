"""The scores of a model: kept with their intervals, printed, compared with another model's, and drawn."""

import math
from pathlib import Path

from common.eval import statistics
from common.eval.statistics import mean_loss, verdict


def put(result: dict, name: str, value: float, interval: tuple, form: str, more: str = "") -> None:
    """Keep a score with its interval, and print it."""
    known = all(map(math.isfinite, interval))  # a single question has none
    result["scores"][name], result["intervals"][name] = value, interval if known else None
    shown = f"95 % interval {interval[0]:{form}} to {interval[1]:{form}}" if known else "no interval"
    print(f"  {name}: {value:{form}} ({shown}){more}")


def put_share(result: dict, name: str, hits: int, trials: int) -> None:
    interval = statistics.wilson_interval(hits, trials)
    put(result, name, hits / trials, interval, ".0%", f", {hits} of {trials}")


def compare(first: str, name: str, results: dict) -> None:
    """Print whether a model differs from the first one, on the same chats and on the same questions."""
    before, after = results[first], results[name]
    versus = f"{name} against {first}"
    for source, losses in after.get("losses", {}).items():
        earlier = before["losses"][source]
        low, high = interval = statistics.change_interval(earlier, losses)
        what = "that loss" if len(after["losses"]) == 1 else f"the loss on {source}"
        print(f"\n{versus}: {verdict(-high, -low)}")
        put(after, f"change of {what}", mean_loss(losses) / mean_loss(earlier) - 1, interval, "+.1%")
        if [tokens for _, tokens in earlier] != [tokens for _, tokens in losses]:
            print("  their tokenizers differ, and so do their tokens: such losses do not compare")
    grades, earlier = after.get("judged", {}), before.get("judged", {})
    both = [(at.partition(",")[0], grades[at] - earlier[at]) for at in grades if at in earlier]
    if both:
        differences = statistics.means_by_question(both)
        low, high = statistics.mean_interval(differences)
        found = f"{sum(differences) / len(differences):+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
        print(f"\n{versus}: grades {found}: {verdict(low, high)}")


def draw(file: Path, title: str, result: dict) -> None:
    """A picture of the scores with their intervals, a panel for each kind of number."""
    from matplotlib.figure import Figure  # slow import

    panels = {}
    for name, value in result["scores"].items():
        kind = next((kind for kind in ("judge", "change", "loss") if name.startswith(kind)), "share")
        low, high = result["intervals"][name] or (value, value)
        panels.setdefault(kind, []).append((name.removeprefix("judge "), value, value - low, high - value))
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

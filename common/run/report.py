"""What a run leaves: summary.json, plot.png, and the row a person pastes into runs.md."""

import datetime
import json
import math
import statistics
from pathlib import Path

from common import distributed, hardware
from common.cli import RANK
from common.files import write_atomic
from common.run.metrics import perplexity, read_metrics

# The columns of runs.md; `row` fills them from a summary.
COLUMNS = ("date", "commit", "command", "device", "eval loss", "tok/s", "peak GiB", "mean W", "time", "verdict", "note")


def finish(folder: Path, trainer, events: dict, train_loss: float, eval_loss: float | None, seconds: float, plan):
    """Write plot.png, run_row.md and summary.json, which makes the run a finished one; print the row last.

    events: how often what cost time, by name; seconds: of training. Of several processes all have to call it: peaks
    are those of the process that held most, power that of all.
    """
    monitor, progress, steps = trainer.monitor, trainer.progress, trainer.step_seconds
    monitor.exchange()
    peaks = hardware.peak_vram_gib(), hardware.peak_rss_gib(), hardware.peak_vram_gib(reserved=True)
    peaks = zip(*distributed.gather(peaks), strict=True)
    peak_vram_gib, peak_rss_gib, reserved_gib = (None if None in peak else max(peak) for peak in peaks)
    if RANK:
        return
    monitor.write()
    if eval_loss is not None and not math.isfinite(eval_loss):
        eval_loss = None
    events = events | ({"loss spike": progress.guard.spikes} if progress.guard.spikes else {})
    metadata = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    joules, device, count = trainer.energy_j(), hardware.device_name(), distributed.count()
    summary = dict(
        train_loss=train_loss,
        eval_loss=eval_loss,
        eval_perplexity=perplexity(eval_loss),
        steps=trainer.state.global_step,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens_per_second(),
        train_seconds=seconds,
        median_step_seconds=statistics.median(steps) if steps else None,
        max_step_seconds=max(steps, default=None),
        peak_vram_gib=peak_vram_gib,
        peak_rss_gib=peak_rss_gib,
        predicted_peak_gib=plan.predicted_peak_gib,
        mean_power_w=monitor.mean_power_w(),
        energy_wh=None if joules is None else joules / 3600,
        device=f"{count} x {device}" if count > 1 else device,
        command=metadata["command"],
        commit=metadata["commit"],
        verdict=verdict(progress.guard.bad_steps, events),
        peak_vram_reserved_gib=reserved_gib,
        tokens_per_joule=progress.tokens / joules if joules else None,
        events=events,
    )
    line = row(summary)
    (folder / "run_row.md").write_text(line + "\n", encoding="utf-8")
    plot(folder)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1))
    print(f"\nrun folder: {folder}\nrow for runs.md ({' | '.join(COLUMNS)}):\n{line}")


def verdict(bad_steps: int, events: dict) -> str:
    bad = [f"{bad_steps} steps not finite"] if bad_steps else []
    return ", ".join(["done", *bad, *(f"{n} {event}{'s' * (n > 1)}" for event, n in events.items())])


def row(summary: dict, note: str = "") -> str:
    """One line of the table in runs.md."""

    def show(value, form):
        return "" if value is None else format(value, form)

    peak = summary["peak_vram_gib"] if summary["peak_vram_gib"] is not None else summary["peak_rss_gib"]
    minutes, seconds = divmod(round(summary["train_seconds"]), 60)
    cells = (
        f"{datetime.date.today()}", summary["commit"] or "", f"`{summary['command']}`", summary["device"],
        show(summary["eval_loss"], ".4f"), show(summary["tokens_per_second"], ",.0f"), show(peak, ".2f"),
        show(summary["mean_power_w"], ".0f"), f"{minutes}:{seconds:02}", summary["verdict"], note,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def plot(folder: Path) -> None:
    """Draw metrics.jsonl into plot.png: loss and learning rate over steps, above memory and, where known, power."""
    import matplotlib  # slow import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(folder)

    def draw(axes, name: str, *style, **options) -> None:
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), *style, **options)

    pyplot.rcParams.update({"font.size": 15, "lines.linewidth": 2.5})  # to be read on a phone
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 8), height_ratios=(3, 2))
    draw(above, "loss", color="C0", label="loss")
    draw(above, "eval_loss", "o-", color="C1", label="held out")
    above.set_ylabel("loss (nats a token)")
    if above.lines:
        above.legend()
    memory = "vram_gib" if any(m["vram_gib"] is not None for m in metrics) else "rss_gib"
    draw(below, memory, color="C2")
    below.set_ylabel("memory (GiB)", color="C2")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    for axes, name, label, colour in ((above, "learning_rate", "learning rate", "C7"), (below, "power_w", "W", "C3")):
        if any(m.get(name) is not None for m in metrics):
            right = axes.twinx()
            draw(right, name, "--", color=colour)
            right.set_ylabel(label, color=colour)
            right.set_ylim(bottom=0)
    figure.suptitle(folder.name)
    figure.tight_layout()
    figure.savefig(folder / "plot.png", dpi=100)
    pyplot.close(figure)

"""What a run leaves: summary.json, plot.png, and the row a person pastes into runs.md."""

import datetime
import itertools
import json
import statistics
from pathlib import Path

from common import distributed, hardware
from common.cli import RANK
from common.files import METRICS, write_atomic
from common.run.metrics import finite, perplexity

# The columns of runs.md; `row` fills them from a summary.
COLUMNS = ("date", "commit", "command", "device", "eval loss", "tok/s", "peak GiB", "mean W", "time", "verdict", "note")


def finish(folder: Path, trainer, results: dict, events: dict) -> None:
    """Write plot.png, run_row.md and summary.json, which finishes the run; print the row last.

    results: of the training, for summary.json. events: how often what cost time, by name.
    Of several processes all have to call it.
    """
    trainer.monitor.exchange()
    peaks = hardware.peak_vram_gib(), hardware.peak_rss_gib(), hardware.peak_vram_gib(reserved=True)
    peaks = zip(*distributed.gather(peaks), strict=True)
    peaks = [None if None in peak else max(peak) for peak in peaks]  # the most of a process
    if RANK:
        return
    trainer.monitor.write()
    summary = finite(summarize(trainer, results, peaks, events))
    line = row(summary)
    (folder / "run_row.md").write_text(line + "\n", encoding="utf-8")
    plot(folder)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1))
    print(f"\nrun folder: {folder}\nlook at it: {folder / 'report.html'} in a browser")
    print(f"talk to it: python chat_pipe.py MODEL={folder}")
    print(f"row for runs.md ({' | '.join(COLUMNS)}):\n{line}")


def summarize(trainer, results: dict, peaks: list, events: dict) -> dict:
    """summary.json; peaks: GiB of VRAM, of main memory, and of VRAM reserved by torch."""
    progress, steps, joules = trainer.progress, trainer.step_seconds, trainer.energy_j()
    metadata, device, guard = trainer.metadata, hardware.device_name(), progress.guard
    state, best = trainer.state, progress.best or (None, None)
    is_early = trainer.stops_early() and state.global_step < state.max_steps  # not where the last one had no gain
    early = [f"stopped early at step {state.global_step} of {state.max_steps}"] * is_early
    events = events | ({"loss spike": guard.spikes} if guard.spikes else {})
    bad = [f"{guard.bad_steps} steps not finite"] if guard.bad_steps else []
    return dict(
        train_loss=results["train_loss"],
        eval_loss=results["eval_loss"],
        eval_perplexity=None if "margin" in trainer.evaluated else perplexity(results["eval_loss"]),
        steps=state.global_step,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens_per_second(),
        train_seconds=results["train_seconds"],
        median_step_seconds=statistics.median(steps) if steps else None,
        max_step_seconds=max(steps, default=None),
        peak_vram_gib=peaks[0],
        peak_rss_gib=peaks[1],
        predicted_peak_gib=results["predicted_peak_gib"],
        mean_power_w=trainer.monitor.mean_power_w(),
        energy_wh=None if joules is None else joules / 3600,
        device=f"{distributed.count()} x {device}" if distributed.count() > 1 else device,
        command=metadata["command"],
        commit=metadata["commit"],
        verdict=", ".join(["done", *early, *bad, *(f"{n} {event}{'s' * (n > 1)}" for event, n in events.items())]),
        peak_vram_reserved_gib=peaks[2],
        tokens_per_joule=progress.tokens / joules if joules else None,
        events=events,
        final_step=results["final_step"],
        best_step=best[1],
        best_eval_loss=best[0],
        last_eval_loss=results["last_eval_loss"],
    )


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
    """Draw plot.png: loss and learning rate over steps, what pairs have, memory and, where known, power."""
    import matplotlib  # slow imports
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 15, "lines.linewidth": 2.5})  # to be read on a phone
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    memory = "vram_gib" if any(m["vram_gib"] is not None for m in metrics) else "rss_gib"
    of_pairs = any("margin" in m for m in metrics)
    figure = Figure(figsize=(8, 8 + 3 * of_pairs), layout="tight")
    above, *middle, below = figure.subplots(2 + of_pairs, 1, sharex=True, height_ratios=(3, *[3] * of_pairs, 2))
    if of_pairs:
        plot_pairs(*middle, metrics)
    for axes, name, style, label, colour in (
        (above, "loss", "-", "loss", "C0"),
        (above, "eval_loss", "o-", "held out", "C1"),
        (below, memory, "-", "memory (GiB)", "C2"),
        (above, "learning_rate", "--", "learning rate", "C7"),
        (below, "power_w", "--", "W", "C3"),
    ):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            axes = axes.twinx() if style == "--" else axes
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
            axes.set_ylabel(label, color=colour)
            if axes is not above:
                axes.set_ylim(bottom=0)
    above.legend(handles=above.lines)
    above.set_ylabel("loss" if of_pairs else "loss (nats a token)", color="black")
    below.set_xlabel("step")
    figure.suptitle(folder.name)
    figure.savefig(folder / "plot.png", dpi=100)


def plot_pairs(axes, metrics: list[dict]) -> None:
    """Draw the rewards of both answers and the accuracy; dots: held out."""
    right = axes.twinx()
    right.set_ylim(0, 1.05)
    lines = ((axes, "chosen_reward", "C2"), (axes, "rejected_reward", "C3"), (right, "accuracy", "C7"))
    for (side, name, colour), (kind, style) in itertools.product(lines, (("", "-"), ("eval_", "o"))):
        if points := [(m["step"], m[kind + name]) for m in metrics if m.get(kind + name) is not None]:
            label = None if kind else name.replace("_", " ")
            side.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.legend(handles=[line for side in (axes, right) for line in side.lines if line.get_label()[0] != "_"])
    axes.set_ylabel("reward (nats x BETA)")
    right.set_ylabel("accuracy", color="C7")

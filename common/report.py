"""What a run shows and leaves: progress, metrics.jsonl, plot, summary, and the row a person pastes into runs.md."""

import contextlib
import datetime
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from common import gpu, processes
from common.checkpoints import write_whole
from common.events import Watch
from common.settings import RANK

LOGGED = (
    "loss",
    "kl",
    "grad_norm",
    "learning_rate",
    "eval_loss",
    "facts",
    "samples",
    "bad_steps",
    "spike",
)  # in metrics.jsonl
# The columns of runs.md; `row` fills them from a summary.
COLUMNS = ("date", "commit", "command", "device", "eval loss", "tok/s", "peak GiB", "mean W", "time", "verdict", "note")


class RunLog(TrainerCallback):
    """Writes metrics.jsonl, shows progress (a bar on a terminal, plain lines in a log file), tells of events.

    trainer: a ChatTrainer; monitor: a gpu.HardwareMonitor.
    """

    def __init__(self, trainer, monitor):
        self.trainer, self.monitor, self.watch = trainer, monitor, Watch()
        self.step_seconds: list[float] = []
        self.progress = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()
        self.joules_before = self.trainer.joules  # of a run that goes on
        if sys.stderr.isatty():
            self.progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, line="")
            self.progress.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds.append(now() - self.started)
        self.trainer.seconds += self.step_seconds[-1]
        self.trainer.joules = self.joules()
        for event in self.watch.step(self.step_seconds[-1], self.monitor.gpu(), self.monitor.hot_readings):
            self.say(f"step {state.global_step}: {event}")
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)
        if self.trainer.stop_wished():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        if not ("loss" in logs or "eval_loss" in logs):
            return
        self.monitor.exchange()
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        entry |= {k: logs[k] for k in LOGGED if k in logs}
        if "eval_loss" in logs:
            entry["eval_perplexity"] = perplexity(logs["eval_loss"])
        entry["tokens"] = self.trainer.tokens
        if "loss" in logs:
            entry["step_seconds"] = self.step_seconds[-1]
            entry["tokens_per_second"] = self.speed()
        entry["seconds"] = self.trainer.seconds
        entry |= {"rss_gib": gpu.rss_gib(), "vram_gib": gpu.vram_gib(), "power_w": self.monitor.power_w()}
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.trainer.write_metrics(json.dumps(entry) + "\n")
        self.show(state, entry)

    def speed(self) -> float | None:
        """Tokens a second of the whole run; evaluation and saving left out."""
        return self.trainer.tokens / self.trainer.seconds if self.trainer.seconds else None

    def joules(self) -> float | None:
        """Energy of the whole run; None where power cannot be read."""
        now = self.monitor.energy_j()
        return None if now is None else (self.joules_before or 0.0) + now

    def say(self, line: str) -> None:
        if self.progress:
            self.progress.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr)

    def show(self, state, entry: dict) -> None:
        memory = f"{entry['vram_gib']:.1f} GiB VRAM" if entry["vram_gib"] is not None else f"{entry['rss_gib']:.1f} GiB"
        if "eval_loss" in entry:
            shown = [float("nan") if entry[k] is None else entry[k] for k in ("eval_loss", "eval_perplexity")]
            line = f"eval loss {shown[0]:.4f}  perplexity {shown[1]:.2f}"
            line += "".join(f"  {kind} {share:.0%}" for kind, share in entry.get("facts", {}).items())
        else:
            loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
            line = f"loss {loss}  {entry['tokens_per_second']:,.0f} tok/s  {memory}"
            line += "" if entry["power_w"] is None else f"  {entry['power_w']:.0f} W"
        if self.progress:
            self.progress.update(self.task, line=line)
            if "eval_loss" in entry:
                self.progress.console.print(f"step {entry['step']}: {line}")
        else:
            print(f"step {entry['step']}/{state.max_steps}  {line}", flush=True)

    def on_train_end(self, *args, **kwargs):
        if self.progress:
            self.progress.stop()
            self.progress = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.on_train_end()  # which Trainer does not call when training is cut short


def now() -> float:
    """Seconds on a clock for measuring, with the GPU's queue drained first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def perplexity(loss: float | None) -> float | None:
    """exp(loss), None where there is none or it is beyond all numbers."""
    return math.exp(loss) if loss is not None and loss < 700 else None


@contextlib.contextmanager
def progress(what: str, total: int):
    """A bar on a terminal, nothing in a log file; gives the function that moves it on by one."""
    with Progress(
        TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def read_metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def finish(
    folder: Path, log: RunLog, train_loss: float, eval_loss: float | None, train_seconds: float, predicted: float | None
) -> None:
    """Write plot.png, run_row.md and summary.json, which makes the run a finished one; print the row last.

    Of several processes all have to call it: peaks are those of the process that held most, power that of all.
    """
    log.monitor.exchange()
    peaks = zip(
        *processes.gather((gpu.peak_vram_gib(), gpu.peak_rss_gib(), gpu.peak_vram_gib(reserved=True))), strict=True
    )
    peak_vram_gib, peak_rss_gib, reserved_gib = (None if None in peak else max(peak) for peak in peaks)
    if RANK:
        return
    log.monitor.write()
    if eval_loss is not None and not math.isfinite(eval_loss):
        eval_loss = None
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    seconds, trainer, joules = log.step_seconds, log.trainer, log.joules()
    events = dict(log.watch.counts) | ({"loss spike": trainer.spikes} if trainer.spikes else {})
    bad = [f"{trainer.bad_steps} steps not finite"] if trainer.bad_steps else []
    summary = dict(
        train_loss=train_loss,
        eval_loss=eval_loss,
        eval_perplexity=perplexity(eval_loss),
        steps=trainer.state.global_step,
        tokens=trainer.tokens,
        tokens_per_second=log.speed(),
        train_seconds=train_seconds,
        median_step_seconds=statistics.median(seconds) if seconds else None,
        max_step_seconds=max(seconds) if seconds else None,
        peak_vram_gib=peak_vram_gib,
        peak_rss_gib=peak_rss_gib,
        predicted_peak_gib=predicted,
        mean_power_w=log.monitor.mean_power_w(),
        energy_wh=None if joules is None else joules / 3600,
        device=f"{processes.count()} x {gpu.device_name()}" if processes.count() > 1 else gpu.device_name(),
        command=about["command"],
        commit=about["commit"],
        verdict=", ".join(["done", *bad, *(f"{n} {event}{'s' * (n > 1)}" for event, n in events.items())]),
        peak_vram_reserved_gib=reserved_gib,
        tokens_per_joule=trainer.tokens / joules if joules else None,
        events=events,
    )
    line = row(summary)
    (folder / "run_row.md").write_text(line + "\n", encoding="utf-8")
    plot(folder)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    print(f"\nrun folder: {folder}\nrow for runs.md ({' | '.join(COLUMNS)}):\n{line}")


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

"""metrics.jsonl and what is shown while a run goes on: a bar on a terminal, plain lines in a log file."""

import contextlib
import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from common import hardware
from common.files import METRICS
from common.monitor import StepWatch

# What metrics.jsonl takes from Trainer's logs.
LOGGED = ("loss", "kl", "grad_norm", "learning_rate", "eval_loss", "facts", "samples", "bad_steps", "spike")


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl, shows progress, and tells of events that cost time.

    trainer: a ChatTrainer; monitor: a monitor.HardwareMonitor. Changes neither.
    """

    def __init__(self, trainer, monitor):
        self.trainer, self.monitor, self.watch = trainer, monitor, StepWatch()
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, line="")
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = self.trainer.step_seconds[-1]
        for event in self.watch.step(seconds, self.monitor.gpu(), self.monitor.hot_readings):
            self.say(f"step {state.global_step}: {event}")
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        if not ("loss" in logs or "eval_loss" in logs):
            return
        self.monitor.exchange()
        progress = self.trainer.progress
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        entry |= {name: logs[name] for name in LOGGED if name in logs}
        if "eval_loss" in logs:
            entry["eval_perplexity"] = perplexity(logs["eval_loss"])
        entry["tokens"] = progress.tokens
        if "loss" in logs:
            entry["step_seconds"] = self.trainer.step_seconds[-1]
            entry["tokens_per_second"] = progress.tokens_per_second()
        entry["seconds"] = progress.seconds
        entry |= {"rss_gib": hardware.rss_gib(), "vram_gib": hardware.vram_gib(), "power_w": self.monitor.power_w()}
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        if state.is_world_process_zero:
            self.trainer.metrics_log.append(json.dumps(entry) + "\n")
        self.show(state, entry)

    def say(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, markup=False)
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
        if self.bar:
            self.bar.update(self.task, line=line)
            if "eval_loss" in entry:
                self.bar.console.print(f"step {entry['step']}: {line}")
        else:
            print(f"step {entry['step']}/{state.max_steps}  {line}", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def perplexity(loss: float | None) -> float | None:
    """exp(loss), None where there is no loss or the result is too large for a float."""
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
    with open(folder / METRICS, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]

"""metrics.jsonl and what is shown while a run goes on."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from common import hardware
from common.monitor import StepWatch

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


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl, shows progress (a bar on a terminal, plain lines in a log file), tells of events.

    trainer: a ChatTrainer; monitor: a gpu.HardwareMonitor.
    """

    def __init__(self, trainer, monitor):
        self.trainer, self.monitor, self.watch = trainer, monitor, StepWatch()
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
        entry |= {"rss_gib": hardware.rss_gib(), "vram_gib": hardware.vram_gib(), "power_w": self.monitor.power_w()}
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

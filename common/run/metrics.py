"""metrics.jsonl and what is shown of a run: a bar on a terminal, plain lines in a log file."""

import json
import math
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from common import cli, hardware
from common.monitor import StepWatch
from common.run.records import is_for_kl_only
from common.train.preference import PAIR_METRICS

# What metrics.jsonl takes from Trainer's logs.
LOGGED = "loss kl router_loss grad_norm learning_rate eval_loss facts samples bad_steps spike".split()
LOGGED += [f"{kind}{name}" for kind in ("", "eval_") for name in PAIR_METRICS]


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl, shows progress, and tells of events that cost time; changes no trainer.

    bar: to be entered for the time of training. page: is written anew as lines come.
    """

    def __init__(self, trainer, page):
        self.trainer, self.page, self.watch = trainer, page, StepWatch()
        self.events: list[tuple[int, str]] = []  # since the last line: step and what cost time
        self.bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None, line="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.page.update(at_once=True)
        print(f"watch it in a browser: {self.page.folder / 'report.html'}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        cli.is_training = True
        seconds, monitor = self.trainer.step_seconds[-1], self.trainer.monitor
        for event in self.watch.step(seconds, monitor.gpu(), monitor.hot_readings):
            print(f"step {state.global_step}: {event}", file=sys.stderr)
            self.events.append((state.global_step, event))
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        if not ("loss" in logs or "eval_loss" in logs):
            return
        progress, monitor = self.trainer.progress, self.trainer.monitor
        monitor.exchange()
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        entry |= {name: logs[name] for name in LOGGED if name in logs}
        if "eval_loss" in logs:
            entry["eval_perplexity"] = None if "eval_margin" in logs else perplexity(logs["eval_loss"])
        else:
            entry["step_seconds"] = self.trainer.step_seconds[-1]
            entry["tokens_per_second"] = progress.tokens_per_second()
        entry |= dict(
            tokens=progress.tokens,
            seconds=progress.seconds,
            rss_gib=hardware.rss_gib(),
            vram_gib=hardware.vram_gib(),
            power_w=monitor.power_w(),
        )
        if self.events:
            entry["events"], self.events = self.events, []
        line = describe(entry)
        self.bar.update(self.task, line=line)
        if "eval_loss" in entry or self.bar.disable:
            print(f"step {state.global_step}/{state.max_steps}  {line}", flush=True)
        if state.is_world_process_zero:
            self.trainer.metrics_log.append(json.dumps(finite(entry)) + "\n")
            self.page.update()


def describe(entry: dict) -> str:
    """A line of metrics.jsonl for people."""
    if "eval_loss" in entry:
        line = f"eval loss {entry['eval_loss']:.4f}"
        if "eval_margin" in entry:
            line += f"  accuracy {entry['eval_accuracy']:.0%}  margin {entry['eval_margin']:.2f}"
        else:
            line += f"  perplexity {entry['eval_perplexity'] or math.nan:.2f}"
        return line + "".join(f"  {kind} {share:.0%}" for kind, share in entry.get("facts", {}).items())
    loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
    if is_for_kl_only(entry):
        loss = f"none, KL {entry['kl']:.4f}"
    memory = f"{entry['rss_gib']:.1f} GiB" if entry["vram_gib"] is None else f"{entry['vram_gib']:.1f} GiB VRAM"
    watts = "" if entry["power_w"] is None else f"  {entry['power_w']:.0f} W"
    if "margin" in entry:
        loss += f"  accuracy {entry['accuracy']:.0%}  margin {entry['margin']:.2f}"
    return f"loss {loss}  {entry['tokens_per_second']:,.0f} tok/s  {memory}{watts}"


def finite(entry: dict) -> dict:
    """The entry with None for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


def perplexity(loss: float | None) -> float | None:
    """exp(loss), None where there is no loss or the result is too large for a float."""
    return math.exp(loss) if loss is not None and loss < 700 else None

"""Run folders: settings, metrics, plot, summary, and the row a person pastes into runs.md."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

from common import checkpoints, gpu
from common.checkpoints import write_whole
from common.settings import UserError

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
# What takes effect when a run goes on; the first ones decide what the data becomes.
DATA_SETTINGS = ("DATA", "EVAL_DATA", "EVAL_SIZE", "TOO_LONG", "DROP_PATTERN")
CHANGEABLE = (
    *DATA_SETTINGS, *"""NUM_TRAIN_EPOCHS MAX_STEPS GRADIENT_ACCUMULATION_STEPS LEARNING_RATE MIN_LR LR_SCHEDULER
    WARMUP_RATIO MAX_GRAD_NORM KL_WEIGHT NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING ATTN_IMPLEMENTATION LORA_DROPOUT
    GALORE_SCALE GALORE_UPDATE_GAP DOCTOR LOGGING_STEPS EVAL_STEPS SAVE_STEPS SAVE_TOTAL_LIMIT""".split(),
)  # fmt: skip
LOCKS: dict[Path, FileLock] = {}  # of run folders, held by this process; the system lets go of them
LOGGED = ("loss", "kl", "grad_norm", "learning_rate", "eval_loss", "bad_steps", "spike")  # in metrics.jsonl
# The columns of runs.md; `row` fills them from a summary.
COLUMNS = ("date", "commit", "command", "device", "eval loss", "tok/s", "peak GiB", "mean W", "time", "verdict", "note")


def create_folder(out_dir: str, run_name: str | None, script: str, settings: dict) -> Path:
    """Make OUT_DIR/RUN_NAME (default <script>-<time>) and write settings.json into it.

    Raises UserError when the folder cannot be written, or holds a run that is not to be gone on with or would become
    another. Ends the program with exit code 0 where that run is finished.
    """
    stem = Path(script).stem
    name = run_name or f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name.strip(".") == "":
        raise UserError(f"RUN_NAME={name}: use 1 to 64 letters, digits, dots, dashes and underscores.")
    folder = Path(out_dir).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    except OSError as error:
        raise UserError(f"OUT_DIR={out_dir}: {folder} cannot be written ({error.strerror}). Choose another.") from error
    (folder / "STOP").unlink(missing_ok=True)  # of an earlier time
    if checkpoints.folders(folder) or any((folder / f).exists() for f in ("metrics.jsonl", "report.json", "final")):
        if not settings.get("RESUME"):
            raise UserError(
                f"RUN_NAME={name}: {folder} holds a run already. Choose another name, or remove the folder."
            )
        refuse_changes(folder, settings)
        if (folder / "summary.json").exists():
            print(f"{folder} is finished: nothing to do. Another RUN_NAME starts another run.")
            raise SystemExit(0)
    about = dict(
        script=stem,
        command=command(),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=git_commit(),
        versions={"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        settings=settings,
    )
    write_whole(folder / "settings.json", json.dumps(about, indent=1))
    return folder


def lock(folder: Path) -> None:
    """Hold a run folder until this process ends, however it ends; UserError while another process holds it."""
    try:
        LOCKS.setdefault(folder, FileLock(folder / ".lock")).acquire(timeout=0)
    except Timeout:
        raise UserError(f"RUN_NAME={folder.name}: a run that is going on writes to {folder}. Choose another.") from None


def refuse_changes(folder: Path, settings: dict) -> None:
    """Exit code 3 when a resume would go on with other settings than the newest checkpoint, or the run, began with."""
    for file in [
        *(checkpoint / checkpoints.MARK for checkpoint in checkpoints.published(folder)),
        folder / "settings.json",
    ]:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
            break
        except (OSError, ValueError, KeyError, TypeError):
            before = settings  # damaged; without any checkpoint the run starts again
    allowed = {"RESUME", "OUT_DIR", "RUN_NAME", "ALLOW_CHANGE", *allowed_changes(settings)}
    changed = [k for k, v in settings.items() if k not in allowed and before.get(k) != v]
    if changed:
        difference = ", ".join(f"{k} was {before.get(k)}, now {settings[k]}" for k in changed)
        raise UserError(
            f"RESUME=auto would change the run: {difference}. Set it back, allow it "
            f"(ALLOW_CHANGE={','.join(changed)}), or start a new run.",
            code=3,
        )


def allowed_changes(settings: dict) -> set[str]:
    """The settings that ALLOW_CHANGE names; UserError for one that cannot change within a run."""
    allowed = {name for name in settings["ALLOW_CHANGE"].replace(" ", "").split(",") if name}
    if fixed := sorted(allowed - set(CHANGEABLE)):
        raise UserError(
            f"ALLOW_CHANGE={settings['ALLOW_CHANGE']}: {fixed[0]} cannot change within a run; start a new one. "
            f"These can: {', '.join(CHANGEABLE)}."
        )
    return allowed


def command() -> str:
    """The command line of this run, without the interpreter's folder."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Short commit of the scripts, with -dirty when files were edited; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "") if head.returncode == 0 else None


def carry_out(trainer, folder: Path, checkpoint, save) -> None:
    """Train (on from a checkpoint with its mark), save, evaluate, and write the results into the run folder."""
    log = RunLog(trainer)
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)
    started = now()
    with gpu.HardwareMonitor(folder / "hardware.csv"), StopRequest(folder) as trainer.stop, log:
        train_loss = trainer.train(checkpoint).metrics["train_loss"]
        train_seconds = now() - started
        save(folder / "final")  # before the evaluation, which may crash
        eval_loss = trainer.evaluate()["eval_loss"] if trainer.eval_dataset else None
    finish(folder, log, train_loss, eval_loss, train_seconds)


class RunLog(TrainerCallback):
    """Writes metrics.jsonl and shows progress: a bar on a terminal, plain lines in a log file.

    trainer: a ChatTrainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.step_seconds: list[float] = []
        self.progress = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()
        self.tokens_before = self.trainer.tokens  # in earlier calls of a run that was resumed
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
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)
        if self.trainer.stop_wished():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        if not ("loss" in logs or "eval_loss" in logs):
            return
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        entry |= {k: logs[k] for k in LOGGED if k in logs}
        if "eval_loss" in logs:
            entry["eval_perplexity"] = perplexity(logs["eval_loss"])
        entry["tokens"] = self.trainer.tokens
        if "loss" in logs:
            entry["step_seconds"] = self.step_seconds[-1]
            entry["tokens_per_second"] = self.speed()
        entry |= {"rss_gib": gpu.rss_gib(), "vram_gib": gpu.vram_gib(), "power_w": None}
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.trainer.write_metrics(json.dumps(entry) + "\n")
        self.show(state, entry)

    def speed(self) -> float | None:
        """Tokens a second since the start or the last resume; evaluation and saving left out."""
        done = self.trainer.tokens - self.tokens_before
        return done / sum(self.step_seconds) if self.step_seconds else None

    def show(self, state, entry: dict) -> None:
        memory = f"{entry['vram_gib']:.1f} GiB VRAM" if entry["vram_gib"] is not None else f"{entry['rss_gib']:.1f} GiB"
        if "eval_loss" in entry:
            shown = [float("nan") if entry[k] is None else entry[k] for k in ("eval_loss", "eval_perplexity")]
            line = f"eval loss {shown[0]:.4f}  perplexity {shown[1]:.2f}"
        else:
            loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
            line = f"loss {loss}  {entry['tokens_per_second']:,.0f} tok/s  {memory}"
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


class StopRequest:
    """Turns SIGTERM, Ctrl-C, SIGBREAK or a file STOP in the run folder into a wish, as a context manager.

    number: the signal, None as long as there is none. A second signal interrupts at once.
    """

    def __init__(self, folder: Path):
        self.file, self.number, self.before = folder / "STOP", None, {}

    def __enter__(self):
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):  # the last on Windows only
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup
                self.before[name] = signal.signal(getattr(signal, name), self.receive)
        return self

    def receive(self, number: int, frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        if number == getattr(signal, "SIGHUP", None):  # the terminal is gone; writing to it would end the run
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print("stopping after this step, with a checkpoint; once more: at once", file=sys.stderr)

    def wished(self) -> bool:
        if self.number is None and self.file.exists():
            self.number = signal.SIGINT
        return self.number is not None

    def __exit__(self, *exc):
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)


def now() -> float:
    """Seconds on a clock for measuring, with the GPU's queue drained first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def perplexity(loss: float | None) -> float | None:
    """exp(loss), None where there is none or it is beyond all numbers."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def read_metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def finish(folder: Path, log: RunLog, train_loss: float, eval_loss: float | None, train_seconds: float) -> None:
    """Write plot.png, run_row.md and summary.json, which makes the run a finished one; print the row last."""
    if eval_loss is not None and not math.isfinite(eval_loss):
        eval_loss = None
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    seconds = log.step_seconds
    summary = dict(
        train_loss=train_loss,
        eval_loss=eval_loss,
        eval_perplexity=perplexity(eval_loss),
        steps=log.trainer.state.global_step,
        tokens=log.trainer.tokens,
        tokens_per_second=log.speed(),
        train_seconds=train_seconds,
        median_step_seconds=statistics.median(seconds) if seconds else None,
        max_step_seconds=max(seconds) if seconds else None,
        peak_vram_gib=gpu.peak_vram_gib(),
        peak_rss_gib=gpu.peak_rss_gib(),
        predicted_peak_gib=None,
        mean_power_w=None,
        energy_wh=None,
        device=gpu.device_name(),
        command=about["command"],
        commit=about["commit"],
        verdict="done" + (f", {log.trainer.bad_steps} steps not finite" if log.trainer.bad_steps else ""),
    )
    plot(folder)
    line = row(summary)
    (folder / "run_row.md").write_text(line + "\n", encoding="utf-8")
    write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    print(f"\nrun folder: {folder}\nrow for runs.md ({' | '.join(COLUMNS)}):\n{line}")


def row(summary: dict) -> str:
    """One line of the table in runs.md."""

    def show(value, form):
        return "" if value is None else format(value, form)

    peak = summary["peak_vram_gib"] if summary["peak_vram_gib"] is not None else summary["peak_rss_gib"]
    minutes, seconds = divmod(round(summary["train_seconds"]), 60)
    cells = (
        f"{datetime.date.today()}", summary["commit"] or "", f"`{summary['command']}`", summary["device"],
        show(summary["eval_loss"], ".4f"), show(summary["tokens_per_second"], ",.0f"), show(peak, ".2f"),
        show(summary["mean_power_w"], ".0f"), f"{minutes}:{seconds:02}", summary["verdict"], "",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def plot(folder: Path) -> None:
    """Draw loss and learning rate over steps from metrics.jsonl into plot.png."""
    import matplotlib  # slow import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(folder)
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    for key, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if points:
            above.plot(*zip(*points, strict=True), style, label=key.replace("_", " "))
    rates = [(m["step"], m["learning_rate"]) for m in metrics if "learning_rate" in m]
    if rates:
        below.plot(*zip(*rates, strict=True))
    above.set_ylabel("loss (nats per learned token)")
    above.legend()
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    figure.suptitle(folder.name)
    figure.tight_layout()
    figure.savefig(folder / "plot.png", dpi=100)
    pyplot.close(figure)

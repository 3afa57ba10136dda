"""Runs: their folders, what may change when they go on, their first and last stages, and wishes to stop."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import PrinterCallback

from common import distributed, hardware
from common.cli import UserError
from common.data import checks, prepare, prepared
from common.files import write_atomic
from common.monitor import HardwareMonitor
from common.run import report
from common.run.metrics import MetricsLog, now
from common.run.stop import StopRequest
from common.train import checkpoints

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")

# What takes effect when a run goes on; the first ones decide what the data becomes.
DATA_SETTINGS = ("DATA", "EVAL_DATA", "EVAL_SIZE", "MAX_SAMPLES", "TOO_LONG", "DROP_PATTERN")

CHANGEABLE = (
    *DATA_SETTINGS, *"""NUM_TRAIN_EPOCHS MAX_STEPS GRADIENT_ACCUMULATION_STEPS LEARNING_RATE MIN_LR LR_SCHEDULER
    WARMUP_RATIO MAX_GRAD_NORM KL_WEIGHT NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING ATTN_IMPLEMENTATION LORA_DROPOUT
    GALORE_SCALE GALORE_UPDATE_GAP DOCTOR LOGGING_STEPS EVAL_STEPS EVAL_FACTS EVAL_PROMPTS SAVE_STEPS
    SAVE_TOTAL_LIMIT REPORT_TO""".split(),
)  # fmt: skip

LOCKS: dict[Path, FileLock] = {}  # of run folders, held by this process; the system lets go of them


@dataclass
class Run:
    """What a training script has before it has a model."""

    folder: Path
    checkpoint: tuple[Path, dict] | None  # to go on from, with its mark
    train_set: object  # datasets.Dataset of input_ids and labels
    eval_set: object | None
    account: dict  # of the data
    row_length: int  # tokens of the longest row


def begin(settings: dict, script: str, tokenizer, encoder, keep_unlearned: bool, trained_rows: list[int]) -> Run:
    """Run folder, checkpoint, data, doctor. keep_unlearned, trained_rows: see prepared.datasets_for, doctor.examine."""
    folder = distributed.on_first(lambda: create_folder(settings["OUT_DIR"], settings["RUN_NAME"], script, settings))
    checkpoint = distributed.on_first(lambda: checkpoints.latest_valid(folder)) if settings["RESUME"] else None
    mark = checkpoint[1] if checkpoint and not allowed_changes(settings) & set(DATA_SETTINGS) else None
    data = prepare.datasets_for(settings, encoder, folder / "data", keep_unlearned, mark)
    train_set, eval_set, account = data
    print(prepared.describe(account))
    checks.examine(train_set, tokenizer, encoder, settings, keep_unlearned, trained_rows)
    longest = settings["MAX_LENGTH"] if settings["PACKING"] else account["length_percentiles"]["100"]
    return Run(folder, checkpoint, train_set, eval_set, account, min(longest, account["tokens"]))


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
        **how_many(),
    )
    write_atomic(folder / "settings.json", json.dumps(about, indent=1))
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
        *(checkpoint / checkpoints.MANIFEST for checkpoint in checkpoints.published(folder)),
        folder / "settings.json",
    ]:
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            before, there_were = about["settings"], {"processes": 1, "engine": None}
            there_were |= {name: about[name] for name in there_were if name in about}
            break
        except (OSError, ValueError, KeyError, TypeError):
            before, there_were = settings, how_many()  # damaged; without any checkpoint the run starts again
    if there_were != how_many():
        raise UserError(
            f"RESUME=auto: the run began with {there_were['processes']} processes ({there_were['engine']}), now there "
            f"are {distributed.count()} ({distributed.engine()}). Start it as before, or start a new run.",
            code=3,
        )
    allowed = {"RESUME", "OUT_DIR", "RUN_NAME", "ALLOW_CHANGE", "MEMORY_LIMIT", *allowed_changes(settings)}
    changed = [k for k, v in settings.items() if k not in allowed and before.get(k) != v]
    if changed:
        difference = ", ".join(f"{k} was {before.get(k)}, now {settings[k]}" for k in changed)
        allowing = f"allow it (ALLOW_CHANGE={','.join(changed)}), " if set(changed) <= set(CHANGEABLE) else ""
        raise UserError(
            f"RESUME=auto would change the run: {difference}. Set it back, {allowing}or start a new run.", code=3
        )


def how_many() -> dict:
    """What must be the same when a run goes on: optimizer states, random numbers and rows belong to processes."""
    return {"processes": distributed.count(), "engine": distributed.engine()}


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
    """The command line of this run, without the interpreter's folder; of several processes, one that does the same."""
    launcher, count = ["python"], distributed.count()
    if engine := distributed.engine():
        config = f"launch/{engine}.yaml" if engine != "zero1" else "CONFIG"
        launcher = ["accelerate", "launch", "--config_file", config, "--num_processes", str(count)]
        if (machines := count // int(os.environ.get("LOCAL_WORLD_SIZE", count))) > 1:
            launcher += ["--num_machines", str(machines)]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])


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


def execute(trainer, run: Run, fit, save) -> None:
    """Train (on from the run's checkpoint), save, evaluate, and write the results into the run folder.

    fit: the fitting.Fit by which the trainer computes; it goes into settings.json, and from there into checkpoints.
    """
    folder = run.folder
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8")) | {"fit": fit.settings()}
    distributed.on_first(lambda: write_atomic(folder / "settings.json", json.dumps(about, indent=1)))
    if (published := checkpoints.published(folder)) and published[0] != (run.checkpoint or [None])[0]:
        run.checkpoint = checkpoints.latest_valid(folder)  # memory ran out after it was written
    monitor = HardwareMonitor(folder / "hardware.csv")
    log = MetricsLog(trainer, monitor)
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)
    started = now()
    with monitor, StopRequest(folder) as trainer.stop, log:
        train_loss = trainer.train(run.checkpoint).metrics["train_loss"]
        train_seconds = now() - started
        weights = trainer.whole_weights()
        distributed.on_first(lambda: save(folder / "final", weights))  # before the evaluation, which may crash
        try:
            eval_loss = trainer.evaluate()["eval_loss"] if trainer.eval_dataset else None
        except Exception as error:
            if not hardware.is_out_of_memory(error) or distributed.count() > 1:
                raise
            trainer.args.per_device_eval_batch_size = 1  # training is done; it is not to begin again
            eval_loss = trainer.evaluate()["eval_loss"]
    report.finish(folder, log, train_loss, eval_loss, train_seconds, fit.predicted_peak_gib)

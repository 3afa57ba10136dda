"""Run folders: created, locked, described by settings.json; rules of resuming; requests to stop."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from common import distributed
from common.bounds import CHANGEABLE, split_list
from common.cli import UserError
from common.files import METRICS, hash_file, write_atomic
from common.settings import declared
from common.train import checkpoints

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "liger-kernel")
LOCKS: dict[Path, FileLock] = {}  # of run folders, held until this process ends
# Settings that decide what rows become, and those that change nothing of a run.
DATA_SETTINGS = {"DATA", "EVAL_DATA", "EVAL_SIZE", "MAX_SAMPLES", "TOO_LONG", "DROP_PATTERN"}
FREE = {"RESUME", "OUT_DIR", "RUN_NAME", "ALLOW_CHANGE", "MEMORY_LIMIT", "ACTIVATION_OFFLOADING"}
SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")]


def create_folder(settings: dict, script: str) -> Path:
    """Open OUT_DIR/RUN_NAME and write settings.json into it. Errors: see `open_folder`."""
    folder, metadata = open_folder(settings, script)
    write_atomic(folder / "settings.json", json.dumps(metadata, indent=1))
    return folder


def open_folder(settings: dict, script: str) -> tuple[Path, dict]:
    """OUT_DIR/RUN_NAME (default <script>-<time>), made and locked, and what is to be its settings.json.

    Raises UserError when it cannot be written, or holds a run that must not be resumed or would become another.
    Ends the program where that run is finished and no setting has changed.
    """
    out_dir, stem = settings["OUT_DIR"], Path(script).stem
    name = settings["RUN_NAME"] or f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(out_dir).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS.setdefault(folder, FileLock(folder / ".lock")).acquire(timeout=0)
    except Timeout:
        raise UserError(f"RUN_NAME={name}: another process is writing to {folder}. Choose another name.") from None
    except OSError as error:
        raise UserError(f"OUT_DIR={out_dir}: {folder} cannot be written ({error.strerror}). Choose another.") from error
    (folder / "STOP").unlink(missing_ok=True)  # of an earlier time
    results = (METRICS, "report.json", "final")
    if checkpoints.folders(folder) or any((folder / file).exists() for file in results):
        if not settings.get("RESUME"):
            raise UserError(f"RUN_NAME={name}: {folder} holds a run already. Choose another name, or remove it.")
        changes = find_changes(folder, settings)
        if not changes and (folder / "summary.json").exists():
            print(f"{folder} is finished: nothing to do. Another RUN_NAME starts another run.")
            raise SystemExit(0)
        refuse_changes(folder, changes, allowed_changes(settings))
    # Beside settings that differ from the script as it stands now, what they are there.
    defaults = {s["name"]: s["default"] for s in declared(script)}
    changed = {name: defaults.get(name) for name in settings if settings[name] != defaults.get(name)}
    return folder, {"script": stem, "settings": settings, "changed": changed} | provenance()


def find_changes(folder: Path, settings: dict) -> dict[str, str]:
    """The settings that differ from those the run began with, and how. Exit code 3 where the processes differ."""
    now = settings, distributed.count(), distributed.engine()
    before, processes, engine = read_settings(folder) or now
    if (processes, engine) != now[1:]:
        # Optimizer states, random numbers and rows belong to processes.
        raise UserError(
            f"RESUME=auto: the run began with {processes} processes ({engine}), now there are {now[1]} "
            f"({now[2]}). Start it as before, or start a new run.",
            code=3,
        )
    changed = [name for name in settings if name not in FREE and before.get(name) != settings[name]]
    changes = {name: f"{name} was {before.get(name)}, now {settings[name]}" for name in changed}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        account = json.loads((folder / "data" / "report.json").read_text(encoding="utf-8"))
        trained = checkpoints.published(folder) or (folder / "summary.json").exists()
        hashes = account["sources"] if trained else {}
        if files := [name for name in hashes if hash_file(Path(name).expanduser()) != hashes[name]]:
            changes.setdefault("DATA", f"{', '.join(files)} is not what it began with")
    return changes


def refuse_changes(folder: Path, changes: dict[str, str], allowed: set[str]) -> None:
    """Exit code 3 when a resume would go on with other settings than the run began with, or could not."""
    changeable, difference = changes.keys() <= set(CHANGEABLE), ", ".join(changes.values())
    if changeable and (folder / "summary.json").exists() and not checkpoints.published(folder):
        setting = "ADAPTER" if (folder / "final" / "adapter_config.json").exists() else "MODEL"
        raise UserError(
            f"RUN_NAME={folder.name} is finished and has no checkpoint to go on from ({difference}). Train its result "
            f"further: {setting}={folder} RUN_NAME={folder.name}-2.",
            code=3,
        )
    if changes.keys() - allowed:
        allowing = f"allow it (ALLOW_CHANGE={','.join(changes)}), " if changeable else ""
        raise UserError(
            f"RESUME=auto would change the run: {difference}. Set it back, {allowing}or start a new run.", code=3
        )


def read_settings(folder: Path) -> tuple[dict, int, str | None] | None:
    """Settings, processes and engine of the run, of its newest checkpoint until it is finished; None: all damaged."""
    files = [checkpoint / checkpoints.MANIFEST for checkpoint in checkpoints.published(folder)]
    files.insert(0 if (folder / "summary.json").exists() else len(files), folder / "settings.json")
    for file in files:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metadata = json.loads(file.read_text(encoding="utf-8"))
            return metadata["settings"], metadata["processes"], metadata["engine"]
    return None


def allowed_changes(settings: dict) -> set[str]:
    """The settings that ALLOW_CHANGE names."""
    return set(split_list(settings["ALLOW_CHANGE"]))


def provenance() -> dict:
    """What it takes to make a run again."""
    launcher, count = ["python"], distributed.count()
    if engine := distributed.engine():
        config = f"launch/{engine}.yaml" if engine != "zero1" else "CONFIG"
        launcher = ["accelerate", "launch", "--config_file", config, "--num_processes", str(count)]
        if (machines := count // int(os.environ.get("LOCAL_WORLD_SIZE", count))) > 1:
            launcher += ["--num_machines", str(machines)]
    installed = {name: next(importlib.metadata.distributions(name=name), None) for name in PACKAGES}
    return dict(
        command=shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=git_commit(),
        versions={"python": platform.python_version(), **{name: p and p.version for name, p in installed.items()}},
        processes=count,
        engine=engine,
    )


def git_commit() -> str | None:
    """Short commit of the scripts, with -dirty when files were edited; None outside of git."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    with contextlib.suppress(FileNotFoundError):  # no git
        result = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() or None


class StopRequest:
    """Turns signals or a file STOP in the run folder into a request, as a context manager.

    number: the signal, None until there is one. A second signal interrupts at once.
    """

    def __init__(self, folder: Path):
        self.file, self.number = folder / "STOP", None

    def __enter__(self):
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in heeded}
        return self

    def receive(self, number: int, frame) -> None:
        if self.number is not None:
            if distributed.count() > 1 and number != signal.SIGINT:
                return  # a launcher passes on what every process got already
            raise KeyboardInterrupt
        self.number = number
        if signal.Signals(number).name == "SIGHUP":  # the terminal is gone
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print("Stopping after this step and saving a checkpoint. Press Ctrl-C again to stop now.", file=sys.stderr)

    def requested(self) -> bool:
        if self.number is None and self.file.exists():
            self.number = signal.SIGINT
        return self.number is not None

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)

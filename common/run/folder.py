"""Run folders: created, locked, and described by settings.json."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from common import distributed
from common.cli import UserError
from common.files import METRICS, write_atomic
from common.run import resume
from common.train import checkpoints

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
LOCKS: dict[Path, FileLock] = {}  # of run folders, held by this process; the system lets go of them


def create_folder(settings: dict, script: str) -> Path:
    """Make OUT_DIR/RUN_NAME (default <script>-<time>) and write settings.json into it.

    Raises UserError when the folder cannot be written, or holds a run that must not be resumed or would become another.
    Ends the program where that run is finished.
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
    if checkpoints.folders(folder) or any((folder / file).exists() for file in (METRICS, "report.json", "final")):
        if not settings.get("RESUME"):
            raise UserError(f"RUN_NAME={name}: {folder} holds a run already. Choose another name, or remove it.")
        resume.refuse_changes(folder, settings)
        if (folder / "summary.json").exists():
            print(f"{folder} is finished: nothing to do. Another RUN_NAME starts another run.")
            raise SystemExit(0)
    metadata = {"script": stem, "settings": settings} | provenance()
    write_atomic(folder / "settings.json", json.dumps(metadata, indent=1))
    return folder


def provenance() -> dict:
    """What it takes to make a run again."""
    launcher, count = ["python"], distributed.count()
    if engine := distributed.engine():
        config = f"launch/{engine}.yaml" if engine != "zero1" else "CONFIG"
        launcher = ["accelerate", "launch", "--config_file", config, "--num_processes", str(count)]
        if (machines := count // int(os.environ.get("LOCAL_WORLD_SIZE", count))) > 1:
            launcher += ["--num_machines", str(machines)]
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return dict(
        command=shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=git_commit(),
        versions={"python": platform.python_version(), **{name: installed.get(name) for name in PACKAGES}},
        processes=count,
        engine=engine,
    )


def git_commit() -> str | None:
    """Short commit of the scripts, with -dirty when files were edited; None outside a git checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    try:
        result = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return result.stdout.strip() if result.returncode == 0 else None

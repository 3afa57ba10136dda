"""Checkpoints: published whole or not at all, verified before they are trusted, rotated by step.

A folder checkpoint-N counts once it holds COMPLETE.json, written last, with the size and XXH3 hash of every file.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

from common.cli import UserError
from common.files import file_names, hash_of, sync_files, sync_folder, write_atomic

MANIFEST = "COMPLETE.json"

LOADED = (".json", ".safetensors", ".bin", ".pt", ".pth")  # files that Trainer or peft may look for


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, newest step first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def published(run: Path) -> list[Path]:
    """The published checkpoints of a run folder, newest step first."""
    return [folder for folder in folders(run) if (folder / MANIFEST).is_file()]


def publish(checkpoint: Path, about: dict) -> None:
    """Bring every file of a checkpoint to the disk, and then the mark that makes it count; about goes into it."""
    sync_files(checkpoint)
    files = {}
    for name in file_names(checkpoint):
        with open(checkpoint / name, "rb") as stream:
            files[name] = [os.fstat(stream.fileno()).st_size, hash_of(stream)]
    write_atomic(checkpoint / MANIFEST, json.dumps(about | {"files": files}, indent=1))
    sync_folder(checkpoint.parent)


def read_manifest(checkpoint: Path) -> dict:
    """What was written of a published checkpoint; ValueError when a file differs from it, is missing or was added."""
    about = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if missing := {"step", "data", "progress", "settings", "versions", "files"} - set(about):
        raise ValueError(f"{MANIFEST} does not tell {sorted(missing)[0]}")
    # Others, such as what a file manager leaves behind, would not be loaded.
    present = {name for name in file_names(checkpoint) if Path(name).suffix in LOADED} - {MANIFEST}
    if different := present - set(about["files"]) | set(about["files"]) - set(file_names(checkpoint)):
        raise ValueError(f"{sorted(different)[0]} is missing or does not belong to it")
    for name, (size, digest) in about["files"].items():
        with open(checkpoint / name, "rb") as stream:
            if os.fstat(stream.fileno()).st_size != size or hash_of(stream) != digest:
                raise ValueError(f"{name} is damaged")
    return about


def latest_valid(run: Path) -> tuple[Path, dict] | None:
    """The newest published checkpoint that verifies, and its mark; a line is printed for each one rejected.

    None when there is none yet. Raises UserError when there are some and none is sound; nothing is deleted.
    """
    found = published(run)
    for checkpoint in found:
        try:
            return checkpoint, read_manifest(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{checkpoint.name} is rejected: {error}", file=sys.stderr)
    if not found:
        return None
    raise UserError(f"RESUME=auto: {run} holds no sound checkpoint. Start anew: RESUME=None and another RUN_NAME.")


def clear(run: Path, after: int) -> None:
    """Remove saves that were cut short; put aside published checkpoints newer than the one a run goes on from."""
    whole = published(run)
    for checkpoint in folders(run):
        if checkpoint not in whole:
            remove(checkpoint)
        elif step_of(checkpoint) > after:  # rejected; they must not count when it comes to keep the newest
            aside = run / f"rejected-{step_of(checkpoint)}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def rotate(run: Path, keep: int) -> None:
    """Remove the published checkpoints but the newest `keep` (at least one) and the one of the least held-out loss."""
    found = published(run)
    best = min(found, key=eval_loss, default=None)
    for checkpoint in found[max(1, keep) :]:
        if checkpoint != best or eval_loss(best) == math.inf:
            remove(checkpoint)


def eval_loss(checkpoint: Path) -> float:
    """The held-out loss measured at a published checkpoint's step; infinite where there is none."""
    try:
        loss = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["eval_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return math.inf if loss is None or math.isnan(loss) else loss


def remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # first, so that it does not count while it is being removed
    shutil.rmtree(checkpoint)

"""Checkpoints: published whole or not at all, verified before they are trusted, rotated by step.

A folder checkpoint-N counts once it holds COMPLETE.json, written last, with the size and SHA-256 of every file.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from common.settings import UserError

MARK = "COMPLETE.json"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def published(run: Path) -> list[Path]:
    """The published checkpoints of a run folder, newest step first."""
    found = [folder for folder in run.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
    return sorted((folder for folder in found if (folder / MARK).is_file()), key=step_of, reverse=True)


def publish(checkpoint: Path, about: dict) -> None:
    """Bring every file of a checkpoint to the disk, and then the mark that makes it count; about goes into it."""
    files = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[file.relative_to(checkpoint).as_posix()] = [file.stat().st_size, digest]
    partial = checkpoint / f"{MARK}.partial"
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(about | {"files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, checkpoint / MARK)
    sync_folder(checkpoint)
    sync_folder(checkpoint.parent)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders, and writes their entries by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_mark(checkpoint: Path) -> dict:
    """What was written of a published checkpoint; ValueError when a file differs from it, is missing or too many."""
    about = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {MARK}
    if different := present ^ set(about["files"]):
        raise ValueError(f"{sorted(different)[0]} is missing or does not belong to it")
    for name, (size, digest) in about["files"].items():
        with open(checkpoint / name, "rb") as stream:
            if os.fstat(stream.fileno()).st_size != size or hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise ValueError(f"{name} is damaged")
    return about


def newest_sound(run: Path) -> tuple[Path, dict] | None:
    """The newest published checkpoint that verifies, and its mark; a line is printed for each one rejected.

    None when there is none yet. Raises UserError when there are some and none is sound; nothing is deleted.
    """
    found = published(run)
    for checkpoint in found:
        try:
            return checkpoint, read_mark(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{checkpoint.name} is rejected: {error}", file=sys.stderr)
    if not found:
        return None
    raise UserError(f"RESUME=auto: {run} holds no sound checkpoint. Start anew: RESUME=None and another RUN_NAME.")


def refuse_other_data(checkpoint: tuple[Path, dict] | None, digest: str) -> None:
    """Exit code 3 when a run would go on with other tokens than it began with."""
    if checkpoint and checkpoint[1]["data"] != digest:
        raise UserError(
            "RESUME=auto would change the run: the sources of DATA, the tokenizer or the template give other tokens "
            "than when it began. Set them back, or start a new run.",
            code=3,
        )


def rotate(run: Path, keep: int) -> None:
    """Remove the published checkpoints but the newest `keep`; at least one stays."""
    for checkpoint in published(run)[max(1, keep) :]:
        (checkpoint / MARK).unlink()  # first, so that it does not count while it is being removed
        shutil.rmtree(checkpoint)

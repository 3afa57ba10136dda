"""Checkpoints: published whole or not at all, verified before they are trusted, rotated by step.

A folder checkpoint-N counts once it holds COMPLETE.json, written last, with the size and XXH3 hash of every file.
"""

import json
import math
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import RANK, UserError
from common.files import file_names, hash_file, sync_files, sync_folder, write_atomic

MANIFEST = "COMPLETE.json"
LOADED = (".json", ".safetensors", ".bin", ".pt", ".pth")  # files that Trainer or peft may look for


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest step first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def published(run: Path) -> list[Path]:
    """The published checkpoints of a run folder, newest step first."""
    return [folder for folder in folders(run) if (folder / MANIFEST).is_file()]


def publish(checkpoint: Path, metadata: dict) -> None:
    """Bring every file of a checkpoint to the disk, and then the manifest, with the metadata, that makes it count."""
    sync_files(checkpoint)
    paths = {name: checkpoint / name for name in file_names(checkpoint)}
    files = {name: [path.stat().st_size, hash_file(path)] for name, path in paths.items()}
    write_atomic(checkpoint / MANIFEST, json.dumps(metadata | {"files": files}, indent=1))
    sync_folder(checkpoint.parent)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a published checkpoint; ValueError when a file differs from it, is missing or was added."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if missing := {"step", "data", "progress", "settings", "versions", "files"} - set(manifest):
        raise ValueError(f"{MANIFEST} lacks {sorted(missing)[0]}")
    names = file_names(checkpoint)
    # Other files, such as a file manager leaves behind, would not be loaded.
    present = {name for name in names if Path(name).suffix in LOADED} - {MANIFEST}
    if different := present - set(manifest["files"]) | set(manifest["files"]) - set(names):
        raise ValueError(f"{sorted(different)[0]} is missing or does not belong to it")
    for name, (size, digest) in manifest["files"].items():
        if (checkpoint / name).stat().st_size != size or hash_file(checkpoint / name) != digest:
            raise ValueError(f"{name} is damaged")
    return manifest


def first_valid(found: list[Path]) -> tuple[Path, dict] | None:
    """The first checkpoint that verifies, with its manifest; a line is printed for each one rejected."""
    for checkpoint in found:
        try:
            return checkpoint, read_manifest(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{checkpoint.name} is rejected: {error}", file=sys.stderr)


def latest_valid(run: Path) -> tuple[Path, dict] | None:
    """The newest published checkpoint that verifies, with its manifest; None when there is none yet.

    Raises UserError when there are some and none is valid; nothing is deleted.
    """
    valid = first_valid(found := published(run))
    if found and not valid:
        raise UserError(f"RESUME=auto: {run} holds no valid checkpoint. Start anew: RESUME=None and another RUN_NAME.")
    return valid


def clear(run: Path, after: int) -> None:
    """Remove unfinished saves; put aside published checkpoints newer than the one a run resumes from."""
    for checkpoint in folders(run):
        if not (checkpoint / MANIFEST).is_file():
            remove(checkpoint)
        elif step_of(checkpoint) > after:  # rejected: it must not count among the newest that are kept
            aside = run / f"rejected-{step_of(checkpoint)}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def rotate(run: Path, keep: int, data: str) -> None:
    """Remove the published checkpoints but the newest `keep` (at least one) and the one of the least held-out loss."""
    found = published(run)
    kept = found[: max(1, keep)] + [best for *_, best in by_loss(run, data)[:1]]
    for checkpoint in found:
        if checkpoint not in kept:
            remove(checkpoint)


def by_loss(run: Path, data: str) -> list[tuple[float, int, Path]]:
    """Held-out loss, step and folder of the published checkpoints where it was measured, the least loss first."""
    found = sorted((eval_loss(checkpoint, data), step_of(checkpoint), checkpoint) for checkpoint in published(run))
    return [each for each in found if each[0] < math.inf]


def eval_loss(checkpoint: Path, data: str) -> float:
    """The loss at a published checkpoint's step on the held-out rows of data (its digest); infinite: not measured."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        loss, same = manifest["eval_loss"], held_out(manifest["data"]) == held_out(data)
        return loss if same and math.isfinite(loss) else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def held_out(data: str) -> str:
    """The part of a digest of data that is of the held-out rows: losses compare where it is equal."""
    return data.rpartition("-")[2]


def add_eval_loss(checkpoint: Path, loss: float) -> None:
    """Note a loss that was measured after the checkpoint was published."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    write_atomic(checkpoint / MANIFEST, json.dumps(manifest | {"eval_loss": loss}, indent=1))


def remove(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # first, so that it does not count while it is being removed
    shutil.rmtree(checkpoint)


@dataclass
class CheckpointWriter:
    """Publishes the checkpoints of a run in a thread, beside training; a save that fails is tried again later."""

    run: Path
    keep: int = 2  # checkpoints, beside the one of the least held-out loss
    saved_step: int | None = None
    retry_at: float = math.inf  # step
    retry_after: int = 1  # steps, doubled with each failure
    pending: tuple[Path, Future] | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def submit(self, checkpoint: Path, metadata: dict) -> None:
        """Publish a checkpoint whose files are written; `wait` tells how it went."""
        (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
        self.pending = checkpoint, self.thread.submit(self.publish_and_rotate, checkpoint, metadata)

    def publish_and_rotate(self, checkpoint: Path, metadata: dict) -> None:
        publish(checkpoint, metadata)
        try:
            rotate(self.run, self.keep, metadata["data"])
        except OSError as error:
            print(f"an old checkpoint could not be removed: {error}", file=sys.stderr)

    def wait(self, step: int, last_step: int) -> None:
        """Wait until the last checkpoint is on the disk. step, last_step: where training is, and where it ends."""
        if self.pending:
            checkpoint, publishing = self.pending
            self.pending = None
            try:
                publishing.result()
            except OSError as error:
                self.report_failure(checkpoint, str(error), step, last_step)
            else:
                self.saved_step = step_of(checkpoint)
                self.retry_at, self.retry_after = math.inf, 1

    def report_failure(self, checkpoint: Path, error: str, step: int, last_step: int) -> None:
        """Remove what was written of a checkpoint and say when it is tried again."""
        if not RANK:  # a rest does not count, and goes when the run starts again
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.retry_at = step + self.retry_after
        self.retry_after *= 2
        again = f"; tried again at step {self.retry_at}" if self.retry_at <= last_step else ""
        print(f"{checkpoint.name} could not be saved: {error}{again}", file=sys.stderr)

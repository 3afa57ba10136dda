"""Files: written whole and brought to the disk, hashed, appended to; the space left."""

import errno
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import xxhash

GIB = 2**30
METRICS = "metrics.jsonl"  # of a training run: one object for each logged step


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a file that is never seen half-written, and bring it to the disk."""
    partial = file.with_name(f"{file.name}.partial")
    with open(partial, "wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders, and writes their entries by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(folder: Path) -> None:
    for name in file_names(folder):
        with open(folder / name, "r+b") as stream:  # Windows syncs only what is open for writing
            os.fsync(stream.fileno())
    sync_folder(folder)


def file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def hash_file(file: Path) -> str:
    """XXH3 of a file: against accidents only, and 13 times as fast as SHA-256."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def check_space(folder: Path, needed: float) -> None:
    """OSError where the disk has fewer bytes left than needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / GIB:.3g} GiB are needed, {free / GIB:.3g} are free", str(folder))


@dataclass
class LineLog:
    """A file of lines; what a full disk does not take waits for the next append."""

    file: Path
    pending: bytes = b""

    def append(self, line: str = "") -> bool:
        """Add a line after those that wait; returns whether all are in the file."""
        self.pending += line.encode()
        try:
            with open(self.file, "ab", buffering=0) as stream:
                end = stream.tell()
                if stream.write(self.pending) < len(self.pending):
                    stream.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.pending = b""
        except OSError as error:
            print(f"{self.file} could not be written and is tried again later: {error}", file=sys.stderr)
        return not self.pending

"""Keeps gpu_check going: its rows run in a process that may crash, hang or lose its GPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BEGUN = "begun.json"  # the row that is running, in OUT_DIR
BROKEN = 75  # exit code of a process whose GPU answers no more


def supervise(folder: Path, minutes: float, started: float) -> int:
    """Run this command in a process of its own, again after one that broke; returns the exit code of the last.

    A row in which the process crashes, or which takes longer than its limit, gets that as its result.
    """
    begun = folder / BEGUN
    begun.unlink(missing_ok=True)
    while True:
        left = minutes - (time.perf_counter() - started) / 60
        command = [sys.executable, *sys.argv, f"MINUTES={left:.3f}"]
        code, reason = wait(subprocess.Popen(command, env={**os.environ, "GPU_CHECK_WORKER": "1"}), begun)
        if begun.exists():
            record = json.loads(begun.read_text(encoding="utf-8"))
            record |= {"error": reason or f"the process ended with code {code}", "seconds": age(begun)}
            with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
                results.write(json.dumps(record) + "\n")
            begun.unlink()
            print(f"{record['row']}: {record['error']}; the next rows in a new process", flush=True)
        elif code != BROKEN:
            return code


def wait(child: subprocess.Popen, begun: Path) -> tuple[int, str | None]:
    """The exit code of the process, and why it was killed, if it was."""
    reason = None
    while child.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(FileNotFoundError):  # between two rows
            limit = json.loads(begun.read_text(encoding="utf-8"))["limit"]
            if age(begun) > limit and reason is None:
                reason = f"killed after {limit:.0f} s"
                child.kill()
    return child.returncode, reason


def age(file: Path) -> float:
    return time.time() - file.stat().st_mtime

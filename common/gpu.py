"""Hardware: memory in use and at its peak, and the device's name. Nothing is guessed: what cannot be read is None."""

import csv
import platform
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

GIB = 2**30


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def rss_gib() -> float:
    """Main memory this process holds now."""
    return psutil.Process().memory_info().rss / GIB


def peak_rss_gib() -> float:
    """The most main memory this process ever held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB on Linux


def vram_gib() -> float | None:
    """Memory that torch has reserved on the GPU now."""
    return torch.cuda.memory_reserved() / GIB if torch.cuda.is_available() else None


def peak_vram_gib() -> float | None:
    """The most memory that torch's tensors ever took on the GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


class HardwareMonitor:
    """A thread that writes memory in use to a CSV file once a second, as a context manager."""

    COLUMNS = ("seconds", "rss_gib", "vram_gib", "power_w")

    def __init__(self, file: Path, interval_seconds: float = 1.0):
        self.file, self.interval_seconds = file, interval_seconds
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def sample(self) -> None:
        start = time.monotonic()
        with open(self.file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(self.COLUMNS)
            while True:
                vram = vram_gib()
                seconds = round(time.monotonic() - start, 2)
                try:
                    writer.writerow([seconds, round(rss_gib(), 3), "" if vram is None else round(vram, 3), ""])
                    stream.flush()
                except OSError:  # a full disk costs the row; what it costs the run, the run tells
                    pass
                if self.stop.wait(self.interval_seconds):
                    return

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        self.thread.join()

"""hardware.csv of a run, and what costs time silently: spilled memory, pauses, heat."""

import contextlib
import csv
import platform
import statistics
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import distributed, hardware
from common.cli import RANK

# Of hardware.csv; used_gib: of a GPU by all programs, of the CPU by this process.
COLUMNS = ("unix_time", "device", "power_w", "used_gib", "reserved_gib", "utilization_percent", "temperature_c",
           "clock_mhz", "throttled", "rank")  # fmt: skip

WINDOW, WINDOW_MIN = 64, 10  # steps that say what is usual
PAUSE = 3  # times the median step
PAUSE_SECONDS = 1.0  # more than usual, at least: nobody waits for a tenth of a second
SPILLED_GIB = 0.1  # of what torch has reserved, elsewhere than on the GPU
FULL = 0.97  # of the GPU's memory
HOT_READINGS = 3  # in a row
# Windows' drivers, WSL's too, go on in main memory when the GPU's is full.
CAN_SPILL = sys.platform == "win32" or "microsoft" in platform.release().lower()
REMEDIES = {
    "spill": "Lower PER_DEVICE_TRAIN_BATCH_SIZE or MAX_LENGTH, set GRADIENT_CHECKPOINTING=True, or MEMORY_LIMIT=0.9",
    "pause": "Other programs, a disk that is busy, or an optimizer's occasional work (OPTIM)",
    "throttle": "Cool it, or lower its power limit (nvidia-smi -pl), which costs less speed than heat does",
}


class HardwareMonitor:
    """A thread that reads the devices once a second into a CSV file, as a context manager.

    latest: the last reading of each device, by name. Power and energy are those of the devices
    that train; the readings of other processes come by `exchange`.
    """

    def __init__(self, file: Path, interval_seconds: float = 1.0, devices: list | None = None):
        self.file, self.interval_seconds = file, interval_seconds
        self.devices = hardware.open_devices() if devices is None else devices
        self.trains = f"gpu{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        self.latest: dict[str, dict] = {}
        self.hot_readings = 0  # in a row
        self.rows: deque[dict] = deque()  # that are not in the file yet
        self.others: list[tuple | None] = []  # watts and joules of other processes
        self.start = time.monotonic()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        waiting = True
        while waiting:
            self.read()
            if not RANK:
                self.write()
            waiting = not self.stop.wait(self.interval_seconds)

    def read(self) -> None:
        self.latest = {device.name: device.read() for device in self.devices}
        self.hot_readings = self.hot_readings + 1 if (self.gpu() or {}).get("throttled") else 0
        for device, reading in self.latest.items():
            row = dict(unix_time=round(time.time(), 2), rank=RANK, device=device, **reading)
            self.rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})

    def write(self) -> None:
        rows = self.take()
        # A full disk costs these rows; the run itself reports what else it costs.
        with contextlib.suppress(OSError), open(self.file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
            if not stream.tell():
                writer.writeheader()
            writer.writerows(rows)

    def exchange(self) -> None:
        """Give the first process the readings of the others; all have to call it."""
        readings = distributed.gather((self.take() if RANK else [], self.own_energy()))
        self.others = [energy for rank, (_, energy) in enumerate(readings) if rank != RANK]
        if not RANK:
            self.rows.extend(row for rows, _ in readings for row in rows)

    def take(self) -> list[dict]:
        return [self.rows.popleft() for _ in range(len(self.rows))]

    def gpu(self) -> dict | None:
        return self.latest.get(self.trains) if self.trains != "cpu" else None

    def own_energy(self) -> tuple[float, float] | None:
        """Watts and joules of this process; None where power cannot be read."""
        watts = self.latest.get(self.trains, {}).get("power_w")
        joules = sum(device.energy_j for device in self.devices if device.name == self.trains)
        return None if watts is None else (watts, joules)

    def total(self, which: int) -> float | None:
        """Watts (0) or joules (1) of all processes; None where power cannot be read."""
        known = [energy[which] for energy in (self.own_energy(), *self.others) if energy]
        return sum(known) if known else None

    def power_w(self) -> float | None:
        return self.total(0)

    def energy_j(self) -> float | None:
        return self.total(1)

    def mean_power_w(self) -> float | None:
        joules = self.energy_j()
        return None if joules is None else joules / max(time.monotonic() - self.start, 1e-3)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        self.thread.join()
        self.read()  # the end of the energy


@dataclass
class StepWatch:
    """Finds events in the times of steps; each is counted and reported once while it lasts."""

    counts: Counter = field(default_factory=Counter)
    usual: deque = field(default_factory=lambda: deque(maxlen=WINDOW))  # quiet steps' (s, W)
    lasting: set[str] = field(default_factory=set)

    def step(self, seconds: float, gpu: dict | None = None, hot_readings: int = 0) -> list[str]:
        """Lines to print after a step. gpu: a reading of Gpu; hot_readings: throttled, in a row."""
        median = statistics.median(s for s, _ in self.usual) if len(self.usual) >= WINDOW_MIN else None
        found = {}
        if gpu and (how := self.spills(seconds, median, gpu)):
            found["spill"] = how
        elif median and seconds > max(PAUSE * median, median + PAUSE_SECONDS):
            found["pause"] = f"{seconds:.1f} s, usually {median:.1f}"
        if hot_readings >= HOT_READINGS:
            found["throttle"] = f"the GPU slows itself down at {(gpu or {}).get('temperature_c')} degrees"
        if not found:
            self.usual.append((seconds, (gpu or {}).get("power_w")))
        new = [event for event in found if event not in self.lasting]
        self.lasting = set(found)
        self.counts.update(new)
        return [f"{event}: {found[event]}. {REMEDIES[event]}." for event in new]

    def spills(self, seconds: float, median: float | None, gpu: dict) -> str | None:
        """How a step shows that memory lies outside of the GPU (on Windows and WSL), or None.

        Either torch has reserved more than is in use on the whole GPU, or the GPU is full and
        waits for memory: steps have become slower while its power fell.
        """
        used, total, watts = (gpu.get(name) for name in ("used_gib", "total_gib", "power_w"))
        if used is None:
            return None
        at_watts = "" if watts is None else f", at {watts:.0f} W"
        spilled = gpu["reserved_gib"] - used
        if spilled > SPILLED_GIB:
            return f"{spilled:.1f} GiB lie in main memory, which is many times slower{at_watts}"
        before = [power for _, power in self.usual if power is not None]
        falls = watts is None or not before or watts < 0.8 * statistics.median(before)
        if CAN_SPILL and used > FULL * total and median and seconds > 1.5 * median and falls:
            full = f"{used:.1f} of {total:.1f} GiB in use"
            return f"{full}, {seconds:.1f} s a step, before {median:.1f}{at_watts}"
        return None

"""Events of a run that cost time without a word: memory that spills, pauses, a throttled GPU."""

import platform
import statistics
import sys
from collections import Counter, deque

WINDOW, WINDOW_MIN = 64, 10  # steps that say what is usual
PAUSE = 3  # times the median step
PAUSE_SECONDS = 1.0  # more than usual, at least: nobody waits for a tenth of a second
SPILLED_GIB = 0.1  # of what torch has reserved, elsewhere than on the GPU
FULL = 0.97  # of the GPU's memory
HOT_READINGS = 3  # in a row
# Drivers for Windows, and so for WSL, go on in main memory when the GPU's is full; on Linux it runs out.
CAN_SPILL = sys.platform == "win32" or "microsoft" in platform.release().lower()
REMEDIES = {
    "spill": "Lower PER_DEVICE_TRAIN_BATCH_SIZE or MAX_LENGTH, set GRADIENT_CHECKPOINTING=True, or MEMORY_LIMIT=0.9",
    "pause": "Other programs, a disk that is busy, or an optimizer's occasional work (OPTIM)",
    "throttle": "Cool it, or lower its power limit (nvidia-smi -pl), which costs less speed than heat does",
}


class Watch:
    """Looks at each step; `counts` are of events, each counted and told once for as long as it lasts."""

    def __init__(self):
        self.counts = Counter()
        self.usual: deque[tuple[float, float | None]] = deque(maxlen=WINDOW)  # seconds and watts of quiet steps
        self.lasting: set[str] = set()

    def step(self, seconds: float, gpu: dict | None = None, hot_readings: int = 0) -> list[str]:
        """What to tell after a step. gpu: a reading of gpu.Gpu; hot_readings: how many in a row were throttled."""
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
        """How a step shows that memory lies outside of the GPU (Windows and WSL do that); None where it does not.

        Either torch has reserved more than the whole GPU has in use, or the GPU is full, and steps have become slower
        while its power fell: it waits for memory.
        """
        used, total, watts = (gpu.get(name) for name in ("used_gib", "total_gib", "power_w"))
        if used is None:
            return None
        at_watts = "" if watts is None else f", at {watts:.0f} W"
        if gpu["reserved_gib"] - used > SPILLED_GIB:
            return f"{gpu['reserved_gib'] - used:.1f} GiB lie in main memory, which is many times slower{at_watts}"
        before = [power for _, power in self.usual if power is not None]
        falls = watts is None or not before or watts < 0.8 * statistics.median(before)
        if CAN_SPILL and used > FULL * total and median and seconds > 1.5 * median and falls:
            return f"{used:.1f} of {total:.1f} GiB in use, {seconds:.1f} s a step, before {median:.1f}{at_watts}"
        return None

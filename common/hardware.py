"""Memory, power and load of this machine's GPUs and CPU; what cannot be read is None."""

import os
import platform
import re
import sys
import time
from pathlib import Path

import psutil
import pynvml
import torch
from accelerate.utils.memory import should_reduce_batch_size

from common import distributed
from common.bounds import SIZE
from common.files import GIB

POWERCAP = Path("/sys/class/powercap")  # RAPL, Intel's and AMD's energy counters
CGROUP = Path("/sys/fs/cgroup/memory.max")
HOT = (
    pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwSlowdown
    | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
)  # fmt: skip  # the power cap is not among them: at full load it is always on


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def now() -> float:
    """Seconds for measuring, with the GPU's queue drained first."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rss_gib() -> float:
    return psutil.Process().memory_info().rss / GIB


def peak_rss_gib() -> float:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB on Linux


def vram_gib() -> float | None:
    """What torch has reserved on the GPU now."""
    return torch.cuda.memory_reserved() / GIB if torch.cuda.is_available() else None


def peak_vram_gib(reserved: bool = False) -> float | None:
    """The most that tensors ever took on the GPU, or that torch reserved for them."""
    read = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
    return read() / GIB if torch.cuda.is_available() else None


def memory_limit(setting: str | None, device: str) -> float:
    """Bytes this process may take of the device: the setting's, but at most what is free.

    On a GPU torch is held to it: memory runs out with an error where Windows would spill.
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available + rss_gib() * GIB, memory.total
        if CGROUP.is_file() and (text := CGROUP.read_text().strip()).isdigit():  # container, Slurm
            total = min(total, int(text))
            free = min(free, total)
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit = min(free, read_size(setting, total) if setting else free)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def read_size(text: str, total: float = GIB) -> float:
    """Bytes of "7500MiB", "8GiB", or of a share of the total; bounds.py has checked the form."""
    number, unit = re.fullmatch(SIZE, text.strip()).groups()
    return float(number) * {"": total, "MiB": 2**20, "GiB": GIB}[unit]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as torch, CUDA, cuBLAS or cuDNN say it, or the CPU's."""
    signs = "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CPUAllocator: not enough memory"  # the last: Windows
    ran_out = isinstance(error, RuntimeError) and re.search(signs, str(error)) or isinstance(error, MemoryError)
    return should_reduce_batch_size(error) or bool(ran_out)


class Gpu:
    """One of the GPUs that torch sees, read through NVML."""

    def __init__(self, number: int):
        self.number, self.name, self.read_at = number, f"gpu{number}", None
        uuid = str(torch.cuda.get_device_properties(number).uuid)  # NVML's numbers may differ
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.energy_at_start = self.ask("TotalEnergyConsumption")  # mJ
        self.energy_j = 0.0

    def ask(self, what: str, *arguments):
        try:
            return getattr(pynvml, f"nvmlDeviceGet{what}")(self.handle, *arguments)
        except pynvml.NVMLError:  # not supported by this GPU or driver
            return None

    def read(self) -> dict:
        reserved = torch.cuda.memory_reserved(self.number)  # before "used", which grows with it
        power, memory, now = self.ask("PowerUsage"), self.ask("MemoryInfo"), time.monotonic()
        load, reasons = self.ask("UtilizationRates"), self.ask("CurrentClocksThrottleReasons")
        power_w = None if power is None else power / 1000
        counter = self.ask("TotalEnergyConsumption")
        if counter is not None and self.energy_at_start is not None:
            self.energy_j = (counter - self.energy_at_start) / 1000
        elif power_w is not None and self.read_at is not None:
            self.energy_j += power_w * (now - self.read_at)
        self.read_at = now
        return dict(
            power_w=power_w,
            used_gib=memory and memory.used / GIB,
            total_gib=memory and memory.total / GIB,
            reserved_gib=reserved / GIB,
            utilization_percent=load and load.gpu,
            temperature_c=self.ask("Temperature", pynvml.NVML_TEMPERATURE_GPU),
            clock_mhz=self.ask("ClockInfo", pynvml.NVML_CLOCK_SM),
            throttled=None if reasons is None else int(bool(reasons & HOT)),
        )


class Cpu:
    """This process on the CPU, and the energy of its packages."""

    name = "cpu"

    def __init__(self):
        self.process = psutil.Process()
        self.process.cpu_percent()  # counts from here
        reads_energy = os.environ.get("LOCAL_RANK", "0") == "0"  # one process for all
        zones = POWERCAP.glob("*-rapl:*") if reads_energy else ()
        self.counters = [zone for zone in zones if zone.name.count(":") == 1]  # packages
        # Where a counter starts again from 0.
        self.ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self.counters]
        self.energy_j, self.read_at = 0.0, time.monotonic()
        self.before = self.energies()

    def energies(self) -> list[int] | None:
        """Microjoules of each package."""
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self.counters] or None
        except OSError:  # not allowed
            return None

    def read(self) -> dict:
        now, power_w, energies = time.monotonic(), None, self.energies()
        if energies and self.before:
            counts = zip(energies, self.before, self.ranges, strict=True)
            joules = sum((e - b) % (top + 1) for e, b, top in counts) / 1e6
            self.energy_j += joules
            power_w = joules / max(now - self.read_at, 1e-3)
        self.before, self.read_at = energies, now
        return dict(power_w=power_w, used_gib=rss_gib(), utilization_percent=self.process.cpu_percent())


def open_devices() -> list:
    """The devices that can be read: the GPUs (of several processes, each its own), the CPU."""
    devices = [Cpu()]
    if torch.cuda.is_available():
        try:
            pynvml.nvmlInit()
            alone = distributed.count() == 1
            numbers = range(torch.cuda.device_count()) if alone else [torch.cuda.current_device()]
            devices = [*map(Gpu, numbers), *devices]
        except pynvml.NVMLError as error:
            print(f"the GPU's power and load cannot be read: {error}", file=sys.stderr)
    elif devices[0].before is None:
        problem = f"no GPU, and no counters in {POWERCAP} that this user may read"
        print(f"power cannot be read: {problem}", file=sys.stderr)
    return devices

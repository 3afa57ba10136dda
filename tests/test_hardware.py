"""Power, energy and events: recorded readings, a stand-in for NVML with its units, and RAPL's files."""

import csv
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch
from conftest import ROOT

from common import distributed, hardware, monitor
from common.model import load
from common.monitor import HardwareMonitor, StepWatch

# What seed 000 saw on its 24 GB card: GiB that torch reserved, GiB in use on the GPU, watts, minutes an epoch.
FITS, SPILLS, SPILLS_FAR = (16.0, 16.6, 370, 24), (26.5, 23.8, 180, 89), (63.0, 23.9, 120, 1178)


def reading(reserved, used, watts, minutes, total=24.0):
    return minutes / 10, dict(reserved_gib=reserved, used_gib=used, total_gib=total, power_w=watts, temperature_c=70)


def told(steps, hot=()):
    """(number of the step, event) of all that a Watch tells."""
    watch = StepWatch()
    hot = dict(hot)
    lines = [(i, line) for i, step in enumerate(steps) for line in watch.step(*step, hot.get(i, 0))]
    assert sum(watch.counts.values()) == len(lines)
    return [(i, line.partition(":")[0]) for i, line in lines]


def test_a_clean_run_tells_nothing():
    jitter = [1.0, 1.1, 0.9, 1.2, 1.0, 1.9, 0.8] * 30
    assert told([(j * 2.4, reading(*FITS)[1] | {"power_w": 370 / j}) for j in jitter]) == []
    assert told([(0.02, None), (0.02, None), (0.5, None)] * 30) == []  # below a second nobody waits
    nearly_full = [reading(22.0, 23.9, 370, 24)] * 50  # but neither slower nor colder
    assert told(nearly_full) == []


@pytest.mark.parametrize("spilled", [SPILLS, SPILLS_FAR])
def test_spilling_is_told_once(spilled):
    assert told([reading(*FITS)] * 20 + [reading(*spilled)] * 30) == [(20, "spill")]
    assert told([reading(*spilled)] * 30) == [(0, "spill")]  # from the start, with nothing to compare
    again = [reading(*FITS)] * 20 + [reading(*spilled)] * 5 + [reading(*FITS)] * 5 + [reading(*spilled)] * 5
    assert told(again) == [(20, "spill"), (30, "spill")]


def test_a_full_gpu_that_becomes_slow_and_cold_spills_on_windows(monkeypatch):
    """What another program took cannot be seen in torch's own numbers."""
    monkeypatch.setattr(monitor, "CAN_SPILL", True)
    full = dict(reserved_gib=16.0, used_gib=23.8, total_gib=24.0, temperature_c=60)
    assert told([reading(*FITS)] * 20 + [(8.9, full | {"power_w": 180})] * 9) == [(20, "spill")]
    assert told([reading(*FITS)] * 20 + [(8.9, full | {"power_w": 365})] * 9) == [(20, "pause")]  # busy: no spill
    monkeypatch.setattr(monitor, "CAN_SPILL", False)  # Linux: the memory would have run out
    assert told([reading(*FITS)] * 20 + [(8.9, full | {"power_w": 180})] * 9) == [(20, "pause")]


def test_pauses_and_heat_are_told_once():
    steps = [reading(*FITS)] * 40
    steps[25] = 61.0, steps[25][1]  # seed 000's GaLore
    assert told(steps) == [(25, "pause")]
    assert told([reading(*FITS)] * 40, hot={10: 1, 11: 2, 12: 3, 13: 4, 14: 5, 30: 2}) == [(12, "throttle")]


class FakeNvml:
    """Answers in NVML's units, by a clock that a test sets; `missing` functions are not supported."""

    def __init__(self, missing=()):
        self.missing, self.power_mw, self.energy_mj, self.reasons = missing, 250_000, 5_000_000, 0

    def __call__(self, function, handle, *arguments):
        if function in self.missing:
            raise pynvml.NVMLError_NotSupported(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return {
            "nvmlDeviceGetPowerUsage": self.power_mw,
            "nvmlDeviceGetTotalEnergyConsumption": self.energy_mj,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=6 * 2**30, total=8 * 2**30),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=93),
            "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons,
            "nvmlDeviceGetTemperature": 71,
            "nvmlDeviceGetClockInfo": 1800,
        }[function]


@pytest.fixture
def fake_gpu(monkeypatch):
    def make(missing=()):
        nvml = FakeNvml(missing)
        for name in ("PowerUsage", "TotalEnergyConsumption", "MemoryInfo", "UtilizationRates",
                     "CurrentClocksThrottleReasons", "Temperature", "ClockInfo"):  # fmt: skip
            function = f"nvmlDeviceGet{name}"
            monkeypatch.setattr(pynvml, function, lambda *a, f=function: nvml(f, *a))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-1234": "handle"}[uuid])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="1234"))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 5 * 2**30)
        return nvml, hardware.Gpu(0)

    return make


def test_nvml_in_watts_and_joules(fake_gpu, tmp_path):
    nvml, device = fake_gpu()
    nvml.energy_mj += 36_000_000
    monitor = HardwareMonitor(tmp_path / "hardware.csv", 0.01, [device, hardware.Cpu()])
    monitor.trains = "gpu0"
    with monitor:
        time.sleep(0.1)
        assert monitor.power_w() == 250.0 and monitor.energy_j() == pytest.approx(36_000)
    assert monitor.mean_power_w() == pytest.approx(36_000 / (time.monotonic() - monitor.start), rel=0.05)
    with open(tmp_path / "hardware.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["device"] for row in rows[:2]] == ["gpu0", "cpu"]
    expected = dict(power_w=250, used_gib=6, reserved_gib=5, utilization_percent=93, temperature_c=71, clock_mhz=1800)
    assert {name: float(rows[0][name]) for name in expected} == expected and rows[0]["throttled"] == "0"
    assert float(rows[1]["used_gib"]) > 0.1 and rows[1]["temperature_c"] == ""


def test_energy_is_summed_up_where_the_gpu_does_not_count_it(fake_gpu, monkeypatch):
    _, device = fake_gpu(missing=["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetClockInfo"])
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(hardware.time, "monotonic", lambda: next(clock))
    readings = [device.read() for _ in range(4)]
    assert device.energy_j == 250 * 6 and readings[-1]["clock_mhz"] is None


def test_a_laptop_without_power_readings_gives_none(fake_gpu, tmp_path):
    _, device = fake_gpu(missing=["nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"])
    monitor = HardwareMonitor(tmp_path / "hardware.csv", devices=[device])
    monitor.trains = "gpu0"
    monitor.read()
    assert monitor.power_w() is monitor.energy_j() is monitor.mean_power_w() is None


def test_only_heat_counts_as_throttling(fake_gpu, tmp_path):
    nvml, device = fake_gpu()
    monitor = HardwareMonitor(tmp_path / "hardware.csv", devices=[device])
    monitor.trains = "gpu0"
    for reasons, hot in ((pynvml.nvmlClocksThrottleReasonSwPowerCap, 0), (0x20, 1), (0x40 | 0x4, 2), (0, 0), (0x8, 1)):
        nvml.reasons = reasons
        monitor.read()
        assert monitor.hot_readings == hot


def test_a_gpu_that_cannot_be_read_is_not_given_the_cpus_power(monkeypatch, tmp_path):
    class Cpu:
        name, energy_j = "cpu", 60.0

        def read(self):
            return dict(power_w=95.0, used_gib=1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monitor = HardwareMonitor(tmp_path / "hardware.csv", devices=[Cpu()])
    monitor.read()
    assert monitor.trains == "gpu1" and monitor.power_w() is monitor.energy_j() is monitor.gpu() is None


def test_rapl_counts_packages_and_starts_again_at_its_end(monkeypatch, tmp_path):
    for zone, energy in (("intel-rapl:0", 900_000_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 77)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("999999999\n")
    monkeypatch.setattr(hardware, "POWERCAP", tmp_path)
    cpu = hardware.Cpu()
    cpu.read_at -= 2  # seconds
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("20000000")  # 120 J on, over the end of its range
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("35000000")  # 30 J on
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("999")  # a part of package 0
    assert cpu.read()["power_w"] == pytest.approx(75, rel=0.01) and cpu.energy_j == pytest.approx(150)


def test_what_cannot_be_read_is_said_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hardware, "POWERCAP", tmp_path)
    monitor = HardwareMonitor(tmp_path / "hardware.csv", 0.01)
    with monitor:
        time.sleep(0.05)
    assert capsys.readouterr().err.count("power cannot be read") == 1 and monitor.energy_j() is None


def test_the_monitor_takes_below_a_hundredth_of_a_core(tmp_path):
    monitor = HardwareMonitor(tmp_path / "hardware.csv", 0.0)
    monitor.read()
    before, readings = time.thread_time(), 200
    for _ in range(readings):
        monitor.read()
    assert (time.thread_time() - before) / readings < 0.01  # seconds of CPU; there is one reading a second


def test_a_run_that_goes_on_adds_to_its_readings(tmp_path):
    for _ in range(2):
        with HardwareMonitor(tmp_path / "hardware.csv", 0.01):
            time.sleep(0.03)
    lines = (tmp_path / "hardware.csv").read_text().splitlines()
    assert sum(line.startswith("unix_time") for line in lines) == 1 and len(lines) > 3


def test_energy_and_events_reach_the_summary(arguments, run_here, tmp_path, monkeypatch, at_step):
    class Meter:  # 100 W
        name = "cpu"

        def __init__(self):
            self.start = time.monotonic()

        energy_j = property(lambda self: 100 * (time.monotonic() - self.start))

        def read(self):
            return dict(power_w=100.0, used_gib=1.0, utilization_percent=50)

    monkeypatch.setattr(hardware, "open_devices", lambda: [Meter()])
    at_step({14: lambda: time.sleep(3.0)})
    code, out, err = run_here("qlora_train.py", *arguments("run", "MAX_STEPS=16", "SAVE_STEPS=None", "EVAL_STEPS=None"))
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mean_power_w"] == pytest.approx(100, rel=0.02) and summary["events"] == {"pause": 1}
    assert summary["energy_wh"] * 3600 >= 100 * summary["train_seconds"] * 0.98
    assert summary["tokens_per_joule"] == pytest.approx(summary["tokens"] / summary["energy_wh"] / 3600)
    assert err.count("step 14: pause: 3.") == 1 and "100 W" in out and summary["verdict"] == "done, 1 pause"
    assert "| 100 |" in (tmp_path / "run" / "run_row.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "run: done" in page and "<dt>step 14</dt><dd>pause: 3." in page and " W on average" in page


ON_A_MAC = """
import json, sys
from pathlib import Path
import bitsandbytes, torch  # bitsandbytes would make tensors there when it is imported
torch.backends.mps.is_available = torch.backends.mps.is_built = torch.xpu.is_available = lambda: True
sys.path.insert(0, "tests")
from conftest import execute
for run in json.loads(sys.argv[1]):
    print(execute(*run))
    Path(sys.argv[2], "summary.json").unlink(missing_ok=True)  # it can go on
"""


def test_on_a_mac_or_an_intel_gpu_the_cpu_trains_resumes_and_chats(arguments, tmp_path):
    """In a process of its own, where torch says that it has MPS and an XPU, so that the libraries would take them."""
    settings = arguments("run", "ALLOW_CHANGE=MAX_STEPS")
    runs = [("qlora_train.py", [*settings, f"MAX_STEPS={steps}"]) for steps in (2, 3)]
    runs += [("chat_pipe.py", [f"MODEL={tmp_path / 'run'}", "PROMPT=Hi", "MAX_NEW_TOKENS=4"])]
    command = [sys.executable, "-c", ON_A_MAC, json.dumps(runs), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines.count("0") == 3 and "resuming from checkpoint-2" in lines, done.stderr
    for name in ("MPS", "XPU"):
        assert done.stderr.count(f"{name} is not used: nobody has tried these scripts on it. The CPU computes.") == 1


@pytest.fixture
def old_gpu(monkeypatch):
    """Choices are made as on a GPU without bfloat16."""
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(hardware, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: False)


@pytest.mark.parametrize(
    "script, settings, dtype",
    [
        ("qlora_train.py", [], "float16"),
        ("qlora_train.py", ["ADAPTER=None"], "float32"),
        ("preference_train.py", ["ADAPTER=None"], "float32"),
        ("galore_train.py", [], "float32"),
        ("galore_train.py", ["OPTIM=adamw"], "float32"),
        ("estimate_memory.py", ["METHOD=lora"], "float16"),
        ("estimate_memory.py", ["METHOD=full"], "float32"),
        ("estimate_memory.py", ["METHOD=galore", "GALORE_RANK=16"], "float32"),
        ("estimate_memory.py", ["METHOD=full", "DEVICE=cpu"], "bfloat16"),
    ],
)
def test_without_bfloat16_all_weights_train_in_float32(script, settings, dtype, old_gpu, tiny, run_here, monkeypatch):
    from common.cli import UserError
    from common.train import sft

    def start(settings, source, dtype, *args):
        raise UserError(f"would train in {dtype}")

    monkeypatch.setattr(sft, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: script != "estimate_memory.py")
    _, out, err = run_here(script, f"MODEL={tiny()}", "MAX_LENGTH=256", *settings)
    assert (f"would train in torch.{dtype}\n" in err) or re.search(rf", {dtype}\b", out), err
    assert ("full fine-tuning in float32: this GPU has no bfloat16" in out) == (dtype == "float32")


def test_a_refusal_names_the_dtype_that_was_chosen(old_gpu, tiny, run_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for settings, dtype in ((["ADAPTER=pissa"], "float16"), (["ADAPTER=None"], "float32")):
        code, _, err = run_here("qlora_train.py", f"MODEL={tiny()}", "QUANTIZATION=nf4", *settings)
        assert code == 2 and f"{settings[0]} QUANTIZATION=nf4 DTYPE={dtype}: " in err
    assert load.choose_dtype("float16", full=True) == torch.float16  # and refused
    code, _, err = run_here("galore_train.py", f"MODEL={tiny()}", "DTYPE=float16")
    assert code == 2 and "DTYPE=float16: gradients of float16 weights cannot be unscaled" in err

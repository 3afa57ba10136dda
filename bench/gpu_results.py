"""The results of gpu_check: what ran on what, errors as results, lines for the screen and Markdown tables."""

import datetime
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import common.cuda  # noqa: F401  turns cuDNN's attention off

REQUIRED = ("transformers", "trl", "peft", "accelerate", "datasets")  # by every row
OPTIONAL = ("bitsandbytes", "hqq", "gguf", "xllamacpp", "liger_kernel", "galore_torch", "tokenizers", "huggingface_hub")
OTHERS = ("triton", "numpy", "pyarrow", "dill", "multiprocess")  # whose version may matter
COLUMNS = (
    "row", "tok/s, ours / TRL", "ratio", "largest difference of losses", "of the matrix peak", "allocated GiB",
    "reserved GiB", "predicted GiB", "predicted / allocated - 1", "median step s", "slowest step s", "seconds",
    "result",
)  # fmt: skip


def describe() -> str:
    """Versions of everything imported, the device, its driver and what torch was built for."""
    names = ("torch", *REQUIRED, *OPTIONAL, *OTHERS)
    lines = [f"python {platform.python_version()}, " + ", ".join(f"{name} {version_of(name)}" for name in names)]
    if torch.cuda.is_available():
        properties, driver = torch.cuda.get_device_properties(0), guarded(read_driver)
        driver = driver.get("driver") or driver["error"]
        lines.append(
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, capability {properties.major}."
            f"{properties.minor}, driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
            f"built for {' '.join(torch.cuda.get_arch_list())}"
        )
    return "\n".join([*lines, f"{device_name()}, {os.environ.get('PYTORCH_ALLOC_CONF', 'no PYTORCH_ALLOC_CONF')}"])


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "MISSING"


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def read_driver() -> dict:
    import pynvml

    pynvml.nvmlInit()
    return {"driver": pynvml.nvmlSystemGetDriverVersion()}


def guarded(call) -> dict:
    """What `call` returns, or its error: type, last line and traceback."""
    try:
        free_memory()
        return call()
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        trace = "".join(traceback.format_exception(error))
        return {"error": f"{type(error).__name__}: {lines[0][:200]}", "traceback": trace}


def free_memory() -> None:
    """Trainers hold their models in circles, and a run of the scripts holds torch to what was free then."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()


def matrix_peak_tflops(device: str, size: int = 8192, repeats: int = 20) -> float:
    """What the device reaches on square bf16 matrix products, in TFLOP/s."""
    from common.hardware import now

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    started = now()
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (now() - started) / 1e12


def table_of(description: str, records: list[dict]) -> str:
    """A Markdown page: what ran on what, the timed rows, the others."""
    from common.run.folder import git_commit

    timed = [cells(record) for record in records if "sides" in record]
    others = [[r["row"], f"{r.get('seconds', 0):.1f}", outcome(r)] for r in records if "sides" not in r]
    head = f"{datetime.date.today()}, commit {git_commit() or 'unknown (no .git)'}\n\n{description}\n"
    note = (
        "Rows cudnn: both numbers ours with SDPA, cuDNN's attention off / on. On a CPU, allocated is resident memory."
    )
    return "\n".join(
        [head, *markdown(COLUMNS, timed), "", note, "", *markdown(("row", "seconds", "result"), others), ""]
    )


def markdown(columns: tuple, rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def line_of(record: dict) -> str:
    """A result as a line for the screen."""
    if "sides" not in record:
        return f"| {record['row']} | {record.get('seconds', 0):.1f} s | {outcome(record)} |"
    named = (f"{name}: {cell}" for name, cell in zip(COLUMNS[1:], cells(record)[1:], strict=True) if cell)
    line = f"{record['row']}: {'; '.join(named)}"
    return line.replace("ours / TRL", " / ".join(reversed(record["sides"])))


def outcome(record: dict) -> str:
    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    return (record.get("error") or f"ok: {record['said']}").replace("|", "/")


def cells(record: dict) -> list[str]:
    """The cells of a timed row; first number ours (cuDNN off), second TRL's (cuDNN on)."""
    theirs, ours = record["sides"].values()
    good, peak = [side for side in (ours, theirs) if "error" not in side], record["peak_tflops"]
    both = len(good) == 2
    predicted = record["predicted"] and record["predicted"]["gib"]

    def pair(of, form: str) -> str:
        return " / ".join("-" if "error" in side else format(of(side), form) for side in (ours, theirs))

    def share(side: dict) -> float:
        return side["tokens_per_second"] * side["flop_per_token"] / (peak or math.nan) / 1e12

    problems = [f"{name}: {side['error']}" for name, side in record["sides"].items() if "error" in side]
    problems += [f"{n}, again: {s['error_again']}" for n, s in record["sides"].items() if "error_again" in s]
    problems += [f"{n}: NaN loss" for n, s in record["sides"].items() if any(map(math.isnan, s.get("losses", [])))]
    if predicted and record["predicted"]["attention"] != record["attention"]:
        problems.append(f"predicted for {record['predicted']['attention']}, ran {record['attention']}")
    on_gpu = all(side["reserved_gib"] is not None for side in good)
    can_compare = predicted and on_gpu and "error" not in ours and "ours" in record["sides"]
    return [
        record["row"],
        pair(lambda side: side["tokens_per_second"], ",.0f"),
        f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}" if both else "",
        f"{difference(ours['losses'], theirs['losses']):.2%}" if both and "galore" not in record["row"] else "",
        pair(share, ".0%"),
        pair(lambda side: side["peak_gib"], ".2f"),
        pair(lambda side: side["reserved_gib"], ".2f") if on_gpu else "",
        f"{predicted:.2f}" if predicted else "not predicted",
        f"{predicted / ours['peak_gib'] - 1:+.1%}" if can_compare else "",
        pair(lambda side: statistics.median(side["seconds"]), ".3f"),
        pair(lambda side: max(side["seconds"]), ".3f"),
        f"{record['seconds']:.0f}",
        "; ".join(problems).replace("|", "/") or "ok",
    ]


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two lists of losses; NaN where one of them is."""
    found = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False)]
    return math.nan if any(map(math.isnan, found)) else max(found)

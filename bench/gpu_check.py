"""Proves or disproves this project on a CUDA GPU in eight minutes: every method by a short run of its script, then
speed, losses and memory of ours and plain TRL in turn, rows sorted by what they are worth.

    python bench/gpu_check.py
    python bench/gpu_check.py DEVICE=cpu MODELS=tiny
    python bench/gpu_check.py PREDICT=True

Writes OUT_DIR/results.jsonl as rows end, table.md and errors.log (full tracebacks). A row that fails, hangs or crashes
is a result; the same command again goes on with the rows that are not in results.jsonl. PREDICT=True traces the memory
of all timed rows on a CPU into bench/gpu_predictions.json, which is read on the GPU. Without a GPU it exits with 2.
"""

import os
import sys
import time
from pathlib import Path

started = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import ROOT, UserError, run_main
from common.settings import apply_overrides

DEVICE = "cuda"  # or cpu: all but the device itself, with MODELS=tiny
MODELS = "8B,1.6B"  # of gpu_timing.SHAPES; tiny takes the place of both, with a sixteenth of their tokens
MINUTES: int | float = 8  # no row is begun that would end later
ROWS: str | None = None  # regex of the rows to run: "smoke", "8B lora"; None: all
STEPS = 8  # timed optimizer steps of a run
ROUNDS = 2  # runs of each side, in turn; of the second, as many as there is time for
PREDICT = False  # True: write bench/gpu_predictions.json, and nothing else
OUT_DIR = "out/gpu_check"

if __name__ == "__main__":
    apply_overrides(globals())
    os.environ["HF_HUB_OFFLINE"] = "1"
    if DEVICE == "cpu" or PREDICT:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not PREDICT and "GPU_CHECK_WORKER" not in os.environ:
        from gpu_supervisor import supervise

        sys.exit(supervise(Path(OUT_DIR), MINUTES, started))

import importlib.util
import json
import math
import re

import torch
from gpu_results import REQUIRED, describe, device_name, guarded, line_of, matrix_peak_tflops, table_of
from gpu_supervisor import BEGUN, BROKEN

from common.files import write_atomic

PREDICTIONS = ROOT / "bench" / "gpu_predictions.json"
PACKAGES = {
    "nf4": "bitsandbytes", "int8": "bitsandbytes", "hqq": "hqq", "galore_8bit": "bitsandbytes", "loftq": "bitsandbytes",
    "adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes", "export": "gguf", "liger": "liger_kernel",
}  # fmt: skip
ON_CUDA_ALONE = ("float16", "galore_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "loftq", "offloading", "offload")
ON_CUDA_ALONE += ("cudnn kernels", "liger", "compiled")  # the last would take minutes on a CPU
# Rows by worth: a smoke row, or model, method, tokens, with checkpointing or not; and its seconds on an H100 (guessed).
PLAN = """
smoke lora: 8
8B lora 4096: 45
8B liger 4096: 25
8B nf4 4096: 50
8B dpo 4096: 60
8B galore 4096 checkpointing: 70
8B full 4096 checkpointing: 35
smoke nf4: 5; smoke full: 4; smoke galore: 4; smoke dpo kept: 5; smoke dpo live: 5; smoke resume: 6; smoke chat: 3
smoke export: 5; smoke evaluate: 4; smoke cudnn kernels: 5; smoke liger: 8
1.6B cudnn 4096: 20
1.6B lora 1024: 15; 1.6B compiled 1024: 90; 1.6B nf4 1024: 15; 1.6B dpo 1024: 15; 1.6B galore 1024: 20
1.6B full 1024: 10
smoke int8: 5; smoke hqq: 5; smoke galore_8bit: 4; smoke float16: 4; smoke float32: 4; smoke adamw_bnb_8bit: 4
smoke paged_adamw_8bit: 4; smoke loftq: 5; smoke kl: 4; smoke checkpointing: 4; smoke offloading: 4; smoke unpacked: 4
smoke chat nf4: 3
8B lora 1024: 25; 8B lora 8192 checkpointing: 70
8B nf4 1024: 30; 8B nf4 8192 checkpointing: 80
8B dpo 1024: 30; 8B dpo 8192 checkpointing: 90
1.6B lora 4096: 25; 1.6B nf4 4096: 25; 1.6B dpo 4096: 30; 1.6B galore 4096: 35; 1.6B full 4096: 15
8B galore 1024: 45; 8B full 1024: 20; smoke compile: 60
1.6B lora 8192: 40; 1.6B nf4 8192: 40; 1.6B dpo 8192 checkpointing: 50; 1.6B galore 8192 checkpointing: 50
1.6B full 8192 checkpointing: 25
8B cudnn 4096: 40; 8B lora 4096 checkpointing: 50; 8B offload 4096: 40; 1.6B cudnn 1024: 15
8B galore 8192 checkpointing: 110; 8B full 8192 checkpointing: 60
"""


def main():
    print(describe(), flush=True)
    missing = [name for name in REQUIRED if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"these packages are missing, and every row needs them: {', '.join(missing)}. pip install them."
        )
    if PREDICT:
        write_predictions()
        return
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "DEVICE=cuda: this check needs a CUDA GPU, and torch sees none. DEVICE=cpu MODELS=tiny goes dry."
        )
    folder = Path(OUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    records = read_results(folder / "results.jsonl")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peak = guarded(lambda: {"tflops": matrix_peak_tflops(DEVICE, 8192 if DEVICE == "cuda" else 256)})
    print(f"bf16 matrix products, at the most: {peak.get('tflops', math.nan):.1f} TFLOP/s {peak.get('error', '')}")
    run_rows(folder, records, peak.get("tflops"))
    failed = [r["row"] for r in records if "error" in r or any("error" in s for s in r.get("sides", {}).values())]
    print(f"{len(records)} rows, {len(failed)} with an error: {', '.join(failed) or 'none'}")
    print(f"{time.perf_counter() - started:.0f} s; {folder / 'table.md'}, errors in {folder / 'errors.log'}")


def run_rows(folder: Path, records: list[dict], peak: float | None) -> None:
    """Run what is not in the records and fits into MINUTES, in order; append to the files, print."""
    expected, taken, skipped, left_out = 1.0, 1.0, [], []
    for row, seconds in rows_to_run():
        if any(record["row"] == row for record in records):
            continue
        if reason := cannot_run(row):
            skipped.append({"row": row, "skipped": reason})
            print(line_of(skipped[-1]), flush=True)
            continue
        begun = time.perf_counter()
        left = started + 60 * MINUTES - begun
        if seconds * max(taken / expected, 0.3) > left:
            left_out.append(row)
            continue
        record = {"row": row, "device": device_name(), "peak_tflops": peak}
        write_atomic(folder / BEGUN, json.dumps(record | {"limit": min(5 * seconds, left) + 60}))
        record |= run_row(row, records)
        record["seconds"] = time.perf_counter() - begun
        expected, taken = expected + seconds, taken + record["seconds"]
        records.append(record)
        write_record(folder, record)
        (folder / BEGUN).unlink()
        print(line_of(record), flush=True)
        (folder / "table.md").write_text(table_of(describe(), [*records, *skipped]), encoding="utf-8")
        if "error" in guarded(lambda: {"answer": torch.ones(1, device=DEVICE).item()}):
            print("the device answers no more: the next rows in a new process", flush=True)
            os._exit(BROKEN)
    if left_out:
        print(f"not begun, for want of time: {', '.join(left_out)}. The same command goes on with them.")


def run_row(row: str, records: list[dict]) -> dict:
    """The result of a row: what a smoke row says, or both sides of a timed one; errors are results."""
    if row.startswith("smoke "):
        return guarded(lambda: {"said": importlib.import_module("gpu_smoke").run_smoke(row.removeprefix("smoke "))})
    return guarded(lambda: time_row(row, records))


def time_row(row: str, records: list[dict]) -> dict:
    from gpu_timing import time_work

    work = work_of(row)
    known = [r["sides"]["trl"] for r in records if r.get("peer") == work.peer() and "trl" in r.get("sides", {})]
    end = started + 60 * MINUTES

    def may_go_on(seconds: float) -> bool:
        return time.perf_counter() + 1.2 * seconds < end

    sides = time_work(work, DEVICE, STEPS, ROUNDS, {"trl": known[0]} if known else {}, may_go_on)
    return {"sides": sides, "peer": work.peer(), "predicted": prediction(row), "attention": work.attention(DEVICE)}


def work_of(row: str):
    from gpu_timing import Work

    model, method, length, *checkpointing = row.split()
    return Work(model, method, int(length), bool(checkpointing))


def rows_to_run() -> list[tuple[str, float]]:
    """Names and seconds of the rows that MODELS and ROWS choose."""
    models, chosen = MODELS.replace(" ", "").split(","), {}
    for item in re.split(r"[;\n]+", PLAN.strip()):
        row, _, seconds = item.strip().partition(": ")
        model, *rest = row.split()
        if model != "smoke" and "tiny" in models:
            row = " ".join(["tiny", rest[0], str(int(rest[1]) // 16), *rest[2:]])
        elif model != "smoke" and model not in models:
            continue
        if ROWS is None or re.search(ROWS, row):
            chosen.setdefault(row, float(seconds))
    return list(chosen.items())


def cannot_run(row: str) -> str | None:
    """Why a row is skipped on this machine."""
    kind, _, name = row.partition(" ")
    method = name if kind == "smoke" else name.split()[0]
    package = PACKAGES.get(method)
    if package and not importlib.util.find_spec(package):
        return f"the package {package} is missing"
    return "needs CUDA" if DEVICE == "cpu" and method in ON_CUDA_ALONE else None


def read_results(file: Path) -> list[dict]:
    """Results of earlier commands on this kind of device."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if record["device"] == device_name()]


def write_record(folder: Path, record: dict) -> None:
    """Append a result to results.jsonl, and its tracebacks to errors.log instead."""
    parts = [record, *record.get("sides", {}).values()]
    with (folder / "errors.log").open("a", encoding="utf-8") as log:
        for part in parts:
            if trace := part.pop("traceback", None):
                log.write(f"== {record['row']}\n{trace}\n")
    with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
        results.write(json.dumps(record) + "\n")


def write_predictions() -> None:
    """Trace our side of every timed row of the plan as on CUDA, on this CPU."""
    import gpu_timing

    found = json.loads(PREDICTIONS.read_text(encoding="utf-8")) if PREDICTIONS.exists() else {}
    for row, _ in rows_to_run():
        if row.startswith("smoke "):
            continue
        if reason := cannot_run(row):
            print(f"{row}: {reason}")
        else:
            work, begun = work_of(row), time.perf_counter()
            found[row] = {"attention": work.attention("cuda"), "gib": round(gpu_timing.predict(work), 3)}
            print(f"{row}: {found[row]} ({time.perf_counter() - begun:.0f} s)", flush=True)
            PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def prediction(row: str) -> dict | None:
    """What was traced for a row; None where nothing was."""
    return json.loads(PREDICTIONS.read_text(encoding="utf-8")).get(row) if PREDICTIONS.exists() else None


if __name__ == "__main__":
    run_main(main)

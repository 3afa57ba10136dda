"""Several processes that train one model; only the first writes files and prints."""

import functools
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState

from common import cuda
from common.cli import RANK, explain


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def engine() -> str | None:
    """How the model is held: None by one process, "ddp" whole by each, "fsdp" and "zero3" in parts.

    "zero1" and "zero2": whole, and in parts what the optimizer keeps.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            stage = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        return f"zero{stage}"
    return "ddp" if count() > 1 else None


def holds_parts() -> bool:
    return engine() in ("fsdp", "zero3")


@functools.cache
def device() -> torch.device:
    """The device of this process, a GPU that CUDA (or ROCm) sees or the CPU; the first call joins the others.

    A script that computes calls it before all else: it says why a GPU is not used. UserError for one that cannot be.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        cuda.check_kernels(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    elif problem := cuda.explain_idle_gpu():
        print(problem, file=sys.stderr)
    for name, backend in (("MPS", torch.backends.mps), ("XPU", torch.xpu)):
        if backend.is_available() and not on_gpu:
            print(f"{name} is not used: nobody has tried these scripts on it. The CPU computes.", file=sys.stderr)
            backend.is_available = lambda: False  # the libraries each ask for themselves: peft would load to it
    # The others wait while the first prepares data or writes to a slow disk.
    patience = {"timeout": timedelta(hours=6)} if count() > 1 else {}
    return PartialState(cpu=not on_gpu, **patience).device


def enable_fsdp_on_cpu() -> None:
    """Let FSDP work on CPUs, where accelerate 1.15 uses DDP; before a trainer is made."""
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.MULTI_GPU


def gather(thing) -> list:
    """What each process gives, by rank. All have to call it."""
    things = [thing] * count()
    if count() > 1:
        device()
        dist.all_gather_object(things, thing)
    return things


def on_first(function):
    """What the function returns or raises in the first process, all return or raise."""
    gather(None)  # no other is still busy with what it may change
    result = error = None
    if not RANK:
        try:
            result = function()
        except (OSError, SystemExit) as raised:  # of which callers catch some
            error = raised
        except Exception as raised:
            error = explain(raised)  # the others get no traceback
    result, error = gather((result, error))[0]
    if error:
        raise error
    return result

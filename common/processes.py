"""Several processes, started by torchrun or accelerate, that train one model: their number, and what they agree on.

Only the first one (rank 0) writes files and prints.
"""

import functools
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.utils.data import Sampler

from common.settings import RANK


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def engine() -> str | None:
    """How the model is held. None: by one process; "ddp": whole by each; "fsdp", "zero3": in parts; "zero1", "zero2":
    whole, and in parts what the optimizer keeps."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            stage = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        return f"zero{stage}"
    return "ddp" if count() > 1 else None


def holds_parts() -> bool:
    """Whether a process holds a part of the model only."""
    return engine() in ("fsdp", "zero3")


@functools.cache
def device() -> torch.device:
    """The device of this process; the first call joins the others."""
    if count() == 1:
        return PartialState().device
    # The others wait while the first prepares data or writes to a slow disk.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6)).device


def share_out() -> None:
    """Let FSDP work on CPUs, where accelerate 1.15 goes on with DDP and says nothing; before a trainer is made."""
    state = PartialState()
    if engine() == "fsdp" and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def gather(thing) -> list:
    """What each process gives, by rank. All of them have to call it."""
    if count() == 1:
        return [thing]
    device()
    things = [None] * count()
    dist.all_gather_object(things, thing)
    return things


def on_first(function):
    """What the function returns in the first process, handed to all; what it raises there, all raise."""
    gather(None)  # no other is still busy with what it may change
    result = error = None
    if not RANK:
        try:
            result = function()
        except (Exception, SystemExit) as raised:
            error = raised
    result, error = gather((result, error))[0]
    if error:
        raise error
    return result


class EvenSampler(Sampler):
    """Random numbers below `rows`, in the order that one process takes them, and then those of `blanks` blank rows.

    Processes take turns batch by batch, and accelerate would fill the last turn with the first rows a second time.
    """

    def __init__(self, rows: int, blanks: int, seed: int):
        self.rows, self.blanks, self.seed, self.epoch = rows, blanks, seed, 0

    def __len__(self):
        return self.rows + self.blanks

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's SeedableRandomSampler
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, len(self))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def with_blanks(dataset, blank: dict, share: int):
    """The dataset with blank rows at its end, so that its length is a multiple of `share`."""
    from datasets import Dataset, concatenate_datasets  # slow import

    if not (missing := -len(dataset) % share):
        return dataset
    row = {name: blank[name] for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_list([row] * missing, features=dataset.features)])

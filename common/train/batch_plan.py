"""Fit a run into the memory there is: micro batch and checkpointing chosen by tracing, and smaller ones on failure."""

import bisect
import functools
import gc
import sys
import traceback
from dataclasses import dataclass, replace

import torch

from common import distributed, hardware
from common.cli import UserError
from common.files import GIB
from common.train import memory
from common.train.config import ZERO_BUCKET

# A micro step takes as long as its tokens and so many more: seed 000's runs 8 to 10 (1.6 B, 4 bits, RTX 4060, rows of
# 512 tokens) took 1,205, 995 and 922 s with 1, 2 and 3 rows. A CPU is busy with one row.
OVERHEAD_TOKENS = 274

USEFUL_TOKENS = 4096  # in a micro step: beyond, little is won, and attention over packed rows grows quadratically

# cuBLAS keeps a workspace for each thread that computes, forward and backward: 32 MiB on Hopper, 8 on other GPUs
# (CUBLAS_WORKSPACE_CONFIG in torch's documentation).
CUBLAS_WORKSPACE = 2 * 32 * 2**20

# Of the memory there is, for what is predicted: some is lost between blocks, and the trace may err. On the CPU the C
# library keeps what was freed: the demo came to hold 3.1 GiB where 1.8 were predicted (runs.md).
MARGIN = {"cuda": 0.92, "cpu": 0.6}

RESTARTS = 3  # each with half the micro batch


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is computed: rows at a time, micro steps a step, and whether activations are computed twice."""

    rows: int
    accumulation: int
    checkpointing: bool
    predicted_peak_gib: float | None = None  # None where the architecture cannot be traced

    def __str__(self):
        steps = f" in {self.accumulation} micro steps" if self.accumulation > 1 else ""
        rows = f"{self.rows} row{'s' * (self.rows > 1)} at a time{steps}"
        return rows + (", activations computed twice" if self.checkpointing else "")

    def settings(self) -> dict:
        return dict(
            PER_DEVICE_TRAIN_BATCH_SIZE=self.rows,
            GRADIENT_ACCUMULATION_STEPS=self.accumulation,
            GRADIENT_CHECKPOINTING=self.checkpointing,
        )

    def smaller(self, may_checkpoint: bool) -> "BatchPlan | None":
        """The same batch in less memory; None where there is no way."""
        if self.rows > 1:  # half, or what divides an odd number
            rows = max(n for n in range(1, self.rows // 2 + 1) if self.rows % n == 0)
            return BatchPlan(rows, self.accumulation * self.rows // rows, self.checkpointing)
        return BatchPlan(self.rows, self.accumulation, True) if may_checkpoint and not self.checkpointing else None


def plan_batch(settings: dict, build, make_optimizer, step: memory.Step, checkpoint=None) -> BatchPlan:
    """The fastest way to compute a batch in the memory there is.

    What PER_DEVICE_TRAIN_BATCH_SIZE and GRADIENT_CHECKPOINTING leave open is chosen, the batch as a whole kept. build:
    makes (model, base or None) of a quantisation; make_optimizer, step: as for `trace`. checkpoint: what the run goes
    on from, whose choice is kept. Raises UserError when nothing fits.
    """
    batch = batch_of_a_process(settings)
    rows, checkpointing = settings["PER_DEVICE_TRAIN_BATCH_SIZE"], settings["GRADIENT_CHECKPOINTING"]
    before = checkpoint and checkpoint[1].get("fit")
    if before and before["PER_DEVICE_TRAIN_BATCH_SIZE"] * before["GRADIENT_ACCUMULATION_STEPS"] == batch:
        rows = before["PER_DEVICE_TRAIN_BATCH_SIZE"]
        checkpointing = before["GRADIENT_CHECKPOINTING"] if checkpointing is None else checkpointing
    limit = min(distributed.gather(hardware.memory_limit(settings["MEMORY_LIMIT"], step.device)))
    usable = limit * MARGIN[step.device]
    outside = round(hardware.rss_gib() * GIB) if step.device == "cpu" else CUBLAS_WORKSPACE
    outside = {"outside of tensors": max(distributed.gather(outside))}  # all have to choose the same
    quantization = settings.get("QUANTIZATION")

    @functools.cache
    def parts(rows: int, checkpointing: bool, quantization=quantization) -> dict[str, int]:
        this = replace(step, rows=rows, checkpointing=checkpointing, accumulates=batch > rows)
        needed = memory.trace(*build(quantization), make_optimizer, this)
        if distributed.count() > 1:
            needed = per_process(needed, *build(quantization), step.dtype, quantization)
        return needed | outside

    def peak(*choice) -> int:
        return sum(parts(*choice).values())

    try:
        most = max(1, USEFUL_TOKENS // step.length) if step.device == "cuda" else 1
        possible = [rows] if rows else [n for n in range(1, most + 1) if batch % n == 0]
        fits: list[tuple[int, bool]] = []  # (rows, checkpointing)
        for again in (False, True) if checkpointing is None else (checkpointing,):
            if (possible[-1], False) not in fits:  # the fastest of all
                fits += [(rows, again) for rows in largest(possible, lambda n, c=again: peak(n, c) <= usable)]
        if not fits:
            fits = [(possible[0], checkpointing is not False)]
            if settings["PER_DEVICE_TRAIN_BATCH_SIZE"] is None and peak(*fits[0]) > limit:
                raise too_large(settings, fits[0], peak(*fits[0]), limit)
            print("memory: this may be too little, but is tried", file=sys.stderr)
    except UserError:
        raise
    except Exception as error:  # from the code of any architecture, on tensors without data
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error}, {where.filename}:{where.lineno}"
        print(f"memory could not be predicted ({told})", file=sys.stderr)
        return BatchPlan(rows or 1, batch // (rows or 1), bool(checkpointing))
    rows, checkpointing = min(fits, key=lambda fit: relative_time(fit[0] * step.length, fit[1], step))
    fit = BatchPlan(rows, batch // rows, checkpointing, peak(rows, checkpointing) / GIB)
    print(f"memory: {fit}: {describe(parts(rows, checkpointing))}; {usable / GIB:.2f} can be used")
    # Where the 16-bit weights alone are larger, there is no need to trace.
    if quantization and sum(p.nbytes for p in build(None)[0].parameters()) < peak(rows, checkpointing):
        if (other := peak(rows, checkpointing, None)) < peak(rows, checkpointing):
            print(f"memory: QUANTIZATION=None would need less, {other / GIB:.2f} GiB", file=sys.stderr)
    return fit


def batch_of_a_process(settings: dict) -> int:
    """Rows of a step in each process; with PER_DEVICE_TRAIN_BATCH_SIZE=None, processes share those of one."""
    rows, per_device = settings["GRADIENT_ACCUMULATION_STEPS"], settings["PER_DEVICE_TRAIN_BATCH_SIZE"]
    if per_device:
        each = rows * per_device
    else:
        each = -(-rows // distributed.count())
        if each * distributed.count() != rows:
            print(
                f"GRADIENT_ACCUMULATION_STEPS={rows} is no multiple of {distributed.count()} processes", file=sys.stderr
            )
    if distributed.count() > 1:
        whole = each * distributed.count()
        print(f"{distributed.count()} processes ({distributed.engine()}), {each} rows each: a batch of {whole}")
    return each


def per_process(parts: dict[str, int], model, base, dtype: torch.dtype, quantization: str | None) -> dict[str, int]:
    """The bytes of a process, of those that one alone would need: model and base as for `trace`, which has used up its
    own."""
    engine, number = distributed.engine(), distributed.count()
    if engine == "ddp":
        return parts | {"exchange": parts["gradients"]}  # averaged in a second copy
    trained = [p for p in model.parameters() if p.requires_grad]
    # Both engines train 16-bit weights in float32: FSDP by making them so, DeepSpeed beside them.
    wider = 4 // min(p.itemsize for p in trained)
    parts = parts | {kind: parts[kind] * wider // number for kind in ("gradients", "optimizer states")}
    frozen = sum(p.nbytes for p in base.parameters()) if base is not None else 0  # KL_WEIGHT's, which each has whole
    whole = parts["weights"] - frozen
    if engine != "fsdp":
        parts["exchange"] = 4 * ZERO_BUCKET
        if dtype != torch.float32:
            parts["float32 weights"] = 4 * sum(p.numel() for p in trained) // number
    if distributed.holds_parts():
        layers = [
            sum(p.nbytes for p in layer.parameters())
            for layer in max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        ]
        parts["weights"] = whole * (wider if engine == "fsdp" else 1) // number + frozen
        # Embeddings, head, and a layer with the next one.
        parts["gathered"] = sum(p.nbytes for p in model.parameters()) - sum(layers) + 2 * max(layers)
    if engine == "zero3" or engine == "fsdp" and quantization:  # whole on each device, before it is shared out
        parts["loading"] = max(0, whole + frozen - sum(parts.values()))
    return parts


def largest(possible: list, fits) -> list:
    """The largest of ascending values that fits, alone in a list; no value when none does. More never needs less."""
    number = bisect.bisect_left(possible, True, key=lambda value: not fits(value))
    return possible[:number][-1:]


def relative_time(tokens: int, checkpointing: bool, step: memory.Step) -> float:
    """Of a token in micro steps of so many: forward is half of an adapter's work, a third where all weights learn."""
    again = checkpointing / (3 if step.full else 2)
    return (1 + again) * (1 + (OVERHEAD_TOKENS / tokens if step.device == "cuda" else 0))


def describe(parts: dict[str, int]) -> str:
    named = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in parts.items() if size >= GIB / 200)
    return f"{sum(parts.values()) / GIB:.2f} GiB predicted ({named})"


def too_large(settings: dict, smallest: tuple[int, bool], peak: float, limit: float) -> UserError:
    four_bits = "" if settings.get("QUANTIZATION", "full") else "QUANTIZATION=nf4, "
    return UserError(
        f"MODEL={settings['MODEL']} MAX_LENGTH={settings['MAX_LENGTH']}: one row at a time, with "
        f"GRADIENT_CHECKPOINTING={smallest[1]}, needs {peak / GIB:.2f} GiB; there are {limit / GIB:.2f} GiB "
        f"(MEMORY_LIMIT={settings['MEMORY_LIMIT']}). Try a smaller MAX_LENGTH, {four_bits}or a smaller model; "
        "`python estimate_memory.py` shows what fits. PER_DEVICE_TRAIN_BATCH_SIZE=1 tries all the same."
    )


def restart_smaller(train, fit: BatchPlan, settings: dict):
    """Call train(fit); where memory runs out, again with half the micro batch and the same batch, RESTARTS times."""
    for left in reversed(range(RESTARTS + 1)):
        try:
            return train(fit)
        except Exception as error:
            if not hardware.is_out_of_memory(error):
                raise
            smaller = fit.smaller(may_checkpoint=settings["GRADIENT_CHECKPOINTING"] is None)
            if distributed.count() > 1:
                smaller = None  # the others do not know of it
            if smaller is None or not left:
                raise UserError(
                    f"out of memory with {fit}: {str(error).splitlines()[0]} Lower MAX_LENGTH={settings['MAX_LENGTH']} "
                    "or see `python estimate_memory.py --help`."
                ) from error
            print(f"out of memory with {fit}; starting again with {smaller}", file=sys.stderr)
            fit = smaller
        gc.collect()  # what the frames of the error held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

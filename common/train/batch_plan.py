"""The batch plan: rows at once and gradient checkpointing, chosen by tracing what fits into memory."""

import bisect
import functools
import gc
import math
import sys
import traceback
from dataclasses import dataclass, replace

import torch

from common import distributed, hardware
from common.cli import UserError
from common.files import GIB
from common.train.memory import Step, trace
from common.train.parallel import ZERO_BUCKET, EvenSampler

# A micro step takes as long as its tokens and so many more: seed 000's runs 8 to 10 (1.6 B, 4 bits, RTX 4060, rows of
# 512 tokens) took 1,205, 995 and 922 s with 1, 2 and 3 rows. CPU: docs/benchmarks.md, pairs.
OVERHEAD_TOKENS = {"cuda": 274, "cpu": 40}
# In a micro step: beyond, little is won, and on a GPU attention over packed rows grows quadratically.
USEFUL_TOKENS = {"cuda": 4096, "cpu": 1024}
# cuBLAS keeps a workspace for each thread that computes, forward and backward: 32 MiB on Hopper, 8 on other GPUs
# (CUBLAS_WORKSPACE_CONFIG in torch's documentation).
CUBLAS_WORKSPACE = 2 * 32 * 2**20
# Share of the memory that a prediction may take: some is lost between blocks, and the trace may err. On the CPU the C
# library keeps what was freed: the demo came to hold 3.1 GiB where 1.8 were predicted (docs/benchmarks.md).
MARGIN = {"cuda": 0.92, "cpu": 0.6}
RESTARTS = 3  # each with half the micro batch


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of a step are computed: rows at once, micro steps, and gradient checkpointing."""

    rows: int
    accumulation: int
    checkpointing: bool
    predicted_peak_gib: float | None = None  # None where the architecture cannot be traced

    def __str__(self):
        steps = f" in {self.accumulation} micro steps" if self.accumulation > 1 else ""
        rows = f"{self.rows} row{'s' * (self.rows > 1)} at a time{steps}"
        return rows + (", with gradient checkpointing" if self.checkpointing else "")

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


def rows_per_step(settings: dict) -> tuple[int, int | None]:
    """(rows of a step on each device, rows at once where the settings fix them).

    BATCH_SIZE is for all devices together. Without it, PER_DEVICE_TRAIN_BATCH_SIZE and GRADIENT_ACCUMULATION_STEPS
    decide, as in the libraries; with it, they must divide it. Raises UserError where they do not.
    """
    batch, devices = settings["BATCH_SIZE"], distributed.count()
    rows, steps = settings["PER_DEVICE_TRAIN_BATCH_SIZE"], settings["GRADIENT_ACCUMULATION_STEPS"]
    if batch is None:
        return (rows or 1) * (steps or 1), rows or (1 if steps else None)
    if batch % (devices * (rows or 1) * (steps or 1)) or (rows and steps and rows * steps * devices != batch):
        raise UserError(
            f"BATCH_SIZE={batch}: not {devices} devices x PER_DEVICE_TRAIN_BATCH_SIZE={rows} x "
            f"GRADIENT_ACCUMULATION_STEPS={steps}. Leave the last two at None, or change BATCH_SIZE."
        )
    return batch // devices, rows or (batch // devices // steps if steps else None)


def plan_batch(settings: dict, build, make_optimizer, step: Step, checkpoint=None) -> BatchPlan:
    """The fastest way to compute a batch in the memory there is.

    build: makes (model, base or None) of a quantisation on the meta device; make_optimizer, step: as for `trace`, with
    all pairs of the run. checkpoint: what the run resumes from, whose plan is kept. Raises UserError when nothing fits.
    """
    batch, fixed_rows = rows_per_step(settings)
    if (number := distributed.count()) > 1:
        print(f"{number} processes ({distributed.engine()}), {batch} rows each: a batch of {batch * number}")
    checkpointing, quantization = settings["GRADIENT_CHECKPOINTING"], settings.get("QUANTIZATION")
    before = plan_of(checkpoint, batch)
    rows = before.get("PER_DEVICE_TRAIN_BATCH_SIZE", fixed_rows)
    checkpointing = before.get("GRADIENT_CHECKPOINTING") if checkpointing is None else checkpointing
    limit = min(distributed.gather(hardware.memory_limit(settings["MEMORY_LIMIT"], step.device)))
    outside = round(hardware.rss_gib() * GIB) if step.device == "cpu" else CUBLAS_WORKSPACE
    outside = max(distributed.gather(outside))  # all have to choose the same

    @functools.cache
    def parts(rows: int, checkpointing: bool, quantization=quantization) -> dict[str, int]:
        pairs, accumulates = largest_micro_step(step.pairs, rows, batch * number // rows, settings), batch > rows
        micro_step = replace(step, rows=rows, checkpointing=checkpointing, accumulates=accumulates, pairs=pairs)
        needed = trace(*build(quantization), make_optimizer, micro_step)
        if number > 1:
            needed = per_process(needed, *build(quantization), step.dtype, quantization)
        return needed | {"outside of tensors": outside}

    try:
        plan = choose_plan(batch, rows, checkpointing, parts, limit, step)
        if quantization:
            compare_with_16_bits(plan, parts, build)
    except UserError:
        raise
    except Exception as error:  # from the code of any architecture, on tensors without data
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}, {where.filename}:{where.lineno}"
        print(f"memory could not be predicted ({reason})", file=sys.stderr)
        return BatchPlan(rows or 1, batch // (rows or 1), bool(checkpointing))
    if plan.predicted_peak_gib * GIB > limit and fixed_rows is None:
        raise too_large(settings, plan, limit)
    return plan


def plan_of(checkpoint, batch: int) -> dict:
    """BatchPlan.settings of the run that is resumed, where it computes the same batch; else nothing."""
    plan = checkpoint[1].get("plan") if checkpoint else None
    is_same = plan and plan["PER_DEVICE_TRAIN_BATCH_SIZE"] * plan["GRADIENT_ACCUMULATION_STEPS"] == batch
    return plan if is_same else {}


def compare_with_16_bits(plan: BatchPlan, parts, build) -> None:
    """Say where the quantised model needs more memory than the 16-bit one, as small models do."""
    peak = plan.predicted_peak_gib * GIB
    if sum(p.nbytes for p in build(None)[0].parameters()) < peak:  # else there is no need to trace
        if (other := sum(parts(plan.rows, plan.checkpointing, None).values())) < peak:
            print(f"memory: QUANTIZATION=None would need less, {other / GIB:.2f} GiB", file=sys.stderr)


def choose_plan(batch: int, rows: int | None, checkpointing: bool | None, parts, limit: float, step: Step) -> BatchPlan:
    """The fastest plan that fits into MARGIN of the limit, else the one that needs least.

    rows, checkpointing: None where they are to be chosen. parts: bytes by kind for (rows, checkpointing).
    """
    usable = limit * MARGIN[step.device]
    most = max(1, USEFUL_TOKENS[step.device] // step.length)
    possible = [rows] if rows else [n for n in range(1, most + 1) if batch % n == 0]
    plans = []
    for again in (False, True) if checkpointing is None else (checkpointing,):
        if not plans or plans[0].rows < possible[-1]:  # without checkpointing and with all rows: the fastest
            for n in largest(possible, lambda n, again=again: sum(parts(n, again).values()) <= usable):
                plans.append(BatchPlan(n, batch // n, again))
    fits = bool(plans)
    plans = plans or [BatchPlan(possible[0], batch // possible[0], checkpointing is not False)]
    plan = min(plans, key=lambda plan: relative_time(plan.rows * step.length, plan.checkpointing, step))
    kinds = parts(plan.rows, plan.checkpointing)
    plan = replace(plan, predicted_peak_gib=sum(kinds.values()) / GIB)
    named = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items() if size >= GIB / 200)
    usable = f"{usable / GIB:.2f} are usable" + ("" if fits else ": this may be too little")
    print(f"memory: {plan}: {plan.predicted_peak_gib:.2f} GiB predicted ({named}); {usable}")
    return plan


def per_process(parts: dict[str, int], model, base, dtype: torch.dtype, quantization: str | None) -> dict[str, int]:
    """The bytes of a process, of those that one alone would need. model, base: as for `trace`, not yet traced."""
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
        modules = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in modules]
        parts["weights"] = whole * (wider if engine == "fsdp" else 1) // number + frozen
        # Embeddings, head, and a layer with the next one.
        parts["gathered"] = sum(p.nbytes for p in model.parameters()) - sum(layers) + 2 * max(layers)
    if engine == "zero3" or engine == "fsdp" and quantization:  # whole on each device, before it is sharded
        parts["loading"] = max(0, whole + frozen - sum(parts.values()))
    return parts


def largest_micro_step(pairs: tuple, rows: int, accumulation: int, settings: dict) -> tuple:
    """The pairs of the micro step with the most tokens, of those that training will take, in its order."""
    if not pairs:
        return ()
    sampler, found = EvenSampler(len(pairs), 0, settings["SEED"]), []
    steps = settings["MAX_STEPS"] or math.ceil(settings["NUM_TRAIN_EPOCHS"] * len(pairs) / rows / accumulation)
    while len(found) < steps * accumulation:
        order = [pairs[number] for number in sampler]
        found += [order[i : i + rows] for i in range(0, len(order), rows)]
        sampler.set_epoch(sampler.epoch + 1)
    taken = found[: steps * accumulation]
    return tuple(max(taken, key=lambda micro_step: sum(sum(pair.shape) for pair in micro_step)))


def largest(possible: list, fits) -> list:
    """The largest of ascending values that fits, alone in a list; no value when none does. More never needs less."""
    number = bisect.bisect_left(possible, True, key=lambda value: not fits(value))
    return possible[:number][-1:]


def relative_time(tokens: int, checkpointing: bool, step: Step) -> float:
    """Time of a token in micro steps of so many: forward is half the work of LoRA, a third of full fine-tuning."""
    again = checkpointing / (3 if step.full else 2)
    return (1 + again) * (1 + OVERHEAD_TOKENS[step.device] / tokens)


def too_large(settings: dict, plan: BatchPlan, limit: float) -> UserError:
    four_bits = "" if settings.get("QUANTIZATION", "full") else "QUANTIZATION=nf4, "
    return UserError(
        f"MODEL={settings['MODEL']} MAX_LENGTH={settings['MAX_LENGTH']}: one row at a time, with "
        f"GRADIENT_CHECKPOINTING={plan.checkpointing}, needs {plan.predicted_peak_gib:.2f} GiB; there are "
        f"{limit / GIB:.2f} GiB "
        f"(MEMORY_LIMIT={settings['MEMORY_LIMIT']}). Try a smaller MAX_LENGTH, {four_bits}or a smaller model; "
        "`python estimate_memory.py` shows what fits. PER_DEVICE_TRAIN_BATCH_SIZE=1 tries all the same."
    )


def restart_smaller(train, plan: BatchPlan, settings: dict):
    """Call train(plan); where memory runs out, again with half the rows at once and the same batch, RESTARTS times."""
    for left in reversed(range(RESTARTS + 1)):
        try:
            return train(plan)
        except Exception as error:
            if not hardware.is_out_of_memory(error):
                raise
            smaller = plan.smaller(may_checkpoint=settings["GRADIENT_CHECKPOINTING"] is None)
            if distributed.count() > 1:
                smaller = None  # the others do not know of it
            if smaller is None or not left:
                raise UserError(
                    f"out of memory with {plan}: {str(error).splitlines()[0]} Lower "
                    f"MAX_LENGTH={settings['MAX_LENGTH']}, or see `python estimate_memory.py --help`."
                ) from error
            print(f"out of memory with {plan}; starting again with {smaller}", file=sys.stderr)
            plan = smaller
        gc.collect()  # what the frames of the error held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

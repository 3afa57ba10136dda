"""Optimizers and the learning-rate schedule."""

import dataclasses
import math
import sys
from types import SimpleNamespace

from peft.optimizers import create_loraplus_optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments


def optimizer_class(args, model=None) -> tuple:
    """The optimizer that OPTIM names and its arguments; of LoRA+, what Trainer calls a factory.

    args: TrainingArguments, or what has the same fields; its lora_plus_ratio, where it has one, is the learning rate of
    LoRA's B matrices over that of all others (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
    """
    if args.optim == "adamw_anyprecision":
        from optimi import AdamW  # transformers' own wants torchdistx, which is abandoned

        kind, options = AdamW, dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
        options |= dict(lr=args.learning_rate, weight_decay=args.weight_decay)
    else:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    ratio = getattr(args, "lora_plus_ratio", None)
    if ratio is None:
        return kind, options
    # Left to peft, adapters on the embeddings would learn at 1e-6 whatever LEARNING_RATE is, and nothing would decay.
    options |= dict(loraplus_lr_embedding=args.learning_rate, loraplus_weight_decay=args.weight_decay)
    return lambda: make_lora_plus, options | dict(optimizer_cls=kind, loraplus_lr_ratio=ratio)


def make_lora_plus(model, **options):
    optimizer = create_loraplus_optimizer(model, **options)
    # FSDP does not resume with more than one group that is empty.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def make_optimizer(name: str, model, lora_plus_ratio: float | None = None):
    """The optimizer that transformers knows by this name, over the trained parameters of a model to be traced."""
    # Only the defaults of TrainingArguments: made for real, it would choose a device for the whole process.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    kind, options = optimizer_class(SimpleNamespace(**defaults | dict(optim=name, lora_plus_ratio=lora_plus_ratio)))
    if lora_plus_ratio:
        return kind()(model, **options)
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def make_schedule(optimizer, steps: int, settings: dict) -> LambdaLR:
    """LR_SCHEDULER over so many steps: linear warm-up, then down to MIN_LR."""
    name, floor = settings["LR_SCHEDULER"], settings["MIN_LR"] / settings["LEARNING_RATE"]
    warmup = settings.get("WARMUP_STEPS")
    if warmup is None:
        warmup = math.ceil(settings["WARMUP_RATIO"] * steps)
    elif warmup >= steps:
        print(f"WARMUP_STEPS={warmup}: the run has {steps} steps and never reaches LEARNING_RATE", file=sys.stderr)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, name, warmup, floor))


def set_peak(schedule: LambdaLR, optimizer, peak: float) -> None:
    """Give a schedule and its optimizer, as they were loaded, another peak learning rate."""
    old = schedule.base_lrs[0]
    # LORA_PLUS_RATIO gives groups rates of their own; all that are the same as then stay so to the last bit.
    schedule.base_lrs = [peak if rate == old else rate * (peak / old) for rate in schedule.base_lrs]
    parts = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, rate, factor in parts:
        group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def learning_rate_factor(step: int, steps: int, name: str, warmup: int, floor: float) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warm-up, then down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]
    return floor + (1 - floor) * falling

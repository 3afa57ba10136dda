"""Optimizers and the learning-rate schedule."""

import dataclasses
import math
from types import SimpleNamespace

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments


def optimizer_class(args, model=None) -> tuple[type, dict]:
    """The optimizer that OPTIM names and its arguments. args: TrainingArguments, or what has the same fields."""
    if args.optim != "adamw_anyprecision":
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    from optimi import AdamW  # transformers' own wants torchdistx, which is abandoned

    betas = args.adam_beta1, args.adam_beta2
    return AdamW, dict(lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)


def make_optimizer(name: str, model):
    """The optimizer that transformers knows by this name, over the trained parameters of a model to be traced."""
    # Only the defaults of TrainingArguments: made for real, it would choose a device for the whole process.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    kind, options = optimizer_class(SimpleNamespace(**defaults | {"optim": name}))
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def make_schedule(optimizer, steps: int, settings: dict) -> LambdaLR:
    """LR_SCHEDULER over so many steps: linear warm-up, then down to MIN_LR."""
    warmup, floor = math.ceil(settings["WARMUP_RATIO"] * steps), settings["MIN_LR"] / settings["LEARNING_RATE"]
    name = settings["LR_SCHEDULER"]
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, name, warmup, floor))


def learning_rate_factor(step: int, steps: int, name: str, warmup: int, floor: float) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warm-up, then down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]
    return floor + (1 - floor) * falling

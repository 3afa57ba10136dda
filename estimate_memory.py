"""Memory of a training step, traced without a GPU and without weights.

    python estimate_memory.py MODEL=stabilityai/stablelm-2-1_6b METHOD=qlora
    python estimate_memory.py MODEL=meta-llama/Meta-Llama-3-8B METHOD=qlora FIT=24GiB

Prints a table by purpose; with FIT, what fits. Of a hub model only the config is loaded.
"""

from common.cli import UserError, run_main
from common.model.location import check_models
from common.settings import apply_overrides

# Model
MODEL = "smollm2-135m-instruct"  # hub id, folder (a config.json is enough), or this embedded model
METHOD = "lora"  # full, lora, qlora (NF4 base), int8 (LoRA on an int8 base), hqq-1bit to hqq-4bit, galore
DTYPE: str | None = None  # of weights and compute; None: as training on DEVICE here; bfloat16 if it is not here
LORA_R = 16  # rank of adapters, on every linear layer but the head
GALORE_RANK = 128  # of gradients and moments
OPTIM = "adamw_torch_fused"  # METHOD=galore has its own; paged ones keep their states elsewhere
# Step
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # rows at once
GRADIENT_ACCUMULATION_STEPS = 1  # above 1, gradients are there from the first layer on
MAX_LENGTH = 1024  # tokens of a row; of each answer of a pair
LOSS: str | None = None  # of preferences: dpo, ipo, simpo, orpo or kto, whose rows are pairs; None: of chats
REFERENCE = "kept"  # of preferences: live, computed at each step, or kept
PACKING = True  # rows of several chats, as one
GRADIENT_CHECKPOINTING: bool | None = None  # None: both
ACTIVATION_OFFLOADING = False  # True: activations wait in main memory for the backward pass; CUDA
KL_WEIGHT = 0.0  # above 0: the base computes, too
DEVICE = "cuda"  # cuda or cpu: kernels and autocast differ
# Question
FIT: str | None = None  # "8GiB": print what fits in so much, the fastest first

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)

import functools
from dataclasses import replace

import torch

from common import hardware
from common.files import GIB
from common.model import adapters, load, location
from common.model.attention import choose_attention
from common.model.liger import apply_kernels, choose_kernels
from common.model.quantize import BITS, BITSANDBYTES, report_unquantized
from common.train import batch_plan, galore, memory, optimizers
from common.train.meta_model import empty_model
from common.train.preference import FREE
from common.train.storage import KINDS

QUANTIZATIONS = {"qlora": "nf4", "int8": "int8"} | {name: name for name in BITS}  # by METHOD


def main():
    if ACTIVATION_OFFLOADING and DEVICE != "cuda":
        raise UserError(f"ACTIVATION_OFFLOADING=True DEVICE={DEVICE}: activations are in main memory. Set it to False.")
    if LOSS and (METHOD == "galore" or METHOD == "full" and has_live_reference()):
        raise UserError(f"METHOD={METHOD} LOSS={LOSS} REFERENCE={REFERENCE}: not trained so. Take METHOD=lora.")
    size = hardware.read_size(FIT) if FIT else None
    source = location.locate(MODEL)
    config = load.load_config(source)
    load.check_length(source, MAX_LENGTH)
    quantization = load.find_quantization(source, QUANTIZATIONS.get(METHOD), f"METHOD={METHOD}")
    if quantization and METHOD in ("full", "galore"):
        raise UserError(f"METHOD={METHOD}: MODEL={source.name} is quantised ({quantization}). Take METHOD=lora.")
    if quantization not in (None, *BITSANDBYTES, *BITS):
        raise UserError(
            f"MODEL={source.name} is quantised ({quantization}), which is not traced. Name the 16-bit model."
        )
    model, _ = build(config, quantization)
    if quantization:
        report_unquantized(model, quantization)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optim = "galore" if METHOD == "galore" else OPTIM
    form = str(choose_dtype()).removeprefix("torch.") + choose_kernels(None, config, choose_dtype(), device=DEVICE)[1]
    print(f"{MODEL}: {load.count_weights(config):,} weights; {METHOD} trains {trained:,}, {optim}, {form}")
    rows = PER_DEVICE_TRAIN_BATCH_SIZE * sequences_of_row()
    step = memory.Step(rows, MAX_LENGTH, PACKING, 0.0 if LOSS else KL_WEIGHT, choose_dtype(), DEVICE,
                       METHOD in ("full", "galore"), accumulates=GRADIENT_ACCUMULATION_STEPS > 1,
                       offloads=ACTIVATION_OFFLOADING, has_reference=has_live_reference())  # fmt: skip
    checkpointing = (False, True) if GRADIENT_CHECKPOINTING is None else (GRADIENT_CHECKPOINTING,)
    try:
        arguments = config, quantization, step, checkpointing
        print_fits(*arguments, size) if size else print_table(*arguments)
    except (NotImplementedError, ImportError, ValueError) as error:
        raise UserError(f"MODEL={MODEL} OPTIM={OPTIM} cannot be traced: {error}") from error


def sequences_of_row() -> int:
    """A pair is two sequences side by side; a labelled answer is one."""
    return 2 if LOSS not in (None, "kto") else 1


def has_live_reference() -> bool:
    return LOSS is not None and LOSS not in FREE and REFERENCE == "live"


@functools.cache
def choose_dtype() -> torch.dtype:
    name = DTYPE if DEVICE == hardware.device_type() else DTYPE or "bfloat16"
    return load.choose_dtype(name, full=METHOD in ("full", "galore"))


def build(config, quantization: str | None):
    """(model, base or None) of METHOD on the meta device."""
    attention = choose_attention(config, None, PACKING, DEVICE, choose_dtype())
    empty = functools.partial(empty_model, config, quantization, choose_dtype(), attention)
    settings = dict(MODEL=MODEL, ADAPTER="lora", LORA_TARGET_MODULES="auto")
    settings |= dict(LORA_R=LORA_R, LORA_ALPHA=LORA_R, LORA_DROPOUT=0.0)
    is_full = METHOD in ("full", "galore")
    model = empty() if is_full else adapters.add_adapter(empty(), settings)
    if choose_kernels(None, config, choose_dtype(), device=DEVICE)[0]:
        apply_kernels(model)
    return model, empty().requires_grad_(False) if is_full and KL_WEIGHT and not LOSS else None


def optimizer(model):
    if METHOD != "galore":
        return optimizers.make_optimizer(OPTIM, model)
    made = galore.GaLore(*galore.split_weights(model, GALORE_RANK), GALORE_RANK, fused=True)
    made.attach(model)
    return made


def print_table(config, quantization: str | None, step: memory.Step, columns: tuple[bool, ...]):
    """Memory by kind, with and without checkpointing."""
    steps = [replace(step, checkpointing=checkpointing) for checkpointing in columns]
    parts = [memory.trace(*build(config, quantization), optimizer, step) for step in steps]
    peaks = [sum(part.values()) for part in parts]
    rows = {kind: [part[kind] for part in parts] for kind in KINDS} | {"peak": peaks}
    if quantization:
        plain = [memory.trace(*build(config, None), optimizer, step) for step in steps]
        rows["the same in 16 bits"] = [sum(part.values()) for part in plain]
    print(f"\n{'GiB':24}" + "".join(f"checkpointing {'on' if c else 'off':6}" for c in columns))
    for name, sizes in rows.items():
        print(f"{name:24}" + "".join(f"{size / GIB:17.2f}   " for size in sizes))
    if quantization:
        without_weights = [[sum(p.values()) - p["weights"] for p in row] for row in (parts, plain)]
        print_formula(config.get_text_config(), *without_weights)


def print_formula(config, quantized: list[int], plain: list[int]):
    """What QLoRA costs beside the weights, and by github.com/RahulSChand/gpu_poor/issues/1."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = [getattr(config, name, None) for name in names]
    if None not in sizes:
        tokens = MAX_LENGTH * PER_DEVICE_TRAIN_BATCH_SIZE * sequences_of_row()
        traced = [(ours - theirs) / GIB for ours, theirs in zip(quantized, plain, strict=True)]
        expected = (15 * sizes[0] + 6 * sizes[1]) * sizes[2] * tokens * 0.75 / GIB
        found = ", ".join(f"{gib:.2f}" for gib in traced)
        print(f"overhead of quantisation: {found} GiB traced; {expected:.2f} by gpu_poor's formula")


def print_fits(config, quantization: str | None, step: memory.Step, choices: tuple[bool, ...], size: float):
    """What fits into a size, in powers of two of tokens at once. choices: of checkpointing."""
    workspace = batch_plan.CUBLAS_WORKSPACE if DEVICE == "cuda" else 0
    budget = size * batch_plan.MARGIN[DEVICE] - workspace
    each = sequences_of_row()
    smallest, found = 256 if PACKING else MAX_LENGTH * each, []
    possible = [smallest * 2**i for i in range(10)]

    @functools.cache
    def needed(tokens: int, again: bool) -> int:
        rows, length = (1, tokens) if PACKING else (tokens // MAX_LENGTH, MAX_LENGTH)
        this = replace(step, rows=rows, length=length, checkpointing=again)
        model, base = build(config, quantization)
        return sum(memory.trace(model, base, optimizer, this).values())

    for again in choices:
        for tokens in batch_plan.largest(possible, lambda tokens, again=again: needed(tokens, again) <= budget):
            found.append((batch_plan.relative_time(tokens, again, step), tokens, again, needed(tokens, again)))
    if not found:
        raise UserError(f"FIT={FIT}: not even {smallest} tokens fit. Try METHOD=qlora, or a smaller model.")
    print(f"\nfits in {FIT} (used to {batch_plan.MARGIN[DEVICE]:.0%}), fastest first:")
    print("  tokens at once  checkpointing    GiB  time a token")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
    for time, tokens, again, need in sorted(found):
        form = f"  {tokens:14,}  {'on' if again else 'off':13}  {need / GIB:5.2f}  {time / min(found)[0]:12.2f}"
        lengths = [n for n in possible if n <= min(tokens // each, positions)] if PACKING else [MAX_LENGTH]
        print(form, ", ".join(f"{tokens // n // each} x {f'{each} x ' * (each > 1)}{n:,}" for n in lengths), sep="   ")


if __name__ == "__main__":
    run_main(main)

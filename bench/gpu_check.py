"""Speed and memory on a CUDA GPU, ours and plain TRL in turn: one table for runs.md, within 10 minutes.

    python bench/gpu_check.py

Models of 1.6 B and 8 B are built from their configs with random weights (memory and speed do not care), so that no
download is needed. Without a GPU it says so and exits 2.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import hardware
from common.cli import UserError, run_main
from common.data.compared import IGNORE_INDEX
from common.files import GIB
from common.hardware import now
from common.run.folder import git_commit
from common.settings import apply_overrides
from common.train import batch_plan, memory, optimizers
from common.train.meta_model import empty_model

MODELS = "1.6B,8B"  # of SHAPES below
METHODS = (
    "lora,offload,nf4,full,galore,dpo"  # offload: activations in RAM; galore: against TRL's full; dpo: LoRA on pairs
)
MAX_LENGTH = 1024  # tokens of a row
STEPS = 12  # optimizer steps a run; the first two are not timed
LORA_R = 16  # rank, on every linear layer
GALORE_RANK = 128

if __name__ == "__main__":
    apply_overrides(globals())

import datetime
import functools
import gc
import time

import torch
from datasets import Dataset
from peft import get_peft_model
from sides import SIDES, Pairs, lora, make_galore, train_side
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

# The published shapes of StableLM-2 1.6B and Llama-3 8B; "tiny" is for the tests.
SHAPES = {
    "1.6B": ("stablelm", dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
                              num_key_value_heads=32, vocab_size=100_352)),
    "8B": ("llama", dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128_256)),
    "tiny": ("llama", dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=640)),
}  # fmt: skip


def main():
    if not torch.cuda.is_available():
        raise UserError("this check needs a CUDA GPU, and torch sees none.")
    peak = matrix_peak_tflops("cuda")
    print(f"{hardware.device_name()}: bf16 matrix peak measured at {peak:.0f} TFLOP/s", flush=True)
    columns = "date | commit | check | device | tok/s | of peak | peak GiB | predicted GiB | off | ratio to TRL"
    print(f"| {columns} |\n" + "|---" * 10 + "|")
    for name in MODELS.split(","):
        for method in METHODS.split(","):
            for checkpointing in (False, True) if method in ("lora", "nf4") else (False,):
                print_rows(name, method, checkpointing, peak)


def print_rows(name: str, method: str, checkpointing: bool, peak: float) -> None:
    """A row for each side; TRL's without checkpointing only, for the time it takes."""
    results = {}
    for side in SIDES[1:] if checkpointing else SIDES:
        try:
            results[side] = time_training(name, method, side, "cuda", checkpointing)
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            print(f"{name} {method} {side}: out of memory", flush=True)
    predicted = predict(name, method, checkpointing, "cuda")
    for side, r in results.items():
        share = r["tokens_per_second"] * r["flop_per_token"] / (peak * 1e12)
        cells = [
            f"{datetime.date.today()}", git_commit(),
            f"{name} {method} {MAX_LENGTH} {'checkpointing ' * checkpointing}{side}", hardware.device_name(),
            f"{r['tokens_per_second']:,.0f}", f"{share:.0%}", f"{r['peak_gib']:.2f}",
            f"{predicted:.2f}" if side == "ours" else "",
            f"{predicted / r['peak_gib'] - 1:+.1%}" if side == "ours" else "",
            f"{r['tokens_per_second'] / results['trl']['tokens_per_second']:.2f}" if "trl" in results else "",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def predict(name: str, method: str, checkpointing: bool, device: str) -> float:
    """The traced peak of our side, in GiB, with cuBLAS's workspace."""
    architecture, shape = SHAPES[name]
    config = AutoConfig.for_model(architecture, **shape, max_position_embeddings=4096)
    model = empty_model(config, "nf4" if method == "nf4" else None, torch.bfloat16, "sdpa")
    is_full = method in ("full", "galore")
    kind = dict(checkpointing=checkpointing, full=is_full, offloads=method == "offload", has_reference=method == "dpo")
    step = memory.Step(1, MAX_LENGTH, device=device, **kind)
    optimizer = functools.partial(optimizers.make_optimizer, "adamw_torch_fused")
    if method == "galore":
        optimizer = functools.partial(make_galore, rank=GALORE_RANK)
    parts = memory.trace(model if is_full else get_peft_model(model, lora(LORA_R)), None, optimizer, step)
    return (sum(parts.values()) + (batch_plan.CUBLAS_WORKSPACE if device == "cuda" else 0)) / GIB


def matrix_peak_tflops(device: str, size: int = 8192, repeats: int = 20) -> float:
    """What the device reaches on square bf16 matrix products, in TFLOP/s."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    a @ b
    started = now()
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (now() - started) / 1e12


def build_model(name: str, method: str, device: str):
    """A model with random weights on the device; for nf4 its linear layers but the head quantised in place."""
    architecture, shape = SHAPES[name]
    config = AutoConfig.for_model(architecture, **shape, max_position_embeddings=4096)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if method == "nf4":
        quantize_in_place(model, device)
    return model


def quantize_in_place(model, device: str) -> None:
    """Replace every linear layer but the head by bitsandbytes' NF4 with double quantisation."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                nf4 = dict(compress_statistics=True, quant_type="nf4")
                sizes = (layer.in_features, layer.out_features)
                new = Linear4bit(*sizes, compute_dtype=torch.bfloat16, device="meta", **nf4)
                new.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, module=new, **nf4)
                new.bias = layer.bias
                setattr(parent, name, new.to(device))
                layer.weight = None
    model.is_loaded_in_4bit = True  # what peft and TRL ask


def time_training(name: str, method: str, side: str, device: str, checkpointing: bool = False) -> dict:
    """Train a few steps on packed random tokens; tokens/s over the median step and the peak of allocated memory."""
    set_seed(0)
    gc.collect()  # the model before, whose trainer holds it in a circle
    if device == "cuda":
        torch.cuda.empty_cache()
    model = build_model(name, method, device)
    if device == "cuda":  # the peak of training, not of building
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    rank = GALORE_RANK if method == "galore" else LORA_R
    work = model, random_rows(method), word_tokenizer(), MAX_LENGTH, STEPS, rank, device, checkpointing
    result = train_side(side, *work, method=method, pairs=Pairs(1) if method == "dpo" else None)
    # 2 FLOP a weight forward, 2 for the gradient of the activations, 2 for that of weights that are not frozen (GaLore
    # computes less, and is counted as if it did not), or for the forward pass of a reference.
    return {**result, "flop_per_token": (6 if method in ("full", "galore", "dpo") else 4) * weights}


def random_rows(method: str) -> Dataset:
    """Random tokens for STEPS rows of MAX_LENGTH, with a quarter of it in each; for dpo two answers to one question."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(STEPS if method == "dpo" else 4 * STEPS):
        ids = torch.randint(3, 600, (MAX_LENGTH if method == "dpo" else MAX_LENGTH // 4,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": list(ids)})
        if method == "dpo":
            half = MAX_LENGTH // 2
            ids[half] = ids[0]
            rows[-1]["labels"][0] = rows[-1]["labels"][half] = IGNORE_INDEX
            rows[-1] |= dict(seq_lengths=[half, half], is_good=True)
    return Dataset.from_list(rows)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The smallest tokenizer that a trainer accepts; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )


if __name__ == "__main__":
    started = time.perf_counter()
    run_main(main)
    print(f"{time.perf_counter() - started:.0f} s in all")

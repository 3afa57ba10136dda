"""The timed rows of gpu_check: ours and plain TRL's training in turn, and the memory that was predicted for ours.

Models of 1.6 B and 8 B are built from their configs with random weights (memory and speed do not care), so that no
download is needed.
"""

import contextlib
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from datasets import Dataset
from gpu_results import free_memory, guarded
from peft import get_peft_model
from sides import Pairs, lora, make_galore, train_side
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from common.data.compared import IGNORE_INDEX, size_of
from common.files import GIB
from common.hardware import now
from common.model.attention import can_share_prompts, choose_attention
from common.model.liger import apply_kernels, swap
from common.train import batch_plan, memory, optimizers
from common.train.meta_model import empty_model

# The published shapes of StableLM-2 1.6B and Llama-3 8B; "tiny" is for machines without a GPU.
SHAPES = {
    "1.6B": ("stablelm", dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
                              num_key_value_heads=32, vocab_size=100_352)),
    "8B": ("llama", dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128_256)),
    "tiny": ("llama", dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, vocab_size=640)),
}  # fmt: skip
LORA_R = 16
SHORT = 64  # tokens of the steps before the timed ones in which GaLore replaces its first bases
SHORT_STEPS = {"galore": 16}  # galore.FIRST_REFRESHES
UNTIMED = 2  # steps of full length before the timed ones
# Methods of ours alone, and what TRL's side does instead.
PEERS = {"galore": "full", "offload": "lora", "liger": "lora", "compiled": "lora"}
# What two sides of a row differ in; of cudnn both are ours, with SDPA.
SIDES = {"cudnn": ("cuDNN on", "cuDNN off")}
FULL = ("full", "galore")


@dataclass(frozen=True)
class Work:
    """A timed row: what is trained, on packed rows of about `length` tokens.

    method: lora, nf4, full, galore (against TRL's full), dpo (LoRA on pairs), offload (LoRA, activations in main
    memory), liger (LoRA with its kernels, which no other row has), compiled (LoRA, TORCH_COMPILE) or cudnn (LoRA with
    SDPA, with cuDNN's attention and without).
    """

    model: str
    method: str
    length: int
    checkpointing: bool = False

    def __str__(self):
        return f"{self.model} {self.method} {self.length}{' checkpointing' * self.checkpointing}"

    def peer(self) -> str:
        """The row of which TRL's side is the same work."""
        return str(replace(self, method=PEERS.get(self.method, self.method)))

    def rank(self) -> int:
        """Of LoRA, or of GaLore's gradients."""
        return min(128, self.config().hidden_size // 4) if self.method == "galore" else LORA_R

    def sides(self) -> tuple[str, str]:
        return SIDES.get(self.method, ("trl", "ours"))

    def attention(self, device: str) -> str:
        """That of our side, as training chooses it."""
        packed = self.method != "compiled" or device == "cuda"  # see sft.start
        return "sdpa" if self.method == "cudnn" else choose_attention(self.config(), None, packed, device)

    def config(self):
        architecture, shape = SHAPES[self.model]
        return AutoConfig.for_model(architecture, **shape, max_position_embeddings=8192)


def time_work(work: Work, device: str, steps: int, rounds: int, known: dict, may_go_on) -> dict[str, dict]:
    """Results of both sides, each that of its faster round; an error in the place of a side that failed.

    known: results that need not be measured again, side to result. may_go_on: called with the seconds of a round,
    whether there is time for another.
    """
    results: dict[str, dict] = dict(known)
    for number in range(rounds):
        started = now()
        for side in work.sides():
            if side in known or "error" in results.get(side, {}):
                continue
            result = guarded(lambda side=side: time_side(work, side, device, steps))
            if number and "error" in result:
                result = results[side] | {"error_again": result["error"]}
            elif number:
                result = max(result, results[side], key=lambda r: r["tokens_per_second"])
            results[side] = result
        if not may_go_on(now() - started):
            break
    return results


def time_side(work: Work, side: str, device: str, steps: int) -> dict:
    """Train a few steps; what `sides.train_side` returns, and the operations of a token."""
    set_seed(0)
    is_trl, method = side == "trl", {"cudnn": "lora"}.get(work.method, work.method)
    with attention_kernels(side), contextlib.ExitStack() as afterwards:
        model = build_model(work, "sdpa" if is_trl else work.attention(device), device)
        kernels = apply_kernels(model) if method == "liger" and not is_trl else []
        afterwards.callback(swap, kernels)
        weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
        free_memory()  # the peak is that of training, not of building
        rows = random_rows(replace(work, method="full") if is_trl and method == "galore" else work, steps)
        result = train_side(
            side if is_trl else "ours", model, rows, word_tokenizer(), None, len(rows), work.rank(), device,
            work.checkpointing, method, Pairs(1) if method == "dpo" else None, len(rows) - steps, kernels,
        )  # fmt: skip
    # 2 FLOP a weight forward, 2 for the gradient of the activations, 2 for that of weights that are not frozen (GaLore
    # computes less, and is counted as if it did not), or for the forward pass of a reference.
    return {**result, "flop_per_token": (6 if method in (*FULL, "dpo") else 4) * weights}


@contextlib.contextmanager
def attention_kernels(side: str):
    """cuDNN's attention as plain torch has it for TRL, and as training has it for ours."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp({"trl": True, "ours": before}.get(side, side == "cuDNN on"))
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def predict(work: Work, device: str = "cuda") -> float:
    """The traced peak of our side, in GiB, with cuBLAS's workspace."""
    attention, quantization = work.attention(device), "nf4" if work.method == "nf4" else None
    model = empty_model(work.config(), quantization, torch.bfloat16, attention)
    kernels = apply_kernels(model) if work.method == "liger" else []
    is_full, pairs = work.method in FULL, ()
    if work.method == "dpo":
        shares = can_share_prompts(work.config(), attention, work.length)
        sizes = [size_of(row, shares) for row in random_rows(work, 4)]
        pairs = (max(sizes, key=lambda size: sum(size.shape)),)
    kind = dict(checkpointing=work.checkpointing, full=is_full, offloads=work.method == "offload")
    step = memory.Step(1, work.length, device=device, has_reference=bool(pairs), pairs=pairs, **kind)
    optimizer = functools.partial(optimizers.make_optimizer, "adamw_torch_fused")
    if work.method == "galore":
        optimizer = functools.partial(make_galore, rank=work.rank())
    parts = memory.trace(model if is_full else get_peft_model(model, lora(LORA_R)), None, optimizer, step)
    swap(kernels)
    return (sum(parts.values()) + (batch_plan.CUBLAS_WORKSPACE if device == "cuda" else 0)) / GIB


def build_model(work: Work, attention: str, device: str):
    """A model with random weights on the device; for nf4 its linear layers but the head quantised in place."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(work.config(), dtype=torch.bfloat16, attn_implementation=attention)
    if work.method == "nf4":
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
                new.weight = Params4bit(layer.weight.data, requires_grad=False, module=new, **nf4)
                new.bias, new.support_avx512bf16_for_cpu = layer.bias, False  # see load.load_model
                setattr(parent, name, new.to(device))
                layer.weight = None
    model.is_loaded_in_4bit = True  # what peft and TRL ask


def random_rows(work: Work, steps: int) -> Dataset:
    """Packed rows of random tokens, a row a step: short ones, then UNTIMED + steps of about work.length tokens.

    Their documents are of unequal lengths, and every second row has a multiple of 128 and 64 more (pytorch 196678).
    For dpo a row is a pair: a prompt, twice, and two answers.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    lengths = [SHORT] * SHORT_STEPS.get(work.method, 0)
    for number in range(UNTIMED + steps):
        odd = max(0, work.length - 65) // 128 * 128 + 64
        lengths.append(odd - 128 * (number // 2 % 2) * (odd > 256) if number % 2 else work.length - 5 * number)
    for total in lengths:
        if work.method == "dpo":
            rows.append(random_pair(total, generator))
            continue
        cuts = sorted({0, total, *torch.randint(1, total, (max(1, total // 400),), generator=generator).tolist()})
        ids = torch.randint(3, 600, (total,), generator=generator).tolist()
        rows.append(dict(input_ids=ids, labels=ids, seq_lengths=[b - a for a, b in zip(cuts, cuts[1:], strict=False)]))
    return Dataset.from_list(rows)


def random_pair(total: int, generator) -> dict:
    """Half of the tokens are the prompt, a quarter of them twice; the better answer is longer than the other."""
    prompt, answers = total // 4, total - 2 * (total // 4)
    lengths = [answers * 2 // 3, answers - answers * 2 // 3]
    first, *others = (torch.randint(3, 600, (n,), generator=generator).tolist() for n in (prompt, *lengths))
    others = [
        [3 + number, *answer[1:]] for number, answer in enumerate(others)
    ]  # they differ from their first token on
    ignored = [IGNORE_INDEX] * prompt
    return dict(
        input_ids=[token for answer in others for token in (*first, *answer)],
        labels=[label for answer in others for label in (*ignored, *answer)],
        seq_lengths=[prompt + length for length in lengths],
        is_good=True,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The smallest tokenizer that a trainer accepts; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )

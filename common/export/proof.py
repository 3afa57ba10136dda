"""Where an export is verified, and in which dtype: chosen before weights are loaded, by what fits."""

from typing import NamedTuple

import torch

from common import distributed, hardware
from common.cli import UserError
from common.export.verify import LONGEST, Row
from common.files import GIB
from common.model import load

SHARE = 0.9  # of the free memory: some is lost between blocks, and what is computed on the way is estimated


class Proof(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the computation


def choose_proof(config, requested: str | None, merged: torch.dtype, rows: list[Row], has_gguf: bool) -> Proof:
    """float32 on the GPU, else on the CPU, else 16 bits there; printed. requested: the setting PROOF_DTYPE.

    merged: the dtype of the merged weights. has_gguf: whether GGUF files are verified, too, on longer rows. UserError
    where nothing fits.
    """
    own, cpu = distributed.device(), torch.device("cpu")
    free = {device: hardware.memory_limit(None, device.type) for device in (own, cpu)}
    half = "float16" if load.choose_dtype(None) == torch.float16 else "bfloat16"
    too_large = []
    for name in (requested,) if requested else ("float32", half):
        for device, size in free.items():
            proof, place = Proof(device, getattr(torch, name)), "CPU" if device == cpu else "GPU"
            needed, in_main_memory = bytes_needed(config, proof, merged, rows, has_gguf)
            line = f"{name} on the {place}, {needed / GIB:.3g} of {size / GIB:.3g} GiB"
            if needed <= SHARE * size and in_main_memory <= SHARE * free[cpu]:
                print(f"verification: {line}" + (f" (too large: {'; '.join(too_large)})" if too_large else ""))
                return proof
            too_large.append(line)
    if requested:
        print(f"verification: {line}: this may be too little")
        return proof
    raise UserError(f"PROOF_DTYPE=None: no memory for {'; '.join(too_large)}. PROOF_DTYPE={half} tries all the same.")


def bytes_needed(config, proof: Proof, merged: torch.dtype, rows: list[Row], has_gguf: bool) -> tuple[int, int]:
    """Weights, activations of the longest row and its logits on the device; and what main memory must hold besides."""
    text, width = config.get_text_config(), proof.dtype.itemsize
    weights, answers = load.count_weights(config), [len(row.answers) for row in rows]
    longest = max([LONGEST * has_gguf, *(len(row.ids) for row in rows)])
    needed = weights * max(width, merged.itemsize)
    needed += longest * text.hidden_size * 16 * width  # keys, queries, values, and an MLP of 3 times 3.5 the width
    needed += max(answers) * text.vocab_size * (width + 2 * 4)  # and their logarithms, in float32
    predictions = 6 * sum(answers) * text.vocab_size * 4  # two models', and what their divergence takes
    if proof.device.type == "cpu":
        return needed + predictions, 0
    return needed, predictions + weights * width * has_gguf  # such files are read into main memory first

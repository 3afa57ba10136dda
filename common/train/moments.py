"""Adam's moments in 16 bits or in codes of 8 bits, and stochastic rounding of updates: what GaLore's states need."""

import torch

BLOCK = 256  # moments that share a scale, in 8 bits


def get_moments(state: dict, eight_bit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's first and second moments, in the dtype of the basis."""
    if not eight_bit:
        return state["exp_avg"], state["exp_avg_sq"]
    return tuple(dequantize(state, name, state["basis"].dtype) for name in ("exp_avg", "exp_avg_sq"))


def put_moments(state: dict, first: torch.Tensor, second: torch.Tensor, eight_bit: bool) -> None:
    if eight_bit:
        quantize(state, "exp_avg", first)
        quantize(state, "exp_avg_sq", second)
    else:
        state["exp_avg"], state["exp_avg_sq"] = first, second


def quantize(state: dict, name: str, moment: torch.Tensor) -> None:
    """Keep a moment as 8-bit codes with a scale for each block; second moments, without a sign, on a finer map."""
    from bitsandbytes import functional as bnb

    code = bnb.create_dynamic_map(signed=name == "exp_avg").to(moment.device)
    codes, quantized = bnb.quantize_blockwise(moment.float().contiguous(), code=code, blocksize=BLOCK)
    state[name], state[f"{name}_scales"] = codes, quantized.absmax


def dequantize(state: dict, name: str, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    code = bnb.create_dynamic_map(signed=name == "exp_avg").to(state[name].device)
    scales = state[f"{name}_scales"]
    return bnb.dequantize_blockwise(state[name], absmax=scales, code=code, blocksize=BLOCK).to(dtype)


def add_stochastically(weights: torch.Tensor, update: torch.Tensor, seed: int) -> None:
    """Add a float32 update to bfloat16 weights, rounding up or down at random, in proportion to what is left over.

    To the nearest, an update of less than half a step of bfloat16 (a 256th of the weight) would be lost every time
    (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). The seed makes it the same in all processes, and on resume.
    """
    generator = torch.Generator(weights.device).manual_seed(seed)
    # One number a column will do: what is left over differs from row to row.
    noise = torch.randint(2**16, weights.shape[-1:], generator=generator, dtype=torch.int32, device=weights.device)
    total = update.add_(weights)
    total.view(torch.int32).add_(noise).bitwise_and_(-(2**16))  # the upper 16 bits of a float32 are a bfloat16
    weights.copy_(total)

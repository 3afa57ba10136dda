"""Adam's moments in 16 bits or in codes of 8 bits, and stochastic rounding of updates: what GaLore's states need."""

import math

import torch

from common.train.compiled import compiled_on_cuda

BLOCK = 256  # moments that share a scale, in 8 bits


def make_maps(device: torch.device) -> dict[str, torch.Tensor]:
    """The values of 8-bit codes by the name of the moment; second moments, without a sign, have a finer map.

    To be made once: bitsandbytes takes a millisecond for each.
    """
    from bitsandbytes import functional as bnb

    return {name: bnb.create_dynamic_map(signed=name == "exp_avg").to(device) for name in ("exp_avg", "exp_avg_sq")}


def get_moments(state: dict, maps: dict | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's first and second moments, in the dtype of the basis. maps: of 8-bit codes; None: there are no codes."""
    if maps is None:
        return state["exp_avg"], state["exp_avg_sq"]
    return tuple(dequantize(state, name, code) for name, code in maps.items())


def put_moments(state: dict, first: torch.Tensor, second: torch.Tensor, maps: dict | None) -> None:
    if maps is None:
        state["exp_avg"], state["exp_avg_sq"] = first, second
    else:
        quantize(state, "exp_avg", first, maps["exp_avg"])
        quantize(state, "exp_avg_sq", second, maps["exp_avg_sq"])


def quantize(state: dict, name: str, moment: torch.Tensor, code: torch.Tensor) -> None:
    """Keep a moment as 8-bit codes with a scale for each block."""
    from bitsandbytes import functional as bnb

    codes, quantized = bnb.quantize_blockwise(moment.float().contiguous(), code=code, blocksize=BLOCK)
    state[name], state[f"{name}_scales"] = codes, quantized.absmax


def dequantize(state: dict, name: str, code: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    moment = bnb.dequantize_blockwise(state[name], absmax=state[f"{name}_scales"], code=code, blocksize=BLOCK)
    return moment.to(state["basis"].dtype)


def update_moments(first, second, gradients, betas: tuple[float, float], eps: float, steps: list[int]) -> list:
    """Take gradients into Adam's moments, in place; the directions to go, without the first moments' correction.

    Lists of tensors, which torch computes in one launch an operation; steps: how many each has taken, with this one.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
    spreads = torch._foreach_sqrt(second)
    torch._foreach_div_(spreads, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(spreads, eps)
    return torch._foreach_div(first, spreads)


def draw_noise(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """For add_stochastically: the same in all processes, and on resume. One number a column will do: what is left over
    differs from row to row."""
    generator = torch.Generator(weights.device).manual_seed(seed)
    return torch.randint(2**16, weights.shape[-1:], generator=generator, dtype=torch.int32, device=weights.device)


@compiled_on_cuda
def add_stochastically(weights, update: torch.Tensor, rate: float, decay: float | None, noise) -> None:
    """weights += rate * update - decay * weights; (m, n), bfloat16; rounded up or down at random, in proportion to what
    is left over.

    To the nearest, an update of less than half a step of bfloat16 (a 256th of the weight) would be lost every time
    (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). noise: (n,), from 0 to 2**16 - 1.
    """
    total = update.float().mul_(rate).add_(weights)
    if decay is not None:
        total.sub_(weights.float() * decay)
    total.view(torch.int32).add_(noise).bitwise_and_(-(2**16))  # the upper 16 bits of a float32 are a bfloat16
    weights.copy_(total)

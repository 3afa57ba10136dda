"""Liger's kernels, an optional package: RMSNorm, SwiGLU and rotary positions in training on CUDA, each in one pass.

transformers' own code stays at hand (`put_aside`): the check before the first step compares the two on the user's card.
"""

import contextlib
import functools
import sys

import torch

from common import distributed
from common.cli import UserError


def choose_kernels(
    requested: bool | None, config, dtype: torch.dtype, compiled: bool = False, device: str | None = None
) -> tuple[bool, str]:
    """Whether a model trains with Liger's kernels, and the words that say so; none where there is no CUDA.

    requested: LIGER_KERNEL. dtype: of the computation. compiled: TORCH_COMPILE. device: its type; None: this process's.
    Raises UserError where they are requested and cannot be had.
    """
    device = device or distributed.device().type
    obstacle = find_obstacle(config, dtype, compiled, device)
    if requested and obstacle:
        raise UserError(f"LIGER_KERNEL=True: {obstacle}. LIGER_KERNEL=None trains without.")
    if device != "cuda":
        return False, ""
    if requested is False or obstacle:
        return False, f", no Liger kernels ({obstacle or 'LIGER_KERNEL=False'})"
    return True, ", Liger kernels"


def find_obstacle(config, dtype: torch.dtype, compiled: bool, device: str) -> str | None:
    """Why a model cannot train with Liger's kernels; None where it can."""
    if device != "cuda":
        return "there is no CUDA GPU"
    if dtype == torch.float32:
        return "they are for DTYPE=bfloat16 and float16"
    if compiled:
        return "TORCH_COMPILE=True makes kernels of its own"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:  # of Triton, too, or of another transformers
        return f"{str(error).splitlines()[0]}: pip install liger-kernel==0.8.5"
    return None if config.model_type in known else f"the package has none for {config.model_type}"


def apply_kernels(model) -> list[tuple]:
    """Let a model, also one with an adapter, compute with Liger's kernels; its loss stays its own.

    Returns the changes, for `swap` and `put_aside`. UserError where the package does not fit the model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    code, own = vars(sys.modules[type(base).__module__]), own_code(type(base).__module__)
    forwards = [(module, vars(module).get("forward")) for module in base.modules()]
    try:
        _apply_liger_kernel_to_instance(base, fused_linear_cross_entropy=False, cross_entropy=False)
    except (AttributeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        problem = f"liger-kernel does not fit {type(base).__name__} ({error})"
        raise UserError(f"LIGER_KERNEL: {problem}. Set LIGER_KERNEL=False.") from error
    # Classes are for models built later: Liger's MLP would drop their biases.
    code.update({name: value for name, value in own.items() if isinstance(value, type)})
    # Experts keep theirs: Liger's compute the gradient of frozen weights, and take an adapter for the experts.
    swap([(vars(module), "forward", before) for module, before in forwards if is_expert(module)])
    changes = [(vars(module), "forward", before) for module, before in forwards]
    changes += [(code, name, value) for name, value in own.items()]  # rotary positions are a function
    return [change for change in changes if change[0].get(change[1]) is not change[2]]


def is_expert(module) -> bool:
    """Whether a module holds the weights of several experts, or is an adapter on one that may."""
    return hasattr(module, "base_layer") or any(p.ndim > 2 for p in module.parameters(recurse=False))


@functools.cache
def own_code(module: str) -> dict:
    """The functions and classes of a modeling file, as they are at the first call: before Liger's are there."""
    return dict(vars(sys.modules[module]))


def swap(changes: list[tuple]) -> None:
    """Put what a model had in the place of Liger's, or that back. changes: namespace, name, the other value or None."""
    for number, (names, name, other) in enumerate(changes):
        changes[number] = names, name, names.pop(name, None)
        if other is not None:
            names[name] = other


@contextlib.contextmanager
def put_aside(changes: list[tuple]):
    """Compute with transformers' own code."""
    swap(changes)
    try:
        yield
    finally:
        swap(changes)

"""What is compiled: each layer of the decoder by itself (TORCH_COMPILE), and on CUDA the optimizer's own functions."""

import functools
import sys

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model) -> None:
    """Compile the decoder's layers, which share what is compiled, for rows of any length.

    A whole model would be compiled again and again: the loss takes a new number of positions each time, and checkpoints
    and masks break its graph.
    """
    # Of a layer: in training, first and later ones; in evaluation; without its adapter; with a cache. 8 is the default.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


COMPILED_ON = {"cuda"}  # devices; one on which the compiler fails is taken out


def compiled_on_cuda(function):
    """Have an elementwise function compiled at its first call with CUDA tensors, once for all shapes and numbers.

    Operation by operation it would read and write whole matrices each time. Elsewhere it runs as it is written, and so
    it does where Triton fails (it is not installed, the GPU is older than compute capability 7.0, no C compiler).
    """

    @functools.cache
    def compiled():
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(tensor, *args):
        if tensor.device.type in COMPILED_ON:
            try:
                return compiled()(tensor, *args)
            except torch._dynamo.exc.TorchDynamoException as error:  # nothing has been computed yet
                COMPILED_ON.discard(tensor.device.type)
                reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
                print(f"{function.__name__} is not compiled, and slower: {reason}", file=sys.stderr)
        return function(tensor, *args)

    return call

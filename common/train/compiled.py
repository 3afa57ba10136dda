"""TORCH_COMPILE: each layer of the decoder compiled by itself."""

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

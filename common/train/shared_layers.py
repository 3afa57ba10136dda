"""The layers below the first one that is trained: what they compute for the model is what they compute for the base."""

import contextlib
import re
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from common.cli import UserError
from common.model.targets import decoder_layers

# Settings of configs with which layers read keys and values of layers below (Gemma 3n and 4, Mistral Large).
READ_FROM_ABOVE = ("num_kv_shared_layers", "kv_sharing_modes")
NOISE = re.compile("dropout|layerdrop|jitter")


class SharedLayers:
    """Decoder layers whose output is kept in the model's forward pass and handed on in the base's.

    model: without PEFT's wrapper, in which `requires_grad` says what is trained. Nothing is shared where anything
    below the first trained layer is trained, noisy in training only, or compiled.
    """

    def __init__(self, model):
        self.embeddings, self.layers, self.output = model.get_input_embeddings(), layers_below(model), None

    @contextlib.contextmanager
    def kept(self):
        """Around the model's pass, whose checkpointed layers are computed again after it."""
        if not self.layers or self.is_noisy():
            yield
            return
        handle = self.layers[-1].register_forward_hook(self.keep)
        try:
            yield
        finally:
            handle.remove()

    def keep(self, module, inputs, output) -> None:
        self.output = tree_map_only(torch.Tensor, torch.Tensor.detach, output)  # Falcon's: (hidden, None)

    @contextlib.contextmanager
    def replayed(self):
        """Around the base's pass, with the same inputs."""
        output, self.output = self.output, None
        with contextlib.ExitStack() as patches:
            for layer in self.layers if output is not None else ():
                patches.enter_context(mock.patch.object(layer, "forward", lambda *args, **kwargs: output))
            yield

    def is_noisy(self) -> bool:
        is_compiled = self.layers[-1]._compiled_call_impl is not None  # it would not see another forward
        return is_compiled or getattr(self.embeddings, "neftune_noise_alpha", None) is not None


def layers_below(model) -> list[nn.Module]:
    """The decoder layers below the first trained one; none where these are trained, random or read from above."""
    try:
        layers = model.get_submodule(decoder_layers(model)[0])
    except UserError:  # several lists
        return []
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in READ_FROM_ABOVE):
        return []
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else 0
    above = {module for layer in layers[first:] for module in layer.modules()}
    below = [module for module in model.get_decoder().modules() if module not in above]
    is_trained = any(p.requires_grad for module in below for p in module.parameters(recurse=False))
    return [] if is_trained or any(map(is_random, below)) else list(layers[:first])


def is_random(module: nn.Module) -> bool:
    """Whether a module by itself drops values or adds noise in training."""
    rates = [value for name, value in vars(module).items() if NOISE.search(name) and isinstance(value, float)]
    return isinstance(module, nn.Dropout) and module.p > 0 or any(rates)

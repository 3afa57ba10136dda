"""The layers below the first one that is trained: what they compute for the model is what they compute for the base."""

import contextlib
from unittest import mock

from torch import nn

from common.cli import UserError
from common.model.targets import decoder_layers


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
        yield
        handle.remove()

    def keep(self, module, inputs, output) -> None:
        is_tensor = hasattr(output, "detach")  # as all of transformers 5
        self.output = output.detach() if is_tensor else tuple(part.detach() for part in output)

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
    """The decoder layers below the first trained one; none where what is below is trained or drops out."""
    try:
        layers = model.get_submodule(decoder_layers(model)[0])
    except UserError:  # several lists
        return []
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):  # Gemma 3n: layers above read keys of these
        return []
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else 0
    above = {module for layer in layers[first:] for module in layer.modules()}
    below = [module for module in model.get_decoder().modules() if module not in above]
    is_trained = any(p.requires_grad for module in below for p in module.parameters(recurse=False))
    return [] if is_trained or any(map(drops_out, below)) else list(layers[:first])


def drops_out(module: nn.Module) -> bool:
    """Whether a module by itself drops values in training."""
    rates = [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return isinstance(module, nn.Dropout) and module.p > 0 or any(rates)

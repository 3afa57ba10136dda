"""Targets: the layers of a model that get an adapter, or are projected by GaLore."""

import re

import torch
from peft.utils import constants
from transformers.pytorch_utils import Conv1D

from common.bounds import is_pattern, split_list
from common.cli import UserError


def find_targets(model, settings: dict) -> list[str]:
    """The paths of the layers that LORA_TARGET_MODULES and LORA_LAYERS choose; UserError where one means no layer."""
    wanted, numbers = settings["LORA_TARGET_MODULES"], settings.get("LORA_LAYERS")
    is_auto = wanted == "auto"
    if is_auto and settings["ADAPTER"] == "ia3":
        wanted = ",".join(ia3_layers(model)[0])
    if wanted == "auto":
        chosen = text_layers(model)
    else:
        adaptable = [path for path, layer in model.named_modules() if is_adaptable(layer)]
        chosen = match_layers(adaptable, wanted, "LORA_TARGET_MODULES")
    if numbers is None:
        return chosen
    stack, count = decoder_layers(model)
    places = {path: re.match(rf"{re.escape(stack)}\.(\d+)\.", path) for path in chosen}
    allowed = choose_layers(numbers, count)
    inside = [path for path, place in places.items() if place and int(place[1]) in allowed]
    if not inside:
        raise UserError(f"LORA_LAYERS={numbers}: these have no layer of LORA_TARGET_MODULES={wanted}.")
    # Head and embeddings are in no decoder layer; who names them wants them.
    return inside + [path for path, place in places.items() if not place and not is_auto]


def text_layers(model) -> list[str]:
    """The paths of the decoder's linear layers; a model that also sees has others.

    Without out_proj of Mamba's mixers (which have a parameter D): its kernels read the weight past an adapter.
    """
    inside = set(model.get_decoder().modules()) - {model.get_output_embeddings()}
    mixers = {path.removesuffix(".D") for path, _ in model.named_parameters() if path.endswith(".D")}
    layers = [(path, layer) for path, layer in model.named_modules() if layer in inside and is_adaptable(layer)]
    layers = [path for path, layer in layers if not isinstance(layer, torch.nn.Embedding)]
    return [path for path in layers if path.removesuffix(".out_proj") not in mixers]


def is_linear(layer) -> bool:
    """Whether a module is a product with a matrix; routers (Llama 4's, Phi-MoE's) are more than that."""
    return isinstance(layer, (torch.nn.Linear, Conv1D)) and not type(layer).__name__.endswith("Router")


def is_adaptable(layer) -> bool:
    """Whether a module is a layer on which peft puts adapters: linear, of any quantisation, or an embedding."""
    if is_linear(layer) or isinstance(layer, torch.nn.Embedding):
        return True
    is_quantized = "Linear" in type(layer).__name__ and not isinstance(layer, torch.nn.Linear)
    return is_quantized and not any(layer.children())


def short_names(model, paths: list[str]) -> list[str]:
    """The last parts of the paths, as other programs expect them, if these mean the same layers; else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return names if meant == set(paths) else paths


def match_layers(paths: list[str], wanted: str, setting: str) -> list[str]:
    """Those of the paths that a value of a setting (bounds.TARGETS) means, in the model's order.

    wanted: a regular expression of whole paths, or names, comma-separated: the last parts of paths. UserError with the
    model's names for a part that means no layer.
    """
    if is_pattern(wanted):
        found = {wanted: {path for path in paths if re.fullmatch(wanted, path)}}
    else:
        found = {name: {p for p in paths if f".{p}".endswith(f".{name}")} for name in split_list(wanted)}
    if missing := [name for name, these in found.items() if not these]:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
        raise UserError(f"{setting}={wanted}: no layer is called {', '.join(missing)}. The model has: {names}.")
    return [path for path in paths if any(path in these for these in found.values())]


def ia3_layers(model) -> tuple[set[str], tuple[str, ...]]:
    """The names of the layers that peft scales by IA3, and of those of which it scales the inputs."""
    kind = model.config.model_type
    names = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if names is None:
        raise UserError(f"ADAPTER=ia3: peft has no choice of layers for {kind}. Set LORA_TARGET_MODULES to names.")
    return names, tuple(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])


def decoder_layers(model) -> tuple[str, int]:
    """(path, number) of a model's decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    inside = set(model.get_decoder().modules())
    lists = ((path, m) for path, m in model.named_modules() if m in inside and isinstance(m, torch.nn.ModuleList))
    path = next((path for path, modules in lists if len(modules) == count), None)
    if path is None:
        raise UserError(f"LORA_LAYERS: {model.config.model_type} has no one list of its layers. Set LORA_LAYERS=None.")
    return path, count


def choose_layers(numbers: str, count: int) -> set[int]:
    """The layers that a value of LORA_LAYERS means, of so many; UserError for one outside of them."""
    chosen: set[int] = set()
    for item in split_list(numbers):
        parts = [int(part) if part else None for part in item.split(":")]
        highest = count if ":" in item else count - 1  # a slice may end behind the last
        if outside := [n for n in parts[:2] if n is not None and not -count <= n <= highest]:
            raise UserError(f"LORA_LAYERS={numbers}: the model has {count} layers, 0 to {count - 1}; not {outside[0]}.")
        chosen |= set(range(count)[slice(*parts)]) if ":" in item else {range(count)[parts[0]]}
    return chosen

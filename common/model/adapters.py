"""Adapters: LoRA, its variants and IA3, put on a frozen model by peft."""

import re
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.utils import constants
from transformers.pytorch_utils import Conv1D

from common.bounds import is_pattern, split_list
from common.cli import UserError

# Papers: https://arxiv.org/abs/ and the number. IA3, which scales activations: 2205.05638.
VARIANTS = {
    "lora": {},  # 2106.09685
    "dora": {"use_dora": True},  # 2402.09353: magnitude and direction apart
    "rslora": {"use_rslora": True},  # 2312.03732: scaled by the root of the rank
    "pissa": {"init_lora_weights": "pissa"},  # 2404.02948: starts from the principal singular vectors
    "loftq": {},  # 2310.08659: starts from what quantisation lost
}


def add_adapter(model, settings: dict, new_rows=()):
    """Freeze the model and put a new adapter on it; UserError where it does not fit.

    model: may be on the meta device. new_rows: token ids whose rows of embeddings and head are trained.
    """
    name, on_meta = settings["ADAPTER"], model.device.type == "meta"
    targets = find_targets(model, settings)
    try:
        if name == "ia3":
            of_inputs = ia3_layers(model)[1] if settings["LORA_TARGET_MODULES"] == "auto" else ()
            inputs = [path for path in targets if path.endswith(of_inputs)]
            config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=inputs)
        else:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=settings["LORA_R"],
                lora_alpha=settings["LORA_ALPHA"],
                lora_dropout=settings["LORA_DROPOUT"],
                target_modules=targets,
                trainable_token_indices=embedding_rows(model, new_rows, targets) if new_rows else None,
                **({} if on_meta and name == "pissa" else VARIANTS[name]),
            )
        model = get_peft_model(model, config)
        if name == "loftq" and not on_meta:
            local = Path(model.name_or_path) / "model.safetensors"
            replace_lora_weights_loftq(model, model_path=str(local) if local.is_file() else None)
    except (ValueError, OSError) as error:
        problem = f"LORA_TARGET_MODULES={settings['LORA_TARGET_MODULES']} does not fit {settings['MODEL']}: {error}"
        raise UserError(f"ADAPTER={name} {problem}") from error
    return model


def find_targets(model, settings: dict) -> list[str]:
    """The paths of the layers that LORA_TARGET_MODULES and LORA_LAYERS choose; UserError where one means no layer."""
    wanted, numbers, head = settings["LORA_TARGET_MODULES"], settings.get("LORA_LAYERS"), model.get_output_embeddings()
    layers = {path: layer for path, layer in model.named_modules() if is_adaptable(layer)}
    is_auto = wanted == "auto"
    if is_auto and settings["ADAPTER"] == "ia3":
        wanted = ",".join(ia3_layers(model)[0])
    if wanted == "auto":
        chosen = [p for p, layer in layers.items() if layer is not head and not isinstance(layer, torch.nn.Embedding)]
    else:
        chosen = match_layers(list(layers), wanted, "LORA_TARGET_MODULES")
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


def is_adaptable(layer) -> bool:
    """Whether a module is a layer on which peft puts adapters: linear, of any quantisation, or an embedding."""
    known = isinstance(layer, (torch.nn.Linear, Conv1D, torch.nn.Embedding))
    return known or "Linear" in type(layer).__name__ and not any(layer.children())


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
    lists = ((path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
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


def embedding_rows(model, rows: list[int], targets: list[str]) -> dict[str, list[int]]:
    """The rows to train, by the name of the embeddings and, where it is not tied, of the head."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    both = [path for path, module in model.named_modules() if module is embeddings or module is head]
    if taken := set(both) & set(targets):  # peft puts only one of both on a matrix
        problem = f"{taken.pop()} cannot have an adapter while the rows of the template's {len(rows)} new tokens train"
        remedy = "Leave it out, or take a CHAT_TEMPLATE without new tokens, such as zephyr."
        raise UserError(f"LORA_TARGET_MODULES: {problem}. {remedy}")
    chosen = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return {name: rows for name, module in model.named_modules() if any(module is c for c in chosen)}

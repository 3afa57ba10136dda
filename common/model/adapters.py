"""Adapters: LoRA, its variants and IA3, put on a frozen model by peft."""

from pathlib import Path

from peft import IA3Config, LoraConfig, TaskType, get_peft_model, replace_lora_weights_loftq

from common.cli import UserError
from common.model.quantize import hqq_layer_names

# Variants of LoRA and their papers: https://arxiv.org/abs/2106.09685 (LoRA), 2402.09353 (DoRA: magnitude and
# direction apart), 2312.03732 (rsLoRA: scaled by the root of the rank), 2404.02948 (PiSSA: starts from the principal
# singular vectors), 2310.08659 (LoftQ: starts from what quantisation lost); IA3 scales activations: 2205.05638.
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {},
}


def add_adapter(model, settings: dict, new_rows=()):
    """Freeze the model and put a new adapter on it, as ADAPTER and the LORA_ settings say.

    model: may be on the meta device, to be traced. new_rows: token ids whose rows of embeddings and head are trained as
    well. Raises UserError where the adapter does not fit the model.
    """
    name, target_names = settings["ADAPTER"], settings["LORA_TARGET_MODULES"]
    is_auto, on_meta = target_names == "auto", model.device.type == "meta"
    targets = (hqq_layer_names(model) or "all-linear") if is_auto else target_names.replace(" ", "").split(",")
    try:
        if name == "ia3":  # auto: peft's own choice, which it knows for most architectures
            modules = None if is_auto else targets
            config = IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=modules, feedforward_modules=modules and [])
        else:
            config = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=settings["LORA_R"],
                lora_alpha=settings["LORA_ALPHA"],
                lora_dropout=settings["LORA_DROPOUT"],
                target_modules=targets,
                trainable_token_indices=embedding_rows(model, new_rows) if new_rows else None,
                **({} if on_meta and name == "pissa" else VARIANTS[name]),
            )
        model = get_peft_model(model, config)
        if name == "loftq" and not on_meta:
            local = Path(model.name_or_path) / "model.safetensors"
            replace_lora_weights_loftq(model, model_path=str(local) if local.is_file() else None)
    except (ValueError, OSError) as error:
        layers = {path.rpartition(".")[2] for path, module in model.named_modules() if not any(module.children())}
        raise UserError(
            f"ADAPTER={name} LORA_TARGET_MODULES={target_names} does not fit {settings['MODEL']}: {error} "
            f"(its layers: {', '.join(sorted(layers))})"
        ) from error
    return model


def embedding_rows(model, rows: list[int]) -> dict[str, list[int]]:
    """The rows to train, by the name of the embeddings and, where it is not tied to them, of the head."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    chosen = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return {name: rows for name, module in model.named_modules() if any(module is c for c in chosen)}

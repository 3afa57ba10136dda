"""Adapters: LoRA, its variants and IA3, put on a frozen model by peft."""

import warnings
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.tuners.trainable_tokens import TrainableTokensLayer

from common.cli import UserError
from common.model.targets import find_targets, ia3_layers, short_names

# Of adapters on one side of tied embeddings, which merging.py gives a matrix each.
warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
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
    names = short_names(model, targets)
    try:
        if name == "ia3":
            of_inputs = ia3_layers(model)[1] if settings["LORA_TARGET_MODULES"] == "auto" else ()
            inputs = [path for path in targets if path.endswith(of_inputs)]
            inputs = short_names(model, inputs) if inputs else []
            config = IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=inputs)
        else:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=settings["LORA_R"],
                lora_alpha=settings["LORA_ALPHA"],
                lora_dropout=settings["LORA_DROPOUT"],
                target_modules=names,
                trainable_token_indices=embedding_rows(model, new_rows, targets) if new_rows else None,
                **({} if on_meta and name == "pissa" else VARIANTS[name]),
            )
        model = keep_head_bias(get_peft_model(model, config))
        if name == "loftq" and not on_meta:
            local = Path(model.name_or_path) / "model.safetensors"
            replace_lora_weights_loftq(model, model_path=str(local) if local.is_file() else None)
    except (ValueError, OSError) as error:
        problem = f"LORA_TARGET_MODULES={settings['LORA_TARGET_MODULES']} does not fit {settings['MODEL']}: {error}"
        raise UserError(f"ADAPTER={name} {problem}") from error
    return model


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


def trained_rows(config) -> list[int]:
    """Token ids whose rows an adapter trains, by its PeftConfig."""
    rows = config.to_dict().get("trainable_token_indices") or []
    return sum(rows.values(), []) if isinstance(rows, dict) else rows


def keep_head_bias(model):
    """Mend peft 0.21, which drops the bias of a head whose token rows are trained (Phi-2); returns the model."""
    for layer in model.modules():
        bias = getattr(layer.base_layer, "bias", None) if isinstance(layer, TrainableTokensLayer) else None
        if bias is not None:
            layer.register_forward_hook(add_bias)
    return model


def add_bias(layer, args, output):
    uses_base = layer.disable_adapters or layer.merged or not layer.active_adapters
    return output if uses_base else output + layer.base_layer.bias


def load_adapter(model, folder: str, trainable: bool = False):
    """The model with the adapter in a folder."""
    return keep_head_bias(PeftModel.from_pretrained(model, folder, is_trainable=trainable))

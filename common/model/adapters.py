"""Adapters: LoRA, its variants and IA3, put on a frozen model by peft."""

import functools
import re
import warnings
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError, safe_open
from transformers.pytorch_utils import Conv1D

from common.cli import UserError
from common.model.targets import find_targets, ia3_layers, short_names

# Of adapters on one side of tied embeddings, which merging.py gives a matrix each.
warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)  # peft makes its own
# Papers: https://arxiv.org/abs/ and the number. IA3, which scales activations: 2205.05638.
VARIANTS = {
    "lora": {},  # 2106.09685
    "dora": {"use_dora": True},  # 2402.09353: magnitude and direction apart
    "rslora": {"use_rslora": True},  # 2312.03732: scaled by the root of the rank
    "pissa": {"init_lora_weights": "pissa"},  # 2404.02948: starts from the principal singular vectors
    "loftq": {},  # 2310.08659: starts from what quantisation lost
}

# What peft raises for an adapter on another model: other shapes, layers or tensors, or a package that is missing.
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError, UserWarning)
# Kinds of peft that no chat can use.
REFUSED = dict.fromkeys(("POLY", "MULTITASK_PROMPT_TUNING"), "want the number of a task, which chats do not have")
WHOLE_TEXT = "weigh the whole text anew for each token, and a chat goes on from the keys and values of earlier ones"
REFUSED |= dict.fromkeys(("XLORA", "LILY", "SHADOW"), WHOLE_TEXT)
# What peft saves once more of embeddings and head where these were resized.
COPIES = (".modules_to_save.weight", ".original_module.weight", ".base_layer.weight")
# Which dimension of a tensor is the vocabulary's, by the rest of its name after that of embeddings or head.
VOCABULARY_DIMENSIONS = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}


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
    fields = config.to_dict()
    rows = fields.get("trainable_token_indices") or fields.get("token_indices") or []
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


def add_in_one_pass(model) -> None:
    """Let plain LoRA layers add their product to the base's result by one addmm.

    peft passes over the result five times (product, scale, sum), and copies it first where the base is in 4 bits.
    """
    for layer in model.modules():
        is_new = isinstance(layer, LoraLayer) and not isinstance(layer, OnePass)
        if is_new and isinstance(layer.get_base_layer(), (torch.nn.Linear, Conv1D)):
            layer.__class__ = with_one_pass(type(layer))


class OnePass:
    """Mixin over a LoRA layer of peft."""

    def forward(self, inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """inputs (..., in) -> (..., out); peft's own where it does more than plain LoRA."""
        name, *others = self.active_adapters or [None]
        is_used = name in self.lora_A and not (self.disable_adapters or self.merged)
        if args or kwargs or others or not is_used or name in self.lora_variant or self.lora_bias[name]:
            return super().forward(inputs, *args, **kwargs)
        result = self.base_layer(inputs)
        low, last = self.lora_A[name](self.lora_dropout[name](inputs)), self.lora_B[name]  # low: (..., rank)
        if result.dtype != low.dtype:  # of layers that compute in another dtype than autocast's
            return result + (last(low) * self.scaling[name]).to(result.dtype)
        added = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), last.weight.T, alpha=self.scaling[name])
        return added.view(result.shape)


@functools.cache
def with_one_pass(kind: type) -> type:
    return type(kind.__name__, (OnePass, kind), {})


def read_config(folder: str) -> PeftConfig:
    """The config of the adapter in a folder, without its base, which MODEL may have named.

    UserError for a kind that peft does not know, or for another task.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"its adapter_config.json is not one of peft's ({type(error).__name__}: {error})"
        raise UserError(f"ADAPTER={folder}: {problem}. A newer peft may know it, or the file is damaged.") from error
    if reason := REFUSED.get(config.peft_type):
        raise UserError(f"ADAPTER={folder}: adapters of the kind {config.peft_type.value} {reason}.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"ADAPTER={folder} is for {config.task_type}, not for a language model that writes.")
    config.base_model_name_or_path = config.revision = None
    return config


def check_merge(folder: str) -> None:
    """UserError where the kind of the adapter in a folder has no weights of the base to merge into."""
    if not issubclass(PEFT_TYPE_TO_TUNER_MAPPING[kind := read_config(folder).peft_type], BaseTuner):
        raise no_merge(folder, kind)


def no_merge(name: str, kind: str) -> UserError:
    remedy = "chat_pipe.py and evaluate_model.py use it beside its base"
    return UserError(f"MODEL={name}: adapters of the kind {kind.value} cannot be merged; {remedy}.")


def load_adapter(model, folder: str, trainable: bool = False):
    """The model with the adapter in a folder, whose rows its embeddings get; UserError where it does not fit."""
    config = read_config(folder)
    try:
        fit_rows(model, folder, config)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)
        # Once more, for the tensors that found no place; those of prompt learning have one of their own.
        found = adapted.load_adapter(folder, adapted.active_adapter, is_trainable=trainable)
        unused = [name for name in found.unexpected_keys if not name.endswith(COPIES)]
        if unused and not config.is_prompt_learning:
            raise ValueError(f"no layer for {unused[0]}.")
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except (SafetensorError, OSError) as error:  # safetensors names a file that it may not read as not found
        problem = f"its weights are damaged or cannot be read ({error})"
        raise UserError(f"ADAPTER={folder}: {problem}. Copy or fetch them again.") from error
    except MISFITS as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = next((line for line in lines if "size mismatch" in line), lines[0])
        if missing := re.findall(r"'(base_model\.[^']+)'", reason):
            reason = f"it has no weights for {missing[0]}, and {len(missing) - 1} more like it."
        problem = f"does not fit MODEL={model.name_or_path}: {reason} Set MODEL to its base."
        raise UserError(f"ADAPTER={folder} {problem}") from error
    return keep_head_bias(adapted)


def fit_rows(model, folder: str, config: PeftConfig) -> None:
    """Give embeddings and head as many rows as the adapter has: other tools pad them, or cut them to the tokens."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    # Dimension of the vocabulary, by what follows the layer's name.
    dimensions = {f".{name}.{rest}": i for name in names for rest, i in VOCABULARY_DIMENSIONS.items()}
    rows, found = ends[0].weight.shape[0], []
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as tensors:
        for key in tensors.keys():
            found += [tensors.get_slice(key).get_shape()[i] for end, i in dimensions.items() if key.endswith(end)]
            if not tensors.get_tensor(key).isfinite().all():
                problem = f"its weights are not finite ({key}). Take an earlier checkpoint, or fetch it again."
                raise UserError(f"ADAPTER={folder}: {problem}")
    wanted = max([*(found or [rows]), *(token + 1 for token in trained_rows(config))])
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)


@torch.no_grad()
def prompt_cache(model):
    """Keys and values of the tokens that prompt learning puts before every chat; None for other models."""
    if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
        return None
    prompt = model.get_prompt(batch_size=1)  # (1, N, hidden), or the keys and values themselves
    if not isinstance(prompt, torch.Tensor):
        return prompt
    return model.get_base_model()(inputs_embeds=prompt.to(model.dtype), use_cache=True).past_key_values

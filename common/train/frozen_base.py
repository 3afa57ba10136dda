"""A frozen base, perhaps quantised, with an adapter that is trained; or all of its weights: checked and built."""

from dataclasses import replace

import torch

from common import distributed
from common.bounds import ADAPTERS
from common.cli import UserError
from common.model import adapters, load, location
from common.model.quantize import BITS


def locate_base(settings: dict) -> tuple[location.Source, torch.dtype, dict]:
    """The base with the adapter to continue, if any, its dtype, and the settings with its own QUANTIZATION.

    Refuses combinations that elsewhere fail silently or with a bare assertion, with the reason.
    """
    distributed.device()  # first of all: it says why a GPU is not used
    adapter = settings["ADAPTER"]
    source = location.locate(settings["MODEL"], adapter=None if adapter in ADAPTERS else adapter)
    dtype = load.choose_dtype(settings["DTYPE"], full=adapter is None)
    settings = settings | {"QUANTIZATION": load.find_quantization(source, settings["QUANTIZATION"])}
    refuse_untrainable(settings, source, dtype)
    return source, dtype, settings


def refuse_untrainable(settings: dict, source: location.Source, dtype: torch.dtype) -> None:
    adapter, quantization, ratio = settings["ADAPTER"], settings["QUANTIZATION"], settings["LORA_PLUS_RATIO"]
    full, quantised, half = adapter is None, quantization is not None, dtype == torch.float16
    on_gpu, is_new = torch.cuda.is_available(), adapter in ADAPTERS
    continued = adapters.read_config(source.adapter) if source.adapter else None
    is_prompt = continued is not None and continued.is_prompt_learning
    is_lora = continued.peft_type == "LORA" if continued else adapter not in (None, "ia3")
    has_16_bits = load.find_quantization(source, None) is None
    remedy = "Set QUANTIZATION=None or ADAPTER=lora." if has_16_bits else "Take the 16-bit MODEL, or ADAPTER=lora."
    for wrong, reason in (
        (full and quantised, f"quantised weights have no gradient to train by. {remedy}"),
        (full and half, "gradients of float16 weights cannot be unscaled. Set DTYPE=float32 or ADAPTER=lora."),
        (full and source.adapter, "MODEL is an adapter on a frozen base. Set ADAPTER=lora to continue it."),
        (source.adapter and is_new and adapter != "lora", "MODEL has an adapter. Set ADAPTER=lora to continue it."),
        (is_prompt, "peft does not go on training virtual tokens (prompt tuning and the like). Train a new adapter."),
        (half and not on_gpu, "float16 is trained on a GPU only. Set DTYPE=None."),
        (adapter == "pissa" and quantised, f"PiSSA rewrites the base weights. {remedy}"),
        (adapter == "ia3" and quantization in BITS, "peft has no IA3 for hqq's layers. Set ADAPTER=lora."),
        (adapter == "loftq" and quantization != "nf4", "LoftQ makes up for what NF4 loses. Set QUANTIZATION=nf4."),
        (adapter == "loftq" and not has_16_bits, "LoftQ needs the 16-bit weights, too. Set ADAPTER=lora."),
        (adapter == "loftq" and not on_gpu, "peft computes LoftQ on a GPU only. Set ADAPTER=lora."),
        (ratio and not is_lora, f"LORA_PLUS_RATIO={ratio} is for LoRA's matrices. Set it to None."),
    ):
        if wrong:
            chosen = str(dtype).removeprefix("torch.")
            raise UserError(f"ADAPTER={adapter} QUANTIZATION={quantization} DTYPE={chosen}: {reason}")


def reference(settings: dict, source: location.Source) -> location.Source | None:
    """The model that KL_WEIGHT pulls towards: the base without its adapter. PiSSA and LoftQ change the base itself."""
    variant = settings["ADAPTER"]
    if source.adapter:
        variant = adapters.read_config(source.adapter).to_dict().get("init_lora_weights", True)
    return None if variant in (None, "pissa", "loftq") else replace(source, adapter=None)


def trained_rows(settings: dict, source: location.Source, new_token_ids: list[int]) -> list[int]:
    """Ids of tokens that the base has hardly seen and whose rows of embeddings and head this run trains."""
    if source.adapter:
        return adapters.trained_rows(adapters.read_config(source.adapter))
    rows = [] if settings["ADAPTER"] == "ia3" else new_token_ids
    if rows and distributed.engine() == "fsdp" and load.load_config(source).get_text_config().tie_word_embeddings:
        raise UserError(
            f"CHAT_TEMPLATE={settings['CHAT_TEMPLATE']} has tokens whose rows must be trained; FSDP cannot shard these "
            f"where embeddings and head are one matrix, as in {source.name}. Use launch/ddp.yaml or launch/zero2.yaml."
        )
    return rows


def builder(job):
    """A function that puts the adapter on the base that it loads; job: an sft.Job."""

    def build(load_base):
        model = load_base()
        if job.source.adapter or job.settings["ADAPTER"] is None:
            return model
        return adapters.add_adapter(model, job.settings, job.encoder.new_token_ids)

    return build

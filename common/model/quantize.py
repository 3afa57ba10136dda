"""Quantised bases: NF4 and int8 by bitsandbytes, 1 to 4 bits by hqq, and folders that are quantised already."""

import sys

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from common import distributed
from common.bounds import HQQ
from common.cli import UserError
from common.files import GIB

BITS = {name: int(name[4]) for name in HQQ}  # by the value of QUANTIZATION
# Weights that share a scale and a zero point, which add half a bit a weight; hqq's own default.
GROUP_SIZE = 64
BITSANDBYTES = ("nf4", "fp4", "int8")
# Folders' own kinds that no adapter trains on here; transformers can turn them into 16 bits while it loads.
UNPACKED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
# Groups along axis 0 are 64 rows, which every packing divides, whatever a layer's sizes. Loss of SmolLM2-135M
# on 12 chats along axis 0 and 1: 4 bits 2.13 and 2.08, 3 bits 3.24 and 3.80 (16 bits: 1.96).
AXIS = 0
# Columns with an activation as large as this are multiplied in 16 bits. Loss of SmolLM2-135M on 20 chats: 1.693 so,
# 1.704 with 0.0 (no such columns, and no search for them), 1.683 in float32.
INT8_THRESHOLD = 6.0


def own_quantization(config) -> str | None:
    """How a folder's weights are quantised: nf4, fp4, int8, or the method's name; None: they are not."""
    own = config.to_dict().get("quantization_config")
    if not own:
        return None
    if own.get("load_in_4bit"):
        return own.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    return "int8" if own.get("load_in_8bit") else str(own["quant_method"])


def quantization_config(quantization: str | None, dtype: torch.dtype, config) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings: NF4 with double quantisation, int8, or the folder's own; None for all others.

    config: the model's.
    """
    if quantization in BITSANDBYTES and quantization == own_quantization(config):
        own = AutoQuantizationConfig.from_dict(config.to_dict()["quantization_config"])
        own.bnb_4bit_compute_dtype = dtype
        return own
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP knows one dtype.
            bnb_4bit_quant_storage=dtype if distributed.engine() == "fsdp" else torch.uint8,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
    return None


def adopt_dtype(model, dtype: torch.dtype) -> None:
    """Compute in the dtype with weights that a folder has quantised; transformers 5.23 leaves the others as saved."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = model._get_dtype_plan(dtype)  # some models have layers that are right in float32 only
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype
        elif parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = dtype


def forget_codes(model) -> None:
    """Let a model that was loaded from a quantised folder be saved once it is dequantised.

    Saving reverts what loading converted; transformers 5.23 would stop, or write weights under the names of codes.
    """
    used = [c for c in model._weight_conversions if isinstance(c, WeightConverter)]
    of_codes = [c for c in used if any("hf_quantizer" in vars(operation) for operation in c.operations)]
    model._weight_conversions = [c for c in model._weight_conversions if c not in of_codes]


def report_unquantized(model, quantization: str) -> None:
    """Say how much of a mixture of experts stays in 16 bits: its experts are no linear layers, which alone are packed.

    bitsandbytes' parametrisation for them would keep every dequantised expert for the backward pass.
    """
    experts = {name: p.nbytes for name, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point()}
    total = sum(p.nbytes for p in model.parameters())
    if (size := sum(experts.values())) > total / 100:  # else short convolutions
        names = ", ".join(sorted({name.rpartition(".")[2] for name in experts}))
        share = f"{size / GIB:.2f} of {total / GIB:.2f} GiB of weights stay in 16 bits (experts: {names})"
        print(f"QUANTIZATION={quantization}: {share}", file=sys.stderr)


def quantize_hqq(model, quantization: str, dtype: torch.dtype, device) -> None:
    """Put hqq's layers in the place of linear ones, but the head, on a device that may be meta."""
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config

    kept = get_keys_to_not_convert(model)
    for name, layer in list(model.named_modules()):
        if type(layer) not in (torch.nn.Linear, Conv1D) or not should_convert_module(name, kept):
            continue
        if layer.weight.numel() % GROUP_SIZE:
            problem = f"{name} has {layer.weight.numel()} weights, which do not divide into groups of {GROUP_SIZE}"
            raise UserError(f"QUANTIZATION={quantization}: {problem}. Set QUANTIZATION=int8 or None.")
        config = hqq_base_quant_config(nbits=BITS[quantization], group_size=GROUP_SIZE, axis=AXIS)
        weight = layer.weight.detach().to(device)
        # The search for zero points looks at its error, and on the meta device there is none.
        config["weight_quant_params"]["optimize"] = weight.device.type != "meta"
        packed = HQQLinear(None, config, compute_dtype=dtype, device=weight.device)
        config.pop("offload_meta")
        packed.quantize((weight.T if isinstance(layer, Conv1D) else weight).contiguous(), **config)
        packed.bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
        packed.source_class = type(layer)
        model.set_submodule(name, packed)
        layer.weight = layer.bias = None  # `list` above holds the layer
    model.to(device)


def hqq_layer_names(model) -> list[str]:
    """The names of hqq's layers."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "HQQLinear"]


def dequantize_hqq(model):
    """Put ordinary layers, with the weights that they stand for, in the place of hqq's."""
    for name in hqq_layer_names(model):
        packed = model.get_submodule(name)
        is_conv, sizes = packed.source_class is Conv1D, (packed.in_features, packed.out_features)
        with torch.device("meta"):
            layer = packed.source_class(*(sizes[::-1] if is_conv else sizes))
        weight = packed.dequantize()
        layer.weight = torch.nn.Parameter(weight.T.contiguous() if is_conv else weight)
        layer.bias = None if packed.bias is None else torch.nn.Parameter(packed.bias)
        model.set_submodule(name, layer)
    return model

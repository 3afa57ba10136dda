"""Models on the meta device: every shape and dtype, no weights."""

import copy

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from common.model.adapters import fit_rows, keep_head_bias, read_config
from common.model.attention import choose_attention
from common.model.quantize import BITS, quantization_config, quantize_hqq


def empty_model(config, quantization: str | None, dtype: torch.dtype, attention: str, vocabulary: int = 0):
    """What load_model would load, on the meta device: every shape and dtype, no weights. For memory.trace."""
    config = copy.deepcopy(config)
    # Kernels that need data (FlashAttention, FlexAttention) keep what attention per document keeps.
    if attention not in ("sdpa", "eager", "varlen_documents"):
        attention = choose_attention(config, None, packed=True, device="cpu")
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocabulary)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if quantization in BITS:
            quantize_hqq(model, quantization, dtype, "meta")
        elif quantization:
            quantizer = AutoHfQuantizer.from_config(quantization_config(quantization, dtype, config))
            quantizer.preprocess_model(model=model, device_map=None)
            setattr(model, "is_loaded_in_8bit" if quantization == "int8" else "is_loaded_in_4bit", True)
            for module in model.modules():
                empty_quantized(module, dtype)
    return model


def empty_quantized(module, dtype: torch.dtype) -> None:
    """Give one of bitsandbytes' linear layers on the meta device the tensors that it has when its weights are there."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(module, Linear4bit):
        weight, shape = module.weight, module.weight.shape
        blocks = -(-shape.numel() // weight.blocksize)
        about = dict(code=torch.empty(16), blocksize=weight.blocksize, quant_type=weight.quant_type, dtype=dtype)
        scales = torch.empty(blocks)
        if weight.compress_statistics:
            second = torch.empty(-(-blocks // 256))
            second = QuantState(second, code=torch.empty(256), blocksize=256, dtype=torch.float32)
            scales = torch.empty(blocks, dtype=torch.uint8)
            about |= dict(offset=torch.empty(()), state2=second)
        state = QuantState(scales, shape, **about)
        packed = torch.nn.Parameter(torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state, packed.quant_type = state, weight.quant_type
        packed.compress_statistics = weight.compress_statistics
        packed.bnb_quantized = True
        module.weight, module.quant_state, module.support_avx512bf16_for_cpu = packed, state, False
    elif isinstance(module, Linear8bitLt):
        codes = torch.empty(module.weight.shape, dtype=torch.int8)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
        module.weight.CB = module.weight.SCB = None
        module.state.CB, module.state.SCB = codes, torch.empty(len(codes))


def empty_adapter(model, folder: str):
    """A model on the meta device with an adapter of the form of the one in a folder, as if it went on training."""
    config = read_config(folder)
    config.inference_mode, config.init_lora_weights = False, True
    fit_rows(model, folder, config)
    return keep_head_bias(get_peft_model(model, config))

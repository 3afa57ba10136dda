"""Write GGUF files, a tensor at a time (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map, quants
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.bounds import check_package
from common.cli import UserError
from common.export.gguf_tokenizer import add_tokenizer

# model_type of a config -> architecture of llama.cpp
ARCHITECTURES = {name: name for name in "llama qwen2 qwen3 stablelm gpt2".split()}
ARCHITECTURES["mistral"] = "llama"
# Kind -> types of most weights, of the most important, and of GPT-2's joint q, k and v. K-quants as
# llama.cpp mixes them; q4_0 and q5_0 have embeddings and head in 8 bits.
KINDS = {kind: (Type[kind.upper()],) * 3 for kind in "f32 f16 bf16 q8_0 q4_0 q5_0 q6_k".split()}
KINDS["q4_k_m"] = (Type.Q4_K, Type.Q6_K, Type.Q5_K)
KINDS["q5_k_m"] = (Type.Q5_K, Type.Q6_K, Type.Q6_K)
# K-quants -> what is taken for rows that are not a multiple of 256.
K_QUANTS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
# Features that GGUF files cannot express.
UNKNOWN = ("qk_layernorm", "use_sliding_window", "mlp_bias", "scale_attn_by_inverse_layer_idx")


def check(config, kinds: list[str], llama_cpp: str | None) -> None:
    """UserError where a package, a converter or support of the model is missing."""
    if kinds:
        check_package("GGUF", ",".join(kinds), "xllamacpp", "xllamacpp")
    if llama_cpp or not kinds:
        return
    if any(KINDS[kind][0] in K_QUANTS for kind in kinds):
        check_package("GGUF", ",".join(kinds), "libgguf", "libgguf")
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF: cannot write {config.model_type} models, only {known}. Set LLAMA_CPP.")
    values = config.to_dict()
    odd = [name for name in UNKNOWN if values.get(name)]
    if not values.get("scale_attn_weights", True):
        odd.append("unscaled attention")
    activation = values.get("activation_function") or values["hidden_act"]
    if activation not in ("silu", "gelu_new"):
        odd.append(f"activation {activation}")
    rope = values.get("rope_parameters") or {}
    known = rope.get("rope_type", "default") in ("default", "linear", "yarn", "llama3")
    if not known or rope.keys() & {"attention_factor", "beta_fast", "beta_slow", "mscale"}:
        odd.append(f"rope {rope}")
    if odd:
        raise UserError(f"GGUF: cannot write the model's {', '.join(odd)}. Set LLAMA_CPP.")


def bytes_per_weight(*kinds: str) -> float:
    return sum(4 if "32" in kind else 2 if "16" in kind else 9 / 8 for kind in kinds)


def write(file: Path, folder: Path, config, tokenizer, kind: str, pre_tokenizer: str | None = None) -> str:
    """Write a folder's model; returns a note. UserError where tokens or weights do not fit."""
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type])
    writer.add_name(folder.parent.name)
    writer.add_file_type(LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()])
    writer.add_quantization_version(2)
    add_config(writer, config)
    add_tokenizer(writer, tokenizer, config, pre_tokenizer)
    types = {}
    for name, tensor in tensors(folder, config):
        shape, type = tensor.shape, tensor_type(name, tensor.shape, kind, config)
        nbytes = int(np.prod(quants.quant_shape_to_byte_shape(shape, type)))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=type)
        types[name] = type
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(folder, config):
        writer.write_tensor_data(quantize(name, tensor, types[name]))
    writer.close()
    short = sum(type not in (Type.F32, *K_QUANTS) for type in types.values())
    note = f"{short} of {len(types)} tensors have rows too short for K-quants: q5_0, q5_1 or q8_0"
    return note if KINDS[kind][0] in K_QUANTS and short else ""


def add_config(writer: GGUFWriter, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope, head_dim = config.rope_parameters, head_size(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if config.model_type == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def head_size(config) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def tensors(folder: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights as llama.cpp expects them."""
    kind = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                new = names.get_name(name, (".weight", ".bias"))
                if new is None:
                    raise UserError(f"GGUF: {file} has an unknown tensor: {name}. Set LLAMA_CPP.")
                tensor = stream.get_tensor(name)
                if kind == "llama" and "attn_q." in new:
                    tensor = interleave(tensor, config.num_attention_heads)
                if kind == "llama" and "attn_k." in new:
                    tensor = interleave(tensor, config.num_key_value_heads)
                if kind == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", new):
                    tensor = tensor.T.contiguous()  # Conv1D
                yield new, tensor
    if kind != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        exponents = torch.arange(0, head_size(config), 2) / head_size(config)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -exponents / scaled


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads in llama.cpp's order: its rotary embedding pairs neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def tensor_type(name: str, shape, kind: str, config) -> Type:
    """How a tensor is stored. The rules of K-quants are llama.cpp's (llama_tensor_get_type)."""
    chosen, important, joint = KINDS[kind]
    if len(shape) == 1 or "norm" in name or name == "position_embd.weight":
        return Type.F32
    if name == "output.weight" or name == "token_embd.weight" and config.tie_word_embeddings:
        chosen = Type.Q8_0 if chosen in (Type.Q4_0, Type.Q5_0) else important
    elif "attn_qkv" in name:
        chosen = joint
    elif re.search(r"attn_v|ffn_down", name):
        # Layers that suffer most: the first and the last eighth, and every third between.
        layer, layers = int(name.split(".")[1]), config.num_hidden_layers
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            chosen = important
    if chosen in K_QUANTS and shape[-1] % 256:
        chosen = K_QUANTS[chosen]
    floats = (Type.F32, Type.F16, Type.BF16)
    return Type.F16 if chosen not in floats and shape[-1] % 32 else chosen


def quantize(name: str, tensor: torch.Tensor, type: Type) -> np.ndarray:
    data = tensor.float().numpy()
    if type in K_QUANTS:
        import libgguf

        return libgguf.quantize_rows(data, int(type))
    with np.errstate(over="ignore"):
        packed = quants.quantize(data, type)
    if type == Type.F16 and not np.isfinite(packed).all():
        raise UserError(f"GGUF: {name} has weights beyond float16's range. Take GGUF=bf16.")
    return packed

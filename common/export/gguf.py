"""Write GGUF files, a tensor at a time (github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, get_tensor_name_map, quants
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.bounds import check_package
from common.cli import UserError
from common.export import gguf_config
from common.export.gguf_tokenizer import add_tokenizer

# Their rotary embedding pairs neighbours, and transformers' the halves of a head.
INTERLEAVED = ("llama", "smollm3", "granite")
HEADS = ("stablelm", "phi2", "olmo2")  # want a head of their own in the file, also where it is tied
# Kind -> types of most weights, of the most important, and of GPT-2's joint q, k and v. K-quants as
# llama.cpp mixes them; q4_0 and q5_0 have embeddings and head in 8 bits.
KINDS = {kind: (Type[kind.upper()],) * 3 for kind in "f32 f16 bf16 q8_0 q4_0 q5_0 q6_k".split()}
KINDS["q4_k_m"] = (Type.Q4_K, Type.Q6_K, Type.Q5_K)
KINDS["q5_k_m"] = (Type.Q5_K, Type.Q6_K, Type.Q6_K)
# K-quants -> what is taken for rows that are not a multiple of 256.
K_QUANTS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def check(config, kinds: list[str], llama_cpp: str | None) -> None:
    """UserError where a package, a converter or support of the model is missing."""
    if kinds:
        check_package("GGUF", ",".join(kinds), "xllamacpp", "xllamacpp")
    if llama_cpp or not kinds:
        return
    if any(KINDS[kind][0] in K_QUANTS for kind in kinds):
        check_package("GGUF", ",".join(kinds), "libgguf", "libgguf")
    check_config(config)


def check_config(config) -> None:
    """UserError for a model that is not written here, or that llama.cpp would compute differently."""
    if config.model_type not in gguf_config.ARCHITECTURES:
        known = ", ".join(gguf_config.ARCHITECTURES)
        raise UserError(f"GGUF: cannot write {config.model_type} models, only {known}. Set LLAMA_CPP.")
    if odd := gguf_config.unknown_to_llama_cpp(config):
        model = f"{config.model_type} models with {', '.join(odd)}"
        raise UserError(f"GGUF: cannot write {model} so that llama.cpp computes them alike. Set GGUF=None.")


def bytes_per_weight(*kinds: str) -> float:
    return sum(4 if "32" in kind else 2 if "16" in kind else 9 / 8 for kind in kinds)


def write(file: Path, folder: Path, config, tokenizer, kind: str, pre_tokenizer: str | None = None) -> str:
    """Write a folder's model; returns a note. UserError where tokens or weights do not fit."""
    check_config(config)  # merging may have changed it: a head that is no longer tied
    writer = GGUFWriter(file, gguf_config.ARCHITECTURES[config.model_type])
    writer.add_name(folder.parent.name)
    writer.add_file_type(LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()])
    writer.add_quantization_version(2)
    gguf_config.add_config(writer, config)
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
    notes = [gguf_config.exact_context(config)[1]]
    short = sum(type not in (Type.F32, *K_QUANTS) for type in types.values())
    if KINDS[kind][0] in K_QUANTS and short:
        notes.append(f"{short} of {len(types)} tensors have rows too short for K-quants: q5_0, q5_1 or q8_0")
    return "; ".join(filter(None, notes))


def tensors(folder: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights as llama.cpp expects them."""
    kind = gguf_config.ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    stored = {name: file for file in files for name in file.keys()}
    for name, file in stored.items():
        first_expert = ".experts.0." in name
        if name == "lm_head.weight" and config.tie_word_embeddings or ".experts." in name and not first_expert:
            continue
        new = names.get_name(name.replace(".experts.0.", ".experts."), (".weight", ".bias"))
        if new is None:
            raise UserError(f"GGUF: {folder} has an unknown tensor: {name}. Set LLAMA_CPP.")
        if first_expert:  # transformers saves them one by one
            every = [name.replace(".experts.0.", f".experts.{i}.") for i in range(config.num_local_experts)]
            yield new, torch.stack([stored[one].get_tensor(one) for one in every])
            continue
        yield new, arranged(new, file.get_tensor(name), kind, config)
        if new == "token_embd.weight" and config.tie_word_embeddings and kind in HEADS:
            yield "output.weight", file.get_tensor(name)
    yield from rope_tensors(config)


def arranged(name: str, tensor: torch.Tensor, kind: str, config) -> torch.Tensor:
    """A weight in llama.cpp's order and meaning. name: llama.cpp's."""
    if kind in INTERLEAVED and "attn_q." in name:
        return interleave(tensor, config.num_attention_heads)
    if kind in INTERLEAVED and "attn_k." in name:
        return interleave(tensor, config.num_key_value_heads)
    if kind == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        return tensor.T.contiguous()  # Conv1D
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor.float() + 1  # its norms scale by 1 + weight; bfloat16 would round the sum
    return tensor


def rope_tensors(config) -> Iterator[tuple[str, torch.Tensor]]:
    """Factors by which the frequencies of a rotary embedding are divided."""
    rope, _ = gguf_config.ropes(config)
    if rope.get("rope_type") == "llama3":
        exponents = torch.arange(0, gguf_config.head_size(config), 2) / gguf_config.head_size(config)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        yield "rope_freqs.weight", rope["rope_theta"] ** -exponents / scaled
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"])


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads in llama.cpp's order: its rotary embedding pairs neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def tensor_type(name: str, shape, kind: str, config) -> Type:
    """How a tensor is stored. The rules of K-quants are llama.cpp's (llama_tensor_get_type)."""
    chosen, important, joint = KINDS[kind]
    if len(shape) == 1 or re.search("norm|position_embd|ffn_gate_inp", name):
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

        rows = libgguf.quantize_rows(data.reshape(-1, data.shape[-1]), int(type))
        return rows.reshape(*data.shape[:-1], -1)
    with np.errstate(over="ignore"):
        packed = quants.quantize(data, type)
    if type == Type.F16 and not np.isfinite(packed).all():
        raise UserError(f"GGUF: {name} has weights beyond float16's range. Take GGUF=bf16.")
    return packed

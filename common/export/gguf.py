"""GGUF files for llama.cpp and what is built on it: written from a merged model, with its real tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Weights are read, converted and written one
tensor at a time.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType, RopeScalingType, TokenType, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH_NAMES
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.settings import check_choice

# model_type of a config -> architecture of llama.cpp
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "stablelm": "stablelm", "gpt2": "gpt2",
}  # fmt: skip

# name -> types of the weights, of those that matter most, and of the joint q, k and v of GPT-2; the K-quants as
# llama.cpp mixes them, the others with embeddings and head in 8 bits.
KINDS = {kind: (Type[kind.upper()],) * 3 for kind in ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_0", "q6_k")} | {
    "q4_k_m": (Type.Q4_K, Type.Q6_K, Type.Q5_K),
    "q5_k_m": (Type.Q5_K, Type.Q6_K, Type.Q6_K),
}

K_QUANTS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}  # and what stands in for short rows

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Steps of the pre-tokenizer -> its name in llama.cpp, which knows each by name only.
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (SPLIT, "ByteLevel"): "llama-bpe",
    (SPLIT.replace("{1,3}", ""), "ByteLevel"): "qwen2",
}

# What cannot be written in a file where it is otherwise.
USUAL = {
    "qk_layernorm": False, "use_sliding_window": False, "mlp_bias": False, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}  # fmt: skip


def check(config, kinds: list[str], llama_cpp: str | None = None) -> None:
    """UserError for a kind of file, or a feature of the model, that cannot be written. llama_cpp: a checkout of it."""
    for kind in kinds:
        check_choice("GGUF", kind, KINDS)
    if llama_cpp and not (Path(llama_cpp) / "convert_hf_to_gguf.py").is_file():
        raise UserError(f"LLAMA_CPP={llama_cpp} holds no convert_hf_to_gguf.py. Name a checkout of llama.cpp.")
    k_quants = not llama_cpp and any(KINDS[kind][0] in K_QUANTS for kind in kinds)
    for package in ["xllamacpp"] * bool(kinds) + ["libgguf"] * k_quants:
        if not importlib.util.find_spec(package):
            raise UserError(f"GGUF={','.join(kinds)} needs the package {package}: pip install {package}")
    if llama_cpp or not kinds:
        return
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"GGUF: {config.model_type} models are not written here ({', '.join(ARCHITECTURES)} are). "
            "Set LLAMA_CPP to a checkout of llama.cpp, whose converter knows more."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    activation = config.activation_function if config.model_type == "gpt2" else config.hidden_act
    odd = [name for name, usual in USUAL.items() if bool(getattr(config, name, usual)) != usual]
    known = rope.get("rope_type", "default") in ("default", "linear", "yarn", "llama3")
    if not known or set(rope) & {"attention_factor", "beta_fast", "beta_slow", "mscale"}:
        odd.append(f"rope {rope}")
    if activation not in ("silu", "gelu_new"):
        odd.append(f"activation {activation}")
    if odd:
        raise UserError(f"GGUF: the model's {', '.join(odd)} cannot be written here. Set LLAMA_CPP.")


def write(file: Path, folder: Path, config, tokenizer, kind: str, pre_tokenizer: str | None = None) -> str:
    """Write the model in a folder (safetensors, Hugging Face names) as a GGUF file; returns a note on its tensors.

    pre_tokenizer: the name that llama.cpp has for the tokenizer's way to split text; None: found out.
    Raises UserError where that is not known, or weights do not fit into float16.
    """
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type])
    writer.add_name(folder.parent.name)
    writer.add_file_type(LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()])
    writer.add_quantization_version(2)
    add_config(writer, config)
    add_tokenizer(writer, tokenizer, config, pre_tokenizer)
    types = {}
    for name, tensor in tensors(folder, config):
        types[name] = tensor_type(name, tensor.shape, kind, config)
        nbytes = int(np.prod(quants.quant_shape_to_byte_shape(tensor.shape, types[name])))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(folder, config):
        writer.write_tensor_data(quantized(name, tensor, types[name]))
    writer.close()
    short = sum(type not in (Type.F32, *K_QUANTS) for type in types.values()) if KINDS[kind][0] in K_QUANTS else 0
    return f"{short} of {len(types)} tensors have rows too short for K-quants: q5_0, q5_1 or q8_0" if short else ""


def add_config(writer: GGUFWriter, config) -> None:
    """What llama.cpp must know to compute the model."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = head_size(config)
    rope = config.rope_parameters
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
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors(folder: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights as llama.cpp wants them, one after another."""
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    seen = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                tensor, new = stream.get_tensor(name), names.get_name(name, (".weight", ".bias"))
                if new is None:
                    raise UserError(f"GGUF: {file} has a tensor that is unknown in {config.model_type}: {name}")
                if ARCHITECTURES[config.model_type] == "llama" and re.search(r"attn_[qk]\.", new):
                    heads = config.num_attention_heads if "attn_q" in new else config.num_key_value_heads
                    tensor = interleaved(tensor, heads)
                if config.model_type == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", new):
                    tensor = tensor.T.contiguous()  # Conv1D
                seen.add(new)
                yield new, tensor
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_size(config), 2) / head_size(config))
        yield "rope_freqs.weight", plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order of llama.cpp's rotary embedding, which turns neighbours, not halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def tensor_type(name: str, shape, kind: str, config) -> Type:
    """How a tensor is stored. The rules of K-quants are llama.cpp's (llama_tensor_get_type)."""
    usual, important, joint = KINDS[kind]
    if len(shape) == 1 or "norm" in name or name == "position_embd.weight":
        return Type.F32
    chosen = usual
    if name == "output.weight" or name == "token_embd.weight" and config.tie_word_embeddings:
        chosen = Type.Q8_0 if usual in (Type.Q4_0, Type.Q5_0) else important
    elif "attn_qkv" in name:
        chosen = joint
    elif re.search(r"attn_v|ffn_down", name) and more_bits(int(name.split(".")[1]), config.num_hidden_layers):
        chosen = important
    if chosen in K_QUANTS and shape[-1] % 256:
        chosen = K_QUANTS[chosen]
    return Type.F16 if chosen not in (Type.F32, Type.F16, Type.BF16) and shape[-1] % 32 else chosen


def more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among those that suffer most: the first, the last, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantized(name: str, tensor: torch.Tensor, type: Type) -> np.ndarray:
    data = tensor.float().numpy()
    if type in K_QUANTS:
        import libgguf

        return libgguf.quantize_rows(data, int(type))
    with np.errstate(over="ignore"):
        packed = quants.quantize(data, type)
    if type == Type.F16 and not np.isfinite(packed).all():
        raise UserError(f"GGUF: {name} has weights beyond float16's range. Take bf16.")
    return packed


def add_tokenizer(writer: GGUFWriter, tokenizer, config, pre_tokenizer: str | None) -> None:
    """Vocabulary, merges, kinds of tokens, the tokens that begin and end, and the template."""
    spec, encoder = json.loads(tokenizer.backend_tokenizer.to_str()), ChatEncoder(tokenizer)
    model, count = spec["model"], config.vocab_size
    if model["type"] != "BPE":
        raise UserError(f"GGUF: a tokenizer of type {model['type']} is not written here. Set LLAMA_CPP.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    texts = {id: token for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(count)])
    writer.add_token_types([token_type(texts.get(i), added.get(i), tokenizer.unk_token) for i in range(count)])
    if model.get("byte_fallback"):  # as SentencePiece made it: tokens are merged by score
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre_tokenizer or "default")
        ranks = {"".join(merge.split(" ")): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(texts.get(i), -1e6) for i in range(count)])
        writer.add_add_space_prefix("Prepend" in str(spec["normalizer"]) or "'always'" in str(spec["pre_tokenizer"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or pre_tokenizer_name(spec, config))
        writer.add_token_merges(merges)
    writer.add_add_bos_token(adds_bos(encoder))
    writer.add_add_eos_token(False)
    end = tokenizer.convert_tokens_to_ids(encoder.end_token)
    ids = dict(bos=tokenizer.bos_token_id, eos=end, eot=end, pad=tokenizer.pad_token_id, unk=tokenizer.unk_token_id)
    for name, id in ids.items():
        if id is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    writer.add_chat_template(tokenizer.chat_template)


def adds_bos(encoder: ChatEncoder) -> bool:
    """Whether a file asks for a BOS before every text; llama.cpp then takes away one that the template has written.

    Where the template has none, though the tokenizer adds it to plain text, training has seen none either.
    """
    text = encoder.render([{"role": "user", "content": "a"}], add_generation_prompt=True)[0]
    return encoder.adds_bos and text.startswith(encoder.variables["bos_token"])


def token_type(text: str | None, added, unknown: str | None) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if added is not None:
        if text == unknown:
            return TokenType.UNKNOWN
        control = added.special or re.fullmatch(r"<\|.*\|>", text)
        return TokenType.CONTROL if control else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL


def pre_tokenizer_name(spec: dict, config) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits text; UserError where none is known to fit."""
    part = spec["pre_tokenizer"] or {}
    steps = part.get("pretokenizers", [part])
    key = tuple(s["pattern"].get("Regex") if s.get("type") == "Split" else s.get("type") for s in steps)
    name = PRE_TOKENIZERS.get(key)
    options = {
        "ByteLevel": {"add_prefix_space": False, "use_regex": len(key) == 1 or key[0] == "Digits"},
        "Digits": {"individual_digits": True},
        "Split": {"behavior": "Isolated", "invert": False},
    }
    as_known = all(step | options.get(step.get("type"), {}) == step for step in steps)
    normalizer, ignores = (spec["normalizer"] or {}).get("type"), spec["model"].get("ignore_merges", False)
    if name is None or not as_known or normalizer not in (None, "NFC") or ignores != (name == "llama-bpe"):
        raise UserError(
            "GGUF: no pre-tokenizer of llama.cpp is known to split text as this tokenizer does. Name one with "
            f"PRE_TOKENIZER=, and see whether the proof agrees. ({json.dumps(part)[:300]})"
        )
    return "stablelm2" if (name, config.model_type) == ("qwen2", "stablelm") else name


def modelfile(gguf_name: str, tokenizer) -> str:
    """A Modelfile for Ollama: the file, where to stop, and the template in Go's language, as far as that can say it."""
    encoder = ChatEncoder(tokenizer)
    template = go_template(encoder)
    said = "# The chat template could not be put into Ollama's language: use /api/generate with raw prompts."
    if template is not None:
        said = f'TEMPLATE """{template}"""'
    return f'FROM ./{gguf_name}\nPARAMETER stop "{encoder.end_token}"\n{said}\n'


def go_template(encoder: ChatEncoder) -> str | None:
    """The chat template as Go text; None where it is more than fixed texts around the messages."""
    bos = encoder.variables["bos_token"] if adds_bos(encoder) else ""
    system, user, answer = ({"role": role, "content": f"\0{role}\0"} for role in ("system", "user", "assistant"))

    def texts(*messages: dict) -> list[str]:
        """What stands before, between and after messages, without a BOS that is put there anyway."""
        text = encoder.render(list(messages), add_generation_prompt=True)[0].removeprefix(bos)
        return re.split("\0[a-z]*\0", text)

    try:
        first_system, system_user, user_answer, answer_user, prompt = texts(system, user, answer, user)
        first_user, *following = texts(user, answer, user)
    except (UserError, ValueError):  # no system messages, or a message left out
        return None
    if prompt != user_answer or following != [user_answer, answer_user, prompt]:
        return None
    return (
        "{{ range $i, $m := .Messages }}"
        f'{{{{ if eq $m.Role "system" }}}}{first_system}'
        f'{{{{ else if eq $m.Role "assistant" }}}}{user_answer}'
        f"{{{{ else if eq $i 0 }}}}{first_user}"
        f'{{{{ else if eq (index $.Messages 0).Role "system" | and (eq $i 1) }}}}{system_user}'
        f"{{{{ else }}}}{answer_user}{{{{ end }}}}{{{{ $m.Content }}}}{{{{ end }}}}{prompt}"
    )

"""A model's config for llama.cpp: what a GGUF file can say of it, and the file's metadata."""

from gguf import GGUFWriter, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.model.load import context_length

# model_type of a config -> architecture of llama.cpp
ARCHITECTURES = {
    name: name for name in "llama qwen2 qwen3 stablelm gpt2 gemma2 phi3 olmo2 smollm3 granite cohere2".split()
} | {
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "olmo3": "olmo2", "phi": "phi2",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
# Settings that are built into llama.cpp -> the values that it knows; ANY: any but none.
ANY = None
GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
BUILT_IN = {
    "all": dict(
        qk_layernorm=[False], mlp_bias=[False], attention_bias=[False], scale_attn_weights=[True],
        scale_attn_by_inverse_layer_idx=[False], use_bidirectional_attention=[None, False],
        hidden_act=["silu", "swish"],
    ),
    "llama": dict(mlp_bias=[False, True], attention_bias=[False, True]),
    "granite": dict(mlp_bias=[False, True], attention_bias=[False, True]),
    "gpt2": dict(activation_function=GELU),
    "phi2": dict(hidden_act=GELU),
    "gemma2": dict(
        hidden_activation=GELU, attn_logit_softcapping=ANY, final_logit_softcapping=ANY, tie_word_embeddings=[True]
    ),
    "gemma3": dict(hidden_activation=GELU, attn_logit_softcapping=[None]),
    "cohere2": dict(tie_word_embeddings=[True]),
    "qwen3moe": dict(norm_topk_prob=[True], decoder_sparse_step=[1], mlp_only_layers=[[]]),
}  # fmt: skip
# Architectures with a window -> of how many layers one sees everything, unless a file says otherwise.
WINDOWS = {"gemma2": 2, "gemma3": 6, "olmo2": 4, "cohere2": 4}
# Which may rotate only a part of each head, and whose heads have to be hidden_size wide together.
PARTIAL_ROTARY = ("stablelm", "phi2", "phi3")
WHOLE_HEADS = (*PARTIAL_ROTARY, "olmo2", "cohere2", "gpt2", "qwen2")
ROPE_TYPES = {"llama3": ("llama", "granite"), "longrope": ("llama", "phi3")}  # others: all
# Numbers of a config -> how they are written.
SCALES = {
    "attn_logit_softcapping": GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": GGUFWriter.add_final_logit_softcapping,
    "embedding_multiplier": GGUFWriter.add_embedding_scale,
    "attention_multiplier": GGUFWriter.add_attention_scale,
    "residual_multiplier": GGUFWriter.add_residual_scale,
    "logits_scaling": GGUFWriter.add_logit_scale,  # Granite divides by it, Cohere multiplies
    "logit_scale": GGUFWriter.add_logit_scale,
}


def unknown_to_llama_cpp(config) -> list[str]:
    """What of a config llama.cpp computes differently, as NAME=value; ARCHITECTURES has to know its model_type."""
    values, architecture = config.to_dict(), ARCHITECTURES[config.model_type]
    known = BUILT_IN["all"] | BUILT_IN.get(architecture, {})
    layers, heads, head_dim = config.num_hidden_layers, config.num_attention_heads, head_size(config)
    # The largest Gemmas have their own scale, which llama.cpp knows by their number of layers.
    largest = layers == {"gemma2": 46, "gemma3": 62}.get(architecture)
    known["query_pre_attn_scalar"] = [config.hidden_size // heads if largest else head_dim]
    known["no_rope_layers"] = [[int((i + 1) % 4 != 0) for i in range(layers)]]
    if architecture in WHOLE_HEADS:
        known["head_dim"] = [None, config.hidden_size / heads]
    odd = {
        name: values[name]
        for name, allowed in known.items()
        if name in values and (values[name] is None if allowed is ANY else values[name] not in allowed)
    }
    if architecture in ("gemma2", "cohere2") and not any(windowed_layers(config)):
        odd["sliding_window"] = None  # it would abort
    return [f"{name}={value}" for name, value in odd.items()] + unknown_rope(config, architecture)


def unknown_rope(config, architecture: str) -> list[str]:
    rope, local = ropes(config)
    odd = []
    for values in (rope, local):
        kind = values.get("rope_type", "default")
        if kind not in ("default", "linear", "yarn") and architecture not in ROPE_TYPES.get(kind, ()):
            odd.append(f"rope_type={kind}")
        built_in = dict(beta_fast=32, beta_slow=1, mscale=None, mscale_all_dim=None, truncate=True)
        if kind != "longrope":
            built_in["attention_factor"] = None
        if architecture not in PARTIAL_ROTARY:
            built_in["partial_rotary_factor"] = 1
        odd += [f"{name}={values[name]}" for name in built_in if values.get(name) not in (None, built_in[name])]
    if local is not rope:
        same_base = architecture == "gemma3" or local["rope_theta"] == rope["rope_theta"]
        if local["rope_type"] != "default" or not same_base or (architecture, rope["rope_type"]) == ("gemma3", "yarn"):
            odd.append(f"rope_parameters={config.rope_parameters}")
    return list(dict.fromkeys(odd))


def ropes(config) -> tuple[dict, dict]:
    """Parameters of the rotary embedding of layers that see everything, and of those with a window."""
    rope = config.to_dict().get("rope_parameters") or {}
    return rope.get("full_attention", rope), rope.get("sliding_attention", rope)


def head_size(config) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def windowed_layers(config) -> list[bool]:
    """Which layers see a window only."""
    values = config.to_dict()
    kinds = values.get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
    return [bool(values.get("sliding_window")) and kind == "sliding_attention" for kind in kinds]


def last_change(config) -> int:
    """Tokens up to which a model sees and rotates all as in a short text; 0 if it always does."""
    values = config.to_dict()
    lengths = [rope.get("original_max_position_embeddings") for rope in ropes(config)]
    lengths += [any(windowed_layers(config)) and config.sliding_window, values.get("attention_chunk_size")]
    return max(filter(None, lengths), default=0)


def exact_context(config) -> tuple[int, str]:
    """Tokens of context in which llama.cpp computes what the model does; a note where the model has more."""
    whole, rope = context_length(config), ropes(config)[0]
    limits = {whole: ""}
    if ARCHITECTURES.get(config.model_type) not in WINDOWS and any(windowed_layers(config)):
        limits[config.sliding_window] = "its layers for this architecture have no sliding window"
    if rope.get("rope_type") == "longrope":
        # It chooses by the length of the context, transformers by the length of the text.
        limits[rope["original_max_position_embeddings"]] = "beyond, it rotates short texts as long ones"
    context = min(limits)
    note = f"context {context} of {whole}: in llama.cpp, {limits[context]}"
    return context, note if context < whole else ""


def add_config(writer: GGUFWriter, config) -> None:
    values = config.to_dict()
    writer.add_context_length(exact_context(config)[0])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    if "layer_norm_eps" in values:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if "num_local_experts" in values:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(values.get("moe_intermediate_size", config.intermediate_size))
    for name, add in SCALES.items():
        if values.get(name) is not None:
            add(writer, values[name])
    add_windows(writer, config)
    add_rope(writer, config)


def add_windows(writer: GGUFWriter, config) -> None:
    period, layers = WINDOWS.get(ARCHITECTURES[config.model_type]), windowed_layers(config)
    if period and any(layers):
        writer.add_sliding_window(config.sliding_window)
        if layers != [(i + 1) % period != 0 for i in range(len(layers))]:
            writer.add_sliding_window_pattern(layers)


def add_rope(writer: GGUFWriter, config) -> None:
    rope, local = ropes(config)
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size(config) * rope.get("partial_rotary_factor", 1)))
    if local is not rope:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS[kind](config, "cpu")[1])

"""Tiny random models of the architectures that people fine-tune, with what makes each of them different."""

from pathlib import Path

# Name: model_type of transformers, changes to conftest.tiny_config. Windows are shorter than the chats.
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
TWO_KINDS = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
ARCHITECTURES = {
    "llama-3.2": ("llama", dict(rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 128})),
    "mistral-nemo": ("mistral", dict(head_dim=32, sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=24)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=24, tie_word_embeddings=True)),
    "gemma3": ("gemma3_text", dict(head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True, **TWO_KINDS)),
    "phi-2": ("phi", dict()),
    "phi-4": ("phi3", dict()),
    "phi-4-mini": (
        "phi3",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75),
        ),
    ),
    "olmo2": ("olmo2", dict()),
    "smollm3": ("smollm3", dict(tie_word_embeddings=True, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])),
    "granite": (
        "granite",
        dict(
            tie_word_embeddings=True, embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.3,
            attention_multiplier=0.1,
        ),
    ),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3-moe": (
        "qwen3_moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16, norm_topk_prob=True),
    ),
    "gpt-oss": ("gpt_oss", dict(head_dim=16, sliding_window=24, **EXPERTS)),
    "qwen3.5": (
        "qwen3_5_text",
        dict(
            head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
            linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "cohere2": ("cohere2", dict(tie_word_embeddings=True, **TWO_KINDS)),
}  # fmt: skip
OTHERS = {
    "olmo3": ("olmo3", TWO_KINDS),
    "starcoder2": ("starcoder2", dict(sliding_window=24)),
    "exaone4": ("exaone4", TWO_KINDS),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=24, max_window_layers=0)),
    "falcon": ("falcon", dict()),
    "opt": ("opt", dict(ffn_dim=128, word_embed_proj_dim=64)),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "llama-4": (
        "llama4_text",
        dict(
            head_dim=16, attention_chunk_size=24, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=128,
            layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
        ),
    ),
    "mamba-2": ("mamba2", dict(num_heads=8, head_dim=16, n_groups=1, state_size=16)),
    "granite-moe": ("granitemoe", EXPERTS),
    "gemma": ("gemma", dict(head_dim=16)),
    "cohere": ("cohere", dict()),
}  # fmt: skip


def random_model(name: str, seed: int = 0, **changes):
    """A model in float32 whose weights, biases too, are large enough for every part to matter."""
    import torch
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    kind, own = (ARCHITECTURES | OTHERS)[name]
    torch.manual_seed(seed)
    config = tiny_config(kind, **own | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1 or path.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


def save_model(name: str, folder: Path, tokenizer_folder: Path, **changes) -> Path:
    from transformers import AutoTokenizer

    random_model(name, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder

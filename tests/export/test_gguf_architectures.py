"""Each architecture in the real llama.cpp: tiny random models, whose every part is seen when it is left out."""

import pytest
import torch
from conftest import ROOT
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from common.cli import UserError
from common.export import gguf, gguf_config, verify, verify_gguf
from common.export.proof import Proof
from common.model import location
from common.model.attention import choose_attention

SIZES = dict(
    vocab_size=640, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
WINDOW = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
FACTORS = [1.0, 1.3, 1.9, 2.2, 2.8, 3.1, 3.7, 4.4]
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=256, short_factor=FACTORS,
    long_factor=[2.5 * factor for factor in FACTORS],
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=128,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
DEFAULT = dict(rope_type="default", rope_theta=1e4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MULTIPLIERS = dict(embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.5)
CASES = {
    "llama 3.2": ("llama", dict(rope_parameters=LLAMA3, head_dim=32)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, longrope": ("llama", dict(rope_parameters=LONGROPE)),
    "mistral, window": ("mistral", dict(sliding_window=64, tie_word_embeddings=False)),
    "mistral, window shorter than a chat": ("mistral", dict(sliding_window=16)),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=1)),
    "qwen3, yarn": ("qwen3", dict(head_dim=32, rope_parameters=YARN)),
    "gemma 2": (
        "gemma2",
        WINDOW | dict(head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    ),
    "gemma 3": (
        "gemma3_text",
        WINDOW
        | dict(head_dim=32, query_pre_attn_scalar=32)
        | dict(rope_parameters={"sliding_attention": DEFAULT | dict(rope_theta=50.0), "full_attention": DEFAULT}),
    ),
    "gemma 3, linear": (
        "gemma3_text",
        WINDOW
        | dict(head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=4.0)
        | dict(
            rope_parameters={
                "sliding_attention": DEFAULT,
                "full_attention": dict(rope_type="linear", rope_theta=1e4, factor=8.0),
            }
        ),
    ),
    "gemma 3, all see all": (
        "gemma3_text",
        dict(head_dim=16, query_pre_attn_scalar=16, layer_types=["full_attention"] * 2),
    ),
    "olmo 3, all local": ("olmo3", dict(sliding_window=64, layer_types=["sliding_attention"] * 2)),
    "phi-2": ("phi", dict(tie_word_embeddings=False)),
    "phi-4": ("phi3", dict(tie_word_embeddings=False)),
    "phi-3, window": ("phi3", dict(sliding_window=64)),
    "phi-4-mini": ("phi3", dict(tie_word_embeddings=True, rope_parameters=DEFAULT | dict(partial_rotary_factor=0.75))),
    "phi-4-mini, longrope": ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=256)),
    "olmo 2": ("olmo2", dict(tie_word_embeddings=False)),
    "olmo 2, tied": ("olmo2", dict(tie_word_embeddings=True)),
    "olmo 3": (
        "olmo3",
        WINDOW | dict(rope_parameters={"sliding_attention": DEFAULT, "full_attention": YARN}),
    ),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "granite": ("granite", MULTIPLIERS | dict(tie_word_embeddings=True)),
    "granite, llama3, biases": (
        "granite",
        MULTIPLIERS | dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    ),
    "mixtral": ("mixtral", EXPERTS | dict(tie_word_embeddings=False)),
    "qwen3-moe": ("qwen3_moe", EXPERTS | dict(moe_intermediate_size=64, head_dim=16, norm_topk_prob=True)),
    "cohere 2": ("cohere2", WINDOW | dict(logit_scale=2.0)),
}  # fmt: skip


@pytest.fixture
def verified(tokenizer, tmp_path, monkeypatch):
    """verified(case): what verify_gguf measures of the case's f32 file; every weight random, biases and norms, too."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 4)  # random models go on and on

    def make(case):
        kind, changes = CASES[case]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight)) if weight.ndim == 1 else weight.normal_(0, 0.2)
        model.save_pretrained(tmp_path / "final")
        tokenizer.save_pretrained(tmp_path / "final")
        rows = verify.held_out_rows(None, None, tokenizer, 1024, 60)
        source = location.locate(str(tmp_path / "final"))
        attention = choose_attention(model.config, None)
        reference = verify.Reference(
            source, None, Proof(torch.device("cpu"), torch.float32), attention, tokenizer, rows, answers=True
        )
        note = gguf.write(tmp_path / "model.gguf", tmp_path / "final", reference.config, tokenizer, "f32")
        return verify_gguf.verify_gguf(tmp_path / "model.gguf", "f32", reference) | {"note": note}

    return make


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_predicts_what_the_model_does(case, verified):
    result = verified(case)
    assert not result["faults"] and result["llama_cpp_kl"] < 1e-4
    if result["note"]:
        assert result["context"] in (16, 64, 256) and f"context {result['context']} of 512" in result["note"]
    else:
        assert result["context"] == 512
    if CASES[case][1].get("sliding_window") or "original_max" in str(CASES[case][1]):
        assert result["llama_cpp_long_kl"] < 1e-4
    in_transformers = CASES[case][0] in "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 qwen3_moe".split()
    assert (result["kl"] == 0) if in_transformers else (result["kl"] is None)


def named(name, plant):
    plant.__name__ = name  # in the test's name
    return plant


def without(owner, name):
    return named(name, lambda monkeypatch: monkeypatch.setattr(owner, name, lambda *values: None))


def without_scale(name):
    return named(name, lambda monkeypatch: monkeypatch.delitem(gguf_config.SCALES, name))


def instead(owner, name, value):
    return named(name, lambda monkeypatch: monkeypatch.setattr(owner, name, value))


def changed(part, change):
    """Tensors whose name holds `part`, changed."""

    def plant(monkeypatch):
        honest = gguf.tensors

        def tensors(*values):
            for name, tensor in honest(*values):
                yield name, change(tensor) if part in name else tensor

        monkeypatch.setattr(gguf, "tensors", tensors)

    return named(part, plant)


def whole_context(config):
    return config.max_position_embeddings, ""


FAULTS = [
    *(("granite", without_scale(name)) for name in MULTIPLIERS),
    ("gemma 2", without_scale("attn_logit_softcapping")),
    ("gemma 2", without_scale("final_logit_softcapping")),
    ("gemma 3, linear", without_scale("final_logit_softcapping")),
    ("cohere 2", without_scale("logit_scale")),
    *((case, without(GGUFWriter, "add_sliding_window")) for case in ("gemma 2", "gemma 3", "olmo 3", "cohere 2")),
    *((case, without(GGUFWriter, "add_sliding_window_pattern")) for case in ("gemma 3", "olmo 3", "cohere 2")),
    ("gemma 3", without(GGUFWriter, "add_rope_freq_base_swa")),
    ("gemma 3, linear", without(GGUFWriter, "add_rope_scaling_factor")),
    ("qwen3, yarn", without(GGUFWriter, "add_rope_scaling_orig_ctx_len")),
    ("olmo 3", without(GGUFWriter, "add_rope_scaling_type")),
    *((case, changed("norm.weight", lambda weight: weight - 1)) for case in ("gemma 2", "gemma 3")),
    *((case, instead(gguf, "INTERLEAVED", ())) for case in ("llama 3.2", "smollm3", "granite")),
    ("cohere 2", instead(gguf, "INTERLEAVED", ("cohere2",))),
    *((case, changed("_exps", lambda weight: weight.flip(0))) for case in ("mixtral", "qwen3-moe")),
    *((case, without(GGUFWriter, "add_rope_dimension_count")) for case in ("phi-2", "phi-4-mini")),
    ("phi-2", changed("output.bias", torch.zeros_like)),
    ("olmo 2, tied", instead(gguf, "HEADS", ())),
    *(
        (case, changed("rope_", torch.ones_like))
        for case in ("llama 3.2", "llama, longrope", "granite, llama3, biases")
    ),
    ("phi-4-mini, longrope", changed("rope_", torch.ones_like)),
    ("phi-4-mini, longrope", without(GGUFWriter, "add_rope_scaling_attn_factors")),
    *((case, instead(gguf_config, "exact_context", whole_context)) for case in CASES if case.endswith("window")),
    ("phi-4-mini, longrope", instead(gguf_config, "exact_context", whole_context)),
]


@pytest.mark.parametrize(("case", "plant"), FAULTS)
def test_a_part_that_is_left_out_is_seen(case, plant, verified, monkeypatch):
    plant(monkeypatch)
    result = verified(case)
    assert any("llama_cpp" in fault or "llama.cpp" in fault for fault in result["faults"])


@pytest.mark.parametrize("case", ["gemma 2", "gemma 3", "olmo 3", "cohere 2"])
def test_a_window_that_is_one_token_shorter_is_seen(case, verified, monkeypatch):
    honest = GGUFWriter.add_sliding_window
    monkeypatch.setattr(GGUFWriter, "add_sliding_window", lambda self, window: honest(self, window - 1))
    assert all("long_kl is" in fault for fault in verified(case)["faults"] or [""])


def test_both_sets_of_longropes_factors_are_written(verified, monkeypatch):
    """A longer context than is written here makes llama.cpp take the long factors: right for long texts only."""
    monkeypatch.setattr(gguf_config, "exact_context", whole_context)
    result = verified("phi-4-mini, longrope")
    assert result["llama_cpp_long_kl"] < 1e-4 and result["llama_cpp_kl"] > 1e-3


HEADS_OF_16 = dict(head_dim=16, query_pre_attn_scalar=16)
LOCAL = {"sliding_attention": DEFAULT, "full_attention": DEFAULT}
UNKNOWN = [
    ("llama", dict(hidden_act="gelu_new"), "hidden_act=gelu_new"),
    ("llama", dict(rope_parameters=DEFAULT | dict(rope_type="dynamic", factor=2.0)), "rope_type=dynamic"),
    ("qwen2", dict(rope_parameters=LLAMA3), "rope_type=llama3"),
    ("qwen3", dict(attention_bias=True), "attention_bias=True"),
    ("qwen3", dict(rope_parameters=YARN | dict(truncate=False, beta_fast=16.0)), "beta_fast=16.0, truncate=False"),
    ("qwen3", dict(rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm=True"),
    ("phi", dict(hidden_act="gelu"), "hidden_act=gelu"),
    ("gemma2", dict(head_dim=16, query_pre_attn_scalar=24), "query_pre_attn_scalar=24"),
    ("gemma2", HEADS_OF_16 | dict(attn_logit_softcapping=None), "attn_logit_softcapping=None"),
    ("gemma2", HEADS_OF_16 | dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
    ("gemma2", HEADS_OF_16 | dict(layer_types=["full_attention"] * 2), "sliding_window=None"),
    ("gemma3_text", HEADS_OF_16 | dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ("gemma3_text", HEADS_OF_16 | dict(rope_parameters=LOCAL | dict(full_attention=YARN)), "rope_parameters={"),
    (
        "olmo3",
        dict(rope_parameters=LOCAL | dict(sliding_attention=DEFAULT | dict(rope_theta=9.0))),
        "rope_parameters={",
    ),
    ("cohere2", dict(head_dim=32), "head_dim=32"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers=[1, 0]"),
    ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob=False"),
    ("qwen3_moe", dict(norm_topk_prob=True, mlp_only_layers=[0]), "mlp_only_layers=[0]"),
]


@pytest.mark.parametrize(("kind", "changes", "named"), UNKNOWN)
def test_what_llama_cpp_computes_differently_is_refused_by_its_name(kind, changes, named):
    with pytest.raises(UserError) as error:
        gguf.check(AutoConfig.for_model(kind, **SIZES | changes), ["f16"], None)
    line = str(error.value)
    assert (
        line.startswith(f"GGUF: cannot write {kind} models with {named}") and "llama.cpp" in line and "\n" not in line
    )


def test_the_largest_gemmas_have_a_scale_that_llama_cpp_knows():
    changes = dict(num_hidden_layers=62, hidden_size=5376, num_attention_heads=32, query_pre_attn_scalar=168)
    gguf.check_config(AutoConfig.for_model("gemma3_text", **SIZES | changes | dict(head_dim=128)))


def test_a_head_that_merging_has_untied_is_refused(tmp_path):
    config = AutoConfig.for_model("gemma2", **SIZES | HEADS_OF_16 | dict(tie_word_embeddings=False))
    with pytest.raises(UserError, match="tie_word_embeddings=False"):
        gguf.write(tmp_path / "model.gguf", tmp_path, config, None, "f16")

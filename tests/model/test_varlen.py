"""varlen_documents: torch's kernel, which needs a GPU, is replaced by attention one document after the other."""

import itertools
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, OTHERS, random_model
from conftest import tiny_config
from test_attention import LENGTHS, documents, losses_alone, losses_and_gradients, losses_in_row, pair_batches

from common.cli import UserError
from common.data.compared import RowSize
from common.model import attention, varlen
from common.train import memory, storage
from common.train.loss import add_chunked_loss
from common.train.meta_model import empty_model
from common.train.optimizers import make_optimizer

CHOSEN = {
    *("llama-3.2", "mistral-nemo", "mistral-window", "qwen2", "qwen3", "gemma3", "phi-2", "phi-4", "phi-4-mini"),
    *("olmo2", "smollm3", "granite", "mixtral", "qwen3-moe", "cohere2", "olmo3", "starcoder2", "exaone4"),
    *("qwen2-window", "opt", "granite-moe", "gemma", "cohere"),
}
WINDOWS = {name for name in CHOSEN if "window" in name} | {"gemma3", "cohere2", "olmo3", "starcoder2", "exaone4"}


def one_by_one(calls, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """The kernel's results: query (T, heads, d), key and value (T, kv_heads, d); the last query sees the last key."""
    calls.append(window_size)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa and window_size[1] == 0
    assert cu_seq_q[-1] == len(query) and max_q == cu_seq_q.diff().max()
    assert cu_seq_k[-1] == len(key) and max_k == cu_seq_k.diff().max()
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    parts = []
    for (start, end), (first, last) in zip(*map(itertools.pairwise, (cu_seq_q.tolist(), cu_seq_k.tolist()))):  # noqa: B905
        q, k, v = query[start:end], key[first:last], value[first:last]
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (behind >= 0) & (behind <= (window_size[0] if window_size[0] >= 0 else len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


@pytest.fixture
def calls(monkeypatch):
    """Window sizes of all calls of the kernel."""
    calls = []
    monkeypatch.setattr(varlen.varlen, "varlen_attn", partial(one_by_one, calls))
    return calls


def choose(name, *arguments, dtype=torch.bfloat16, **changes):
    return attention.choose_attention(random_model(name, **changes).config, *arguments, True, "cuda", dtype)


def test_varlen_is_chosen_where_nothing_is_lost():
    assert {name for name in [*ARCHITECTURES, *OTHERS] if choose(name, None) == "varlen_documents"} == CHOSEN
    assert choose("llama-3.2", None, dtype=torch.float32) == "sdpa"
    assert choose("llama-3.2", None, attention_dropout=0.1) == "sdpa"
    assert choose("qwen3", None, head_dim=12) == choose("qwen3", None, head_dim=224) == "sdpa"
    assert choose("qwen3", None, head_dim=256) == choose("qwen3", "varlen_documents") == "varlen_documents"
    assert choose("qwen3", "sdpa") == "sdpa"
    with pytest.raises(UserError, match="ATTN_IMPLEMENTATION=varlen_documents.*Set None"):
        choose("gemma2", "varlen_documents")


def test_varlen_needs_a_gpu_and_a_torch_that_have_it(monkeypatch):
    assert attention.choose_attention(random_model("qwen3").config, None, True, "cpu") == "sdpa_documents"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for capability, chosen in {(7, 5): "sdpa", (8, 0): "varlen_documents", (12, 0): "varlen_documents"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert choose("qwen3", None) == chosen
    monkeypatch.setattr(varlen, "OPTIONS", {"query", "is_causal"})  # torch 2.10
    assert choose("qwen3", None) == "sdpa"


def test_models_that_hide_their_window_are_known():
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "create_sliding_window_causal_mask" in text and not re.search(r"\bsliding_window=", text):
            found.add(file.parent.name)
    assert found == varlen.HIDES_WINDOW


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_losses_and_gradients_are_those_of_documents_alone(name, calls, monkeypatch):
    """Windows, shared keys and values, scales; and no mask is made."""
    model = random_model(name)
    losses_alone(model).sum().backward()
    expected = {path: p.grad for path, p in model.named_parameters()}
    alone = losses_alone(model).detach()
    model.zero_grad()
    add_chunked_loss(model)
    model.set_attn_implementation("varlen_documents")
    monkeypatch.setattr(varlen, "sdpa_mask", None)
    losses = losses_in_row(model)
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=2e-5)
    losses.sum().backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-3, atol=2e-4)
    assert set(calls) - {(-1, 0)} == ({(23, 0)} if name in WINDOWS else set())


@pytest.mark.parametrize("name", sorted({"llama-3.2", "granite", "smollm3", *WINDOWS}))
def test_answers_that_share_a_prompt_are_computed_as_if_alone(name, calls):
    """By transformers' attention; prompts are longer than the windows."""
    model, (alone, shared) = random_model(name).double(), pair_batches()
    add_chunked_loss(model)
    expected = losses_and_gradients(model, *alone)
    model.set_attn_implementation("varlen_documents")
    assert attention.can_share_prompts(model.config, "varlen_documents", 10**6)
    found = losses_and_gradients(model, shared)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(calls) == model.config.num_hidden_layers and ((23, 0) in calls) == (name in WINDOWS)


@torch.no_grad()
def test_a_layer_is_compiled_once_for_any_number_of_pairs(monkeypatch):
    def kernel(query, key, value, ends, key_ends, *longest, **options):
        return query * (key.sum() + value.sum() + ends.sum() + key_ends.sum() + sum(longest))

    monkeypatch.setattr(varlen.varlen, "varlen_attn", kernel)
    model = random_model("llama-3.2")
    model.set_attn_implementation("varlen_documents")
    torch._dynamo.reset()
    model.model.layers[0].compile(dynamic=True, backend="eager")
    graphs = []
    for count in (1, 3, 2):
        inputs = pair_batches(count)[1]
        model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_chats_with_and_without_padding_and_with_a_cache(name, calls):
    """What evaluations do during training."""
    model, ids = random_model(name), documents()[2]
    mask = torch.ones(2, ids.shape[1], dtype=torch.int64)
    mask[0, :5] = 0
    padded = ids.repeat(2, 1)
    expected = model(input_ids=padded, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("varlen_documents")
    found = model(input_ids=padded, attention_mask=mask).logits[mask.bool()]
    assert not calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(input_ids=padded).logits[1:], found[None, 52:], rtol=1e-4, atol=1e-4)
    before = model(input_ids=ids[:, :40], use_cache=True)
    parts = [before.logits]
    for part in ids[:, 40:].split([9, 1, 7], 1):
        after = model(input_ids=part, past_key_values=before.past_key_values, use_cache=True)
        parts.append(after.logits)
    assert len(calls) == 5 * len(model.model.layers)
    torch.testing.assert_close(torch.cat(parts, 1), found[None, 52:], rtol=1e-4, atol=1e-4)


def test_it_computes_in_16_bits_under_autocast(calls):
    states = torch.randn(3, 1, 2, sum(LENGTHS), 8)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = varlen.varlen_documents(None, *states, None, cu_seq_lens_q=ends, max_length_q=max(LENGTHS))
    assert output.dtype == torch.bfloat16 and output.shape == (1, sum(LENGTHS), 2, 8)


def test_the_trace_follows_the_kernel():
    """No T x T mask, and keys and values as many as there are."""
    sizes = dict(hidden_size=512, intermediate_size=64, num_attention_heads=8, max_position_embeddings=8192)

    @cache
    def peak(name, tokens=2048, heads=1):
        config = tiny_config("llama", num_key_value_heads=heads, num_hidden_layers=3, vocab_size=64, **sizes)
        model = empty_model(config, None, torch.bfloat16, name)
        step = memory.Step(1, tokens, full=True)
        return sum(memory.trace(model, None, partial(make_optimizer, "sgd"), step).values())

    name = "varlen_documents"
    growth = (peak(name, 4096) - peak(name)) / (peak(name) - peak(name, 1024))
    assert growth == pytest.approx(2, rel=0.02)
    assert peak(name) < 0.95 * peak("sdpa_documents") < peak("sdpa")
    shared = 3 * 2 * 7 * 64 * 2048 * 2  # bytes of the keys and values of 7 heads in 3 layers
    assert peak(name, heads=8) - peak(name) > shared


def test_the_trace_counts_a_prompts_keys_and_values_for_both_answers():
    """In each layer, until its backward pass; and there for each head of the queries."""
    sizes = dict(hidden_size=512, intermediate_size=64, num_attention_heads=8, max_position_embeddings=8192)

    def peak(shape):
        config = tiny_config("llama", num_key_value_heads=2, num_hidden_layers=3, vocab_size=64, **sizes)
        model = empty_model(config, None, torch.bfloat16, "varlen_documents")
        step = memory.Step(1, 2048, full=True, pairs=(RowSize(shape, 64),))
        return sum(memory.trace(model, None, partial(make_optimizer, "sgd"), step).values())

    kept = 3 * 2 * 2 * 64 * 1024 * 2  # bytes of 1,024 tokens' keys and values of 2 heads in 3 layers
    indices = 3 * 1024 * 8
    assert peak((1024, 512, 512)) - peak((0, 1024, 1024)) == pytest.approx(kept + indices, rel=0.01)
    query, backward = torch.empty(2048, 8, 64, dtype=torch.bfloat16), torch.ops.torch_attn._varlen_attn_backward.default
    for heads, expanded in ((2, 2 * 3072 * 8 * 64 * 2), (8, 0)):
        key = torch.empty(3072, heads, 64, dtype=torch.bfloat16)
        assert storage.kernel_bytes(backward, (None, query, key)) == 2048 * 8 * 64 * 4 + expanded

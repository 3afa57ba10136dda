"""Every architecture's packed rows: documents are computed as if each stood alone, or the model is not packed."""

import pytest
import torch
from architectures import ARCHITECTURES, OTHERS, random_model

from common.cli import UserError
from common.data.compared import sequences_of, share_prompts
from common.model import attention, generation
from common.train.loss import add_chunked_loss
from common.train.reliability import chats_of

LENGTHS = [40, 23, 57, 9]
UNPACKED = {"qwen3.5", "falcon", "lfm2", "llama-4", "mamba-2"}
NO_SDPA = {"gemma2", "gpt-oss", "mamba-2"}


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 640, (1, length), generator=generator) for length in LENGTHS]


def losses_alone(model) -> torch.Tensor:
    """Each document by itself, as transformers has the model."""
    losses = []
    for ids in documents():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses)


def losses_in_row(model) -> torch.Tensor:
    """All in one row, by our loss, with the inputs that TRL's collator makes."""
    ids, offsets = torch.cat(documents(), 1), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ends = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    labels = ids.masked_fill(positions == 0, -100)
    return model(input_ids=ids, position_ids=positions, learn=labels, use_cache=False, **ends)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_documents_of_a_row_are_computed_as_if_alone(name):
    """Windows, sinks, scaled and capped logits, experts: through the attention and the loss of training."""
    model = random_model(name)
    expected = losses_alone(model)
    assert attention.can_pack(model.config, 200) == (name not in UNPACKED)
    add_chunked_loss(model)
    if name not in UNPACKED:
        model.set_attn_implementation(attention.choose_attention(model.config, None, packed=True, device="cpu"))
        torch.testing.assert_close(losses_in_row(model), expected, rtol=1e-5, atol=2e-5)
    n = max(LENGTHS)
    ids, mask, labels = (torch.full((len(LENGTHS), n), fill) for fill in (0, 0, -100))
    for row, document in enumerate(documents()):
        length = document.shape[1]
        ids[row, :length], mask[row, :length], labels[row, 1:length] = document, 1, document[0, 1:]
    model.set_attn_implementation(attention.choose_attention(model.config, None))
    padded = model(input_ids=ids, attention_mask=mask, learn=labels, use_cache=False)[0]
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=2e-5)


def random_pairs() -> list[dict]:
    """Pairs of unequal lengths; one without a prompt, one whose answers begin alike."""
    generator, rows = torch.Generator().manual_seed(2), []
    for prompt, better, worse in ((30, 12, 25), (1, 9, 4), (17, 5, 5)):
        tokens = [torch.randint(3, 640, (length,), generator=generator).tolist() for length in (prompt, better, worse)]
        tokens[2][:1] = tokens[1][:1]
        sides = [tokens[0] + answer for answer in tokens[1:]]
        labels = [[-100] * prompt + answer for answer in tokens[1:]]
        rows.append(dict(input_ids=sum(sides, []), labels=sum(labels, []), seq_lengths=[len(side) for side in sides]))
    return rows


def pair_batches(count: int = 3) -> tuple[list[dict], dict]:
    """Each sequence of the pairs by itself, and all in one row, in which a pair's prompt stands once."""
    rows = random_pairs()[:count]
    (tokens, shapes), parts = share_prompts(rows), [part for row in rows for part in sequences_of(row)]
    assert shapes == [(29, 13, 26), (0, 10, 5), (16, 6, 6)][:count]
    alone = [{name: torch.tensor([part[name]]) for name in ("input_ids", "labels")} for part in parts]
    shared = {name: torch.tensor([values]) for name, values in tokens.items()}
    return alone, shared | attention.describe_pairs(shapes)


def losses_and_gradients(model, *batches: dict) -> list[torch.Tensor]:
    model.zero_grad()
    named = [{"learn" if name == "labels" else name: value for name, value in batch.items()} for batch in batches]
    losses = torch.cat([model(**batch, use_cache=False)[0] for batch in named])
    (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
    return [losses, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["llama-3.2", "gpt-oss", "gemma2", "mixtral"])
def test_answers_that_share_a_prompt_are_computed_as_if_alone(name):
    model = random_model(name)
    kind = attention.choose_attention(model.config, None, packed=True, device="cpu")
    model.set_attn_implementation(kind)
    assert attention.can_share_prompts(model.config, kind, 8)
    if window := getattr(model.config, "sliding_window", None):
        assert not attention.can_share_prompts(model.config, kind, window + 1)
        model.config.sliding_window = 64  # of which the masks are made
        model = type(model)(model.config).eval()
        model.set_attn_implementation(kind)
    add_chunked_loss(model)
    alone, shared = pair_batches()
    expected, found = losses_and_gradients(model, *alone), losses_and_gradients(model, shared)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_sequences_of_pairs_that_share_a_prompt_are_found_again():
    alone, shared = pair_batches()
    for (ids, labels), other in zip(chats_of(shared), alone, strict=True):
        assert torch.equal(ids, other["input_ids"]) and torch.equal(labels, other["labels"])


@pytest.mark.parametrize("name", ["falcon", "lfm2", "opt", "gpt-oss"])
def test_what_is_kept_from_packing_would_go_wrong(name):
    """The lists of attention.py name real faults: with transformers' own attention documents see each other."""
    model = random_model(name)
    expected = losses_alone(model)
    add_chunked_loss(model)
    assert (losses_in_row(model) - expected).abs().mean() > 0.01


def test_chunked_attention_is_packed_where_a_chunk_holds_a_row():
    config = random_model("llama-4").config
    assert attention.can_pack(config, 24) and not attention.can_pack(config, 25)
    assert [attention.can_share_prompts(config, "sdpa_documents", tokens) for tokens in (24, 25)] == [True, False]


def choose(name, *arguments, **options):
    return attention.choose_attention(random_model(name).config, *arguments, **options)


def test_attention_is_what_the_model_supports():
    for name in [*ARCHITECTURES, *OTHERS]:
        assert choose(name, None) == ("eager" if name in NO_SDPA else "sdpa"), name
    assert choose("gemma3", None, packed=True, device="cuda") == "varlen_documents"
    assert choose("gemma2", None, packed=True, device="cuda") == "eager_documents"
    assert choose("opt", None, packed=True, device="cuda", dtype=torch.float32) == "sdpa_documents"
    assert choose("falcon", None, packed=True, device="cpu") == "sdpa"  # it has an attention of its own
    assert choose("gpt-oss", "eager", packed=True) == "eager_documents"
    assert choose("gpt-oss", "flex_attention", packed=True) == "flex_attention"


@pytest.mark.parametrize("name, wrong", [("gemma2", "sdpa"), ("mamba-2", "sdpa"), ("llama-4", "flash_attention_2")])
def test_attention_that_a_model_lacks_is_refused_by_name(name, wrong):
    with pytest.raises(UserError, match=f"ATTN_IMPLEMENTATION={wrong}: .* does not support it"):
        choose(name, wrong)


def test_a_package_that_is_missing_is_named():
    with pytest.raises(UserError, match="ATTN_IMPLEMENTATION=flash_attention_2.*pip install flash-attn"):
        choose("llama-3.2", "flash_attention_2")


def test_a_chat_with_a_model_without_keys_and_values_is_refused(tokenizer):
    with pytest.raises(UserError, match="mamba2 models keep no keys and values"):
        generation.Generator(random_model("mamba-2"), tokenizer)

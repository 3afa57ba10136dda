"""Merge an adapter into its base: after quantized training, into the better of two."""

import dataclasses
import re
from pathlib import Path

import torch
from transformers import GenerationConfig

from common.cli import UserError
from common.data import templates
from common.data.encoder import ChatEncoder
from common.export.verify import Reference, predict
from common.files import write_atomic
from common.model import generation, load, merging
from common.model.adapters import check_merge, load_adapter
from common.model.location import Source
from common.model.quantize import BITS, BITSANDBYTES, dequantize_hqq

# Ratio of perplexities up to which the original base wins: it lost nothing to quantization on
# other text, though it differs more from the trained model.
TIE = 1.01
# {% generation %} marks, which only training needs and other libraries cannot read.
MARK = re.compile(r"{%(-?)\s*(?:end)?generation\s*(-?)%}")


def choose_bases(source: Source, quantization: str | None, merge_into: str | None):
    """The bases to try; UserError where MERGE_INTO does not fit, or MODEL is quantized."""
    own = load.find_quantization(source, None)
    if own and not source.adapter:
        raise UserError(f"MODEL={source.name} is quantised ({own}) and has no adapter. Take the 16-bit model.")
    if own not in (None, *BITSANDBYTES):
        raise UserError(f"MODEL={source.name} is quantised ({own}): no adapter is merged into it. Use it as it is.")
    if source.adapter:
        check_merge(source.adapter)
    bases = () if own else ("original",)
    bases += ("dequantized",) if source.adapter and quantization else ()
    if merge_into not in (None, *bases):
        problem = f"only a base that is quantised ({own})" if own else "no quantised base"
        raise UserError(f"MERGE_INTO={merge_into}: MODEL has {problem}. Set MERGE_INTO=None.")
    return (merge_into,) if merge_into else bases


def load_chat_tokenizer(source: Source, template: str | None, options: str):
    """The tokenizer, with its template as other libraries can read it. template, options: see choose_for_chat."""
    tokenizer, name = load.load_tokenizer(source), source.adapter or source.name
    templates.choose_for_chat(tokenizer, template, options)
    # A comment in place of a mark keeps the white space around it.
    tokenizer.chat_template = MARK.sub(r"{#\1 \2#}", tokenizer.chat_template)
    tokenizer.eos_token = ChatEncoder(tokenizer).end_token
    if tokenizer.eos_token is None:
        problem = "its chat template writes no end token, so answers would not end"
        raise UserError(f"MODEL={name}: {problem}. Train with another CHAT_TEMPLATE.")
    return tokenizer


def load_merged(source: Source, base: str, quantization: str | None, dtype, attention: str, vocabulary: int, device):
    """The source's model in `dtype`, with its adapter (if any) merged into the base's weights.

    base: "original", or "dequantized": as `quantization` rounds it. vocabulary: tokens in all.
    """
    quantization = quantization if base == "dequantized" else None
    bare = dataclasses.replace(source, adapter=None)
    model = load.load_model(bare, quantization, dtype, attention, vocabulary=vocabulary, device=device)
    if quantization:
        model = dequantize_hqq(model) if quantization in BITS else model.dequantize()
    if source.adapter:  # which the reference was loaded with, and so is checked
        model = merging.merge_adapter(load_adapter(model, source.adapter), source.adapter)
    return model.to(dtype).eval()


def merge_best(source: Source, bases, quantization: str | None, dtype, reference: Reference):
    """Merge into each base; returns the model of lowest perplexity, its result, and all results."""
    proof, results = reference.proof, []
    arguments = quantization, dtype, reference.attention, len(reference.tokenizer), proof.device
    for base in bases:
        model = None  # frees the last one before this one is loaded
        model = load_merged(source, base, *arguments)
        predictions = predict(model.to(proof.dtype), reference.rows)
        results.append({"into": base} | reference.compare(predictions))
        line = "merged into the {into} base: KL {kl:.2g} nats a token, perplexity {perplexity:.3f}"
        print(line.format(**results[-1]))
    ties = {"original": TIE, "dequantized": 1}
    kept = min(results, key=lambda result: result["perplexity"] / ties[result["into"]])
    was_rounded = torch.promote_types(dtype, proof.dtype) != proof.dtype
    if kept["into"] != base or was_rounded:
        model = None
        model = load_merged(source, kept["into"], *arguments)
    return model.to(dtype), kept, results


def save_merged(folder: Path, model, tokenizer, card: str) -> None:
    """Write the model with its tokenizer and card into the folder's `unverified`."""
    ends, pad = generation.end_tokens(model, tokenizer), tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    load.save_final(folder / "unverified", model, tokenizer)
    write_atomic(folder / "unverified" / "README.md", card)

"""Verify an export: a model's predictions on held-out chats, and those of the model merged from it."""

import math
import random
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as parquet
import torch

from common.cli import UserError
from common.data import sources
from common.data.encoder import ChatEncoder
from common.export import gguf_config
from common.model import generation, load, location
from common.model.attention import choose_attention

# Highest mean KL divergence of the merged model from the trained one, in nats a token, by the dtype of the computation.
# SmolLM2's demo: 6e-5 in float32; another run of LoRA: float32 and float16 5e-4, bfloat16 0.002.
MERGE_BOUNDS = {torch.float32: 0.01, torch.bfloat16: 0.02, torch.float16: 0.02}
MAX_LOSS = 700.0  # nats a token, also for what is not finite: exp(710) overflows
ANSWER_TOKENS = 128  # in which an answer must end
PROMPTS = 4  # to answer
LONGEST = 8256  # tokens of the long row: past the windows and original contexts in use
POSITIONS = 16  # at its end
# Where tokenizers differ: numbers, white space, contractions, capitals, scripts, symbols.
TEXTS = (
    "Hello! What's 12345 plus 3.14159?",
    "  two  spaces,\ttab\n\nand lines \r\n end ",
    "I'll we've DON'T isn't o'clock",
    "Übergröße naïve café Ελληνικά русский 中文字符 日本語 العربية हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
)


class Row(NamedTuple):
    ids: list[int]  # (T,): a held-out chat
    answers: list[int]  # positions whose next token is part of an answer


def held_out_rows(chats: str | None, run: Path | None, tokenizer, max_length: int, count: int) -> list[Row]:
    """Chats that training did not see, with up to `count` tokens of answers; UserError for none.

    chats: the setting CHATS; None: what the run held out, or else data/brief.jsonl.
    """
    rows, pairs, file = [], [], run and run / "data" / "eval.parquet"
    if file and file.is_file() and not chats:
        for row in parquet.read_table(file).to_pylist():
            end = row["lengths"][0] if "lengths" in row else None  # of a pair the better answer
            pairs.append((row["input_ids"][:end], row["assistant_masks"][:end]))
    if not pairs:
        encode = ChatEncoder(tokenizer).encode
        sound = sources.sound_chats(chats or "data/brief.jsonl", "CHATS")
        encoded = (sequence for chat in sound for row in encode([chat]) for sequence in row.sequences())
        pairs = ((ids.tolist(), learned.tolist()) for ids, learned in encoded)
    for ids, mask in pairs:
        answers = [t - 1 for t in range(1, min(len(ids), max_length)) if mask[t]][:count]
        if answers:
            rows.append(Row(ids[: answers[-1] + 2], answers))
            count -= len(answers)
    if not rows:
        raise UserError(f"CHATS={chats}: no answers to compare on. Name a file with some.")
    return rows


def long_rows(rows: list[Row], config) -> list[Row]:
    """Held-out tokens past the last change by length, and up to where llama.cpp is exact, the longest first.

    Drawn at random: of a repeated text, what is beyond a window stands within it as well.
    """
    whole, change = load.context_length(config), gguf_config.last_change(config)
    lengths = {min(change + 64, LONGEST, whole)} if 0 < change < whole else set()
    if (exact := gguf_config.exact_context(config)[0]) < whole:
        lengths.add(min(exact, LONGEST))
    tokens = [token for row in rows for token in row.ids]
    drawn = (random.Random(0).choices(tokens, k=length) for length in sorted(lengths, reverse=True))
    return [Row(ids, list(range(max(0, len(ids) - POSITIONS - 1), len(ids) - 1))) for ids in drawn]


class Reference:
    """A model's predictions on held-out chats, to compare those of models made from it.

    proof: the device and the dtype of the computation (proof.Proof).
    predictions: log-probabilities (N, vocabulary) at the N positions before a token of an answer.
    For GGUF files, if `answers`: how many prompts get an answer that ends, and `long`: long rows, each
    with its predictions.
    """

    def __init__(self, source, quantization: str | None, proof, attention: str | None, tokenizer, rows, answers=False):
        self.attention, self.proof = choose_attention(load.load_config(source), attention), proof
        options = dict(vocabulary=len(tokenizer), device=proof.device)
        model = load.load_model(source, quantization, proof.dtype, self.attention, **options).eval()
        self.tokenizer, self.rows, self.config = tokenizer, rows, model.config
        self.predictions = predict(model, rows)
        if not self.predictions.isfinite().all():
            problem = "predictions are not finite. Take an earlier checkpoint."
            raise UserError(f"MODEL={source.name}: {problem}", code=4)
        self.perplexity = self.compare(self.predictions)["perplexity"]
        self.prompts = [row.ids[: row.answers[0] + 1] for row in rows[:PROMPTS]]
        self.long = [(row, predict(model, [row])) for row in (long_rows(rows, model.config) if answers else ())]
        self.ended, generator = 0, answers and generation.Generator(model, tokenizer)
        for prompt in self.prompts if answers else ():
            list(generator.stream(prompt, ANSWER_TOKENS, temperature=0, top_p=1))
            self.ended += generator.last.stop == "end"

    def compare(self, predictions: torch.Tensor) -> dict:
        """Perplexity of other predictions (N, vocabulary), and their mean KL in nats a token."""
        tokens = torch.tensor([row.ids[t + 1] for row in self.rows for t in row.answers])
        loss = bounded(-predictions.gather(1, tokens[:, None]).mean())
        return {"kl": divergence(self.predictions, predictions), "perplexity": math.exp(loss)}


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean KL divergence of log-probabilities (N, vocabulary), in nats a token."""
    return bounded((expected.exp() * (expected - actual)).sum(-1).mean())


def bounded(loss: torch.Tensor) -> float:
    return loss.nan_to_num(MAX_LOSS).clamp(0, MAX_LOSS).item()


@torch.no_grad()
def predict(model, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities (N, vocabulary) after the rows' answer positions: float32, on the CPU."""
    parts = []
    for row in rows:
        ids, keep = (torch.tensor(values, device=model.device) for values in row)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts) if parts else torch.empty(0)


def verify_merged(folder: Path, reference: Reference, bound: float, answers: bool) -> tuple[Reference, float]:
    """Name the saved model final, or final.rejected (UserError, code 5): its reference and KL."""
    unverified = folder / "unverified"
    source = location.locate(str(unverified))
    how = reference.proof, reference.attention, reference.tokenizer, reference.rows
    saved = Reference(source, None, *how, answers)
    kl = reference.compare(saved.predictions)["kl"]
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    encoders = ChatEncoder(reference.tokenizer), ChatEncoder(load.load_tokenizer(source))
    expected, actual = (list(map(encoder.prompt, chats)) for encoder in encoders)
    fault = None if actual == expected else "its tokenizer gives other tokens"
    if not kl <= bound:
        fault = f"KL {kl:.2g} nats a token, the bound is {bound:.2g}"
    if fault:
        rejected = unverified.rename(folder / "final.rejected")
        raise UserError(f"{rejected} is not the model that was trained: {fault}. Try DTYPE=float32.", code=5)
    unverified.rename(folder / "final")
    return saved, kl

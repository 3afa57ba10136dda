"""Verify a merged model: its predictions on chats that training did not see, and its tokenizer."""

import math
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as parquet
import torch

from common.cli import UserError
from common.data import sources
from common.data.encoder import ChatEncoder
from common.model import generation, load, location

MERGE_BOUND = 0.05  # mean KL divergence of the merged model from the trained one, in nats a token
ANSWER_TOKENS = 128  # in which an answer must end
PROMPTS = 4  # that are answered

# Where tokenizers differ: numbers, white space, contractions, capitals, scripts, symbols.
TEXTS = (
    "Hello! What's 12345 plus 3.14159?",
    "  two  spaces,\ttab\n\nand lines \r\n end ",
    "I'll we've DON'T isn't o'clock",
    "Übergröße naïve café Ελληνικά русский 中文字符 日本語 العربية हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
)


class Row(NamedTuple):
    """A held-out chat of T tokens."""

    ids: list[int]  # (T,)
    answers: list[int]  # positions whose next token is part of an answer


def held_out_rows(chats: str | None, run: Path | None, encoder: ChatEncoder, max_length: int, count: int) -> list[Row]:
    """Chats that training did not see, up to `count` tokens of answers in all.

    chats: the setting CHATS; None: what the run held out, or else data/brief.jsonl.
    Raises UserError where no chat has an answer.
    """
    file = run / "data" / "eval.parquet" if run and not chats else None
    if file and file.is_file() and parquet.read_metadata(file).num_rows:
        table = parquet.read_table(file, columns=["input_ids", "assistant_masks"])
        pairs = (row.values() for row in table.to_pylist())
    else:
        encoded = (encoder.encode([chat])[0] for chat in sources.sound_chats(chats or "data/brief.jsonl", "CHATS"))
        pairs = ((row.ids.tolist(), row.learned.tolist()) for row in encoded)
    rows = []
    for ids, mask in pairs:
        answers = [t - 1 for t in range(1, min(len(ids), max_length)) if mask[t]][:count]
        if answers:
            rows.append(Row(ids[: answers[-1] + 2], answers))
            count -= len(answers)
    if not rows:
        raise UserError(f"CHATS={chats}: no answers to compare predictions on. Name a file with some.")
    return rows


class Reference:
    """A model's predictions on held-out chats, with which those of models made from it are compared.

    predictions: log-probabilities (N, vocabulary) at the N positions before a token of an answer.
    ended: to how many of the prompts the answer ends by itself; None without `answers`.
    """

    def __init__(self, source, quantization: str | None, dtype: torch.dtype, tokenizer, rows: list[Row], answers=False):
        model = load.load_model(source, quantization, dtype, "sdpa", vocabulary=len(tokenizer)).eval()
        self.tokenizer, self.rows, self.dtype, self.config = tokenizer, rows, dtype, model.config
        self.predictions = predict(model, rows)
        if not self.predictions.isfinite().all():
            raise UserError(f"MODEL={source.name}: predictions are not finite. Take an earlier checkpoint.", code=4)
        self.perplexity = perplexity(self.predictions, rows)
        self.prompts = [row.ids[: row.answers[0] + 1] for row in rows[:PROMPTS]]
        self.ended = count_ended(model, tokenizer, self.prompts) if answers else None

    def compare(self, predictions: torch.Tensor) -> dict:
        """The perplexity of other predictions (N, vocabulary), and their mean KL divergence in nats a token."""
        kl = (self.predictions.exp() * (self.predictions - predictions)).sum(-1).mean().item()
        kl = max(0.0, kl) if math.isfinite(kl) else math.inf
        return {"kl": kl, "perplexity": perplexity(predictions, self.rows)}


@torch.no_grad()
def predict(model, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities (N, vocabulary) of the tokens after the rows' answer positions: float32, on the CPU."""
    parts = []
    for row in rows:
        ids, keep = (torch.tensor(values, device=model.device) for values in row)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts)


def perplexity(predictions: torch.Tensor, rows: list[Row]) -> float:
    tokens = torch.tensor([row.ids[t + 1] for row in rows for t in row.answers])
    loss = -predictions.gather(1, tokens[:, None]).mean().item()
    return math.exp(min(700, loss))


def count_ended(model, tokenizer, prompts: list[list[int]]) -> int:
    """How many greedy answers end within ANSWER_TOKENS."""
    generator, ended = generation.Generator(model, tokenizer), 0
    for prompt in prompts:
        list(generator.stream(prompt, ANSWER_TOKENS, temperature=0, top_p=1))
        ended += generator.last.stop == "end"
    return ended


def verify_merged(folder: Path, reference: Reference, bound: float, answers: bool) -> tuple[Reference, float]:
    """Load a saved model; returns its own reference, and its KL divergence from the trained one.

    Raises UserError (code 5) where that is above the bound or the saved tokenizer differs, after
    renaming the folder to final.rejected.
    """
    source = location.locate(str(folder))
    saved = Reference(source, None, reference.dtype, reference.tokenizer, reference.rows, answers)
    kl = reference.compare(saved.predictions)["kl"]
    encoders = ChatEncoder(reference.tokenizer), ChatEncoder(load.load_tokenizer(source))
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    expected, actual = (list(map(encoder.prompt, chats)) for encoder in encoders)
    if kl <= bound and actual == expected:
        return saved, kl
    fault = f"KL {kl:.2g} nats a token, the bound is {bound:.2g}" if actual == expected else "other tokens"
    rejected = folder.rename(folder.with_name("final.rejected"))
    raise UserError(f"{rejected} is not the model that was trained: {fault}. Try DTYPE=float32.", code=5)

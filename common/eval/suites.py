"""Suites: how well a model predicts answers, what it knows, how its answers look, and EleutherAI's tasks.

Each writes its scores into `result` ({"scores", "intervals", ...}) and prints them.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.eval import facts
from common.eval.scores import put, put_share
from common.eval.statistics import bootstrap_loss, mean_loss
from common.model import generation

BATCH_TOKENS = 2048  # padded tokens on a GPU; a CPU is faster with one chat at a time (604 tokens/s against 455)
REPEATS = 0.3  # share of runs of four words that stood in the answer before
ROLE = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|^\s*(###\s*)?(user|human|assistant|system)\s*:", re.IGNORECASE | re.MULTILINE
)


def score_losses(result: dict, model, tokenizer, chats: dict[str, list], max_length: int) -> None:
    """Nats per token of answers, for each source of chats."""
    result["losses"] = {}
    for source, rows in chats.items():
        losses = result["losses"][source] = answer_losses(model, tokenizer, rows, max_length)
        mean, name = mean_loss(losses), "loss" if len(chats) == 1 else f"loss on {source}"
        perplexity = math.exp(min(mean, 700))  # a float ends there
        more = f" nats per token of the answers of {len(rows)} chats, perplexity {perplexity:.2f}"
        put(result, name, mean, bootstrap_loss(losses), ".4f", more)


@torch.no_grad()
def answer_losses(
    model, tokenizer, chats: list[list[dict]], max_length: int, batch_tokens: int | None = None
) -> list[tuple[float, int]]:
    """Per chat, the summed negative log-likelihood of the assistants' tokens (nats) and their number.

    The model's own template is used, with no marks needed: an answer is what follows its generation prompt. Chats of
    similar length are computed together, batch_tokens at a time.
    """
    batch_tokens = batch_tokens or (BATCH_TOKENS if model.device.type == "cuda" else 1)
    encoded = ChatEncoder(tokenizer).encode(chats)
    rows = [[values[:max_length] for values in (row.ids, row.learned, numpy.ones_like(row.ids))] for row in encoded]
    losses: list = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    while order:
        size = max(1, batch_tokens // max(1, len(rows[order[0]][0])))
        batch, order = order[:size], order[size:]
        columns = zip(*(rows[i] for i in batch), strict=True)
        padded = [pad_sequence([torch.tensor(row, dtype=torch.long) for row in column], True) for column in columns]
        ids, learned, there = (tensor.to(model.device) for tensor in padded)  # (B, T), right-padded with zeros
        learned = learned[:, 1:].bool()
        kept = learned.any(0).nonzero().flatten()  # positions that predict an answer's token in some row
        mask = None if len(batch) == 1 else there
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        targets = ids[:, 1:].where(learned, -100)[:, kept]  # (B, K)
        each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        for i, loss, count in zip(batch, each.sum(1).tolist(), learned.sum(1).tolist(), strict=True):
            losses[i] = loss, count
    return losses


def score_facts(result: dict, model, tokenizer, questions: list[dict], show_misses: bool) -> None:
    """Shares of right answers, for each kind of question."""
    asked = facts.ask(model, tokenizer, questions)
    result["answers"] = [row["answer"] for row in asked]
    for kind, (right, count) in facts.counts(asked).items():
        put_share(result, kind, right, count)
    for row in asked if show_misses else ():
        if not row["right"]:
            print(f"    missed: {row['question']} -> {row['answer'][:100]!r}")


def score_health(result: dict, model, tokenizer, prompts: list[str]) -> None:
    """Shares of answers that end by themselves, are empty, repeat themselves, or speak for the user; their lengths."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = list(generation.answers(model, tokenizer, chats, max_new_tokens=256))
    result["health"] = [answer.text for answer in answers]
    for name, flags in examine(prompts, answers).items():
        put_share(result, name, sum(flags), len(flags))
    lengths = [answer.tokens for answer in answers]
    print(f"  answers have {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}")


def examine(prompts: list[str], answers: list[generation.Answer]) -> dict[str, list[bool]]:
    """How answers look, whatever they say: for each name, whether it is true of each answer."""
    texts = [answer.text for answer in answers]
    scripts = [(script_of(prompt), script_of(text)) for prompt, text in zip(prompts, texts, strict=True)]
    return {
        "answers end by themselves": [answer.stop == "end" for answer in answers],
        "answers are empty": [not text.strip() for text in texts],
        "answers repeat themselves": [repetition(text) > REPEATS for text in texts],
        "answers speak for the user": [bool(ROLE.search(text)) for text in texts],
        "answers are in another script": ["" != asked != answered != "" for asked, answered in scripts],
    }


def repetition(text: str) -> float:
    """The share of a text's runs of four words that stood in it before; 0 for short texts."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script_of(text: str) -> str:
    """The script of most of a text's letters (LATIN, CYRILLIC, CJK ...), by their Unicode names."""
    names = (unicodedata.name(letter, "") for letter in text if letter.isalpha())
    counts = Counter(name.partition(" ")[0] for name in names)
    return max(counts, key=counts.get, default="")


def score_by_harness(result: dict, model, tokenizer, tasks: str) -> None:
    """Tasks of EleutherAI's lm-eval, by its own interface; its standard errors give the intervals."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(f"LM_EVAL_TASKS={tasks} needs the harness: pip install lm-eval.") from None
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks.replace(" ", "").split(",")
        )["results"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"LM_EVAL_TASKS={tasks}: {error}") from error
    for task, metrics in found.items():
        for metric, value in metrics.items():
            error = metrics.get(metric.replace(",", "_stderr,", 1))
            if isinstance(value, float) and isinstance(error, float):
                put(result, f"{task} {metric}", value, (value - 1.96 * error, value + 1.96 * error), ".4f")

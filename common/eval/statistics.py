"""Scores with their error: shares, losses on answers, and the bootstrap."""

import math
import statistics

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence

from common.cli import UserError
from common.data.encoder import ChatEncoder

RESAMPLES = 10_000

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # 97.5 % points, 1 to 8 degrees of freedom

BATCH_TOKENS = 2048  # on a GPU, of padded rows; on a CPU one chat at a time is faster (604 tokens/s against 455)


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right for small numbers and near 0 and 1."""
    share, scale = hits / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # 0 of 40: middle - half = 7e-18


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


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Nats per token over all chats."""
    totals, tokens = zip(*losses, strict=True)
    if not sum(tokens):
        raise UserError("MAX_LENGTH: no answer of CHATS begins before it. Raise it.")
    return sum(totals) / sum(tokens)


def bootstrap_loss(losses: list[tuple[float, int]]) -> tuple[float, float]:
    """95 % interval of mean_loss, resampling whole chats."""
    sums = resample(numpy.array(losses)).sum(axis=1)  # (resamples, 2)
    return percentiles(sums[:, 0] / sums[:, 1], len(losses))


def bootstrap_change(before: list, after: list) -> tuple[float, float]:
    """95 % interval of mean_loss(after) / mean_loss(before) - 1 on the same chats, resampling whole chats in pairs."""
    sums = resample(numpy.concatenate([numpy.array(before), numpy.array(after)], axis=1)).sum(axis=1)  # (resamples, 4)
    return percentiles((sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1]) - 1, len(before))


def means_by_question(values) -> list[float]:
    """The mean of each question's values, from pairs (question, value)."""
    by_question: dict = {}
    for question, value in values:
        by_question.setdefault(question, []).append(value)
    return [statistics.fmean(found) for found in by_question.values()]


def bootstrap_mean(values) -> tuple[float, float]:
    """95 % interval of the mean of values, one a question: of grades, or of differences of two models' grades.

    Fewer than ten are too few for a bootstrap: Student's.
    """
    if 2 <= len(values) < 10:
        half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        return statistics.fmean(values) - half, statistics.fmean(values) + half
    return percentiles(resample(numpy.array(values, dtype=float)).mean(axis=1), len(values))


def resample(units: numpy.ndarray) -> numpy.ndarray:
    """(RESAMPLES, n, ...): units drawn with replacement, n at a time."""
    return units[numpy.random.default_rng(0).integers(len(units), size=(RESAMPLES, len(units)))]


def percentiles(estimates: numpy.ndarray, units: int) -> tuple[float, float]:
    """A 95 % interval from bootstrap estimates: expanded percentiles (Hesterberg 2015, arxiv.org/abs/1411.5279).

    Plain percentiles are too narrow for few units, as a normal interval is beside Student's.
    """
    if units < 2:
        return float("-inf"), float("inf")
    z, freedom = 1.959964, units - 1
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # t's 97.5 % point
    tail = statistics.NormalDist().cdf(-student * math.sqrt(units / freedom))
    low, high = numpy.quantile(estimates, (tail, 1 - tail))
    return float(low), float(high)

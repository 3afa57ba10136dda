"""Scores with their error: shares, losses on answers, and the bootstrap."""

import math

import numpy
import torch

from common.encoding import ChatEncoder
from common.settings import UserError


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right for small numbers and near 0 and 1."""
    share, scale = hits / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def answer_losses(model, tokenizer, chats: list[list[dict]], max_length: int) -> list[tuple[float, int]]:
    """Per chat, the summed negative log-likelihood of the assistants' tokens (nats) and their number.

    The model's own template is used, with no marks needed: an answer is what follows its generation prompt.
    """
    losses = []
    for row in ChatEncoder(tokenizer).encode(chats):
        ids = torch.tensor(row.ids[:max_length], dtype=torch.long, device=model.device)
        # (N,) positions that predict an answer's token
        learned = torch.tensor(row.learned[1:max_length], device=model.device).nonzero().flatten()
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=learned).logits[0]  # (N, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[learned + 1], reduction="sum")
        losses.append((loss.item(), len(learned)))
    return losses


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Nats per token over all chats."""
    totals, tokens = zip(*losses, strict=True)
    if not sum(tokens):
        raise UserError("MAX_LENGTH: no answer of CHATS begins before it. Raise it.")
    return sum(totals) / sum(tokens)


def bootstrap_change(before: list, after: list, resamples: int = 10_000) -> tuple[float, float]:
    """95 % interval of mean_loss(after) / mean_loss(before) - 1 on the same chats, resampling whole chats in pairs."""
    pairs = numpy.array(
        [(*b, *a) for b, a in zip(before, after, strict=True)]
    )  # loss, tokens before; loss, tokens after
    picks = numpy.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    sums = pairs[picks].sum(axis=1)  # (resamples, 4)
    changes = (sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1]) - 1
    low, high = numpy.percentile(changes, (2.5, 97.5))
    return float(low), float(high)

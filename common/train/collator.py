"""What is known of a batch while it lies on the CPU, counted there: read back from a GPU, it would be waited for."""

from dataclasses import dataclass

import torch


@dataclass
class CountingCollator:
    """A collator's batch with `tokens`, how many it has, and the rows and columns (2, N) of hidden states (B, T - 1)
    that predict a token `in_loss` and, where with_outside, one `outside` of it.

    collate: the collator whose batch goes to the model as it is.
    """

    collate: object
    with_outside: bool = False

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collate(rows)
        labels, mask = batch["labels"], batch.get("attention_mask")
        tokens = batch["tokens"] if "tokens" in batch else count_tokens(batch)
        batch |= {"tokens": int(tokens), "in_loss": predicts(labels).nonzero().T}
        if self.with_outside:
            batch["outside"] = predicts_outside(labels, mask).nonzero().T
        return batch


def predicts(labels: torch.Tensor) -> torch.Tensor:
    """Which hidden states (B, T - 1) predict a token in the loss. labels: (B, T), -100 outside of it."""
    return labels[:, 1:] != -100


def predicts_outside(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Which hidden states (B, T - 1) predict a token outside of the loss. mask: (B, T), 0 at padding."""
    outside = ~predicts(labels)
    return outside if mask is None else outside & mask[:, 1:].bool()


def count_tokens(batch: dict) -> torch.Tensor:
    """Tokens of a batch, without padding and the single ones that are blank rows."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1)
        return lengths[lengths > 1].sum()
    begins = batch["position_ids"].flatten() == 0
    ends = torch.cat([begins[1:], begins.new_ones(1)])
    return (~(begins & ends)).sum()

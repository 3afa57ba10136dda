"""Loss spikes explained: the chats of a step that have the highest loss."""

import itertools

import torch
from torch.distributed.fsdp import FSDPModule

from common import distributed

SHOWN_TOKENS = 100


def worst_chats(trainer, batches: list[dict], count: int = 3) -> list[dict]:
    """The chats of a step with the highest loss, of all processes: {"loss", "begins"}, highest first."""
    rows, chats = [chat for inputs in batches for chat in chats_of(inputs)], []
    # Sharded weights are gathered by all processes at once, so each computes as often as the others.
    rows += rows[-1:] * (max(distributed.gather(len(rows))) - len(rows))
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for ids, labels in rows:
            inputs = trainer._prepare_inputs({"input_ids": ids, "labels": labels})
            loss = trainer.compute_loss(trainer.model, inputs).item()
            chats.append({"loss": loss, "begins": trainer.processing_class.decode(ids[0, :SHOWN_TOKENS])})
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # whole weights kept from this forward would be used after the update, too
    distinct = {chat["begins"]: chat for chats in distributed.gather(chats) for chat in chats}
    return sorted(distinct.values(), key=lambda chat: -chat["loss"])[:count]


def chats_of(inputs: dict):
    """(input_ids, labels) of each chat in a batch, packed or padded; (1, T) each."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "attention_mask" in inputs:
        for row, present in enumerate(inputs["attention_mask"].bool()):
            yield ids[row, present][None], labels[row, present][None]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, ids.shape[1]]):
            yield ids[:, start:end], labels[:, start:end]

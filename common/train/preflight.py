"""The check before the first step: the loss that is trained is the one that the model's own forward gives.

One row of the run's data goes through the trainer's collator, attention and loss; its chats also go, each by itself,
through the model as transformers has it. And a new adapter must predict what the base predicts. Three forward passes.
"""

import sys

import torch

from common.cli import UserError
from common.model.attention import choose_attention, plain_attention
from common.train.reliability import chats_of

# Highest mean difference of a chat's losses, in nats a token. Measured on SmolLM2-135M, 4 chats in a row, with what is
# right: float32 2e-6, bfloat16 and NF4 0.016, int8 0.11 (its outliers are chosen for all tokens of a row at once).
# Chats that see each other: 0.21 to 0.29.
BOUNDS = {torch.float32: 5e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
INT8_BOUND = 0.2
SEARCHED = 256  # rows in which the longest chat is looked for
POSITIONS = 256  # tokens in the loss of a chat, the last ones, that are compared


def check_losses(trainer, is_new_adapter: bool) -> None:
    """Raise UserError where the trainer's loss is not the model's own; under DOCTOR=warn, print it.

    Where ATTN_IMPLEMENTATION is left to us, another attention is taken if that helps. is_new_adapter: whether the
    model has one that has to predict what the base does.
    """
    model, name = trainer.model, trainer.model.config._attn_implementation
    inputs = trainer._prepare_inputs(trainer.data_collator(longest_rows(trainer)))
    bound = INT8_BOUND if getattr(model, "is_loaded_in_8bit", False) else BOUNDS[trainer.dtype]
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        expected = losses_apart(trainer, inputs, plain_attention(name))
        found = losses_in_row(model, inputs, expected)
        difference = worst_difference(expected, found)
        for other in other_attentions(trainer, name) if not difference <= bound else ():
            set_attention(model, other)
            if (again := worst_difference(expected, losses_in_row(model, inputs, expected))) <= bound:
                print(f"check: attention {other}, since {name} gives other losses ({difference:.2g} nats)")
                difference, found = again, losses_in_row(model, inputs, expected)
                break
            set_attention(model, name)
        if not difference <= bound:
            report(trainer, explain(trainer, inputs, expected, difference, bound))
        changes = 0.0
        if is_new_adapter:
            with model.disable_adapter():
                changes = worst_difference(losses_in_row(model, inputs, expected), found)
            if not changes <= bound:
                problem = f"it changes the base's losses by {changes:.2g} nats a token before it is trained"
                remedy = (
                    "Try another ADAPTER or LORA_TARGET_MODULES, or CHAT_TEMPLATE=zephyr, which needs no new tokens."
                )
                report(trainer, f"ADAPTER={trainer.settings['ADAPTER']}: {problem}. {remedy}")
    print(f"check: losses differ by {max(difference, changes):.2g} nats from the model's own (bound {bound:g})")
    model.train()


def longest_rows(trainer) -> list[dict]:
    """Of the first rows the one with several chats, or unpacked those two, in which the longest chat is."""
    rows = [trainer.train_dataset[i] for i in range(min(SEARCHED, trainer.rows))]
    rows = [row for row in rows if any(label != -100 for label in row["labels"])] or rows
    if "seq_lengths" not in rows[0]:
        return sorted(rows, key=lambda row: -len(row["input_ids"]))[:: max(1, len(rows) - 1)][:2]
    return [max(rows, key=lambda row: (len(row["seq_lengths"]) > 1, max(row["seq_lengths"])))]


def losses_apart(trainer, inputs: dict, attention: str) -> list[torch.Tensor]:
    """Per chat, the losses of its last tokens in the loss, through the model's own forward and head."""
    trained = trainer.model.config._attn_implementation
    set_attention(trainer.model, attention)
    losses = []
    for ids, labels in chats_of(inputs):
        positions = (labels[0, 1:] != -100).nonzero()[-POSITIONS:, 0]
        logits = trainer.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, positions + 1], reduction="none"))
    set_attention(trainer.model, trained)
    return losses


def losses_in_row(model, inputs: dict, expected: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same through the training loss, with all chats in their row."""
    inputs = dict(inputs)
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in chats_of(inputs)]
    losses, _, _ = model(learn=inputs.pop("labels"), use_cache=False, **inputs)
    return [part[-POSITIONS:] for part in losses.split(counts)]


def worst_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The highest mean difference of a chat's losses. With few tokens it scatters, and so counts less."""
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if len(one)]
    means = [((one - other).abs().mean() / (1 + 8 / len(one))).item() for one, other in pairs]
    return max((float("inf") if mean != mean else mean for mean in means), default=0.0)


def other_attentions(trainer, name: str) -> list[str]:
    """What can take the place of an attention that we chose ourselves."""
    if trainer.settings["ATTN_IMPLEMENTATION"] is not None:
        return []
    plain = choose_attention(trainer.model.config, None)
    per_document = choose_attention(trainer.model.config, None, trainer.settings["PACKING"], device="cpu")
    return [other for other in dict.fromkeys((per_document, plain, "eager")) if other != name]


def set_attention(model, name: str) -> None:
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)


def explain(trainer, inputs: dict, expected, difference: float, bound: float) -> str:
    """Which part gives other losses, and what works."""
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in chats_of(inputs)]
    alone = [losses_in_row(trainer.model, row, expected)[0] for row in rows]
    measured = f"by {difference:.2g} nats a token (bound {bound:g})"
    kind, attention = trainer.model.config.model_type, trainer.model.config._attn_implementation
    if worst_difference(expected, alone) > bound:
        setting = f"ATTN_IMPLEMENTATION={attention}"
        return f"{setting}: the loss of single chats is not {kind}'s own, {measured}. Set ATTN_IMPLEMENTATION=eager."
    setting = f"PACKING={trainer.settings['PACKING']}"
    return f"{setting}: chats of a row change each other's loss in {kind} {measured}. Set PACKING=False."


def report(trainer, problem: str) -> None:
    if trainer.settings["DOCTOR"] == "stop":
        raise UserError(f"{problem} (DOCTOR=warn trains anyway)")
    print(f"check: {problem}", file=sys.stderr)

"""The check before the first step: the loss that is trained is the one that the model's own forward gives.

One row of the run's data goes through the trainer's collator, attention and loss; its chats also go, each by itself,
through the model as transformers has it, without Liger's kernels. And a new adapter must predict what the base
predicts. Three forward passes.
"""

import sys

import torch

from common import cuda, distributed
from common.cli import UserError
from common.model.attention import choose_attention
from common.model.liger import put_aside, swap
from common.train.preference import OF_PAIRS
from common.train.reliability import chats_of

# Highest mean difference of a chat's losses, in nats a token. Measured on SmolLM2-135M with what is right, 4 to 12
# chats in a row: float32 2e-6, bfloat16 and NF4 0.016 to 0.031, int8 0.11 to 0.15 (its outliers are those of the whole
# row). Chats that see each other: 0.21 to 0.29.
BOUNDS = {torch.float32: 5e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
INT8_BOUND = 0.2
# The same pair by the same weights, one after the other: see tests/train/test_preference.py.
REFERENCE_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}
SEARCHED = 32  # rows in which long chats are looked for
POSITIONS = 256  # tokens in the loss of a chat, the last ones, that are compared


@cuda.float32_products("highest")  # TF32 rounds as float16 does, and a fault could hide in that
def check_losses(trainer) -> None:
    """Raise UserError where the trainer's loss is not the model's own; under DOCTOR=warn, print it.

    Where ATTN_IMPLEMENTATION is left to us, another attention is taken if that helps.
    """
    print("check: the loss of a row, against the model's own")
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        inputs, losses, difference, bound = check_row(trainer, longest_rows(trainer))
        if trainer.has_new_adapter and not trainer.restored:
            check_adapter(trainer, inputs, losses, bound)
    print(f"check: losses differ by {difference:.2g} nats from the model's own (bound {bound:.2g})")
    trainer.model.train()


def check_reference(trainer) -> None:
    """Raise UserError where the reference of a preference loss is not the model before its first step."""
    if trainer.restored or not trainer.preference.needs_reference:
        return
    inputs = trainer._prepare_inputs(trainer.data_collator(longest_rows(trainer)))
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        ours, lengths, _ = trainer.log_probs(trainer.model, inputs)
        changes = (ours - trainer.reference_log_probs(trainer.model, inputs, ours)) / lengths.clamp(min=1)
    trainer.model.train()
    difference = max(distributed.gather(changes.abs().max().item()))
    # The reference is computed as in training, in TF32, too.
    dtype = torch.float16 if cuda.uses_tf32(trainer.dtype) else trainer.dtype
    bound = INT8_BOUND if getattr(trainer.model, "is_loaded_in_8bit", False) else REFERENCE_BOUNDS[dtype]
    print(f"check: the reference differs by {difference:.2g} nats a token from the model (bound {bound:.2g})")
    if not difference <= bound:
        kind = trainer.settings["REFERENCE"]
        problem = (
            f"it differs by {difference:.2g} nats a token from the model before the first step (bound {bound:.2g})"
        )
        remedy = {"kept": "Start a new run, or delete its data/reference.npz.", "live": "Set REFERENCE=kept."}[kind]
        report(
            trainer,
            f"REFERENCE={kind}: {problem}, and the first loss would not be that of an untrained model. {remedy}",
        )


def check_row(trainer, rows: list[dict]) -> tuple[dict, list[torch.Tensor], float, float]:
    """The batch of the rows, its losses, their difference from the model's own, and its bound."""
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    inputs = {name: value for name, value in inputs.items() if name not in OF_PAIRS}
    model, asked = trainer.model, trainer.settings.get("ATTN_IMPLEMENTATION")
    bound = INT8_BOUND if getattr(model, "is_loaded_in_8bit", False) else BOUNDS[trainer.dtype]
    plain = choose_attention(model.config, None)
    expected = own_losses(trainer, inputs, plain)
    losses = row_losses(model, inputs)
    difference = worst_difference(expected, losses)
    if not difference <= bound:  # some models are more easily upset by rounding than SmolLM2
        bound = max(bound, 2 * worst_difference(expected, own_losses(trainer, inputs, "eager")))
    if difference <= bound:
        return inputs, losses, difference, bound
    measured = f"by {difference:.2g} nats a token (bound {bound:.2g})"
    if trainer.kernels and drop_wrong_kernels(trainer, inputs, expected, bound, measured):
        return check_row(trainer, rows)
    if "shared_prompts" in inputs:
        print(f"check: no shared prompts, which give other losses, {measured}")
        trainer.data_collator.collate.shares = False
        return check_row(trainer, rows)
    ours = choose_attention(model.config, None, trainer.settings["PACKING"], device="cpu")
    helps = find_attention(trainer, inputs, expected, bound, dict.fromkeys((ours, plain, "eager")))
    if asked or not helps:
        report(trainer, explain(trainer, inputs, expected, helps, measured))
        return inputs, losses, difference, bound
    print(f"check: attention {helps}, since {model.config._attn_implementation} gives other losses, {measured}")
    model.set_attn_implementation(helps)
    if trainer.base_model is not None:
        trainer.base_model.set_attn_implementation(helps)
    losses = row_losses(model, inputs)
    return inputs, losses, worst_difference(expected, losses), bound


def check_adapter(trainer, inputs: dict, losses: list[torch.Tensor], bound: float) -> None:
    """A new adapter, with which the row has these losses, leaves each as it is without it."""
    with trainer.model.disable_adapter():
        changes = worst_difference(row_losses(trainer.model, inputs), losses)
    if not changes <= bound:
        problem = f"it changes the base's losses by {changes:.2g} nats a token before it is trained"
        remedy = "Try another ADAPTER or LORA_TARGET_MODULES, or CHAT_TEMPLATE=zephyr, which needs no new tokens."
        report(trainer, f"ADAPTER={trainer.settings['ADAPTER']}: {problem}. {remedy}")


def longest_rows(trainer) -> list[dict]:
    """Of the first rows the one whose second chat is the longest; unpacked, the longest and the shortest."""
    rows = [trainer.train_dataset[i] for i in range(min(SEARCHED, trainer.rows))]
    rows = [row for row in rows if any(label != -100 for label in row["labels"])] or rows
    if "seq_lengths" not in rows[0]:
        return sorted(rows, key=lambda row: -len(row["input_ids"]))[:: max(1, len(rows) - 1)][:2]
    return [max(rows, key=lambda row: sorted(row["seq_lengths"], reverse=True)[1:2])]


def drop_wrong_kernels(trainer, inputs: dict, expected: list[torch.Tensor], bound: float, measured: str) -> bool:
    """Take Liger's kernels out where the losses are within their bound without them, and return whether they are.

    measured: the words for the difference with them.
    """
    with put_aside(trainer.kernels):
        helps = worst_difference(expected, row_losses(trainer.model, inputs)) <= bound
    if helps:
        if trainer.settings.get("LIGER_KERNEL"):
            report(trainer, f"LIGER_KERNEL=True: the loss is not the model's own, {measured}. Set LIGER_KERNEL=None.")
        print(f"check: no Liger kernels, which give other losses, {measured}; more memory than predicted")
        swap(trainer.kernels)
        trainer.kernels.clear()
    return helps


def own_losses(trainer, inputs: dict, attention: str) -> list[torch.Tensor]:
    """Per chat, the losses of its last tokens, each alone through the model's own forward, without Liger's kernels."""
    model, losses = trainer.model, []
    trained = model.config._attn_implementation
    model.set_attn_implementation(attention)
    for ids, labels in chats_of(inputs):
        positions = (labels[0, 1:] != -100).nonzero()[-POSITIONS:, 0]
        if not len(positions):
            losses.append(positions.float())
            continue
        with put_aside(trainer.kernels):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, positions + 1], reduction="none"))
    model.set_attn_implementation(trained)
    return losses


def row_losses(model, inputs: dict) -> list[torch.Tensor]:
    """The same by the training loss, with all chats in their row."""
    inputs = dict(inputs)
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in chats_of(inputs)]
    losses, _, _ = model(learn=inputs.pop("labels"), use_cache=False, **inputs)
    return [part[-POSITIONS:] for part in losses.split(counts)]


def worst_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The highest mean difference of a chat's losses, in any process. With few tokens it scatters, and counts less."""
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if len(one)]
    means = [((one - other).abs().mean() / (1 + 8 / len(one))).item() for one, other in pairs]
    return max(distributed.gather(max((float("inf") if mean != mean else mean for mean in means), default=0.0)))


def find_attention(trainer, inputs: dict, expected: list[torch.Tensor], bound: float, names) -> str | None:
    """The first of these attentions that gives the losses expected."""
    model, trained = trainer.model, trainer.model.config._attn_implementation
    for name in names:
        model.set_attn_implementation(name)
        difference = worst_difference(expected, row_losses(model, inputs))
        model.set_attn_implementation(trained)
        if difference <= bound:
            return name
    return None


def explain(trainer, inputs: dict, expected: list[torch.Tensor], helps: str | None, measured: str) -> str:
    """Which part gives other losses, and what works. helps: an attention that would."""
    kind, attention = trainer.model.config.model_type, trainer.settings.get("ATTN_IMPLEMENTATION")
    if helps:
        return f"ATTN_IMPLEMENTATION={attention}: the loss is not {kind}'s own, {measured}. Set it to None or {helps}."
    difference = 0.0
    for (ids, labels), one in zip(chats_of(inputs), expected, strict=True):
        row = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
        difference = max(difference, worst_difference([one], row_losses(trainer.model, row)))
    if difference > BOUNDS[trainer.dtype]:
        return f"MODEL={trainer.model.name_or_path}: the loss of single chats is not {kind}'s own, {measured}."
    setting = "PACKING=False" if trainer.args.packing else "PER_DEVICE_TRAIN_BATCH_SIZE=1"
    return f"PACKING={trainer.args.packing}: chats change each other's loss in {kind} {measured}. Set {setting}."


def report(trainer, problem: str) -> None:
    if trainer.settings.get("DOCTOR") != "warn":
        raise UserError(f"{problem} (DOCTOR=warn trains anyway)")
    print(f"check: {problem}", file=sys.stderr)

"""The trainer of preferences: the answers of a pair side by side, with the loss of `preference`."""

import contextlib
import logging
import statistics
import sys
from dataclasses import dataclass

import torch

from common import distributed
from common.data.compared import IGNORE_INDEX, sequences_of, share_prompts
from common.model.attention import describe_pairs
from common.train.collator import CountingCollator, predicts
from common.train.preference import OF_PAIRS, Preference, sum_by_sequence
from common.train.preflight import check_reference
from common.train.reliability import chats_of, highest_losses
from common.train.trainer import ChatTrainer

# Of SFTTrainer: one pair at a time is two sequences without padding.
logging.getLogger("trl.trainer.sft_trainer").addFilter(lambda line: "padding-free" not in line.getMessage())


@dataclass
class PairCollator:
    """TRL's collator, with what belongs to pairs beside it.

    is_packed: all pairs are one row, else each is two padded ones. shares: what the sequences of a pair begin with
    stands in the row once (`compared.share_prompts`).
    """

    collate: object
    is_packed: bool
    shares: bool = False

    def __call__(self, rows: list[dict]) -> dict:
        sequences = [{name: row[name] for name in ("input_ids", "labels", "seq_lengths")} for row in rows]
        batch = self.collate_sequences(sequences)
        if "mismatched" in rows[0]:
            others = [row["mismatched"] for row in rows]
            batch["mismatched"] = self.collate_sequences([o | {"seq_lengths": [len(o["labels"])]} for o in others])
        batch["is_good"] = torch.tensor([row["is_good"] for row in rows])
        lengths = [count_first(row) for row in rows]
        batch["length"] = torch.tensor(lengths)
        batch["tokens"] = sum(len(row["labels"]) for row, length in zip(rows, lengths, strict=True) if length)
        if "reference" in rows[0]:
            batch["reference"] = torch.tensor([row["reference"] for row in rows])  # (pairs, 2)
        return batch

    def collate_sequences(self, rows: list[dict]) -> dict:
        """Inputs and labels, and `answers`: of which sequence each token in the loss is, numbered through the batch."""
        if not self.is_packed:
            batch = self.collate([part for row in rows for part in sequences_of(row)])
            return batch | {"answers": predicts(batch["labels"]).nonzero()[:, 0]}
        if self.shares:
            tokens, shapes = share_prompts(rows)
            batch = {name: torch.tensor([values]) for name, values in tokens.items()}
            batch["labels"][batch["position_ids"] == 0] = IGNORE_INDEX  # nothing predicts them
            batch |= describe_pairs(shapes)
            ends = batch["pair_sequences"]["offsets"][0]
        else:
            batch = self.collate(rows)
            ends = batch["cu_seq_lens_q"]
        numbers = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())  # (T,)
        return batch | {"answers": numbers[1:][predicts(batch["labels"])[0]]}


def count_first(row: dict) -> int:
    """Tokens of the better answer, or of the only one; 0 for a blank row."""
    return sum(label != IGNORE_INDEX for label in row["labels"][: row["seq_lengths"][0]])


class PreferenceTrainer(ChatTrainer):
    """ChatTrainer for pairs, or for labelled answers (LOSS=kto).

    The reference is what the dataset's column `reference` has, the model without its new adapter where it has none.
    shares_prompts: the prompt of a pair is computed once, see PairCollator.
    """

    def __init__(self, *args, preference: Preference, shares_prompts: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.preference, self.evaluated = preference, ("loss", *preference.metrics)
        # Of the current step: pairs, mean tokens of good answers and their share; KTO's divergence.
        self.pairs_in_step, self.usual_length, self.share_good, self.divergence = 1, 1.0, 1.0, 0.0
        self.warned = False
        turn_off_dropout(self.model)
        collate = PairCollator(self.data_collator.collate, self.settings["PACKING"], shares_prompts)
        self.data_collator = CountingCollator(collate)
        self.penalties |= dict.fromkeys(preference.metrics, 0.0)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "labels", "seq_lengths", *OF_PAIRS]

    def blank_row(self) -> dict:
        token = self.processing_class.eos_token_id or 0
        row = {"input_ids": [token] * 2, "labels": [IGNORE_INDEX] * 2, "seq_lengths": [1, 1], "reference": [0.0, 0.0]}
        if "mismatched" in self.train_dataset.column_names:
            alone = {"input_ids": [token], "labels": [IGNORE_INDEX]}
            row |= alone | {"seq_lengths": [1], "mismatched": alone}
        return row | {"is_good": True}

    def restore_progress(self):
        super().restore_progress()
        check_reference(self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, values, router_loss = self.compare_pairs(model, inputs)
        share = 1 / self.current_gradient_accumulation_steps / distributed.count()
        values = {name: value.sum() / self.pairs_in_step for name, value in values.items()}
        values["router_loss"] = router_loss * share
        self.add_to_log(values, share)
        loss = losses.sum() / self.pairs_in_step + self.penalties.get("router_loss", 0.0) * values["router_loss"]
        return loss * self.accelerator.num_processes

    def compare_pairs(self, model, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of each pair and what is logged of it, (pairs,) all, and the router loss; 0 for blank pairs."""
        is_good, is_pair = inputs["is_good"], inputs["length"] > 0
        ours, lengths, router_loss = self.log_probs(model, inputs)
        theirs = self.reference_log_probs(model, inputs, ours)
        lengths = lengths.clamp(min=1)  # of blank pairs
        if not self.preference.is_paired:
            losses = self.preference.labelled_losses(
                ours[:, 0], theirs[:, 0], self.divergence, is_good, self.usual_length
            )
        else:
            losses = self.preference.losses(ours, theirs, lengths, self.usual_length)
        with torch.no_grad():
            values = self.preference.measure(ours, theirs, lengths, is_good, self.share_good)
        return losses * is_pair, {name: value * is_pair for name, value in values.items()}, router_loss

    def log_probs(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and tokens of the answers, (pairs, 2) both, and the router loss."""
        labels, numbers, is_good = (inputs[name] for name in ("labels", "answers", "is_good"))
        inputs = {name: value for name, value in inputs.items() if name not in (*OF_PAIRS, "labels")}
        losses, _, router_loss = model(**inputs, learn=labels, use_cache=False)
        side_by_side = 2 if self.preference.is_paired else 1
        sums, lengths = sum_by_sequence(losses, numbers, len(is_good) * side_by_side)
        return sums.view(-1, side_by_side), lengths.view(-1, side_by_side), router_loss

    def reference_log_probs(self, model, inputs: dict, ours: torch.Tensor, number: int = 0) -> torch.Tensor:
        """Those of the reference, as `ours`; 0 where the loss has none. number: of labelled answers, 1: mismatched."""
        if not self.preference.needs_reference:
            return torch.zeros_like(ours)
        if "reference" in inputs:
            return inputs["reference"][:, number:][:, : ours.shape[1]]
        with torch.no_grad(), self.reference_model():
            return self.log_probs(model, inputs)[0]

    @torch.no_grad()
    def mean_gain(self, batches: list[dict]) -> float:
        """KTO's divergence: the mean gain over the mismatched answers of all batches and processes, at least 0."""
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for batch in batches:
            batch = self._prepare_inputs(batch)
            others = batch["mismatched"] | {name: batch[name] for name in ("is_good", "reference") if name in batch}
            with self.compute_loss_context_manager():
                ours = self.log_probs(self.model, others)[0]
                gains = (ours - self.reference_log_probs(self.model, others, ours, 1))[:, 0] * (batch["length"] > 0)
            total += torch.stack([gains.sum(), (batch["length"] > 0).sum()]).cpu()
        self.model.train()
        gain, count = map(sum, zip(*distributed.gather(total.tolist()), strict=True))
        return max(0.0, gain / max(1, count))

    @contextlib.contextmanager
    def reference_model(self):
        """The model as it was before its new adapter, without dropout and noise."""
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            yield
        self.model.train(was_training)

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        lengths = torch.cat([torch.stack([batch["length"], batch["is_good"]], 1) for batch in batches]).tolist()
        lengths = [pair for of_process in distributed.gather(lengths) for pair in of_process if pair[0]]
        good = [length for length, is_good in lengths if is_good]
        self.pairs_in_step, self.usual_length = max(1, len(lengths)), max(1, sum(good)) / max(1, len(good))
        self.share_good = len(good) / self.pairs_in_step
        if not self.preference.is_paired:  # over the whole step, however it is cut into micro steps
            self.divergence = self.mean_gain(batches)
        return batches, items

    def find_worst(self, batches: list[dict]) -> list[dict]:
        return worst_pairs(self, batches)

    def evaluate(self, *args, **kwargs):
        lengths = [(count_first(row), row["is_good"]) for row in self.eval_dataset]
        good = [length for length, is_good in lengths if length and is_good]  # 0: a blank row
        self.usual_length = statistics.fmean(good or [1])
        self.share_good = len(good) / max(1, sum(length > 0 for length, _ in lengths))
        if not self.preference.is_paired:
            self.divergence = self.mean_gain(self.get_eval_dataloader())
        return super().evaluate(*args, **kwargs)

    def evaluation_sums(self, inputs: dict) -> torch.Tensor:
        losses, values, _ = self.compare_pairs(self.model, inputs)
        sums = [losses.sum(), *(values[name].sum() for name in self.preference.metrics)]
        return torch.stack([*sums, (inputs["length"] > 0).sum()])

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        for prefix in ("", "eval_"):
            if f"{prefix}margin" in logs and not self.warned:
                figures = {name: logs[prefix + name] for name in self.preference.metrics}
                first = next((entry for entry in self.state.log_history if "chosen_logp" in entry), figures)
                if problem := self.preference.find_collapse(figures, first["chosen_logp"]):
                    self.warned = True
                    remedy = f"Lower LEARNING_RATE={self.args.learning_rate}"
                    remedy += ", or set SFT_WEIGHT=1" if self.preference.sft_weight < 1 else ""
                    right = f"{figures['accuracy']:.0%} of the {'held-out ' * bool(prefix)}pairs are right"
                    print(f"step {self.state.global_step}: {right} and {problem}. {remedy}.", file=sys.stderr)


def turn_off_dropout(model) -> None:
    """Leave dropout to the adapter: with the model's own, it would differ from its reference before it has learned."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def worst_pairs(trainer: PreferenceTrainer, batches: list[dict]) -> list[dict]:
    """The pairs of a step with the highest loss, as `reliability.worst_chats` has them."""
    trainer.model.eval()
    found = []
    for batch in map(trainer._prepare_inputs, batches):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = trainer.compare_pairs(trainer.model, batch)[0].tolist()
        sequences = [ids[0, :100] for ids, _ in chats_of(batch)]
        texts = map(trainer.processing_class.decode, sequences[:: len(sequences) // len(losses)])
        found += [{"loss": loss, "begins": text} for loss, text in zip(losses, texts, strict=True)]
    return highest_losses(found)

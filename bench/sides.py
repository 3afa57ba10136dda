"""The two sides of a comparison: our training step and plain TRL's with its own best switches, on the same work."""

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from common import hardware
from common.data.compared import IGNORE_INDEX, answers_of
from common.files import METRICS, LineLog
from common.hardware import now
from common.model.attention import can_share_prompts
from common.train import galore
from common.train.compiled import compile_layers
from common.train.kept_reference import keep_reference
from common.train.preference import Preference
from common.train.preference_trainer import PreferenceTrainer
from common.train.trainer import ChatTrainer, GaloreTrainer

SIDES = ("trl", "ours")
TAKEN_AS_THEY_ARE = {"skip_prepare_dataset": True}


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.started = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self.started)


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def make_galore(model, rank: int) -> galore.GaLore:
    optimizer = galore.GaLore(*galore.split_weights(model, rank), rank, fused=True, lr=2e-4)
    optimizer.attach(model)
    return optimizer


@dataclass(frozen=True)
class Pairs:
    """How a step on pairs is computed: `at_once` of the pairs of a step; reference: live or kept (TRL: precomputed)."""

    count: int = 8
    at_once: int = 1
    reference: str = "live"


def train_side(
    side: str, model, train_set, tokenizer, max_length: int | None, steps: int, rank: int, device: str,
    checkpointing=False, method="lora", pairs: Pairs | None = None, untimed: int = 2, kernels=(),
) -> dict:  # fmt: skip
    """Train on rows of input_ids and labels: adapters (of a quantised base, too; "offload": with activations in main
    memory; "compiled": with compiled layers on our side), every weight ("full"), or every weight by GaLore, whose peer
    is the full side of TRL: the authors' GaLore pauses for minutes at these sizes. With pairs: adapters by DPO, on rows
    of two sequences.

    max_length: of the rows that are packed from these; None: they are packed, with seq_lengths, and taken in order.
    kernels: Liger's in our model.
    Returns tokens_per_second (over the median step, the first `untimed` left out), seconds of these steps, peak_gib
    (allocated on the GPU, else resident in this process), reserved_gib and losses (one a step; NaN where it was).
    """
    set_seed(0)
    adapter, rate = None if method in ("full", "galore") else lora(rank), 1e-4 if pairs else 2e-4
    timer, at_once = StepTimer(), pairs.at_once if pairs else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = dict(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=at_once, learning_rate=rate,
            gradient_accumulation_steps=pairs.count // at_once if pairs else 1, lr_scheduler_type="constant",
            optim="adamw_torch_fused", bf16=model.dtype == torch.bfloat16, use_cpu=device == "cpu",
            gradient_checkpointing=checkpointing, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, seed=0, activation_offloading=method == "offload", logging_nan_inf_filter=False,
        )  # fmt: skip
        if not max_length:
            arguments["train_sampling_strategy"] = "sequential"
        common = dict(processing_class=tokenizer, callbacks=[timer])
        constant = dict(LR_SCHEDULER="constant", WARMUP_RATIO=0, MIN_LR=0, LEARNING_RATE=rate)
        constant |= dict(PACKING=True, MAX_SAMPLES=None, SEED=0)  # what a trainer of pairs reads
        ours = dict(settings=constant, log=LineLog(Path(folder) / METRICS), metadata={})
        if pairs:
            trainer = preference_trainer(side, model, adapter, train_set, arguments, pairs, common, ours)
        else:
            kind = dict(packing=True) if max_length else dict(padding_free=True, dataset_kwargs=TAKEN_AS_THEY_ARE)
            common |= dict(args=SFTConfig(max_length=max_length, **kind, **arguments), train_dataset=train_set)
            trainer = chat_trainer(side, model, adapter, method, rank, common, ours)
            trainer.kernels = kernels
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = list(train_set if pairs else trainer.train_dataset)[0 if max_length else untimed :]
    tokens = sum(len(row["input_ids"]) for row in rows) / len(rows) * (pairs.count if pairs else 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": tokens / statistics.median(timer.seconds[untimed:]),
        "seconds": timer.seconds[untimed:],
        "peak_gib": hardware.peak_rss_gib() if device == "cpu" else hardware.peak_vram_gib(),
        "reserved_gib": hardware.peak_vram_gib(reserved=True),
        "losses": [math.nan if loss is None else float(loss) for loss in losses],
    }


def chat_trainer(side: str, model, adapter, method: str, rank: int, common: dict, ours: dict):
    if side == "ours" and method == "galore":
        return GaloreTrainer(model=model, optimizers=(make_galore(model, rank), None), **ours, **common)
    if side == "ours":
        trainer = ChatTrainer(model=get_peft_model(model, adapter) if adapter else model, **ours, **common)
        if method == "compiled":
            compile_layers(trainer.model)
        return trainer
    return SFTTrainer(model=model, peft_config=adapter, **common)


def preference_trainer(side: str, model, adapter, train_set, arguments: dict, pairs: Pairs, common: dict, ours: dict):
    if side == "trl":  # gets our tokens; its padding_free falls back to padding
        config = DPOConfig(precompute_ref_log_probs=pairs.reference == "kept", max_length=None, beta=0.1, **arguments)
        rows = Dataset.from_list([prompt_and_answers(row) for row in train_set])
        return TokensGiven(model=model, args=config, peft_config=adapter, train_dataset=rows, **common)
    kind = dict(padding_free=True, dataset_kwargs=TAKEN_AS_THEY_ARE)
    config = SFTConfig(max_length=None, **kind, **arguments)
    loss = Preference("dpo", beta=0.1)
    model = get_peft_model(model, adapter)
    attention = model.config._attn_implementation
    shares = can_share_prompts(model.config, attention, max(map(max, train_set["seq_lengths"])))
    rows = dict(train_dataset=train_set, shares_prompts=shares)
    trainer = PreferenceTrainer(model=model, args=config, preference=loss, **rows, **ours, **common)
    if pairs.reference == "kept":
        keep_reference(trainer, Path(arguments["output_dir"]), None)
    return trainer


class TokensGiven(DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset


def prompt_and_answers(row: dict) -> dict:
    """A row of pairs as TRL tokenises it, up to the end tokens."""
    (prompt, chosen, labels, _), (_, rejected, other, _) = answers_of(row)
    ends = [max(i for i, label in enumerate(side) if label != IGNORE_INDEX) + 1 for side in (labels, other)]
    return dict(prompt_ids=prompt, chosen_ids=chosen[: ends[0]], rejected_ids=rejected[: ends[1]])

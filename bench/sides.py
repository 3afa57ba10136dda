"""The two sides of a comparison: our training step and plain TRL's with its own best switches, on the same work."""

import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from common import hardware
from common.files import GIB, METRICS, LineLog
from common.hardware import now
from common.train import galore
from common.train.trainer import ChatTrainer, GaloreTrainer

SIDES = ("trl", "ours")


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


def train_side(
    side: str, model, train_set, tokenizer, max_length: int, steps: int, rank: int, device: str, checkpointing=False,
    method="lora",
) -> dict:  # fmt: skip
    """Train on packed rows of input_ids and labels: adapters (of a quantised base, too; "offload": with
    activations in main memory), every weight ("full"), or every weight by GaLore, whose peer is the full side of TRL:
    the authors' GaLore pauses for minutes at these sizes.

    Returns tokens_per_second (over the median step, the first two left out), peak_gib (allocated on the GPU, else
    resident in this process) and losses (one a step).
    """
    set_seed(0)
    adapter = lora(rank) if method in ("lora", "offload", "nf4") else None
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            args=SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=1, max_length=max_length, packing=True,
                learning_rate=2e-4, lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=True,
                use_cpu=device == "cpu", gradient_checkpointing=checkpointing, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, seed=0, activation_offloading=method == "offload",
            ),
            train_dataset=train_set, processing_class=tokenizer, callbacks=[timer],
        )  # fmt: skip
        constant = dict(LR_SCHEDULER="constant", WARMUP_RATIO=0, MIN_LR=0, LEARNING_RATE=2e-4)
        ours = dict(settings=constant, log=LineLog(Path(folder) / METRICS), metadata={})
        if side == "ours" and method == "galore":
            optimizer = make_galore(model, rank)
            trainer = GaloreTrainer(model=model, optimizers=(optimizer, None), **ours, **common)
        elif side == "ours":
            model = get_peft_model(model, adapter) if adapter else model
            trainer = ChatTrainer(model=model, **ours, **common)
        else:
            trainer = SFTTrainer(model=model, peft_config=adapter, **common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset) / len(trainer.train_dataset)
    return {
        "tokens_per_second": tokens / statistics.median(timer.seconds[2:]),
        "peak_gib": hardware.peak_rss_gib() if device == "cpu" else torch.cuda.max_memory_allocated() / GIB,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }

"""Fine-tune every weight of a causal language model into a chat model, with GaLore's low-rank gradients and moments.

    python galore_train.py
    python galore_train.py MODEL=stabilityai/stablelm-2-1_6b DATA=chats.jsonl GALORE_RANK=256 RUN_NAME=full

Writes OUT_DIR/RUN_NAME/: settings.json, metrics.jsonl, hardware.csv, plot.png, summary.json, run_row.md,
checkpoint-N/ and final/ (model, tokenizer, template). Conversation to it: python chat_pipe.py MODEL=out/full
"""

from common.cli import UserError, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, check_choice, current

# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
DTYPE: str | None = None  # of weights, gradients and moments; None: bfloat16, float32 on older devices
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa; flash_attention_2, flex_attention, eager ...
# GaLore
GALORE_RANK = 128  # of gradients and moments; memory grows with it. Matrices with a side no longer learn as with adamw
GALORE_UPDATE_GAP = 50  # steps from one refresh of a matrix's basis to the next
GALORE_SCALE = 0.25  # factor on the updates of projected matrices, beside LEARNING_RATE
GALORE_TARGET_MODULES = "auto"  # auto: every linear layer but the head; or names, comma-separated: "q_proj,v_proj"
# Data
DATA = "data/brief.jsonl"  # files, hub sets, or a prepared folder: "ultrachat[:10%], oasst2, data/brief.jsonl*20"
MAX_SAMPLES: int | None = None  # chats to train on, drawn at random; None: all. DATA="chats.jsonl[:1%]" takes the first
EVAL_SIZE: int | float = 0.03  # chats held out, or their share below 1; 0: none
EVAL_DATA: str | None = None  # sources to evaluate on instead, in the same form
MAX_LENGTH = 1024  # tokens of a chat; activations grow with it
TOO_LONG = "cut"  # chats over MAX_LENGTH: cut (at a turn), drop, or error
DROP_PATTERN: str | None = "auto"  # regex, case ignored: chats it matches go; auto: claims to be another assistant
PACKING = True  # fill rows with several chats that do not see each other
TRAIN_ON = "assistant"  # assistant: learn the answers only; all: every token
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
DOCTOR = "stop"  # stop: a fault in what would be learned ends the run; warn: it is printed
# Optimization
OPTIM = "galore"  # galore, galore_8bit, galore_exact_svd, galore_torch, adamw, adamw_8bit, adamw_anyprecision
NUM_TRAIN_EPOCHS: int | float = 2
MAX_STEPS: int | None = None  # optimizer steps; overrules NUM_TRAIN_EPOCHS
PER_DEVICE_TRAIN_BATCH_SIZE: int | None = None  # rows at once; None: what fits, out of GRADIENT_ACCUMULATION_STEPS rows
GRADIENT_ACCUMULATION_STEPS = 1  # micro steps an optimizer step (rows, where the line above is None)
LEARNING_RATE = 7e-4  # peak
MIN_LR = 0.0  # where linear and cosine end
LR_SCHEDULER = "cosine"  # constant, linear or cosine, after the warm-up
WARMUP_RATIO = 0.1  # share of the steps
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
KL_WEIGHT: float | None = None  # hold the base's predictions where nothing is learned; a third slower; 0: off
NEFTUNE_NOISE_ALPHA: float | None = None  # noise on the embeddings while training; 5 is usual
GRADIENT_CHECKPOINTING: bool | None = None  # True: a third slower, activations of one layer, not all; None: if needed
MEMORY_LIMIT: str | None = None  # of the device: a share "0.9" or a size "7500MiB"; None: what is free
TORCH_COMPILE = False  # True: minutes before the first step, faster steps after
SEED = 0
# Logging and output
LOGGING_STEPS = 1
EVAL_STEPS: int | float | None = None  # steps between evaluations, or their share of the run; None: at the end only
EVAL_FACTS: str | None = None  # questions (as FACTS of evaluate_model.py) asked at each evaluation; slow
EVAL_PROMPTS: str | None = None  # rows of {"prompt"} answered at each evaluation, into metrics.jsonl
SAVE_STEPS: int | float | None = 0.25  # steps between checkpoints, or their share of the run; None: none
SAVE_TOTAL_LIMIT = 2  # checkpoints to keep, the newest; each holds weights and twice their size of optimizer state
REPORT_TO: str | None = None  # tensorboard, wandb, mlflow, trackio, or several, comma-separated; beside metrics.jsonl
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: galore_train-<time>
RESUME: str | None = "auto"  # the same command again goes on from the newest sound checkpoint; None: never
ALLOW_CHANGE = ""  # settings that may differ from those the run began with: "LEARNING_RATE, SAVE_STEPS"

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)
    check_files(DATA=DATA, EVAL_DATA=EVAL_DATA)

import math
import sys

import torch
from transformers import set_seed

from common import distributed, hardware
from common.data import encode, templates
from common.eval import facts
from common.model import load, location
from common.run.folder import begin, execute
from common.train import batch_plan, galore, memory
from common.train.config import check_settings, choose_kl_weight, trainer_config
from common.train.meta_model import empty_model
from common.train.trainer import ChatTrainer

# OPTIM, and what it is called in transformers; None: made here.
OPTIMIZERS = {
    "galore": None,
    "galore_8bit": None,
    "galore_exact_svd": None,
    "galore_torch": None,
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_anyprecision": "adamw_anyprecision",  # moments in the dtype of the weights, sums after Kahan
}


def main():
    # Settings and data: every mistake that can be found without the model is found here
    settings = current(globals())
    check_choice("OPTIM", OPTIM, OPTIMIZERS)
    in_libraries_terms = settings | {"OPTIM": OPTIMIZERS[OPTIM] or "adamw_torch_fused"}
    if OPTIM == "galore_torch":
        in_libraries_terms["SAVE_STEPS"] = None
        print("OPTIM=galore_torch keeps code in its state, which is not loaded again: no checkpoints", file=sys.stderr)
    check_settings(in_libraries_terms)
    check_galore_settings()
    source = location.locate(MODEL)
    encode.check_settings(settings)
    dtype = load.choose_dtype(DTYPE)
    refuse_untrainable(source, dtype)
    load.check_length(source, MAX_LENGTH)
    tokenizer = load.load_tokenizer(source)
    kl_weight = choose_kl_weight(settings, load.load_config(source), tokenizer)
    encoder, note = templates.set_template(tokenizer, CHAT_TEMPLATE)
    print(note)
    probe = facts.make_probe(EVAL_FACTS, EVAL_PROMPTS, tokenizer)
    run = begin(settings, __file__, tokenizer, encoder, bool(kl_weight), encoder.new_token_ids)

    # Memory: what the settings leave open is chosen so that it fits
    # Compiled, attention per document would be compiled again for every length of a document.
    attention = load.choose_attention(ATTN_IMPLEMENTATION, PACKING and not TORCH_COMPILE)
    print(f"{hardware.device_name()}: {str(dtype).removeprefix('torch.')}, attention {attention}")

    def empty_models(quantization):
        like = load.load_config(source), None, dtype, attention, len(tokenizer)
        base = empty_model(*like).requires_grad_(False) if kl_weight else None
        return empty_model(*like), base

    def optimizer(model):
        return make_optimizer(model) or memory.usual_optimizer(in_libraries_terms["OPTIM"])(model)

    step = memory.Step(1, run.row_length, PACKING, kl_weight, dtype, hardware.device_type(), full=True)
    fit = batch_plan.plan_batch(settings, empty_models, optimizer, step, run.checkpoint)

    # Model and training; once more in smaller parts where memory runs out all the same
    def train(fit):
        set_seed(SEED)
        model = load_whole(source, dtype, attention, len(tokenizer))
        base = load_whole(source, dtype, attention, len(tokenizer)).requires_grad_(False) if kl_weight else None
        optimizer = make_optimizer(model)
        if isinstance(optimizer, galore.GaLore):
            optimizer.leave_out_of_ddp(model)
        if OPTIM.startswith("galore"):
            projected, _ = galore.split_weights(model, GALORE_RANK, GALORE_TARGET_MODULES)
            share = sum(p.numel() for p in projected) / sum(p.numel() for p in model.parameters())
            print(f"GaLore: {len(projected)} matrices projected to rank {GALORE_RANK}, {share:.0%} of all weights")
        trainer = (GaloreTrainer if isinstance(optimizer, galore.GaLore) else ChatTrainer)(
            model=model,
            args=trainer_config(in_libraries_terms, fit, run.folder, dtype, evaluate=bool(run.eval_set)),
            train_dataset=run.train_set,
            eval_dataset=run.eval_set,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            schedule=(LR_SCHEDULER, WARMUP_RATIO, MIN_LR),
            kl_weight=kl_weight,
            base_model=base,
            save_total_limit=SAVE_TOTAL_LIMIT,
            probe=probe,
            data_digest=run.account["digest"],
            base_fingerprint=model.base_fingerprint,
        )

        def save(final, weights):
            load.save_final(final, trainer.model, tokenizer, weights=weights)

        execute(trainer, run, fit, save)

    batch_plan.restart_smaller(train, fit, settings)


class GaloreTrainer(ChatTrainer):
    """ChatTrainer whose gradients lie in the optimizer, which knows their norm."""

    def _clip_grad_norm(self, model):
        return self.optimizer.optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # MAX_GRAD_NORM=0
            grad_norm = self.optimizer.optimizer.clip_grad_norm_(math.inf)
        return super()._get_grad_norm(model, grad_norm)


def check_galore_settings():
    """Refuse what GaLore cannot work with; warn of what did not work for others."""
    sharded = distributed.engine() not in (None, "ddp")
    if GALORE_RANK < 1 or GALORE_UPDATE_GAP < 1 or GALORE_SCALE <= 0:
        raise UserError(
            f"GALORE_RANK={GALORE_RANK} GALORE_UPDATE_GAP={GALORE_UPDATE_GAP} GALORE_SCALE={GALORE_SCALE}: rank and "
            "gap are at least 1, the scale is above 0."
        )
    if OPTIM == "galore_torch" and distributed.count() > 1 or OPTIM.startswith("galore") and sharded:
        raise UserError(
            f"OPTIM={OPTIM} with {distributed.engine()}: its projection needs whole gradients in one process. "
            "OPTIM=galore works with launch/ddp.yaml, OPTIM=adamw with all of them."
        )
    if OPTIM.startswith("galore") and GALORE_SCALE >= 1:
        print(
            f"GALORE_SCALE={GALORE_SCALE}: a run with 2 diverged, and one with 1.5 (rank 488) was given up after 207 "
            "minutes without progress (notes that this project comes from). 0.25 is usual.",
            file=sys.stderr,
        )


def refuse_untrainable(source: location.Source, dtype: torch.dtype):
    """Refuse weights that cannot be trained by a gradient, with the reason."""
    if getattr(load.load_config(source), "quantization_config", None):
        raise UserError(
            f"MODEL={source.name} is quantised: its weights have no gradient to train by. Take the 16-bit model, or "
            "qlora_train.py, which leaves the base as it is."
        )
    if dtype == torch.float16:
        raise UserError(f"DTYPE={DTYPE}: gradients of float16 weights cannot be unscaled. Set DTYPE=float32.")
    if OPTIM == "adamw_8bit" and not torch.cuda.is_available():
        raise UserError("OPTIM=adamw_8bit: bitsandbytes needs a GPU for it. OPTIM=adamw works.")


def load_whole(source: location.Source, dtype: torch.dtype, attention: str, vocabulary: int):
    """The model with all its weights; an adapter on it is merged first."""
    model = load.load_model(source, None, dtype, attention, trainable=True, vocabulary=vocabulary)
    return (model.merge_and_unload() if source.adapter else model).requires_grad_(True)


def make_optimizer(model):
    """The optimizer that OPTIM names, None for one that transformers makes."""
    if not OPTIM.startswith("galore"):
        return None
    projected, plain = galore.split_weights(model, GALORE_RANK, GALORE_TARGET_MODULES)
    usual = dict(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if OPTIM == "galore_torch":
        from galore_torch import GaLoreAdamW

        special = dict(rank=GALORE_RANK, update_proj_gap=GALORE_UPDATE_GAP, scale=GALORE_SCALE, proj_type="std")
        return GaLoreAdamW([{"params": plain}, {"params": projected, **special}], no_deprecation_warning=True, **usual)
    kind = dict(exact_svd=OPTIM == "galore_exact_svd", eight_bit=OPTIM == "galore_8bit")
    optimizer = galore.GaLore(
        projected, plain, GALORE_RANK, GALORE_UPDATE_GAP, GALORE_SCALE, fused=True, **kind, **usual
    )
    optimizer.attach(model)
    return optimizer


if __name__ == "__main__":
    run_main(main)

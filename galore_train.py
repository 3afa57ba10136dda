"""Full fine-tuning of a causal language model into a chat model, with GaLore's low-rank gradients and moments.

    python galore_train.py
    python galore_train.py MODEL=stabilityai/stablelm-2-1_6b DATA=chats.jsonl GALORE_RANK=256 RUN_NAME=full

Writes OUT_DIR/RUN_NAME/: settings.json, metrics.jsonl, hardware.csv, plot.png, report.html, summary.json,
run_row.md, checkpoint-N/ and final/ (model, tokenizer, template). Talk to it: python chat_pipe.py MODEL=out/full
"""

from common.cli import UserError, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# GaLore
GALORE_RANK = 128  # of gradients and moments; memory grows with it. Matrices with a side no longer learn as with adamw
GALORE_UPDATE_GAP = 50  # steps from one refresh of a matrix's basis to the next
GALORE_SCALE = 0.25  # factor on the updates of projected matrices, beside LEARNING_RATE
GALORE_TARGET_MODULES = "auto"  # auto: linear layers but the head; or names: "q_proj,v_proj"; or a regex of whole paths
OPTIM = "galore"  # galore, galore_8bit (CUDA: faster), galore_torch, adamw, adamw_8bit (CUDA), adamw_anyprecision
LEARNING_RATE = 7e-4  # peak
ADAPTER: str | None = None  # adapter folder, run folder or hub id that is merged into MODEL first; None: MODEL's own
# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder, or this embedded model
DTYPE: str | None = None  # of weights and compute; None: bfloat16; older GPUs float16 (full: float32), CPUs float32
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa, or eager where the model has no other; flash_attention_2 ...
# Data
DATA = "data/brief.jsonl"  # files, hub sets, or a prepared folder: "ultrachat[:10%], oasst2, data/brief.jsonl*20"
MAX_SAMPLES: int | None = None  # chats to train on, drawn at random; None: all. DATA="chats.jsonl[:1%]" takes the first
EVAL_SIZE: int | float = 0.03  # chats held out, or their share below 1; 0: none
EVAL_DATA: str | None = None  # sources to evaluate on instead, in the same form
BAD_ROWS = "stop"  # invalid rows: stop names up to 20 of them; skip leaves them out and counts them
COLUMNS: str | None = None  # fields with other names: "question:user, answer:assistant"
COMPLETION = "answer"  # rows of prompt and completion: answer (a chat), or continue (plain text that goes on)
ENCODING = "utf-8"  # of text files; cp1252 ...
MAX_LENGTH = 1024  # tokens of a chat; activations grow with it
TOO_LONG = "cut"  # chats over MAX_LENGTH: cut (at a turn), drop, or error
DROP_PATTERN: str | None = "auto"  # regex, case ignored: chats it matches go; auto: claims to be another assistant
PACKING = True  # fill rows with several chats that do not see each other
TRAIN_ON = "assistant"  # assistant: the answers; last: the last one; content: without reasoning; all: every token
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
TEMPLATE_OPTIONS = ""  # variables of the template: "enable_thinking=False, date_string=26 Jul 2024"
DOCTOR = "stop"  # stop: a problem in what would be learned ends the run; warn: it is printed
# Optimization
NUM_TRAIN_EPOCHS: int | float = 2
MAX_STEPS: int | None = None  # optimizer steps; overrules NUM_TRAIN_EPOCHS
BATCH_SIZE: int | None = None  # rows of an optimizer step, all devices together; None: the product of the next two
PER_DEVICE_TRAIN_BATCH_SIZE: int | None = None  # rows at once on a device; None: as many of the batch as fit
GRADIENT_ACCUMULATION_STEPS: int | None = None  # micro steps of an optimizer step; None: as the batch needs
MIN_LR = 0.0  # where linear and cosine end
LR_SCHEDULER = "cosine"  # constant, linear or cosine, after the warm-up
WARMUP_RATIO = 0.1  # share of the steps
WARMUP_STEPS: int | None = None  # optimizer steps; overrules WARMUP_RATIO
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
KL_WEIGHT: float | None = None  # regularize towards the base outside of the loss; a third slower; 0: off
NEFTUNE_NOISE_ALPHA: float | None = None  # noise on the embeddings while training; 5 is usual
GRADIENT_CHECKPOINTING: bool | None = None  # True: a third slower, activations of one layer, not all; None: if needed
ACTIVATION_OFFLOADING = False  # True: activations wait in main memory for the backward pass; CUDA, less VRAM, slower
MEMORY_LIMIT: str | None = None  # of the device: a share "0.9" or a size "7500MiB"; None: what is free
LIGER_KERNEL: bool | None = None  # one kernel each for norms, SwiGLU, positions; None: on CUDA, where installed
TORCH_COMPILE = False  # True: minutes before the first step, faster steps after
SEED = 0
# Logging and output
LOGGING_STEPS = 1
EVAL_STEPS: int | float | None = None  # steps between evaluations, or their share of the run; None: at the end only
EARLY_STOPPING_PATIENCE: int | None = None  # evaluations without a lower loss, after which the run ends; None: never
EVAL_FACTS: str | None = None  # questions (as FACTS of evaluate_model.py) asked at each evaluation; slow
EVAL_PROMPTS: str | None = None  # rows of {"prompt"} answered at each evaluation, into metrics.jsonl
SAVE_STEPS: int | float | None = 0.25  # steps between checkpoints, or their share of the run; None: none
SAVE_TOTAL_LIMIT = 2  # checkpoints to keep, the newest; each holds weights and twice their size of optimizer state
KEEP: str | None = None  # what final/ is: best (the least held-out loss) or last; None: best where EVAL_STEPS is set
REPORT_TO: str | None = None  # tensorboard, wandb, mlflow, trackio, or several, comma-separated; beside metrics.jsonl
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: <script>-<time>
RESUME: str | None = "auto"  # the same command again resumes from the newest valid checkpoint; None: never
ALLOW_CHANGE = ""  # settings that may differ from those the run began with: "LEARNING_RATE, SAVE_STEPS"

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL, ADAPTER=ADAPTER)
    check_files(current(globals()), "DATA", "EVAL_DATA")

import sys

import torch
from peft import PeftModel

from common import distributed
from common.model import adapters, load, location, merging
from common.run.training_run import open_run
from common.train import galore, sft

# OPTIM and its name in transformers; the others are made here.
TRANSFORMERS_NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_anyprecision": "adamw_anyprecision",  # moments in the dtype of the weights, sums after Kahan
}


def main():
    # Settings, tokenizer, template: every mistake that can be found without the weights is found here
    distributed.device()  # first of all: it says why a GPU is not used
    settings = current(globals())
    source, dtype = location.locate(MODEL, adapter=ADAPTER), load.choose_dtype(DTYPE, full=True)
    refuse_untrainable(source, dtype)
    check_galore_settings()
    whole = settings | {"ADAPTER": None}  # which is merged: all weights are trained
    job = sft.start(whole, source, dtype, source, settings_for_trainer(whole))
    if OPTIM.startswith("galore"):  # layers that the model does not have are found here
        galore.split_weights(job.empty_model(), GALORE_RANK, GALORE_TARGET_MODULES)

    # Run folder and data
    run = open_run(settings, __file__)
    sft.load_data(job, run, job.encoder.new_token_ids)

    # Memory, training, result
    sft.train(job, run, build, make_optimizer if OPTIM.startswith("galore") else None)


def settings_for_trainer(settings: dict) -> dict:
    """The settings with the optimizer's name in transformers."""
    settings = settings | {"OPTIM": TRANSFORMERS_NAMES.get(OPTIM, "adamw_torch_fused")}
    if OPTIM == "galore_torch":
        settings |= {"SAVE_STEPS": None, "KEEP": "last"}
        print("OPTIM=galore_torch keeps code in its state, which is not loaded again: no checkpoints", file=sys.stderr)
    return settings


def build(load_base):
    """The model with all its parameters trained; an adapter on it is merged first."""
    model = load_base()
    model = (merging.merge_adapter(model, MODEL) if isinstance(model, PeftModel) else model).requires_grad_(True)
    if OPTIM.startswith("galore") and model.device.type != "meta":
        projected, _ = galore.split_weights(model, GALORE_RANK, GALORE_TARGET_MODULES)
        share = sum(p.numel() for p in projected) / sum(p.numel() for p in model.parameters())
        print(f"GaLore: {len(projected)} matrices projected to rank {GALORE_RANK}, {share:.0%} of all weights")
    return model


def make_optimizer(model):
    """The GaLore optimizer that OPTIM names."""
    projected, other_params = galore.split_weights(model, GALORE_RANK, GALORE_TARGET_MODULES)
    adamw = dict(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if OPTIM == "galore_torch":
        from galore_torch import GaLoreAdamW

        special = dict(rank=GALORE_RANK, update_proj_gap=GALORE_UPDATE_GAP, scale=GALORE_SCALE, proj_type="std")
        groups = [{"params": other_params}, {"params": projected, **special}]
        return GaLoreAdamW(groups, no_deprecation_warning=True, **adamw)
    shape = dict(rank=GALORE_RANK, update_gap=GALORE_UPDATE_GAP, scale=GALORE_SCALE)
    optimizer = galore.GaLore(projected, other_params, **shape, eight_bit=OPTIM == "galore_8bit", fused=True, **adamw)
    optimizer.attach(model)
    galore.leave_out_of_ddp(model, optimizer)
    return optimizer


def check_galore_settings():
    """Refuse what GaLore cannot work with; warn of what did not work for others."""
    sharded = distributed.engine() not in (None, "ddp")
    if OPTIM == "galore_torch" and distributed.count() > 1 or OPTIM.startswith("galore") and sharded:
        raise UserError(
            f"OPTIM={OPTIM} with {distributed.engine()}: its projection needs whole gradients in one process. "
            "OPTIM=galore works with launch/ddp.yaml, OPTIM=adamw with all of them."
        )
    if OPTIM == "galore_torch" and KEEP == "best":
        raise UserError("KEEP=best OPTIM=galore_torch: it has no checkpoints. Set KEEP=last or OPTIM=galore.")
    if OPTIM.startswith("galore") and GALORE_SCALE >= 1:
        print(
            f"GALORE_SCALE={GALORE_SCALE}: a run with 2 diverged, and one with 1.5 (rank 488) was given up after 207 "
            "minutes without progress (notes that this project comes from). 0.25 is usual.",
            file=sys.stderr,
        )


def refuse_untrainable(source: location.Source, dtype: torch.dtype):
    """Refuse weights that cannot be trained by a gradient, with the reason."""
    if source.adapter:
        adapters.check_merge(source.adapter)
    if load.find_quantization(source, None):
        raise UserError(
            f"MODEL={source.name} is quantised: its weights have no gradient to train by. Take the 16-bit model, or "
            "qlora_train.py, which leaves the base frozen."
        )
    if dtype == torch.float16:
        raise UserError(f"DTYPE={DTYPE}: gradients of float16 weights cannot be unscaled. Set DTYPE=float32.")
    if OPTIM == "adamw_8bit" and not torch.cuda.is_available():
        raise UserError("OPTIM=adamw_8bit: bitsandbytes needs a GPU for it. OPTIM=adamw works.")


if __name__ == "__main__":
    run_main(main)

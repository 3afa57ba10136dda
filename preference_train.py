"""Train a chat model on preferences: answers of which one is better, or answers labelled good and bad.

    python preference_train.py MODEL=out/first
    python preference_train.py MODEL=org/name DATA=pairs.jsonl LOSS=dpo SFT_WEIGHT=1 RUN_NAME=preferred

Writes OUT_DIR/RUN_NAME/: settings.json, metrics.jsonl, hardware.csv, plot.png, report.html, summary.json,
run_row.md, checkpoint-N/ and final/ (adapter, tokenizer, template). Talk to it: python chat_pipe.py MODEL=out/preferred
"""

from common.bounds import ADAPTERS
from common.cli import run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# Preference
LOSS = "dpo"  # dpo, ipo; simpo and orpo, without a reference; kto, for rows with a label
BETA = 0.1  # how strongly the model is held to the reference; simpo: 2 is usual; orpo: weight of the odds ratio
LABEL_SMOOTHING = 0.0  # dpo and simpo: share of pairs that may be labelled the wrong way round
SFT_WEIGHT: float | None = None  # adds the loss on the better answers, which keeps them likely; None: 1, for orpo 0
GAMMA = 0.5  # simpo: margin to reach
REFERENCE = "kept"  # kept: computed once before the first step; live: at each step, by the model without its adapter
# LoRA
QUANTIZATION: str | None = None  # nf4: 0.6 bytes a weight; int8: 1; hqq-4bit to hqq-1bit: 0.6 to 0.2; None: 2
ADAPTER: str | None = "lora"  # lora dora rslora pissa loftq ia3; folder, run or hub id of one to continue; None: full
LORA_R = 16  # rank; memory and time grow with it, slowly
LORA_ALPHA = 32  # the adapter is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.0
LORA_TARGET_MODULES = "auto"  # auto: linear layers but the head; or names: "q_proj,v_proj"; or a regex of whole paths
LORA_LAYERS: str | None = None  # decoder layers with an adapter, a slice or numbers: "-4:", "0,1,-1"; None: all
OPTIM = "adamw_torch_fused"  # adamw_anyprecision (16 bits, Kahan sums); CUDA: adamw_bnb_8bit, paged_adamw_8bit, _32bit
LEARNING_RATE = 2e-4  # peak
LORA_PLUS_RATIO: float | None = None  # LoRA+: learning rate of the B matrices over that of A; 16 is usual; None: 1
# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder, or this embedded model
DTYPE: str | None = None  # of weights and compute; None: bfloat16; older GPUs float16 (full: float32), CPUs float32
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa, or eager where the model has no other; flash_attention_2 ...
# Data
DATA = "data/pairs.jsonl"  # files, hub sets, or a prepared folder: "ultrachat[:10%], oasst2, data/brief.jsonl*20"
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
    check_models(MODEL=MODEL, ADAPTER=None if ADAPTER in ADAPTERS else ADAPTER)
    check_files(current(globals()), "DATA", "EVAL_DATA")

from common.run.training_run import open_run
from common.train import frozen_base, sft


def main():
    # Settings, tokenizer, template: every mistake that can be found without the weights is found here
    source, dtype, settings = frozen_base.locate_base(current(globals()))
    job = sft.start(settings, source, dtype, frozen_base.reference(settings, source))
    rows = frozen_base.trained_rows(settings, source, job.encoder.new_token_ids)
    build = frozen_base.builder(job)
    build(job.empty_model)  # names and numbers of layers that the model does not have are found here

    # Run folder and data
    run = open_run(settings, __file__)
    sft.load_data(job, run, rows)

    # Memory, training, result
    sft.train(job, run, build)


if __name__ == "__main__":
    run_main(main)

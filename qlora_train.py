"""Fine-tune a causal language model into a chat model: LoRA or QLoRA adapters on a frozen base.

    python qlora_train.py
    python qlora_train.py MODEL=stabilityai/stablelm-2-1_6b QUANTIZATION=nf4 DATA=chats.jsonl RUN_NAME=first

Writes OUT_DIR/RUN_NAME/: settings.json, metrics.jsonl, hardware.csv, plot.png, summary.json, run_row.md,
checkpoint-N/ and final/ (adapter, tokenizer, template). Conversation to it: python chat_pipe.py MODEL=out/first
"""

from common.cli import UserError, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, check_choice, current

# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
QUANTIZATION: str | None = None  # nf4: 0.6 bytes a weight; int8: 1; hqq-4bit to hqq-1bit: 0.6 to 0.2; None: 2
DTYPE: str | None = None  # of the base and the compute; None: bfloat16, float16 on older GPUs, float32 on older CPUs
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa; flash_attention_2, flex_attention, eager ...
# Adapter
ADAPTER: str | None = "lora"  # lora dora rslora pissa loftq ia3; a run folder to go on with; None: every weight
LORA_R = 16  # rank; memory and time grow with it, slowly
LORA_ALPHA = 32  # the adapter is scaled by LORA_ALPHA / LORA_R
LORA_DROPOUT = 0.0
LORA_TARGET_MODULES = "auto"  # auto: every linear layer but the head; or names, comma-separated: "q_proj,v_proj"
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
NUM_TRAIN_EPOCHS: int | float = 2
MAX_STEPS: int | None = None  # optimizer steps; overrules NUM_TRAIN_EPOCHS
PER_DEVICE_TRAIN_BATCH_SIZE: int | None = None  # rows at once; None: what fits, out of GRADIENT_ACCUMULATION_STEPS rows
GRADIENT_ACCUMULATION_STEPS = 1  # micro steps an optimizer step (rows, where the line above is None)
LEARNING_RATE = 1e-3  # peak
MIN_LR = 0.0  # where linear and cosine end
LR_SCHEDULER = "cosine"  # constant, linear or cosine, after the warm-up
WARMUP_RATIO = 0.1  # share of the steps
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
OPTIM = "adamw_torch_fused"  # adamw_anyprecision (16 bits, Kahan sums); CUDA: adamw_bnb_8bit, paged_adamw_8bit, _32bit
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
RUN_NAME: str | None = None  # None: qlora_train-<time>
RESUME: str | None = "auto"  # the same command again goes on from the newest sound checkpoint; None: never
ALLOW_CHANGE = ""  # settings that may differ from those the run began with: "LEARNING_RATE, SAVE_STEPS"

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)
    check_files(DATA=DATA, EVAL_DATA=EVAL_DATA)

from pathlib import Path

import torch
from peft import PeftConfig
from transformers import set_seed

from common import distributed, hardware
from common.data import encode, templates
from common.eval import facts
from common.model import adapters, load, location
from common.model.quantize import BITS, check_quantization
from common.run.folder import begin, execute
from common.train import batch_plan, memory
from common.train.config import check_settings, choose_kl_weight, trainer_config
from common.train.meta_model import empty_adapter
from common.train.trainer import ChatTrainer


def main():
    # Settings and data: every mistake that can be found without the model is found here
    settings = current(globals())
    check_settings(settings)
    check_quantization(QUANTIZATION)
    source = locate_model()
    encode.check_settings(settings)
    dtype = load.choose_dtype(DTYPE)
    refuse_untrainable(source, dtype)
    load.check_length(source, MAX_LENGTH)
    tokenizer = load.load_tokenizer(source)
    base_tokenizer = load.load_tokenizer(location.Source(source.name, source.path))
    kl_weight = choose_kl_weight(settings, load.load_config(source), base_tokenizer, keeps_base(source))
    encoder, note = templates.set_template(tokenizer, CHAT_TEMPLATE)
    print(note)
    probe = facts.make_probe(EVAL_FACTS, EVAL_PROMPTS, tokenizer)
    run = begin(settings, __file__, tokenizer, encoder, bool(kl_weight), trained_rows(source, encoder))

    # Memory: what the settings leave open is chosen so that it fits
    # Compiled, attention per document would be compiled again for every length of a document.
    attention = load.choose_attention(ATTN_IMPLEMENTATION, PACKING and not TORCH_COMPILE)
    print(f"{hardware.device_name()}: {str(dtype).removeprefix('torch.')}, attention {attention}")

    def empty_model(quantization):
        model = empty_model(load.load_config(source), quantization, dtype, attention, len(tokenizer))
        if source.adapter:
            return empty_adapter(model, source.adapter), None
        return adapters.add_adapter(model, settings, encoder.new_token_ids) if ADAPTER else model, None

    step = memory.Step(1, run.row_length, PACKING, kl_weight, dtype, hardware.device_type(), full=ADAPTER is None)
    fit = batch_plan.plan_batch(settings, empty_model, memory.usual_optimizer(OPTIM), step, run.checkpoint)

    # Model and training; once more in smaller parts where memory runs out all the same
    def train(fit):
        set_seed(SEED)
        model = load.load_model(source, QUANTIZATION, dtype, attention, trainable=True, vocabulary=len(tokenizer))
        base_fingerprint = model.base_fingerprint
        if not source.adapter and ADAPTER:
            model = adapters.add_adapter(model, settings, encoder.new_token_ids)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{source.name}: {trainable:,} trainable parameters")
        trainer = ChatTrainer(
            model=model,
            args=trainer_config(settings, fit, run.folder, dtype, evaluate=bool(run.eval_set)),
            train_dataset=run.train_set,
            eval_dataset=run.eval_set,
            processing_class=tokenizer,
            schedule=(LR_SCHEDULER, WARMUP_RATIO, MIN_LR),
            kl_weight=kl_weight,
            save_total_limit=SAVE_TOTAL_LIMIT,
            probe=probe,
            data_digest=run.account["digest"],
            base_fingerprint=base_fingerprint,
        )

        def save(final, weights):
            load.save_final(final, trainer.model, tokenizer, base_fingerprint, weights)

        execute(trainer, run, fit, save)

    batch_plan.restart_smaller(train, fit, settings)


def locate_model() -> location.Source:
    """MODEL, with the adapter of an earlier run on it where ADAPTER (or MODEL) names one."""
    source = location.locate(MODEL)
    if ADAPTER in adapters.VARIANTS or ADAPTER is None:
        return source
    if not Path(ADAPTER).is_dir():
        check_choice("ADAPTER", ADAPTER, [*adapters.VARIANTS, "a run folder"])
    return location.with_adapter(source, location.locate(ADAPTER, "ADAPTER"), "ADAPTER")


def refuse_untrainable(source: location.Source, dtype: torch.dtype):
    """Refuse combinations that elsewhere fail silently or with a bare assertion, with the reason."""
    full, quantised, half = ADAPTER is None, QUANTIZATION is not None, dtype == torch.float16
    on_gpu = torch.cuda.is_available()
    for wrong, reason in (
        (full and quantised, "quantised weights have no gradient to train by. Set QUANTIZATION=None or ADAPTER=lora."),
        (full and half, "gradients of float16 weights cannot be unscaled. Set DTYPE=float32 or ADAPTER=lora."),
        (full and source.adapter, "MODEL is an adapter on a frozen base. Set ADAPTER=lora to go on with it."),
        (
            source.adapter and ADAPTER in adapters.VARIANTS and ADAPTER != "lora",
            "MODEL has an adapter. Set ADAPTER=lora to go on.",
        ),
        (half and not on_gpu, "float16 is trained on a GPU only. Set DTYPE=None."),
        (ADAPTER == "pissa" and quantised, "PiSSA rewrites the base weights. Set QUANTIZATION=None or ADAPTER=lora."),
        (ADAPTER == "ia3" and QUANTIZATION in BITS, "peft has no IA3 for hqq's layers. Set ADAPTER=lora."),
        (ADAPTER == "loftq" and QUANTIZATION != "nf4", "LoftQ makes up for what NF4 loses. Set QUANTIZATION=nf4."),
        (ADAPTER == "loftq" and not on_gpu, "peft computes LoftQ on a GPU only. Set ADAPTER=lora."),
    ):
        if wrong:
            raise UserError(f"ADAPTER={ADAPTER} QUANTIZATION={QUANTIZATION} DTYPE={DTYPE}: {reason}")


def keeps_base(source: location.Source) -> bool:
    """Whether leaving out the adapter gives the base's predictions; PiSSA and LoftQ change the base itself."""
    begun = PeftConfig.from_pretrained(source.adapter) if source.adapter else None
    variant = getattr(begun, "init_lora_weights", True) if begun else ADAPTER
    return variant not in (None, "pissa", "loftq")


def trained_rows(source: location.Source, encoder) -> list[int]:
    """Ids of tokens that the base has hardly seen and whose rows of embeddings and head this run trains."""
    if source.adapter:
        rows = getattr(PeftConfig.from_pretrained(source.adapter), "trainable_token_indices", None) or []
        return sum(rows.values(), []) if isinstance(rows, dict) else rows
    rows = [] if ADAPTER == "ia3" else encoder.new_token_ids
    if rows and distributed.engine() == "fsdp" and load.load_config(source).get_text_config().tie_word_embeddings:
        raise UserError(
            f"CHAT_TEMPLATE={CHAT_TEMPLATE} has tokens whose rows are to be learned; FSDP cannot share these out where "
            f"embeddings and head are one matrix, as in {source.name}. launch/ddp.yaml or launch/zero2.yaml works."
        )
    return rows


if __name__ == "__main__":
    run_main(main)

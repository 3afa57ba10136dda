"""Settings checked and put into TRL's terms."""

import dataclasses
import os
from pathlib import Path

import torch
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from common import distributed, hardware
from common.cli import UserError
from common.settings import check_choice
from common.train.loss import supports_chunked_loss

SCHEDULES = ("constant", "linear", "cosine")

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

ZERO_BUCKET = 50_000_000  # gradients that DeepSpeed exchanges at a time; its 500 million would take 2 GB by themselves

# Settings whose names are the libraries' own in capitals.
PASSED_ON = """NUM_TRAIN_EPOCHS PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS PACKING LEARNING_RATE
WEIGHT_DECAY MAX_GRAD_NORM OPTIM NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING TORCH_COMPILE LOGGING_STEPS SEED""".split()

AT_LEAST_1 = """MAX_STEPS PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LOGGING_STEPS""".split()


def check_settings(settings: dict) -> None:
    """Refuse values that no run can work with: UserError naming the setting."""
    check_choice("LR_SCHEDULER", settings["LR_SCHEDULER"], SCHEDULES)
    check_choice("OPTIM", settings["OPTIM"], [name.value for name in OptimizerNames])
    check_choice("RESUME", settings["RESUME"], (None, "auto"))
    for name in AT_LEAST_1:
        if settings[name] is not None and settings[name] < 1:
            raise UserError(f"{name}={settings[name]}: it must be at least 1.")
    for name in ("LEARNING_RATE", "NUM_TRAIN_EPOCHS"):
        if settings[name] <= 0:
            raise UserError(f"{name}={settings[name]}: it must be above 0.")
    if not 0 <= settings["MIN_LR"] <= settings["LEARNING_RATE"]:
        raise UserError(
            f"MIN_LR={settings['MIN_LR']}: it lies between 0 and LEARNING_RATE={settings['LEARNING_RATE']}."
        )
    if settings["SAVE_TOTAL_LIMIT"] < 1:
        raise UserError(f"SAVE_TOTAL_LIMIT={settings['SAVE_TOTAL_LIMIT']}: it must be at least 1.")
    for name in ("EVAL_STEPS", "SAVE_STEPS"):
        if settings[name] and (settings[name] < 0 or settings[name] > 1 and settings[name] % 1):
            raise UserError(f"{name}={settings[name]}: a whole number of steps, or a share of the run below 1.")
    if settings["OPTIM"].startswith("paged") and not torch.cuda.is_available():
        raise UserError(
            f"OPTIM={settings['OPTIM']}: paged optimizers need an NVIDIA GPU. OPTIM=adamw_torch_fused works."
        )
    if settings["MAX_SAMPLES"] is not None and settings["MAX_SAMPLES"] < 1:
        raise UserError(f"MAX_SAMPLES={settings['MAX_SAMPLES']}: it must be at least 1; None takes all.")
    for name in trackers(settings):
        check_choice("REPORT_TO", name, TRACKERS)
        if name not in get_available_reporting_integrations():
            raise UserError(f"REPORT_TO={settings['REPORT_TO']}: the package is missing: pip install {name}.")
    if settings["MEMORY_LIMIT"]:
        hardware.read_size(settings["MEMORY_LIMIT"])
    refuse_engine(settings)


def trackers(settings: dict) -> list[str]:
    return [name.strip() for name in settings["REPORT_TO"].split(",")] if settings["REPORT_TO"] else []


def refuse_engine(settings: dict) -> None:
    """Refuse what cannot be combined with the way processes share the model, with the reason and what works."""
    engine, optim, quantization = distributed.engine(), settings["OPTIM"], settings.get("QUANTIZATION")
    in_parts, probed = distributed.holds_parts(), settings["EVAL_FACTS"] or settings["EVAL_PROMPTS"]
    sizes = [os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("CP", "SP", "TP")]
    for wrong, what, reason in (
        (engine == "zero3" and quantization, f"QUANTIZATION={quantization} with DeepSpeed's stage 3",
         "quantised weights cannot be shared out by it. launch/zero2.yaml works, and launch/fsdp.yaml with nf4."),
        (engine == "fsdp" and quantization not in (None, "nf4"), f"QUANTIZATION={quantization} with FSDP",
         "it shares out weights of one dtype. QUANTIZATION=nf4 works, or launch/ddp.yaml."),
        (engine == "fsdp" and os.environ.get("FSDP_VERSION") != "2", "fsdp_version: 1",
         "frozen and trained weights need FSDP2. Set fsdp_version: 2, as in launch/fsdp.yaml."),
        (engine == "fsdp" and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true",
         "fsdp_cpu_ram_efficient_loading: true", "all processes need the weights. Set it to false."),
        (engine not in (None, "ddp") and optim == "adamw_anyprecision", f"OPTIM={optim} with {engine}",
         "it keeps float32 copies of 16-bit weights anyway. OPTIM=adamw_torch_fused works, or launch/ddp.yaml."),
        (in_parts and ("8bit" in optim or "4bit" in optim or "paged" in optim), f"OPTIM={optim} with {engine}",
         "its states cannot be shared out. OPTIM=adamw_torch_fused works, or launch/ddp.yaml."),
        (in_parts and probed, f"EVAL_FACTS, EVAL_PROMPTS with {engine}",
         "no process has the whole model to answer with. Ask afterwards: python evaluate_model.py."),
        (set(sizes) != {"1"}, "parallelism_config with cp_size, sp_size or tp_size",
         "packed chats and this loss need whole rows. GRADIENT_CHECKPOINTING=True or launch/fsdp.yaml saves memory."),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{what}: {reason}")


def choose_kl_weight(settings: dict, config, base_tokenizer, keeps_base: bool = True) -> float:
    """KL_WEIGHT; for None, 1 where the base is a chat model to keep (it comes with a template), else 0.

    keeps_base: whether the base's predictions can be had. Models with other logits than their head's keep TRL's loss.
    """
    possible, weight = keeps_base and supports_chunked_loss(config), settings["KL_WEIGHT"]
    if weight and not possible:
        adapter = f"ADAPTER={settings['ADAPTER']} on " if "ADAPTER" in settings else ""
        raise UserError(f"KL_WEIGHT={weight} does not work with {adapter}{settings['MODEL']}. Set KL_WEIGHT=0.")
    if weight is None:
        weight = 1.0 if possible and base_tokenizer.chat_template and settings["TRAIN_ON"] == "assistant" else 0.0
    print(f"weight of holding the base's predictions: {weight}")
    return weight


def trainer_config(settings: dict, fit, folder: Path, dtype: torch.dtype, evaluate: bool) -> SFTConfig:
    """A run's settings in TRL's terms; fit: a fitting.Fit; `evaluate`: whether there are held-out rows."""
    settings, on_gpu = settings | fit.settings(), torch.cuda.is_available()
    config = SFTConfig(
        **{name.lower(): settings[name] for name in PASSED_ON},
        output_dir=str(folder),
        # Unpacked rows are taken as they are; TRL would drop those without a label, which hold the base's predictions.
        dataset_kwargs={"skip_prepare_dataset": not settings["PACKING"]},
        max_steps=settings["MAX_STEPS"] or -1,
        max_length=settings["MAX_LENGTH"] if settings["PACKING"] else None,
        per_device_eval_batch_size=fit.rows,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        eval_strategy="steps" if settings["EVAL_STEPS"] and evaluate else "no",
        eval_steps=settings["EVAL_STEPS"],
        save_strategy="steps" if settings["SAVE_STEPS"] else "no",
        save_steps=settings["SAVE_STEPS"] or 500,
        ddp_find_unused_parameters=False,
        # FSDP would keep whole gradients in every process until the last micro step.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": distributed.engine() == "fsdp"}},
        report_to=trackers(settings) or "none",
        run_name=folder.name,
        disable_tqdm=True,
    )
    distributed.enable_fsdp_on_cpu()
    config._n_gpu = min(1, config.n_gpu)  # one process, one GPU; Trainer would split batches over all it sees
    return config


def exchange_in_float32(state) -> None:
    """Have accelerate's engines sum up gradients, and return losses, in float32; they would in 16 bits."""
    if distributed.engine() == "fsdp" and (policy := state.fsdp_plugin.mixed_precision_policy):
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        state.fsdp_plugin.mixed_precision_policy = policy
    elif (distributed.engine() or "").startswith("zero"):
        config = state.deepspeed_plugin.deepspeed_config
        config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        config["zero_optimization"]["reduce_bucket_size"] = ZERO_BUCKET

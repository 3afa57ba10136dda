"""Settings that belong together checked, and put into TRL's terms."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from trl import SFTConfig

from common import distributed, hardware
from common.bounds import check_package, split_list
from common.cli import UserError
from common.train.batch_plan import BatchPlan, rows_per_step
from common.train.preference import SMOOTHED

# Settings whose names are the libraries' own in capitals.
PASSED_ON = """NUM_TRAIN_EPOCHS PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS PACKING LEARNING_RATE
WEIGHT_DECAY MAX_GRAD_NORM OPTIM NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING ACTIVATION_OFFLOADING
LOGGING_STEPS SEED""".split()


def check_combinations(settings: dict) -> None:
    """Refuse settings that contradict each other or this machine. Single values were checked before (bounds.py)."""
    optim = settings["OPTIM"]
    if distributed.engine():
        check_engine(settings)
    if settings["MIN_LR"] > settings["LEARNING_RATE"]:
        raise UserError(f"MIN_LR={settings['MIN_LR']}: it must not be above LEARNING_RATE={settings['LEARNING_RATE']}.")
    if ("8bit" in optim or "paged" in optim) and not torch.cuda.is_available():
        raise UserError(f"OPTIM={optim}: it needs an NVIDIA GPU. OPTIM=adamw_torch_fused works without.")
    if settings["ACTIVATION_OFFLOADING"] and hardware.device_type() != "cuda":
        problem = "it moves activations from a GPU into main memory, and there is no CUDA GPU. Set it to False."
        raise UserError(f"ACTIVATION_OFFLOADING=True: {problem}")
    for name in split_list(settings["REPORT_TO"]):
        if name != "tensorboard" or not find_spec("tensorboardX"):  # transformers takes either
            check_package("REPORT_TO", settings["REPORT_TO"], name, name)
    if "LOSS" in settings:
        check_preference(settings)
    rows_per_step(settings)
    check_evaluations(settings, bool(settings["EVAL_SIZE"] or settings["EVAL_DATA"]))


def check_preference(settings: dict) -> None:
    """Refuse settings that LOSS makes no use of; say what others need."""
    loss, smoothing = settings["LOSS"], settings["LABEL_SMOOTHING"]
    rows = rows_per_step(settings)[0] * distributed.count()
    if loss == "kto" and rows < 4:
        estimate = "its estimate of the divergence is a mean over the rows of a step"
        print(f"note: LOSS=kto with {rows} rows a step: {estimate}. Set BATCH_SIZE=8 or more.", file=sys.stderr)
    if loss == "simpo" and settings["BETA"] < 1:
        print(f"note: LOSS=simpo BETA={settings['BETA']}: its authors take 2 and more.", file=sys.stderr)
    for wrong, name, reason in (
        (settings["TRAIN_ON"] == "all", "TRAIN_ON=all", "only answers are compared. Set TRAIN_ON=assistant."),
        (
            settings["KL_WEIGHT"],
            f"KL_WEIGHT={settings['KL_WEIGHT']}",
            "BETA holds the model to its reference. Set None.",
        ),
        (settings["COMPLETION"] != "answer", f"COMPLETION={settings['COMPLETION']}", "pairs are chats. Set answer."),
        (smoothing and loss not in SMOOTHED, f"LABEL_SMOOTHING={smoothing}", f"LOSS={loss} has none. Set it to 0."),
    ):
        if wrong:
            raise UserError(f"{name} with LOSS={loss}: {reason}")


def check_evaluations(settings: dict, has_rows: bool) -> None:
    """Refuse settings that go by evaluations where there are none. has_rows: whether there are held-out rows."""
    for name in ("KEEP", "EARLY_STOPPING_PATIENCE"):
        wanted = f"{name}={settings[name]}"
        if settings[name] in (None, "last"):
            continue
        if not settings["EVAL_STEPS"]:
            raise UserError(f"{wanted}: nothing is evaluated before the end. Set EVAL_STEPS (0.1: ten times).")
        if not has_rows:
            raise UserError(f"{wanted}: no chats are held out to evaluate on. Set EVAL_SIZE or EVAL_DATA.")


def check_engine(settings: dict) -> None:
    """Refuse what cannot be combined with the way processes share the model, with the reason and what works."""
    engine, optim, quantization = distributed.engine(), settings["OPTIM"], settings.get("QUANTIZATION")
    in_parts, probed = distributed.holds_parts(), settings["EVAL_FACTS"] or settings["EVAL_PROMPTS"]
    sizes = [os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("CP", "SP", "TP")]
    for wrong, what, reason in (
        (engine == "zero3" and quantization, f"QUANTIZATION={quantization} with DeepSpeed's stage 3",
         "it cannot shard quantised weights. launch/zero2.yaml works, and launch/fsdp.yaml with nf4."),
        (engine == "fsdp" and quantization not in (None, "nf4"), f"QUANTIZATION={quantization} with FSDP",
         "it shards weights of one dtype. QUANTIZATION=nf4 works, or launch/ddp.yaml."),
        (engine == "fsdp" and os.environ.get("FSDP_VERSION") != "2", "fsdp_version: 1",
         "frozen and trained weights need FSDP2. Set fsdp_version: 2, as in launch/fsdp.yaml."),
        (engine == "fsdp" and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true",
         "fsdp_cpu_ram_efficient_loading: true", "all processes need the weights. Set it to false."),
        (engine not in (None, "ddp") and optim == "adamw_anyprecision", f"OPTIM={optim} with {engine}",
         "it keeps float32 copies of 16-bit weights anyway. OPTIM=adamw_torch_fused works, or launch/ddp.yaml."),
        (in_parts and ("8bit" in optim or "paged" in optim), f"OPTIM={optim} with {engine}",
         "its states cannot be sharded. OPTIM=adamw_torch_fused works, or launch/ddp.yaml."),
        (in_parts and probed, f"EVAL_FACTS, EVAL_PROMPTS with {engine}",
         "no process has the whole model to answer with. Ask afterwards: python evaluate_model.py."),
        (set(sizes) != {"1"}, "parallelism_config with cp_size, sp_size or tp_size",
         "packed chats and this loss need whole rows. GRADIENT_CHECKPOINTING=True or launch/fsdp.yaml saves memory."),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{what}: {reason}")


def choose_kl_weight(settings: dict, base_has_template: bool, keeps_base: bool) -> float:
    """KL_WEIGHT; for None, 1 where the base is a chat model to keep (it comes with a template), else 0.

    keeps_base: whether the base's predictions can be had.
    """
    weight = settings["KL_WEIGHT"]
    if weight and not keeps_base:
        adapter = f"ADAPTER={settings['ADAPTER']} on " if "ADAPTER" in settings else ""
        raise UserError(f"KL_WEIGHT={weight} does not work with {adapter}{settings['MODEL']}. Set KL_WEIGHT=0.")
    if weight is None:
        weight = 1.0 if keeps_base and base_has_template and settings["TRAIN_ON"] != "all" else 0.0
    print(f"KL regularization towards the base: weight {weight}")
    return weight


def trainer_config(settings: dict, plan: BatchPlan, folder: Path, dtype: torch.dtype, evaluate: bool) -> SFTConfig:
    """A run's settings in TRL's terms. plan: how the batch is computed. evaluate: whether there are held-out rows."""
    settings, on_gpu = settings | plan.settings(), torch.cuda.is_available()
    # Pairs lie side by side in their rows already.
    pairs = {"packing": False, "padding_free": settings["PACKING"]} if "LOSS" in settings else {}
    is_packed = settings["PACKING"] and not pairs
    config = SFTConfig(
        **{name.lower(): settings[name] for name in PASSED_ON} | pairs,
        output_dir=str(folder),
        # Unpacked rows are taken as they are; TRL would drop those without a label, which hold the base's predictions.
        dataset_kwargs={"skip_prepare_dataset": not is_packed},
        max_steps=settings["MAX_STEPS"] or -1,
        max_length=settings["MAX_LENGTH"] if is_packed else None,
        per_device_eval_batch_size=plan.rows,
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
        report_to=split_list(settings["REPORT_TO"]) or "none",
        run_name=folder.name,
        disable_tqdm=True,
        logging_nan_inf_filter=False,  # ReliableTrainer has its own
    )
    if distributed.engine() == "fsdp":  # now: making the arguments has set the state anew
        distributed.enable_fsdp_on_cpu()
    config.lora_plus_ratio = settings.get("LORA_PLUS_RATIO")  # for optimizers.optimizer_class
    config._n_gpu = min(1, config.n_gpu)  # one process, one GPU; Trainer would split batches over all it sees
    return config

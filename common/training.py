"""Training: settings checked and put into TRL's terms, and a trainer with our loss and learning-rate schedule."""

import dataclasses
import math
import os
import statistics
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from common import gpu, processes
from common.loss import add_chunked_loss, supports_chunked_loss
from common.resumable import ResumableTrainer
from common.settings import RANK, UserError, check_choice

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
        gpu.read_size(settings["MEMORY_LIMIT"])
    refuse_engine(settings)


def trackers(settings: dict) -> list[str]:
    return [name.strip() for name in settings["REPORT_TO"].split(",")] if settings["REPORT_TO"] else []


def refuse_engine(settings: dict) -> None:
    """Refuse what cannot be combined with the way processes share the model, with the reason and what works."""
    engine, optim, quantization = processes.engine(), settings["OPTIM"], settings.get("QUANTIZATION")
    in_parts, probed = processes.holds_parts(), settings["EVAL_FACTS"] or settings["EVAL_PROMPTS"]
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


def arguments(settings: dict, fit, folder: Path, dtype: torch.dtype, evaluate: bool) -> SFTConfig:
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
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": processes.engine() == "fsdp"}},
        report_to=trackers(settings) or "none",
        run_name=folder.name,
        disable_tqdm=True,
    )
    processes.share_out()
    config._n_gpu = min(1, config.n_gpu)  # one process, one GPU; Trainer would split batches over all it sees
    return config


def prepare_model(model, kl_weight: float, base_model=None) -> bool:
    """Give a model our loss, and its adapter weights in float32; returns whether its logits allow that loss."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    chunked = supports_chunked_loss(base.config)
    if chunked:
        without_adapter = model.disable_adapter if kl_weight and base_model is None else None
        add_chunked_loss(base, without_adapter, base_model)
    for module in model.modules():
        # Autocast casts activations anyway; PEFT's own cast to the adapter's float32 first doubles that traffic.
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        # TRL makes QLoRA adapters bf16, in which small updates round to nothing; they stay in float32.
        if parameter.requires_grad and isinstance(model, PeftModel):
            parameter.data = parameter.data.float()
    return chunked


class ChatTrainer(ResumableTrainer):
    """ResumableTrainer on tokenised rows, with our loss; counts the tokens it trains on.

    schedule: (name, warmup_ratio, min_lr); see `learning_rate_factor`.
    kl_weight: adds kl_weight * KL(base || model), measured where nothing is learned, to the loss; the base is the model
    without its adapter, or base_model. The logged loss leaves it out, so that runs compare; it is logged as `kl`.
    probe: called with the model at each evaluation; what it returns is logged (facts.make_probe).
    """

    PROGRESS = (*ResumableTrainer.PROGRESS, "divergences")

    def __init__(self, *args, schedule: tuple, kl_weight: float = 0.0, base_model=None, probe=None, **kwargs):
        super().__init__(*args, **kwargs)
        exchange_in_float32(self.accelerator.state)
        share = processes.count() * self.args.per_device_train_batch_size
        blank = {"input_ids": [self.processing_class.eos_token_id or 0], "labels": [-100], "seq_lengths": [1]}
        self.rows = len(self.train_dataset)
        if processes.count() > 1:
            self.train_dataset = processes.with_blanks(self.train_dataset, blank, share)
            self.eval_dataset = self.eval_dataset and processes.with_blanks(self.eval_dataset, blank, share)
        self.schedule, self.probe = schedule, probe
        self.kl_weight = kl_weight
        self.divergences = [0.0, 0, 0.0, 0]  # sum of the KL of steps (nats) and their number; since the last log
        self.micro_steps_with_tokens = 1  # of the current step, in all processes: some have blank rows only
        if base_model is not None:
            base_model.to(processes.device())  # which is not shared out, where the model is
        self.chunked = prepare_model(self.model, kl_weight, base_model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            self.tokens += int(self.accelerator.gather(count_tokens(inputs)[None]).sum())
        if not self.chunked or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        loss, divergence = model(**inputs, learn=labels, use_cache=False)
        if num_items_in_batch is None:  # evaluation
            return loss / learned_positions(labels).clamp(min=1)
        # DDP averages gradients over processes, while num_items_in_batch counts the labels of all of them.
        # At least 1: a batch of answers of weight 0 alone has none, and 0 / 0 would be NaN.
        loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
        if self.kl_weight:
            divergence = divergence / self.micro_steps_with_tokens  # a step's sum, over all processes, is a mean
            kl, share = divergence.item(), 1 / self.current_gradient_accumulation_steps / processes.count()
            if math.isfinite(kl):
                told = kl, share, kl, share
                self.divergences = [total + more for total, more in zip(self.divergences, told, strict=True)]
            loss = loss + self.kl_weight * divergence * self.accelerator.num_processes
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self.spike:
            logs["spike"], self.spike = self.spike, None
        if "loss" in logs and self.bad_since_log:  # Trainer has put other numbers in the place of those not finite
            logs |= {"loss": None, "grad_norm": None, "bad_steps": self.bad_since_log}
            self.bad_since_log, self.divergences[2:] = 0, (0.0, 0)
            super().log(logs, start_time)
            return
        if self.kl_weight and ("loss" in logs or "train_loss" in logs):
            totals = [sum(numbers) for numbers in zip(*processes.gather(self.divergences), strict=True)]
            if "loss" in logs:
                logs["kl"] = totals[2] / (totals[3] or 1)
                logs["loss"] -= self.kl_weight * logs["kl"]
                self.divergences[2:] = 0.0, 0
            else:
                logs["train_loss"] -= self.kl_weight * totals[0] / (totals[1] or 1)
        if "train_loss" in logs:  # what is not logged yet, Trainer adds as this process has it
            rest = processes.gather(self._tr_loss.item())
            logs["train_loss"] += (statistics.fmean(rest) - rest[RANK]) / max(1, self.state.global_step)
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        """Mean loss over the held-out tokens; Trainer's own is a mean over batches, whatever their size.

        A wished stop ends the program in the middle; the run evaluates anew when it goes on.
        """
        if self.evaluation and self.evaluation["step"] == self.state.global_step:
            return self.evaluation
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # summed loss, positions
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed; training must not depend on it
            for inputs in self.get_eval_dataloader():
                if self.stop_wished():
                    break
                inputs = self._prepare_inputs(inputs)
                count = learned_positions(inputs["labels"])
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs) * count
                total += self.accelerator.gather(torch.stack([loss, count])[None]).sum(0).cpu()
        if self.stop_wished():
            self.evaluation_due = self.is_in_train
            self.leave()
        metrics = {"eval_loss": (total[0] / total[1].clamp(min=1)).item()}
        if self.probe:
            with torch.no_grad(), self.accelerator.autocast():  # generate() goes past the forward that has it
                metrics |= self.probe(self.model)
        self.evaluation, self.evaluation_due = metrics | {"step": self.state.global_step}, False
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        if self.kl_weight:
            self.micro_steps_with_tokens = sum(processes.gather(sum(bool(count_tokens(batch)) for batch in batches)))
        return batches, items

    def _get_train_sampler(self, *args):
        if processes.count() == 1:
            return super()._get_train_sampler(*args)
        self.sampler = processes.EvenSampler(self.rows, len(self.train_dataset) - self.rows, self.args.seed)
        return self.sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if processes.count() > 1:
            self.sampler.set_epoch(epoch)  # where batches are skipped, accelerate does not find it
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim != "adamw_anyprecision":
            return ResumableTrainer.get_optimizer_cls_and_kwargs(args, model)
        from optimi import AdamW  # transformers wants torchdistx, which is given up

        betas = args.adam_beta1, args.adam_beta2
        return AdamW, dict(lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            name, warmup_ratio, min_lr = self.schedule
            warmup, floor = math.ceil(warmup_ratio * num_training_steps), min_lr / self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(step, num_training_steps, name, warmup, floor),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


def exchange_in_float32(state) -> None:
    """Have accelerate's engines sum up gradients, and return losses, in float32; they would in 16 bits."""
    if processes.engine() == "fsdp" and (policy := state.fsdp_plugin.mixed_precision_policy):
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        state.fsdp_plugin.mixed_precision_policy = policy
    elif (processes.engine() or "").startswith("zero"):
        config = state.deepspeed_plugin.deepspeed_config
        config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        config["zero_optimization"]["reduce_bucket_size"] = ZERO_BUCKET


def count_tokens(inputs: dict) -> torch.Tensor:
    """Of a batch, without padding and the single ones that are blank rows."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(1)
        return lengths[lengths > 1].sum()
    begins = inputs["position_ids"].flatten() == 0
    ends = torch.cat([begins[1:], begins.new_ones(1)])
    return (~(begins & ends)).sum()


def learned_positions(labels: torch.Tensor) -> torch.Tensor:
    """How many positions of labels (B, T) are learned."""
    return (labels[:, 1:] != -100).sum()


def learning_rate_factor(step: int, steps: int, name: str, warmup: int, floor: float) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warm-up, then down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]
    return floor + (1 - floor) * falling

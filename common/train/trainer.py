"""Training: settings checked and put into TRL's terms, and a trainer with our loss and learning-rate schedule."""

import math
import statistics

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.lr_scheduler import LambdaLR

from common import distributed
from common.cli import RANK
from common.train import reliability
from common.train.config import exchange_in_float32
from common.train.loss import add_chunked_loss, supports_chunked_loss
from common.train.sampling import EvenSampler, with_blanks


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


class ChatTrainer(reliability.ReliableTrainer):
    """ResumableTrainer on tokenised rows, with our loss; counts the tokens it trains on.

    schedule: (name, warmup_ratio, min_lr); see `learning_rate_factor`.
    kl_weight: adds kl_weight * KL(base || model), measured where nothing is learned, to the loss; the base is the model
    without its adapter, or base_model. The logged loss leaves it out, so that runs compare; it is logged as `kl`.
    probe: called with the model at each evaluation; what it returns is logged (facts.make_probe).
    """

    PROGRESS = (*reliability.ReliableTrainer.PROGRESS, "divergences")

    def __init__(self, *args, schedule: tuple, kl_weight: float = 0.0, base_model=None, probe=None, **kwargs):
        super().__init__(*args, **kwargs)
        exchange_in_float32(self.accelerator.state)
        share = distributed.count() * self.args.per_device_train_batch_size
        blank = {"input_ids": [self.processing_class.eos_token_id or 0], "labels": [-100], "seq_lengths": [1]}
        self.rows = len(self.train_dataset)
        if distributed.count() > 1:
            self.train_dataset = with_blanks(self.train_dataset, blank, share)
            self.eval_dataset = self.eval_dataset and with_blanks(self.eval_dataset, blank, share)
        self.schedule, self.probe = schedule, probe
        self.kl_weight = kl_weight
        self.divergences = [0.0, 0, 0.0, 0]  # sum of the KL of steps (nats) and their number; since the last log
        self.micro_steps_with_tokens = 1  # of the current step, in all processes: some have blank rows only
        if base_model is not None:
            base_model.to(distributed.device())  # which is not shared out, where the model is
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
            kl, share = divergence.item(), 1 / self.current_gradient_accumulation_steps / distributed.count()
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
            totals = [sum(numbers) for numbers in zip(*distributed.gather(self.divergences), strict=True)]
            if "loss" in logs:
                logs["kl"] = totals[2] / (totals[3] or 1)
                logs["loss"] -= self.kl_weight * logs["kl"]
                self.divergences[2:] = 0.0, 0
            else:
                logs["train_loss"] -= self.kl_weight * totals[0] / (totals[1] or 1)
        if "train_loss" in logs:  # what is not logged yet, Trainer adds as this process has it
            rest = distributed.gather(self._tr_loss.item())
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
            self.micro_steps_with_tokens = sum(distributed.gather(sum(bool(count_tokens(batch)) for batch in batches)))
        return batches, items

    def _get_train_sampler(self, *args):
        if distributed.count() == 1:
            return super()._get_train_sampler(*args)
        self.sampler = EvenSampler(self.rows, len(self.train_dataset) - self.rows, self.args.seed)
        return self.sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if distributed.count() > 1:
            self.sampler.set_epoch(epoch)  # where batches are skipped, accelerate does not find it
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim != "adamw_anyprecision":
            return reliability.ReliableTrainer.get_optimizer_cls_and_kwargs(args, model)
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

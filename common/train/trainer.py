"""The trainer: TRL's, with our loss and schedule, exact evaluation, and rows dealt out evenly to processes."""

import contextlib
import math
import statistics

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTTrainer

from common import distributed
from common.cli import RANK
from common.train import optimizers, parallel
from common.train.collator import CountingCollator
from common.train.loss import prepare_model, router_loss_weight
from common.train.preflight import check_losses
from common.train.reliability import ReliableTrainer


class ChatTrainer(ReliableTrainer, SFTTrainer):
    """TRL's trainer on tokenised rows, with our loss; counts the tokens it trains on.

    settings: those of the script, for the schedule (`optimizers.make_schedule`).
    kl_weight: adds kl_weight * KL(base || model), measured outside of the loss, to the loss; the base is the model
    without its adapter, or base_model. The logged loss leaves it out, so that runs compare; it is logged as `kl`. The
    same holds for the loss that balances a mixture's experts, logged as `router_loss`.
    probe: called with the model at each evaluation; what it returns is logged (facts.make_probe).
    has_new_adapter: the model has an untrained adapter that leaves the base's weights as they are.
    """

    evaluated = ("loss",)
    kernels: list | tuple = ()  # what Liger's changed in the model (liger.apply_kernels)

    def __init__(
        self, model, *args, settings: dict, kl_weight=0.0, base_model=None, probe=None, has_new_adapter=False, **kwargs
    ):
        with shielded_adapter(model):
            super().__init__(model, *args, **kwargs)
        self.has_new_adapter, self.base_model = has_new_adapter, base_model
        self.settings, self.probe, self.kl_weight = settings, probe, kl_weight
        penalties = {"kl": kl_weight, "router_loss": router_loss_weight(self.model.config)}
        self.penalties = {name: weight for name, weight in penalties.items() if weight}
        self.dtype, self.rows = self.model.dtype, len(self.train_dataset)
        if distributed.count() > 1:
            parallel.exchange_in_float32(self.accelerator.state)
            share = distributed.count() * self.args.per_device_train_batch_size
            self.train_dataset = parallel.with_blanks(self.train_dataset, self.blank_row(), share)
            self.eval_dataset = self.eval_dataset and parallel.with_blanks(self.eval_dataset, self.blank_row(), share)
        # Of the current step: micro steps of all processes that have more than blank rows, and what add_to_log took.
        self.micro_steps_with_tokens, self.unread = 1, []
        self.data_collator = CountingCollator(self.data_collator, bool(kl_weight))
        if base_model is not None:
            base_model.to(distributed.device())  # it is not sharded where the model is
        prepare_model(self.model, kl_weight, base_model, distributed.holds_parts(), distributed.device().type)

    def blank_row(self) -> dict:
        return {"input_ids": [self.processing_class.eos_token_id or 0], "labels": [-100], "seq_lengths": [1]}

    def restore_progress(self):
        check_losses(self)
        super().restore_progress()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        losses, divergence, router_loss = model(**inputs, learn=labels, use_cache=False)
        if num_items_in_batch is None:  # evaluation
            return losses.sum() / count_loss_tokens(labels).clamp(min=1)
        # DDP averages gradients, while num_items_in_batch counts the labels of all processes; there may be none.
        loss = losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
        # A step's sum, over all processes, is a mean.
        share = 1 / self.current_gradient_accumulation_steps / distributed.count()
        values = {"kl": divergence / self.micro_steps_with_tokens, "router_loss": router_loss * share}
        self.add_to_log(values, share)
        loss = loss + sum(weight * values[name] for name, weight in self.penalties.items())
        return loss * self.accelerator.num_processes

    def add_to_log(self, values: dict[str, torch.Tensor], share: float) -> None:
        """Add a micro step's part of what is logged beside the loss. share: of the step that the part stands for."""
        self.unread += [(name, values[name].detach(), share) for name in self.penalties]

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)  # has waited for the GPU
        add_penalties(self.progress.penalties, self.unread)
        self.unread = []
        return norm

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        tokens = [tokens for part in distributed.gather([batch["tokens"] for batch in batches]) for tokens in part]
        self.micro_steps_with_tokens = sum(map(bool, tokens))
        self.progress.tokens += sum(tokens)
        return batches, items

    def log(self, logs, start_time=None):
        """Trainer's log with the loss and the KL apart, and with nothing where steps were not finite."""
        progress = self.progress
        if "loss" in logs and progress.spike:
            logs["spike"], progress.spike = progress.spike, None
        if "loss" in logs and progress.bad_since_log:  # Trainer has put other numbers in the place of those not finite
            logs |= {"loss": None, "grad_norm": None, "bad_steps": progress.bad_since_log}
            progress.bad_since_log = 0
            for sums in progress.penalties.values():
                sums[2:] = 0.0, 0
            super().log(logs, start_time)
            return
        if "loss" in logs or "train_loss" in logs:
            separate_penalties(logs, progress.penalties, self.penalties)
        if "train_loss" in logs:  # what is not logged yet, Trainer adds as this process has it
            rest = distributed.gather(self._tr_loss.item())
            logs["train_loss"] += (statistics.fmean(rest) - rest[RANK]) / max(1, self.state.global_step)
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        """Mean loss over the held-out tokens; Trainer's own is a mean over batches, whatever their size.

        A requested stop ends the program in the middle; the run evaluates anew when it is resumed.
        """
        if self.progress.evaluation and self.progress.evaluation["step"] == self.state.global_step:
            return self.progress.evaluation
        self.model.eval()
        total = 0.0  # of `evaluation_sums`
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed; training must not depend on it
            for inputs in self.get_eval_dataloader():
                if self.stop_requested():
                    break
                with torch.no_grad(), self.compute_loss_context_manager():
                    sums = self.evaluation_sums(self._prepare_inputs(inputs))
                total += self.accelerator.gather(sums[None]).sum(0).double().cpu()
        if self.stop_requested():
            self.progress.evaluation_due = self.is_in_train
            self.save_and_exit()
        means = (total[:-1] / total[-1].clamp(min=1)).tolist()
        metrics = {f"eval_{name}": mean for name, mean in zip(self.evaluated, means, strict=True)}
        if self.probe:
            with torch.no_grad(), self.accelerator.autocast():  # generate() goes past the forward that has it
                metrics |= self.probe(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_sums(self, inputs: dict) -> torch.Tensor:
        """Sums of what `evaluated` names, and the number of what was summed."""
        count = count_loss_tokens(inputs["labels"])
        return torch.stack([self.compute_loss(self.model, inputs) * count, count])

    def create_model_card(self, *args, **kwargs):
        """TRL's names no base and no data; merge_and_export.py writes one from the run."""

    # Rows, optimizer and schedule

    def _get_train_sampler(self, *args):
        if distributed.count() == 1:
            return super()._get_train_sampler(*args)
        self.sampler = parallel.EvenSampler(self.rows, len(self.train_dataset) - self.rows, self.args.seed)
        return self.sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if distributed.count() > 1:
            self.sampler.set_epoch(epoch)  # where batches are skipped, accelerate does not find it
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    get_optimizer_cls_and_kwargs = staticmethod(optimizers.optimizer_class)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = optimizers.make_schedule(optimizer or self.optimizer, num_training_steps, self.settings)
            self._created_lr_scheduler = True
        return self.lr_scheduler


class GaloreTrainer(ChatTrainer):
    """ChatTrainer whose gradients lie in the optimizer, which knows their norm."""

    def _clip_grad_norm(self, model):
        return self.optimizer.optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # MAX_GRAD_NORM=0
            grad_norm = self.optimizer.optimizer.clip_grad_norm_(math.inf)
        return super()._get_grad_norm(model, grad_norm)


@contextlib.contextmanager
def shielded_adapter(model):
    """From TRL, which rounds the adapters of quantised models to bfloat16, in which small updates are lost, and refuses
    an adapter on the head, which its own loss would not see; ours does."""
    head, is_adapted = model.get_output_embeddings(), isinstance(model, PeftModel)
    trained = [(p, p.data) for p in model.parameters() if is_adapted and p.requires_grad]
    if has_adapter := isinstance(head, BaseTunerLayer):
        model.get_output_embeddings = head.get_base_layer
    yield
    if has_adapter:
        del model.get_output_embeddings
    for parameter, data in trained:
        parameter.data = data.to(parameter.device)


def add_penalties(sums_by_name: dict[str, list], parts: list[tuple[str, torch.Tensor, float]]) -> None:
    """Add the finite ones of a step's parts (name, value, share of the step) to the sums of the run."""
    for name, value, share in parts:
        if math.isfinite(value := value.item()):
            sums = sums_by_name.setdefault(name, [0.0, 0, 0.0, 0])
            sums[:] = [total + more for total, more in zip(sums, (value, share) * 2, strict=True)]


def separate_penalties(logs: dict, sums_by_name: dict[str, list], weights: dict[str, float]) -> None:
    """Log the means of what is measured beside the loss, and take what is part of it out of the losses logged."""
    for name, weight in weights.items():
        sums = sums_by_name.setdefault(name, [0.0, 0, 0.0, 0])
        totals = [sum(numbers) for numbers in zip(*distributed.gather(sums), strict=True)]
        if "loss" in logs:
            logs[name] = totals[2] / (totals[3] or 1)
            logs["loss"] -= weight * logs[name]
            sums[2:] = 0.0, 0
        else:
            logs["train_loss"] -= weight * totals[0] / (totals[1] or 1)


def count_loss_tokens(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of labels (B, T) are in the loss."""
    return (labels[:, 1:] != -100).sum()

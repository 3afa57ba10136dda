"""Runs that survive: stop requests, steps that are not finite, loss spikes. For any TRL trainer."""

import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from common import distributed
from common.cli import RANK, UserError
from common.train import checkpoints
from common.train.saving import SavingTrainer


class ReliableTrainer(SavingTrainer):
    """Mixin over a TRL trainer: `class ChatTrainer(ReliableTrainer, SFTTrainer)`.

    patience: evaluations without a lower loss, after which training ends; None: never.
    stop: a run.folder.StopRequest, set before training; when it is requested, the run saves and ends.
    monitor: a monitor.HardwareMonitor, set before training, whose energy is summed up over all sessions of the run.
    What decides how the run goes on is agreed on by all processes in each step.
    """

    def __init__(self, *args, patience: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.patience = patience
        self.stop = self.stop_signal = self.monitor = None  # stop_signal: once all processes know of it
        self.step_seconds: list[float] = []  # of this session
        self.micro_steps: list[tuple[dict, torch.Tensor]] = []  # batch and loss, of the step that is being computed
        self.aborted = False  # after too many steps that are not finite
        self.add_callback(StepHooks(self))

    def train(self, checkpoint: tuple[Path, dict] | None = None):
        """As SavingTrainer's; ends the program where a stop was requested.

        Raises UserError with exit code 4 after too many steps that are not finite.
        """
        result = super().train(checkpoint)
        if self.aborted:
            raise UserError(
                f"stopped: {self.progress.guard.bad_steps} steps with a loss or gradient that is not finite; none was "
                f"applied. Lower LEARNING_RATE={self.args.learning_rate}, or look at DATA.",
                code=4,
            )
        if self.stop_signal is not None and self.state.global_step < self.state.max_steps:
            self.save_and_exit()
        return result

    def _save_checkpoint(self, model, trial):
        if not self.aborted:
            super()._save_checkpoint(model, trial)

    def save_and_exit(self):
        """Save and end the program with the signal's exit code."""
        step = self.state.global_step
        self._save_checkpoint(self.model, None)
        self.writer.wait(step, self.state.max_steps)
        if distributed.gather(self.writer.saved_step)[0] != step:
            raise UserError(
                f"stopped at step {step}, which could not be saved: the same command resumes from the checkpoint "
                f"before. Make room in OUT_DIR={self.run.parent}."
            )
        message = f"stopped at step {step}; the same command, with RUN_NAME={self.run.name}, resumes from there"
        print(message, file=sys.stderr)
        raise SystemExit(128 + self.stop_signal)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_steps.append((inputs, loss))
        # Trainer's logging_nan_inf_filter, without its wait for the GPU in every micro step.
        usual = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, usual)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of a step's gradients; where it or a loss is not finite, the gradients go, and with them the update.

        Trainer calls this right before the optimizer, which skips parameters without a gradient. It would apply such
        an update and log a loss of 0.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        self.writer.wait(step - 1, self.state.max_steps)  # also beside forward and backward, before an update is lost
        loss = torch.stack([loss for _, loss in self.micro_steps]).sum().item()
        readings = distributed.gather((loss, step >= self.writer.retry_at))
        loss = statistics.fmean(loss for loss, _ in readings)
        self.control.should_save |= readings[0][1]  # as the first process, which writes, has it
        # float16's scaler leaves out infinite gradients by itself, as it must; DeepSpeed has one of its own.
        scaled = self.accelerator.scaler is not None or (self.args.fp16 and self.is_deepspeed_enabled)
        guard, usual = self.progress.guard, self.progress.guard.recent_losses
        verdict = guard.judge(loss, None if scaled else float(norm))
        if verdict == "bad":
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.bad_since_log += 1
            print(f"step {step}: loss or gradient not finite, no update", file=sys.stderr)
            if guard.is_hopeless(self.state.max_steps):
                self.aborted = self.control.should_training_stop = True
        elif verdict == "spike":
            self.report_spike(step, loss, statistics.fmean(usual))
        self.micro_steps = []
        return norm

    def report_spike(self, step: int, loss: float, usual: float) -> None:
        chats = self.find_worst([inputs for inputs, _ in self.micro_steps])
        self.progress.spike = {"step": step, "loss": loss, "usual": usual, "chats": chats}
        print(f"step {step}: loss {loss:.2f}, usually {usual:.2f}; most of it from:", file=sys.stderr)
        for chat in chats:
            print(f"  loss {chat['loss']:.2f}: {chat['begins']!r}", file=sys.stderr)

    def find_worst(self, batches: list[dict]) -> list[dict]:
        return worst_chats(self, batches)

    def stop_requested(self) -> bool:
        """Whether a stop is requested in any process; all have to call it."""
        if self.stop_signal is None and self.stop is not None:
            signals = distributed.gather(self.stop.number if self.stop.requested() else None)
            self.stop_signal = next((number for number in signals if number is not None), None)
        return self.stop_signal is not None

    def note_evaluation(self, metrics: dict) -> None:
        """Have the step saved where its held-out loss is the least, and training ended where none was for too long."""
        progress, loss, step = self.progress, metrics["eval_loss"], self.state.global_step
        progress.evaluation, progress.evaluation_due = metrics | {"step": step}, False
        saved = distributed.on_first(lambda: checkpoints.by_loss(self.run, self.data_digest))
        self.control.should_save |= self.keep_best and loss < (saved[0][0] if saved else math.inf)
        if loss < (progress.best or [math.inf])[0]:
            progress.best, progress.without_gain = [loss, step], 0
        else:
            progress.without_gain += 1
        if self.stops_early():
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy != "no"

    def stops_early(self) -> bool:
        return self.patience is not None and self.progress.without_gain >= self.patience

    def energy_j(self) -> float | None:
        """Energy of the whole run; None where power cannot be read."""
        joules = self.monitor and self.monitor.energy_j()
        before = self.restored and self.restored[1]["progress"][RANK]["joules"]
        return None if joules is None else (before or 0.0) + joules

    def _run_epoch(self, *args, **kwargs):
        # Trainer would train one step more.
        if self.state.global_step >= self.state.max_steps or self.stops_early():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


@dataclass
class StepHooks(TrainerCallback):
    """Calls the trainer where Trainer has no method to override."""

    trainer: ReliableTrainer

    def on_train_begin(self, *args, **kwargs):
        self.trainer.restore_progress()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.trainer.note_evaluation(metrics)

    def on_step_begin(self, *args, **kwargs):
        # A GPU is not waited for: each step has waited in `_get_grad_norm`, and leaves the next only its update.
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, progress = time.perf_counter() - self.started, self.trainer.progress
        self.trainer.step_seconds.append(seconds)
        progress.seconds += seconds
        progress.joules = self.trainer.energy_j()
        if self.trainer.stop_requested():
            control.should_save = control.should_training_stop = True


def worst_chats(trainer, batches: list[dict], count: int = 3) -> list[dict]:
    """The chats of a step with the highest loss, of all processes: {"loss", "begins"}, highest first."""
    rows, chats = [chat for inputs in batches for chat in chats_of(inputs)], []
    # Sharded weights are gathered by all processes at once, so each computes as often as the others.
    rows += rows[-1:] * (max(distributed.gather(len(rows))) - len(rows))
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for ids, labels in rows:
            inputs = trainer._prepare_inputs({"input_ids": ids, "labels": labels})
            loss = trainer.compute_loss(trainer.model, inputs).item()
            chats.append({"loss": loss, "begins": trainer.processing_class.decode(ids[0, :100])})
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # whole weights kept from this forward would be used after the update, too
    return highest_losses(chats, count)


def highest_losses(chats: list[dict], count: int = 3) -> list[dict]:
    """Those of all processes with the highest loss, each once."""
    distinct = {chat["begins"]: chat for chats in distributed.gather(chats) for chat in chats}
    return sorted(distinct.values(), key=lambda chat: -chat["loss"])[:count]


def chats_of(inputs: dict):
    """(input_ids, labels) of each chat in a batch, packed or padded or with one prompt for two; (1, T) each."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "shared_prompts" in inputs:
        sizes = [size for shape in inputs["shared_prompts"] for size in shape]
        pieces = list(zip(ids.split(sizes, 1), labels.split(sizes, 1), strict=True))
        for number in range(0, len(pieces), 3):
            prompt, *answers = pieces[number : number + 3]
            for answer in answers:
                yield tuple(torch.cat(parts, 1) for parts in zip(prompt, answer, strict=True))
    elif "attention_mask" in inputs:
        for row, present in enumerate(inputs["attention_mask"].bool()):
            yield ids[row, present][None], labels[row, present][None]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, ids.shape[1]]):
            yield ids[:, start:end], labels[:, start:end]

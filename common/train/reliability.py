"""A trainer whose runs survive: checkpoints published whole, exact resume, stop signals, bad numbers, a full disk."""

import errno
import json
import math
import os
import pickle
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from trl import SFTTrainer

from common import distributed
from common.cli import RANK, UserError
from common.files import GIB, check_space
from common.model import load
from common.train import checkpoints
from common.train.guard import MAX_BAD_STEPS, SPIKE_WINDOW, chats_of, is_spike

METRICS = "metrics.jsonl"  # of a run; a checkpoint holds it as it was

SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of Python, torch and safetensors on a full disk


class ReliableTrainer(SFTTrainer):
    """SFTTrainer that saves, stops and goes on without a trace in the result.

    stop: a runs.StopRequest, set before training; when it is wished, the run saves and ends.
    data_digest, base_fingerprint: of the training data and the base's weights; they go into the checkpoints.

    Of several processes the first writes; what decides how the run goes on is agreed on in each step.
    """

    # What a checkpoint holds of the trainer itself, beside what Trainer saves.
    PROGRESS = (
        "tokens",
        "seconds",
        "joules",
        "spikes",
        "bad_steps",
        "bad_in_a_row",
        "bad_since_log",
        "recent_losses",
        "spike",
        "evaluation",
        "evaluation_due",
        "_total_loss_scalar",
        "_globalstep_last_logged",
        "_initial_global_step",
    )

    def __init__(self, *args, save_total_limit=2, data_digest="", base_fingerprint=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.dtype = Path(self.args.output_dir), self.model.dtype
        self.metrics, self.unwritten = self.run / METRICS, b""  # lines that a full disk did not take
        self.save_total_limit, self.data_digest = save_total_limit, data_digest
        self.base_fingerprint = list(base_fingerprint)
        self.stop = self.stopping = self.progress = None  # stopping: the signal, once all processes know of it
        self.tokens = 0  # seen in training by all processes, padding left out
        self.seconds, self.joules = 0.0, None  # spent in steps, by the whole run (energy: where it can be read)
        self.spikes = 0
        self.micro_steps: list[tuple[dict, torch.Tensor]] = []  # batch and loss, of the step that is being computed
        self.bad_steps = self.bad_in_a_row = self.bad_since_log = 0  # whose loss or gradient was not finite
        self.gave_up = False  # after too many of them
        self.recent_losses: list[float] = []  # of steps
        self.spike: dict | None = None  # since the last log
        self.evaluation: dict | None = None  # the last one: step and eval_loss
        self.evaluation_due = False  # the checkpoint was written in the middle of one
        self.publisher = ThreadPoolExecutor(1)
        self.publishing = None  # the checkpoint being published, and its future
        self.saved_step = None
        self.retry_at, self.retry_after = math.inf, 1  # steps, when a save has failed

    def train(self, checkpoint: tuple[Path, dict] | None = None):
        """Train from the start, or from a checkpoint with its mark, exactly as if the run had never stopped.

        Ends the program where a stop was wished. Raises UserError with exit code 4 after too many steps that are not
        finite, with 2 where the disk is too small or a checkpoint holds code.
        """
        folder, mark = checkpoint or (None, {"step": 0, "progress": None})
        self.progress = [mark["progress"], *mark.get("progress_of_others", [])][RANK if folder else 0]
        self.saved_step = mark["step"]
        if folder:
            print(f"going on from {folder.name}")
            now = self.about()["versions"]
            before = mark["versions"]
            for name in [name for name in now if before.get(name) != now[name]]:
                print(f"{name} was {before.get(name)}, now {now[name]}: results may differ a little", file=sys.stderr)
            if not load.same_weights(mark.get("base", []), self.base_fingerprint):
                raise UserError("RESUME=auto would change the run: MODEL has other weights than it began with.", code=3)
        distributed.on_first(lambda: checkpoints.clear(self.run, self.saved_step))
        self.began_from = folder
        try:
            result = super().train(resume_from_checkpoint=folder and str(folder))
        except pickle.UnpicklingError as error:
            raise UserError(f"RESUME=auto: {folder} holds more than numbers and is not loaded: {error}") from error
        finally:
            self.finish_publishing()
        self._total_loss_scalar -= self._tr_loss.item()  # Trainer has added it at the end; a checkpoint holds both
        if self.gave_up:
            raise UserError(
                f"stopped: {self.bad_steps} steps with a loss or gradient that is not finite; none was applied. "
                f"Lower LEARNING_RATE={self.args.learning_rate}, or look at DATA.",
                code=4,
            )
        if self.stopping is not None and self.state.global_step < self.state.max_steps:
            self.leave()
        return result

    def checkpoint_bytes(self) -> float:
        """What the next checkpoint will take: as much as the last, or weights and what Adam keeps of each."""
        if last := checkpoints.published(self.run):
            return sum(file.stat().st_size for file in last[0].rglob("*"))
        weights, optim = self.weight_bytes(), self.args.optim
        if self.is_deepspeed_enabled:
            return 8 * weights  # once for us, once for DeepSpeed, and in float32 with what Adam keeps
        twice = distributed.engine() == "fsdp"  # once for us, once for accelerate
        return weights * (twice + (1 if "adam" not in optim else 2 if "8bit" in optim else 3))

    def weight_bytes(self) -> int:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in trained)  # DeepSpeed's number, of a part

    def check_space(self) -> None:
        """UserError where the disk cannot hold the checkpoints that are to be kept, one more, and the final model."""
        if self.args.save_strategy == "no":
            return
        kept = self.save_total_limit + (self.args.eval_strategy != "no")  # and the best
        saves = 1 + (self.state.max_steps - self.state.global_step) // max(1, int(self.state.save_steps))
        more = min(saves, max(1, kept + 1 - len(checkpoints.published(self.run))))
        size = self.checkpoint_bytes()
        try:
            check_space(self.run, more * size + self.weight_bytes())
        except OSError as error:
            raise UserError(
                f"OUT_DIR={self.run.parent} has no space for {more} checkpoints of {size / GIB:.2f} GiB "
                f"and the final model: {error.strerror}. Make room, lower SAVE_TOTAL_LIMIT={self.save_total_limit}, "
                "or name another OUT_DIR."
            ) from error

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint and publish it in a thread; a save that fails is told and tried again, the run goes on."""
        step = self.state.global_step
        self.finish_publishing()
        if self.gave_up or step == distributed.gather(self.saved_step)[0]:
            return
        checkpoint, failed = self.run / f"checkpoint-{step}", ""
        try:
            distributed.on_first(lambda: check_space(self.run, self.checkpoint_bytes()))
        except OSError as error:  # in all of them
            self.save_failed(checkpoint, str(error))
            return
        try:
            super()._save_checkpoint(model, trial)
            if self.write_metrics():
                raise OSError(errno.ENOSPC, "not all lines are written", METRICS)
            if not RANK:
                shutil.copyfile(self.metrics, checkpoint / METRICS)
        except SAVE_ERRORS as error:
            if distributed.engine() not in (None, "ddp"):  # the others are in the middle of it
                raise
            failed = str(error)
        progress = {name: getattr(self, name) for name in self.PROGRESS} | {"_tr_loss": self._tr_loss.item()}
        said = distributed.gather((failed, progress))
        if any(failed for failed, _ in said):
            self.save_failed(checkpoint, next(failed for failed, _ in said if failed))
            return
        if RANK:
            return
        (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
        about = self.about() | {"step": step, "data": self.data_digest, "base": self.base_fingerprint}
        about["eval_loss"] = None
        if self.evaluation and self.evaluation["step"] == step:
            about["eval_loss"] = self.evaluation["eval_loss"]
        about["progress"], *about["progress_of_others"] = (progress for _, progress in said)
        self.publishing = checkpoint, self.publisher.submit(self.publish, checkpoint, about)

    def about(self) -> dict:
        """Command, versions and settings of the run."""
        return json.loads((self.run / "settings.json").read_text(encoding="utf-8"))

    def publish(self, checkpoint: Path, about: dict) -> None:
        checkpoints.publish(checkpoint, about)
        try:
            checkpoints.rotate(self.run, self.save_total_limit)
        except OSError as error:
            print(f"an old checkpoint could not be removed: {error}", file=sys.stderr)

    def finish_publishing(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        if self.publishing:
            checkpoint, publishing = self.publishing
            self.publishing = None
            try:
                publishing.result()
            except OSError as error:
                self.save_failed(checkpoint, str(error))
            else:
                self.saved_step = checkpoints.step_of(checkpoint)
                self.retry_at, self.retry_after = math.inf, 1

    def save_failed(self, checkpoint: Path, error: str) -> None:
        if not RANK:  # what is left does not count, and goes when the run starts again
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.retry_at = self.state.global_step + self.retry_after
        self.retry_after *= 2
        again = f"; tried again at step {self.retry_at}" if self.retry_at <= self.state.max_steps else ""
        print(f"{checkpoint.name} could not be saved: {error}{again}", file=sys.stderr)

    def leave(self):
        """Save and end the program with the signal's exit code."""
        self._save_checkpoint(self.model, None)
        self.finish_publishing()
        step = self.state.global_step
        if distributed.gather(self.saved_step)[0] != step:
            raise UserError(
                f"stopped at step {step}, which could not be saved: the same command goes on from the checkpoint "
                f"before. Make room in OUT_DIR={self.run.parent}."
            )
        print(
            f"stopped at step {step}; the same command, with RUN_NAME={self.run.name}, goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(128 + self.stopping)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_steps.append((inputs, loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of a step's gradients; where it or a loss is not finite, the gradients go, and with them the update.

        Trainer calls this right before the optimizer, which skips parameters without a gradient. It would apply such
        an update and log a loss of 0. After MAX_BAD_STEPS in a row, or 1 % of all steps, training stops.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.finish_publishing()  # beside forward and backward, and before the next update could be lost, too
        step = self.state.global_step + 1
        loss = torch.stack([loss for _, loss in self.micro_steps]).sum().item()
        said = distributed.gather((loss, step >= self.retry_at))
        loss = sum(loss for loss, _ in said) / len(said)
        self.control.should_save |= said[0][1]  # as the first process, which writes, has it
        finite = math.isfinite(loss)
        # float16's scaler leaves out infinite gradients by itself, as it must; DeepSpeed has one of its own.
        if self.accelerator.scaler is None and not (self.args.fp16 and self.is_deepspeed_enabled):
            finite &= math.isfinite(norm)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if not finite:
            self.optimizer.zero_grad(set_to_none=True)
            self.bad_steps += 1
            self.bad_since_log += 1
            print(f"step {step}: loss or gradient not finite, no update", file=sys.stderr)
            if self.bad_in_a_row >= MAX_BAD_STEPS or self.bad_steps >= max(MAX_BAD_STEPS, self.state.max_steps / 100):
                self.gave_up = self.control.should_training_stop = True
        else:
            if is_spike(loss, self.recent_losses):
                self.report_spike(step, loss)
            self.recent_losses = [*self.recent_losses, loss][-SPIKE_WINDOW:]
        self.micro_steps = []
        return norm

    def report_spike(self, step: int, loss: float) -> None:
        """Tell of a step's loss with the chats in it that have the highest."""
        rows, chats = [chat for inputs, _ in self.micro_steps for chat in chats_of(inputs)], []
        rows += rows[-1:] * (
            max(distributed.gather(len(rows))) - len(rows)
        )  # shared weights are gathered by all at once
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for ids, labels in rows:
                mean = self.compute_loss(self.model, self._prepare_inputs({"input_ids": ids, "labels": labels})).item()
                chats.append({"loss": mean, "begins": self.processing_class.decode(ids[0, :100])})
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # whole weights that stay from this forward would be used after the update, too
        chats = {chat["begins"]: chat for chats in distributed.gather(chats) for chat in chats}.values()
        chats = sorted(chats, key=lambda chat: -chat["loss"])[:3]
        usual = statistics.fmean(self.recent_losses)
        self.spikes += 1
        self.spike = {"step": step, "loss": loss, "usual": usual, "chats": chats}
        print(f"step {step}: loss {loss:.2f}, usually {usual:.2f}; most of it from:", file=sys.stderr)
        for chat in chats:
            print(f"  loss {chat['loss']:.2f}: {chat['begins']!r}", file=sys.stderr)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # Trainer would train one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def begin(self) -> None:
        """To be called when Trainer has loaded everything: begin the log, or go on where the checkpoint was written."""
        distributed.on_first(self.begin_metrics)
        if not self.began_from:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # the intervals loaded are those of then
        for name in set(self.PROGRESS) & set(self.progress):  # a checkpoint of an earlier version holds fewer
            setattr(self, name, self.progress[name])
        self._tr_loss.fill_(self.progress["_tr_loss"])
        # The states just loaded bring the old peak learning rate with them; ALLOW_CHANGE may have changed it.
        scheduler, peak = self.lr_scheduler, self.args.learning_rate
        scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
        scheduler._last_lr = [peak * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if getattr(optimizer, "is_paged", False):
            page_states(optimizer)
        if self.evaluation_due:
            self.evaluate()

    def begin_metrics(self) -> None:
        self.check_space()
        if self.began_from:
            shutil.copyfile(self.began_from / METRICS, self.metrics)
        else:
            self.metrics.write_text("")

    def write_metrics(self, line: str = "") -> bytes:
        """Append to metrics.jsonl; what a full disk does not take waits for the next time, and is returned."""
        if RANK:
            return b""
        self.unwritten += line.encode()
        try:
            with open(self.metrics, "ab", buffering=0) as stream:
                end = stream.seek(0, os.SEEK_END)
                try:
                    if stream.write(self.unwritten) < len(self.unwritten):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    stream.truncate(end)
                    raise
            self.unwritten = b""
        except OSError as error:
            print(f"{self.metrics} could not be written, later again: {error}", file=sys.stderr)
        return self.unwritten

    def stop_wished(self) -> bool:
        """Whether a stop is wished in any process; all have to call it."""
        if self.stopping is None and self.stop is not None:
            said = distributed.gather(self.stop.number if self.stop.wished() else None)
            self.stopping = next((number for number in said if number is not None), None)
        return self.stopping is not None

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The trained weights on the CPU of the first process, where processes hold parts of them; else None."""
        if distributed.engine() == "zero3":
            return self.accelerator.get_state_dict(self.model_wrapped)
        if distributed.engine() != "fsdp":
            return None
        is_adapter = hasattr(self.model, "peft_config")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapter)
        weights = get_model_state_dict(self.model, options=options)
        if is_adapter:
            return weights
        for name in self.model.all_tied_weights_keys:  # a second name of the same
            weights.pop(name, None)
        return {name: weight.to(self.dtype) for name, weight in weights.items()}  # accelerate has made them float32


def page_states(optimizer) -> None:
    """Give an optimizer of bitsandbytes that was just loaded its paged memory back, which load_state_dict loses.

    Without it a run that just fitted would not fit after a resume (bitsandbytes 0.50, `Optimizer8bit.load_state_dict`).
    """
    for state in optimizer.state.values():
        for name in ("state1", "state2"):
            if name in state:
                state[name] = optimizer.get_state_buffer(state[name], dtype=state[name].dtype).copy_(state[name])

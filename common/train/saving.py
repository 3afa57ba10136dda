"""Checkpoints of a run: written beside training, and resumed from exactly. For any TRL trainer."""

import dataclasses
import json
import logging
import pickle
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from common import distributed, files
from common.bounds import CHANGEABLE
from common.cli import RANK, UserError
from common.files import LineLog, write_atomic
from common.model.load import same_weights
from common.train import checkpoints, optimizers
from common.train.checkpoints import CheckpointWriter
from common.train.guard import StepGuard

SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of Python, torch and safetensors on a full disk
# On each resume it compares SAVE_STEPS=0.25 with the steps that it came to.
logging.getLogger("transformers.trainer_utils").addFilter(lambda line: "`trainer_state.json`" not in line.getMessage())


@dataclass
class Progress:
    """What a checkpoint holds of a run, beside what Trainer saves."""

    tokens: int = 0  # seen in training by all processes, without padding
    seconds: float = 0.0  # spent in steps
    joules: float | None = None  # None where power cannot be read
    penalties: dict[str, list] = field(default_factory=dict)  # name: its sum (nats) and steps; both since the last log
    guard: StepGuard = field(default_factory=StepGuard)
    bad_since_log: int = 0  # steps that were not finite
    spike: dict | None = None  # since the last log
    evaluation: dict | None = None  # the last one: step and eval_loss
    evaluation_due: bool = False  # the checkpoint was written in the middle of one
    best: list | None = None  # loss and step of the evaluation with the least loss
    without_gain: int = 0  # evaluations since then
    loss_account: list[float] = field(default_factory=list)  # Trainer's: total, step of the last log, first step, sum

    def tokens_per_second(self) -> float | None:
        """Over the whole run; evaluation and saving are left out."""
        return self.tokens / self.seconds if self.seconds else None


class SavingTrainer:
    """Mixin over a TRL trainer that saves checkpoints which count only when they are whole, and resumes from them.

    log: metrics.jsonl, which belongs to a checkpoint as it was at that step.
    metadata: for settings.json: settings, versions, command.
    keep_best: also save each step whose evaluation has the least loss until then.
    data_digest, base_fingerprint: of the training data and the base's weights; they go into the checkpoints.
    Of several processes the first writes.
    """

    _initial_global_step = 0  # transformers 5.17 has none

    def __init__(
        self, *args, log: LineLog, metadata: dict, keep_best=False, save_total_limit=2, data_digest="",
        base_fingerprint=(), **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.run, self.metrics_log, self.metadata = Path(self.args.output_dir), log, metadata
        self.keep_best = keep_best and self.args.eval_strategy != "no"
        self.writer = CheckpointWriter(self.run, save_total_limit)
        self.data_digest, self.base_fingerprint = data_digest, list(base_fingerprint)
        self.progress, self.restored = Progress(), None

    def train(self, checkpoint: tuple[Path, dict] | None = None):
        """Train from the start, or from a checkpoint with its manifest, exactly as if the run had never stopped.

        Raises UserError where the disk is too small, a checkpoint holds code, or the base has other weights than then.
        """
        folder, manifest = checkpoint or (None, {"step": 0})
        self.writer.saved_step, self.restored = manifest["step"], checkpoint
        if folder:
            print(f"resuming from {folder.name}")
            versions, before = self.metadata["versions"], manifest["versions"]
            for name in [name for name in versions if before.get(name) != versions[name]]:
                message = f"{name} was {before.get(name)}, now {versions[name]}: results may differ a little"
                print(message, file=sys.stderr)
            if not same_weights(manifest.get("base", []), self.base_fingerprint):
                raise UserError("RESUME=auto would change the run: MODEL has other weights than it began with.", code=3)
        distributed.on_first(lambda: checkpoints.clear(self.run, manifest["step"]))
        try:
            result = super().train(resume_from_checkpoint=folder and str(folder))
        except pickle.UnpicklingError as error:
            raise UserError(f"RESUME=auto: {folder} holds more than numbers and is not loaded: {error}") from error
        finally:
            self.writer.wait(self.state.global_step, self.state.max_steps)
        self._total_loss_scalar -= self._tr_loss.item()  # Trainer has added it at the end; a checkpoint holds both
        return result

    def check_space(self) -> None:
        """UserError where the disk cannot hold the checkpoints that are to be kept, one more, and the final model."""
        if self.args.save_strategy == "no" and not self.keep_best:
            return
        interval = min(self.state.save_steps, self.state.eval_steps) if self.keep_best else self.state.save_steps
        kept = self.writer.keep + (self.args.eval_strategy != "no")  # and the best
        saves = 1 + (self.state.max_steps - self.state.global_step) // max(1, int(interval))
        more = min(saves, max(1, kept + 1 - len(checkpoints.published(self.run))))
        size, weights = self.checkpoint_bytes()
        try:
            files.check_space(self.run, more * size + weights)
        except OSError as error:
            raise UserError(
                f"OUT_DIR={self.run.parent} has no space for {more} checkpoints of {size / files.GIB:.2f} GiB and the "
                f"final model: {error.strerror}. Make room, lower SAVE_TOTAL_LIMIT={self.writer.keep}, or name another "
                "OUT_DIR."
            ) from error

    def checkpoint_bytes(self) -> tuple[float, int]:
        """Bytes of the next checkpoint, and of the trained weights in it."""
        sharded = distributed.engine() == "zero3"  # whose parameters are parts, and know the size of the whole
        trained = [p for p in self.model.parameters() if p.requires_grad]
        weights = sum((p.ds_numel if sharded else p.numel()) * p.itemsize for p in trained)
        if last := checkpoints.published(self.run):  # the next one is like it
            return sum(file.stat().st_size for file in last[0].rglob("*")), weights
        if self.is_deepspeed_enabled:
            return 8 * weights, weights  # once for us, once for DeepSpeed, and in float32 with what Adam keeps
        twice, optim = distributed.engine() == "fsdp", self.args.optim  # once for us, once for accelerate
        return weights * (twice + (1 if "adam" not in optim else 2 if "8bit" in optim else 3)), weights

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint and publish it in a thread. A save that fails is tried again; training goes on."""
        step, last_step = self.state.global_step, self.state.max_steps
        self.writer.wait(step, last_step)
        if step == distributed.gather(self.writer.saved_step)[0]:
            return
        checkpoint, failure = self.run / f"checkpoint-{step}", ""
        try:
            distributed.on_first(lambda: files.check_space(self.run, self.checkpoint_bytes()[0]))
        except OSError as error:  # raised in all processes
            self.writer.report_failure(checkpoint, str(error), step, last_step)
            return
        try:
            super()._save_checkpoint(model, trial)
            if not RANK:
                if not self.metrics_log.append():
                    raise OSError(f"{self.metrics_log.file.name} lacks lines")
                shutil.copyfile(self.metrics_log.file, checkpoint / self.metrics_log.file.name)
        except SAVE_ERRORS as error:
            if distributed.engine() not in (None, "ddp"):  # the others are in the middle of it
                raise
            failure = str(error)
        account = self._total_loss_scalar, self._globalstep_last_logged, self._initial_global_step
        self.progress.loss_account = [*account, self._tr_loss.item()]
        outcomes = distributed.gather((failure, dataclasses.asdict(self.progress)))
        if failure := next((failure for failure, _ in outcomes if failure), None):
            self.writer.report_failure(checkpoint, failure, step, last_step)
        elif not RANK:
            evaluation = self.progress.evaluation or {"step": None}
            metadata = dict(
                step=step,
                data=self.data_digest,
                base=self.base_fingerprint,
                eval_loss=evaluation["eval_loss"] if evaluation["step"] == step else None,
                progress=[progress for _, progress in outcomes],
            )
            self.writer.submit(checkpoint, self.metadata | metadata)

    def restore_progress(self) -> None:
        """Called when Trainer has loaded everything: begin the log, or go on where the checkpoint was written."""
        distributed.on_first(self.begin_log)
        if not self.restored:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # the intervals loaded are those of then
        checkpoint, manifest = self.restored
        self.progress = read_progress(checkpoint, manifest)
        if checkpoints.held_out(manifest["data"]) != checkpoints.held_out(self.data_digest):
            self.progress.best = self.progress.evaluation = None
        if any(manifest["settings"].get(name) != self.metadata["settings"].get(name) for name in CHANGEABLE):
            self.progress.without_gain = 0
        *account, running_loss = self.progress.loss_account
        self._total_loss_scalar, self._globalstep_last_logged, self._initial_global_step = account
        self._tr_loss.fill_(running_loss)
        # The states just loaded bring the old peak learning rate with them; ALLOW_CHANGE may have changed it.
        optimizers.set_peak(self.lr_scheduler, self.optimizer, self.args.learning_rate)
        if "paged" in self.args.optim:
            page_states(self.optimizer.optimizer)
        if self.progress.evaluation_due:
            loss = self.evaluate()["eval_loss"]
            distributed.on_first(lambda: checkpoints.add_eval_loss(checkpoint, loss))

    def begin_log(self) -> None:
        self.check_space()
        (self.run / "summary.json").unlink(missing_ok=True)  # of a finished run that goes on
        metadata = self.metadata | {"max_steps": self.state.max_steps}
        write_atomic(self.run / "settings.json", json.dumps(metadata, indent=1))
        file = self.metrics_log.file
        if self.restored:
            shutil.copyfile(self.restored[0] / file.name, file)
        else:
            file.write_text("")


def read_progress(checkpoint: Path, manifest: dict) -> Progress:
    """This process's progress; UserError with exit code 3 where another version has written it."""
    try:
        progress = manifest["progress"][RANK]
        progress = Progress(**progress | {"guard": StepGuard(**progress["guard"])})
        if len(progress.loss_account) != 4:
            raise ValueError("no loss_account")
        return progress
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"RESUME=auto: {checkpoint} was written by another version of these scripts ({error}). Go on with its "
            f"commit, {manifest.get('commit')}, or start a new run: another RUN_NAME.",
            code=3,
        ) from error


def page_states(optimizer) -> None:
    """Give an optimizer of bitsandbytes that was just loaded its paged memory back, which load_state_dict loses.

    Without it a run that just fitted would not fit after a resume (bitsandbytes 0.50, `Optimizer8bit.load_state_dict`).
    """
    for state in optimizer.state.values():
        for name in ("state1", "state2"):
            if name in state:
                state[name] = optimizer.get_state_buffer(state[name], dtype=state[name].dtype).copy_(state[name])

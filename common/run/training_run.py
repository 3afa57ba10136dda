"""A training run: its folder opened, its trainer executed, its result reported."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback

from common import distributed, hardware
from common.cli import UserError
from common.files import METRICS, LineLog
from common.monitor import HardwareMonitor
from common.run import report
from common.run.folder import DATA_SETTINGS, StopRequest, allowed_changes, open_folder
from common.run.html import LivePage
from common.run.metrics import MetricsLog
from common.train import checkpoints
from common.train.parallel import gather_weights
from common.train.saving import read_progress


@dataclass
class TrainingRun:
    """A run folder, and the checkpoint that the run resumes from, with its manifest."""

    folder: Path
    metadata: dict  # for settings.json
    checkpoint: tuple[Path, dict] | None
    keeps_data: bool  # a resumed run trains on the data it began with
    log: LineLog

    def execute(self, trainer, plan, save) -> None:
        """Train, save, evaluate, and write the results into the run folder.

        plan: the trainer's BatchPlan. save: called with the folder and gathered weights.
        """
        if checkpoints.published(self.folder)[:1] != [self.checkpoint and self.checkpoint[0]]:
            self.checkpoint = checkpoints.latest_valid(self.folder)  # memory ran out after it was written
        if self.checkpoint:
            self.check_steps(trainer, self.checkpoint[1]["step"])
        trainer.monitor = HardwareMonitor(self.folder / "hardware.csv")
        with LivePage(self.folder) as page:
            log = MetricsLog(trainer, page)
            trainer.add_callback(log)
            trainer.remove_callback(PrinterCallback)
            results = self.train(trainer, save, log.bar)
            results["predicted_peak_gib"] = plan.predicted_peak_gib
            report.finish(self.folder, trainer, results, dict(log.watch.counts))

    def train(self, trainer, save, bar) -> dict:
        """Train, save and evaluate; what came out, for summary.json."""
        started = hardware.now()
        with trainer.monitor, StopRequest(self.folder) as trainer.stop, bar:
            results = {"train_loss": trainer.train(self.checkpoint).metrics["train_loss"]}
            results["train_seconds"] = hardware.now() - started
            weights = gather_weights(trainer)
            # Before the evaluation, which may crash.
            distributed.on_first(lambda: save(self.folder / "final", weights))
            last = trainer.state.global_step, evaluate(trainer) if trainer.eval_dataset else None
            results["last_eval_loss"] = last[1]
            kept = self.keep_best(trainer, save, *last) if trainer.keep_best else last
            results["final_step"], results["eval_loss"] = kept
        return results

    def check_steps(self, trainer, done: int) -> None:
        """UserError where the run would have fewer steps than are done, or a finished run no more."""
        args = trainer.args
        steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        is_finished = distributed.on_first((self.folder / "summary.json").exists)
        if steps < done or is_finished and steps == done:
            name = "MAX_STEPS" if args.max_steps > 0 else "NUM_TRAIN_EPOCHS"
            setting = f"{name}={getattr(args, name.lower()):g}"
            raise UserError(f"{setting}: that is {steps} steps, and {done} are done. Raise it, or start a new run.")

    def keep_best(self, trainer, save, last_step: int, last_loss: float) -> tuple[int, float]:
        """Put the checkpoint of the least held-out loss into final/; returns step and loss of what is there then."""
        ranked = distributed.on_first(lambda: checkpoints.by_loss(self.folder, trainer.data_digest))
        best = distributed.on_first(lambda: checkpoints.first_valid([checkpoint for *_, checkpoint in ranked]))
        step, loss = (best[1]["step"], best[1]["eval_loss"]) if best else (last_step, last_loss)
        if step == last_step or last_loss < loss:  # lower, and the disk had no room for its checkpoint
            step, loss = last_step, last_loss
        else:
            trainer.state.best_model_checkpoint = str(best[0])
            trainer._load_best_model()
            weights = gather_weights(trainer)
            distributed.on_first(lambda: save(self.folder / "final", weights))
        print(f"final/ is step {step}, held-out loss {loss:.4f}; the last is step {last_step}, {last_loss:.4f}")
        return step, loss


def open_run(settings: dict, script: str) -> TrainingRun:
    """The folder OUT_DIR/RUN_NAME, locked, and the newest valid checkpoint. Errors: see `open_folder`."""
    folder, metadata = distributed.on_first(lambda: open_folder(settings, script))
    checkpoint = distributed.on_first(lambda: checkpoints.latest_valid(folder)) if settings["RESUME"] else None
    if checkpoint:
        read_progress(*checkpoint)  # before anything slow
    keeps_data = not allowed_changes(settings) & DATA_SETTINGS
    return TrainingRun(folder, metadata, checkpoint, keeps_data, LineLog(folder / METRICS))


def evaluate(trainer) -> float:
    """Held-out loss, row by row where memory runs out: training is done and must not begin again."""
    try:
        return trainer.evaluate()["eval_loss"]
    except Exception as error:
        if not hardware.is_out_of_memory(error) or distributed.count() > 1:
            raise
    trainer.args.per_device_eval_batch_size = 1
    return trainer.evaluate()["eval_loss"]

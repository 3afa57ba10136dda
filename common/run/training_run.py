"""A training run: its folder opened, its trainer executed, its result reported."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback

from common import distributed, hardware
from common.files import METRICS, LineLog, write_atomic
from common.monitor import HardwareMonitor
from common.run import report
from common.run.folder import DATA_SETTINGS, StopRequest, allowed_changes, create_folder
from common.run.metrics import MetricsLog
from common.train import checkpoints
from common.train.parallel import gather_weights


@dataclass
class TrainingRun:
    """A run folder, and the checkpoint that the run resumes from, with its manifest."""

    folder: Path
    checkpoint: tuple[Path, dict] | None
    keeps_data: bool  # a resumed run trains on the data it began with
    log: LineLog

    def execute(self, trainer, plan, save) -> None:
        """Train, save, evaluate, and write the results into the run folder.

        plan: the trainer's BatchPlan, for settings.json. save: called with the folder and gathered weights.
        """
        metadata = json.dumps(trainer.metadata() | {"plan": plan.settings()}, indent=1)
        distributed.on_first(lambda: write_atomic(self.folder / "settings.json", metadata))
        if checkpoints.published(self.folder)[:1] != [self.checkpoint and self.checkpoint[0]]:
            self.checkpoint = checkpoints.latest_valid(self.folder)  # memory ran out after it was written
        trainer.monitor = HardwareMonitor(self.folder / "hardware.csv")
        log = MetricsLog(trainer)
        trainer.add_callback(log)
        trainer.remove_callback(PrinterCallback)
        started = hardware.now()
        with trainer.monitor, StopRequest(self.folder) as trainer.stop, log.bar:
            results = {"train_loss": trainer.train(self.checkpoint).metrics["train_loss"]}
            results["train_seconds"] = hardware.now() - started
            weights = gather_weights(trainer)
            # Before the evaluation, which may crash.
            distributed.on_first(lambda: save(self.folder / "final", weights))
            results["eval_loss"] = evaluate(trainer) if trainer.eval_dataset else None
        results["predicted_peak_gib"] = plan.predicted_peak_gib
        report.finish(self.folder, trainer, results, dict(log.watch.counts))


def open_run(settings: dict, script: str) -> TrainingRun:
    """The folder OUT_DIR/RUN_NAME, locked, and the newest valid checkpoint. Errors: see `create_folder`."""
    folder, checkpoint = distributed.on_first(lambda: create_folder(settings, script)), None
    if settings["RESUME"]:
        checkpoint = distributed.on_first(lambda: checkpoints.latest_valid(folder))
    keeps_data = not allowed_changes(settings) & DATA_SETTINGS
    return TrainingRun(folder, checkpoint, keeps_data, LineLog(folder / METRICS))


def evaluate(trainer) -> float:
    """Held-out loss, row by row where memory runs out: training is done and must not begin again."""
    try:
        return trainer.evaluate()["eval_loss"]
    except Exception as error:
        if not hardware.is_out_of_memory(error) or distributed.count() > 1:
            raise
    trainer.args.per_device_eval_batch_size = 1
    return trainer.evaluate()["eval_loss"]

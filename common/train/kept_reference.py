"""The reference of a preference loss, computed once before the first step and kept in the run folder."""

import io
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.cli import RANK
from common.files import hash_file, write_atomic
from common.train.preference_trainer import PreferenceTrainer
from common.train.preflight import check_losses

SECONDS_BETWEEN_LINES = 30


def keep_reference(trainer: PreferenceTrainer, folder: Path, adapter: str | None) -> None:
    """Give each pair of the trainer the log-probabilities of its untrained model, from the folder's reference.npz.

    That is written anew where data, base or adapter (the folder of one that is continued) differ from its own.
    """
    file, settings = folder / "reference.npz", trainer.settings
    weights = adapter and hash_file(Path(adapter) / "adapter_model.safetensors")
    parts = trainer.data_digest, trainer.base_fingerprint, weights, trainer.dtype
    names = "LOSS MODEL QUANTIZATION ADAPTER MAX_SAMPLES MAX_LENGTH SEED".split()
    key = " ".join(map(str, (*parts, *(settings.get(name) for name in names))))
    kept = read_file(file)
    if kept.get("key") != key:
        with trainer.accelerator.autocast():  # the model is not yet wrapped, which would do it
            check_losses(trainer)  # it may find that another attention is the right one
        describe_work(trainer)
        sets = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
        kept = {name: log_probs_of(trainer, rows) for name, rows in sets.items() if rows is not None}
        content = io.BytesIO()
        np.savez(content, key=key, **kept)
        distributed.on_first(lambda: write_atomic(file, content.getvalue()))
    trainer.train_dataset = with_reference(trainer.train_dataset, kept["train"])
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = with_reference(trainer.eval_dataset, kept["eval"])


def describe_work(trainer: PreferenceTrainer) -> None:
    """Say what is computed before the first step, and where training needs little of it."""
    taken = trainer.args.max_steps * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    rows, taken = trainer.rows, taken * distributed.count()
    is_more = trainer.has_new_adapter and 0 < 2 * taken < rows  # a live one needs the base's weights
    less = f"; training takes {taken:,} of them: REFERENCE=live is faster" if is_more else ""
    print(f"reference: log-probabilities of {rows:,} rows and of those held out, once{less}")


def read_file(file: Path) -> dict:
    """What was kept; nothing where there is no file, or one that cannot be read."""
    try:
        return dict(np.load(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        print(f"{file} cannot be read ({error}): the reference is computed again", file=sys.stderr)
        return {}


def with_reference(rows, kept: np.ndarray):
    """The dataset with its column `reference`; of blank rows, which are at its end, any value will do."""
    missing = len(rows) - len(kept)
    kept = np.concatenate([kept[: len(rows)], np.zeros((max(0, missing), 2), np.float32)])
    return rows.add_column("reference", kept.tolist())


def log_probs_of(trainer: PreferenceTrainer, rows) -> np.ndarray:
    """Log-probabilities of both answers of each row by the model as it is, (rows, 2).

    As many at once as in training: one by one, the first loss is exactly that of no change.
    """
    trainer.model.eval()
    found, at_once, told = [], trainer.args.per_device_train_batch_size, time.monotonic()
    with torch.no_grad(), trainer.accelerator.autocast():  # the model is not yet wrapped, which would do it
        for start in range(RANK * at_once, len(rows), distributed.count() * at_once):
            if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                print(f"reference: {start:,} of {len(rows):,} rows")
            batch = [rows[number] for number in range(start, min(start + at_once, len(rows)))]
            inputs = trainer._prepare_inputs(trainer.data_collator(batch))
            parts = [inputs]
            if "mismatched" in inputs:
                parts.append(inputs["mismatched"] | {"is_good": inputs["is_good"]})
            found.append(torch.cat([trainer.log_probs(trainer.model, part)[0] for part in parts], dim=1).tolist())
    trainer.model.train()
    in_turn = zip(*distributed.gather(found), strict=True)  # blank rows have made the shares equal
    return np.array([pair for turn in in_turn for batch in turn for pair in batch], dtype=np.float32)

"""Prepared data: sources encoded and split into a folder of Parquet files, with an account; and read to train on."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.files import hash_file

IGNORE_INDEX = -100  # label of a token that is not learned
# Settings that decide what rows become; a folder of prepared data is good for their values only.
SHAPING = ("MAX_LENGTH", "TRAIN_ON")


def prepared_with(settings: dict, encoder: ChatEncoder) -> dict:
    return {name: settings[name] for name in SHAPING} | {"encoding": encoder.fingerprint()}


def load(folder: Path, settings: dict, encoder: ChatEncoder, keep_unlearned: bool):
    """The datasets and the account of a prepared folder; UserError when it was prepared for something else."""
    if not (folder / "report.json").is_file():
        raise UserError(f"DATA={folder}: no report.json of prepare_data.py in it. Name a file, or prepare again.")
    try:
        about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        before, now = about["prepared_with"], prepared_with(settings, encoder)
        train, evaluation = (parquet.read_table(folder / f"{name}.parquet") for name in ("train", "eval"))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"DATA={folder} is damaged ({error}); prepare it again.") from error
    if changed := [f"{name}={before[name]}" for name in now if before[name] != now[name]]:
        raise UserError(
            f"DATA={folder} was prepared with {', '.join(changed)}; prepare it again, or set that back. "
            "`encoding` is the tokenizer with its template (MODEL, CHAT_TEMPLATE)."
        )
    about["digest"] = digest(folder)
    learned = lengths(train)[:, 1] > 0
    if not learned.any():
        raise UserError(f"DATA={settings['DATA']}: nothing is left to learn, every answer has weight 0.")
    if not keep_unlearned and not learned.all():
        train = keep(train, np.flatnonzero(learned), about, "left out of training, all their answers have weight 0")
    if settings["MAX_SAMPLES"] and len(train) > settings["MAX_SAMPLES"]:
        chosen = random.Random(settings["SEED"]).sample(range(len(train)), settings["MAX_SAMPLES"])
        train = keep(train, chosen, about, "left out of training by MAX_SAMPLES")
    use_evaluation = len(evaluation) and (settings["EVAL_SIZE"] or settings["EVAL_DATA"])
    return as_dataset(train).shuffle(settings["SEED"]), as_dataset(evaluation) if use_evaluation else None, about


def keep(train: pa.Table, rows, about: dict, reason: str) -> pa.Table:
    """Some rows of the training data; the account tells why the others are not there."""
    about["changed"][f"sequences {reason}"] = len(train) - len(rows)
    train = train.take(rows)
    about |= {"sequences": len(train), "tokens": int(lengths(train)[:, 0].sum())}
    return train


def digest(folder: Path) -> str:
    """Tells prepared folders with other tokens apart."""
    return "-".join(hash_file(folder / f"{name}.parquet")[:16] for name in ("train", "eval"))


def sample(folder: Path, groups: int = 4):
    """Rows from all over a prepared folder's training file, as a dataset."""
    with parquet.ParquetFile(folder / "train.parquet") as file:
        chosen = np.unique(np.linspace(0, file.num_row_groups - 1, groups).round().astype(int))
        return as_dataset(file.read_row_groups(list(chosen)))


def as_dataset(table: pa.Table):
    """A dataset of input_ids and labels, IGNORE_INDEX where nothing is learned."""
    import datasets  # slow import

    (offsets, ids), (_, masks) = flat(table, "input_ids"), flat(table, "assistant_masks")
    labels = np.where(masks == 1, ids, IGNORE_INDEX).astype(np.int32)
    columns = {"input_ids": ids, "labels": labels}
    table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as (offsets from 0, values)."""
    column = table.column(name).combine_chunks()
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0], column.flatten().to_numpy()


def lengths(table: pa.Table) -> np.ndarray:
    """(rows, 2): tokens and learned tokens of each row."""
    offsets, masks = flat(table, "assistant_masks")
    learned = np.concatenate([[0], masks.cumsum(dtype=np.int64)])
    return np.stack([np.diff(offsets), np.diff(learned[offsets])], axis=1)

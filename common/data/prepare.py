"""Preparing: sources become a folder of Parquet files, with an account of every row."""

import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from common import distributed
from common.cli import UserError
from common.data import folders, pipeline, sources
from common.data.account import Reasons, account_for
from common.data.compared import IGNORE_INDEX, with_mismatched
from common.data.encoder import ChatEncoder, Encoded
from common.files import hash_file, write_atomic

# assistant_masks: 1 where a token is in the loss.
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "assistant_masks": pa.list_(pa.int8())})
# lengths: of the sequences of a row. is_good: the label of its answer, where it has one.
SPOOL_SCHEMA = SCHEMA.append(pa.field("lengths", pa.list_(pa.int32()))).append(pa.field("is_good", pa.bool_()))
FILES = ("train.parquet", "eval.parquet")
ROW_GROUP = 4096  # rows in a row group of the files


def datasets_for(settings: dict, encoder: ChatEncoder, folder: Path, keep_unlearned: bool, manifest=None):
    """(train, evaluation or None, account) of DATA, prepared into the folder unless it is already.

    keep_unlearned: also chats without a token in the loss. manifest: of the checkpoint to resume from.
    """
    is_prepared = folders.is_prepared(settings["DATA"])
    if is_prepared:
        folder = Path(settings["DATA"]).expanduser()
        if settings["EVAL_DATA"] and not manifest:
            raise UserError(f"EVAL_DATA={settings['EVAL_DATA']}: DATA is a prepared folder, with held-out chats.")
    elif not manifest or distributed.on_first(lambda: not (folder / "report.json").is_file()):
        folder.mkdir(exist_ok=True)
        # One process, whose tokenizer has threads: workers would import the script with all its libraries.
        account = distributed.on_first(lambda: prepare(settings, encoder, folder, keep_unlearned, workers=1))
        distributed.on_first(lambda: write_atomic(folder / "report.json", json.dumps(account, indent=1)))
    try:
        train, evaluation, account = load_folder(folder, settings, encoder, keep_unlearned)
        if manifest and account["digest"] != manifest["data"]:
            raise UserError("the prepared data is not what it began with. Set it back, or ALLOW_CHANGE=DATA.")
    except UserError as error:
        if not manifest:
            raise
        raise UserError(f"RESUME=auto would change the run: {error} Or start a new run.", code=3) from error
    return train, evaluation, account


def prepare(settings: dict, encoder: ChatEncoder, folder: Path, keep_unlearned=True, workers=None):
    """Write train.parquet and eval.parquet; returns the account, to be written to report.json.

    Memory: one row group and about 100 bytes a chat.
    """
    # Every row once, encoded, to disk
    parts, reasons = sources.parse(settings["DATA"]), Reasons()
    if settings["EVAL_DATA"]:
        parts += [replace(source, times=0) for source in sources.parse(settings["EVAL_DATA"], "EVAL_DATA")]
    chats = pipeline.read_chats(parts, reasons, sources.Reading.of(settings), settings["BAD_ROWS"])
    arguments = (encoder, settings, keep_unlearned)
    rows = pipeline.encode_all(chats, arguments, reasons, workers or os.cpu_count())
    spool = folder / "spool.parquet"
    is_compared = "LOSS" in settings
    times, in_loss, sequences, prompts = write_spool(spool, rows)
    if not times.any() or settings["EVAL_DATA"] and times.all():
        which = "EVAL_DATA" if times.any() else "DATA"
        why = "; ".join(f"{n:,} {reason}" for reason, n in reasons.counts.items())
        raise UserError(f"{which}={settings[which]}: none of its rows is left ({why}).")
    # Rows held out; a pass for each repetition, so that the copies of a chat are far apart
    if not settings["EVAL_DATA"]:
        times[held_out(prompts if is_compared else np.arange(len(times)), settings)] = 0
    elif is_compared and (asked := np.isin(prompts[times == 0], prompts[times > 0]).sum()):
        reasons.counts["changed: held-out pairs whose question is trained on, too; compare others"] = int(asked)
    passes = [np.flatnonzero(times > i) for i in range(times.max())]
    copy_rows(spool, passes, folder / "train.parquet", is_compared)
    copy_rows(spool, [np.flatnonzero(times == 0)], folder / "eval.parquet", is_compared)
    spool.unlink()
    account = account_for(reasons, times, in_loss, sequences, settings["MAX_LENGTH"])
    account["prepared_with"] = {name: settings[name] for name in ("MAX_LENGTH", "TRAIN_ON")}
    account["prepared_with"] |= {"encoding": encoder.fingerprint, "is_compared": is_compared}
    account["sources"] = {str(file): hash_file(file) for source in parts for file in source.files}
    return account


def held_out(groups: np.ndarray, settings: dict) -> np.ndarray:
    """Which rows EVAL_SIZE holds out; groups: a number of each row, by which they are held out together."""
    size, count = settings["EVAL_SIZE"], int(groups.max()) + 1
    number = round(size * count) if size < 1 else int(size)
    if number >= count:
        what = "prompts" if "LOSS" in settings else "chats"
        raise UserError(f"EVAL_SIZE={size} holds out {number} of {count} {what}: none is left.")
    return np.isin(groups, random.Random(settings["SEED"]).sample(range(count), number))


def write_spool(file: Path, rows: Iterator[tuple[int, Encoded]]) -> tuple:
    """Write rows; returns of each its repetitions, tokens in the loss, its lengths, its prompt's number."""
    times, in_loss, sequences, prompts, numbers = [], [], [], [], {}
    with parquet.ParquetWriter(file, SPOOL_SCHEMA) as writer:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            columns = [[row.ids for _, row in group], [row.learned.astype(np.int8) for _, row in group]]
            columns.append([row.lengths.astype(np.int32) for _, row in group])
            columns.append([row.is_good for _, row in group])
            writer.write_table(pa.table(columns, schema=SPOOL_SCHEMA))
            times += [times for times, _ in group]
            in_loss += [row.learned.sum() for _, row in group]
            sequences += columns[2]
            asked = [hash(row.ids[: row.learned.argmax()].tobytes()) for _, row in group]
            prompts += [numbers.setdefault(prompt, len(numbers)) for prompt in asked]
    return np.array(times, dtype=np.int32), np.array(in_loss, dtype=np.int64), sequences, np.array(prompts)


def copy_rows(spool: Path, passes: list[np.ndarray], target: Path, is_compared: bool) -> None:
    """Copy rows, in each pass by ascending numbers, one row group at a time; a row for each sequence of a chat."""
    schema = SPOOL_SCHEMA if is_compared else SCHEMA
    with parquet.ParquetFile(spool) as file, parquet.ParquetWriter(target, schema) as writer:
        for rows in passes:
            for group in range(file.num_row_groups):
                start = group * ROW_GROUP
                first, last = np.searchsorted(rows, [start, start + ROW_GROUP])
                if first < last:
                    chosen = file.read_row_group(group).take(rows[first:last] - start)
                    writer.write_table(chosen if is_compared else as_sequences(chosen))


def as_sequences(chats: pa.Table) -> pa.Table:
    """A row for each sequence of chats."""
    ids, masks, lengths = (chats[name].combine_chunks().flatten() for name in SPOOL_SCHEMA.names[:3])
    offsets = np.concatenate([[0], lengths.to_numpy().cumsum()]).astype(np.int32)
    return pa.table([pa.ListArray.from_arrays(offsets, values) for values in (ids, masks)], schema=SCHEMA)


def load_folder(folder: Path, settings: dict, encoder: ChatEncoder, keep_unlearned: bool):
    """What `datasets_for` returns; UserError when it was prepared for something else."""
    if not (folder / "report.json").is_file():
        raise UserError(f"DATA={folder}: no report.json of prepare_data.py. Name a file, or prepare again.")
    try:
        account = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        before = {"is_compared": False} | account["prepared_with"]
        now = settings | {"encoding": encoder.fingerprint, "is_compared": "LOSS" in settings}
        changed = [f"{name}={before[name]}" for name in before if before[name] != now[name]]
        train, evaluation = (parquet.read_table(folder / name) for name in FILES)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"DATA={folder} is damaged ({error}); prepare it again.") from error
    if before["is_compared"] != now["is_compared"]:
        what = ("chats", "pairs")[before["is_compared"]]
        raise UserError(f"DATA={folder} was prepared for {what}. Name the files that it was made of.")
    if changed:
        hint = "`encoding` is the tokenizer with its template (MODEL, CHAT_TEMPLATE)."
        raise UserError(f"DATA={folder} was prepared with {', '.join(changed)}; set it back. {hint}")
    masks = train["assistant_masks"].combine_chunks()
    learned = np.unique(pc.list_parent_indices(masks).to_numpy()[masks.flatten().to_numpy() == 1])
    if not len(learned):
        raise UserError(f"DATA={settings['DATA']}: no token is in the loss, every answer has weight 0.")
    if not keep_unlearned and len(learned) < len(train):
        reason = "sequences left out of training, all their answers have weight 0"
        account["changed"][reason] = len(train) - len(learned)
        train = train.take(learned)
    most = settings["MAX_SAMPLES"] or len(train)
    if most < len(train):
        account["changed"]["sequences left out of training by MAX_SAMPLES"] = len(train) - most
        train = train.take(random.Random(settings["SEED"]).sample(range(len(train)), most))
    account["sequences"] = len(train)
    account["tokens"] = pc.sum(pc.list_value_length(train["input_ids"])).as_py()
    account["digest"] = "-".join(hash_file(folder / name)[:16] for name in FILES)
    train = as_dataset(train).shuffle(settings["SEED"])
    evaluate = len(evaluation) and (settings["EVAL_SIZE"] or settings["EVAL_DATA"])
    evaluation = as_dataset(evaluation) if evaluate else None
    if settings.get("LOSS") == "kto":
        train, evaluation = (rows and with_mismatched(rows, settings["MAX_LENGTH"]) for rows in (train, evaluation))
    return train, evaluation, account


def as_dataset(table: pa.Table):
    """A dataset of input_ids and labels."""
    import datasets  # slow import

    datasets.disable_progress_bars()  # of shuffling and the like
    ids, masks = (table[name].combine_chunks() for name in SCHEMA.names)
    offsets = ids.offsets.to_numpy() - ids.offsets[0].as_py()
    tokens = ids.flatten().to_numpy()
    labels = np.where(masks.flatten().to_numpy() == 1, tokens, IGNORE_INDEX).astype(np.int32)
    columns = {"input_ids": tokens, "labels": labels}
    columns = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
    if "lengths" in table.column_names:
        columns |= {"seq_lengths": table["lengths"], "is_good": table["is_good"]}
    return datasets.Dataset(pa.table(columns))


def sample(folder: Path):
    """Four row groups at most, from all over the training file."""
    with parquet.ParquetFile(folder / "train.parquet") as file:
        chosen = np.unique(np.linspace(0, file.num_row_groups - 1, 4).round().astype(int))
        return as_dataset(file.read_row_groups(list(chosen)))

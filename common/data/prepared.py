"""A folder of prepared data: its files, read as datasets, and its account of every row."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.files import hash_file

IGNORE_INDEX = -100  # label of a token that is not in the loss
# assistant_masks: 1 where a token is in the loss.
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "assistant_masks": pa.list_(pa.int8())})
FILES = ("train.parquet", "eval.parquet")


def load(folder: Path, settings: dict, encoder: ChatEncoder, keep_unlearned: bool):
    """What `prepare.datasets_for` returns; UserError when it was prepared for something else."""
    if not (folder / "report.json").is_file():
        raise UserError(f"DATA={folder}: no report.json of prepare_data.py. Name a file, or prepare again.")
    try:
        account = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        before, now = account["prepared_with"], settings | {"encoding": encoder.fingerprint}
        changed = [f"{name}={before[name]}" for name in before if before[name] != now[name]]
        train, evaluation = (parquet.read_table(folder / name) for name in FILES)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"DATA={folder} is damaged ({error}); prepare it again.") from error
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
    return train, as_dataset(evaluation) if evaluate else None, account


def as_dataset(table: pa.Table):
    """A dataset of input_ids and labels."""
    import datasets  # slow import

    ids, masks = (table.column(name).combine_chunks() for name in SCHEMA.names)
    offsets = ids.offsets.to_numpy() - ids.offsets[0].as_py()
    tokens = ids.flatten().to_numpy()
    labels = np.where(masks.flatten().to_numpy() == 1, tokens, IGNORE_INDEX).astype(np.int32)
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (tokens, labels)]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns, names=["input_ids", "labels"])))


def sample(folder: Path):
    """A dataset of four row groups at most, from all over the training file."""
    with parquet.ParquetFile(folder / "train.parquet") as file:
        chosen = np.unique(np.linspace(0, file.num_row_groups - 1, 4).round().astype(int))
        return as_dataset(file.read_row_groups(list(chosen)))


def describe(account: dict) -> str:
    rows = "data: {rows:,} rows = {trained:,} trained + {held_out:,} held out + {:,} dropped"
    lines = [rows.format(sum(account["dropped"].values()), **account)]
    for kind in ("dropped", "changed"):
        lines += [f"  {kind} {n:,}: {reason}" for reason, n in account[kind].items()]
    repeated = "{sequences:,} with repetitions; " if account["sequences"] > account["trained"] else ""
    tokens = "{tokens:,} tokens, {tokens_in_loss:,} in the loss; {held_out_tokens:,} held out"
    lines.append("  " + (repeated + tokens).format(**account))
    shortest, median, longest = (account["length_percentiles"][p] for p in ("0", "50", "100"))
    lines.append(f"  a chat has {shortest:,} to {longest:,} tokens, median {median:,}")
    return "\n".join(lines)

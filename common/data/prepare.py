"""Preparing: sources encoded and split into a folder of Parquet files, with an account."""

import bisect
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from common import distributed
from common.cli import UserError
from common.data import encode, prepared, readers, sources
from common.data.encoder import ChatEncoder
from common.files import hash_file, write_atomic

ROW_GROUP = 16  # batches in a row group of the files


def prepare(settings: dict, encoder: ChatEncoder, folder: Path, keep_unlearned=True, workers=None, vocab=None) -> dict:
    """Write train.parquet and eval.parquet into the folder; returns the account, for `publish`.

    Needs memory for one row group and about 100 bytes a chat, whatever the size of the sources.
    """
    counts = Counter()
    vocabulary = readers.read_vocabulary(vocab) if vocab else None
    batches = encode.read_sources(settings["DATA"], "DATA", counts, vocabulary)
    if settings["EVAL_DATA"]:
        held = encode.read_sources(settings["EVAL_DATA"], "EVAL_DATA", counts, vocabulary)
        batches = itertools.chain(batches, ((0, batch) for _, batch in held))
    spool = folder / "spool.parquet"
    encoded = encode.encode_all(batches, encoder, settings, keep_unlearned, counts, workers or os.cpu_count())
    sizes, times = write_spool(spool, encoded)
    if not times.any() or settings["EVAL_DATA"] and times.all():
        which = "EVAL_DATA" if times.any() else "DATA"
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in counts.items() if reason != "rows")
        raise UserError(f"{which}={settings[which]}: none of its rows is left ({reasons or 'it had none'}).")
    if not settings["EVAL_DATA"]:
        times[hold_out(len(times), settings["EVAL_SIZE"], settings["SEED"])] = 0
    # A pass over the spool for each repetition, so that the copies of a chat are far apart.
    passes = [np.flatnonzero(times > i) for i in range(times.max())]
    copy_rows(spool, passes, folder / "train.parquet")
    copy_rows(spool, [np.flatnonzero(times == 0)], folder / "eval.parquet")
    spool.unlink()
    about = account(counts, sizes, times, settings["MAX_LENGTH"])
    return about | {"prepared_with": prepared.prepared_with(settings, encoder), "sources": source_hashes(settings)}


def source_hashes(settings: dict) -> dict[str, str]:
    """Hashes of the local files that DATA and EVAL_DATA name."""
    names = [settings[name] for name in ("DATA", "EVAL_DATA") if settings[name]]
    return {source.name: hash_file(source.file) for name in names for source in sources.parse(name) if source.file}


def publish(folder: Path, about: dict) -> None:
    """Write the account as report.json, which makes the folder one to train on."""
    write_atomic(folder / "report.json", json.dumps(about, indent=1))


def write_spool(file: Path, encoded: Iterator) -> tuple[np.ndarray, np.ndarray]:
    """Write encoded tables to one file: (`lengths` of all rows, repetitions of each)."""
    sizes, times = [np.zeros((0, 2), dtype=np.int32)], [np.zeros(0, dtype=np.int16)]
    with parquet.ParquetWriter(file, encode.SCHEMA) as writer:
        while group := list(itertools.islice(encoded, ROW_GROUP)):
            writer.write_table(pa.concat_tables(table for table, _ in group))
            for table, repetitions in group:
                times.append(np.full(len(table), repetitions, dtype=np.int16))
                sizes.append(prepared.lengths(table).astype(np.int32))
    return np.concatenate(sizes), np.concatenate(times)


def copy_rows(spool: Path, passes: list[np.ndarray], target: Path) -> None:
    """Copy rows of a file, ascending numbers in each pass, one row group at a time."""
    with parquet.ParquetFile(spool) as file, parquet.ParquetWriter(target, encode.SCHEMA) as writer:
        for rows in passes:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
                if len(chosen):
                    writer.write_table(file.read_row_group(group).take(chosen))
                start = end


def hold_out(rows: int, eval_size: float, seed: int) -> list[int]:
    """Numbers of the rows to hold out."""
    held_out = round(eval_size * rows) if eval_size < 1 else int(eval_size)
    if not 0 <= held_out < rows:
        raise UserError(f"EVAL_SIZE={eval_size} holds out {held_out} of {rows} chats; leave some to train on.")
    return random.Random(seed).sample(range(rows), held_out)


def account(counts: Counter, sizes: np.ndarray, times: np.ndarray, max_length: int) -> dict:
    """What became of every row: rows = trained + held_out + all dropped.

    sizes: (chats, 2), tokens and learned tokens. times: (chats,), repetitions in training, 0 where held out.
    """
    reasons = {
        kind: {reason.partition(": ")[2]: n for reason, n in sorted(counts.items()) if reason.startswith(kind)}
        for kind in ("dropped", "changed")
    }
    tokens, learned = np.repeat(sizes, times, axis=0).T
    return dict(
        rows=counts["rows"],
        trained=int((times > 0).sum()),
        held_out=int((times == 0).sum()),
        **reasons,
        sequences=len(tokens),
        tokens=int(tokens.sum()),
        learned_tokens=int(learned.sum()),
        held_out_tokens=int(sizes[times == 0, 0].sum()),
        length_histogram=np.histogram(tokens, bins=50, range=(0, max_length))[0].tolist(),
        length_percentiles={str(p): int(np.percentile(tokens, p)) for p in (0, 25, 50, 75, 95, 100)},
        full=round(tokens.sum() / (best_fit(tokens, max_length) * max_length), 4),
    )


def best_fit(row_lengths, capacity: int, batch: int = 1000) -> int:
    """How many packed rows TRL makes of these rows: best-fit decreasing, a thousand rows at a time."""
    packed = 0
    for start in range(0, len(row_lengths), batch):
        spaces = []  # left in each packed row, ascending
        for length in sorted(row_lengths[start : start + batch], reverse=True):
            i = bisect.bisect_left(spaces, length)
            packed += i == len(spaces)
            bisect.insort(spaces, (spaces.pop(i) if i < len(spaces) else capacity) - length)
    return packed


def describe(about: dict) -> str:
    """The account in a few lines."""
    trained, held_out, dropped = about["trained"], about["held_out"], sum(about["dropped"].values())
    lines = [f"data: {about['rows']:,} rows = {trained:,} trained + {held_out:,} held out + {dropped:,} dropped"]
    lines += [f"  {kind} {n:,}: {reason}" for kind in ("dropped", "changed") for reason, n in about[kind].items()]
    repeated = f"{about['sequences']:,} with repetitions; " if about["sequences"] > trained else ""
    lines.append(
        f"  {repeated}{about['tokens']:,} tokens, {about['learned_tokens']:,} learned; "
        f"{about['held_out_tokens']:,} held out"
    )
    shortest, median, longest = (about["length_percentiles"][p] for p in ("0", "50", "100"))
    lines.append(
        f"  a chat has {shortest:,} to {longest:,} tokens, median {median:,}"
        + (f"; packed rows are full to {about['full']:.0%}" if "full" in about else "")  # earlier versions had none
    )
    return "\n".join(lines)


def datasets_for(settings: dict, encoder: ChatEncoder, folder: Path, keep_unlearned: bool, mark: dict | None = None):
    """(train, evaluation or None, account) of DATA, which is prepared into the folder unless it is prepared already.

    The datasets have input_ids and labels. keep_unlearned: whether chats without a learned token are of use. mark: of
    the checkpoint from which the run goes on, with the data it began with; where that has changed, exit code 3.
    """
    if Path(settings["DATA"]).is_dir():
        folder = Path(settings["DATA"])
        if settings["EVAL_DATA"] and not mark:
            held = f"EVAL_DATA={settings['EVAL_DATA']}"
            raise UserError(f"{held}: DATA is a prepared folder, with chats of its own to hold.")
    elif not mark or distributed.on_first(lambda: not (folder / "report.json").is_file()):  # or removed since
        folder.mkdir(exist_ok=True)
        # One process, whose tokenizer has threads: workers would import the training script with all its libraries.
        distributed.on_first(lambda: publish(folder, prepare(settings, encoder, folder, keep_unlearned, workers=1)))
    try:
        loaded = prepared.load(folder, settings, encoder, keep_unlearned)
        if mark:
            refuse_changes(loaded[2], settings, mark)
        return loaded
    except UserError as error:
        if not mark:
            raise
        raise UserError(f"RESUME=auto would change the run: {error} Or start a new run.", code=3) from error


def refuse_changes(about: dict, settings: dict, mark: dict) -> None:
    """UserError when sources, or the prepared data, are not what a checkpoint was trained on."""
    now = {} if Path(settings["DATA"]).is_dir() else source_hashes(settings)
    if changed := [file for file in now if about["sources"].get(file) != now[file]]:
        raise UserError(f"{', '.join(changed)} is not the file it began with. Set it back, or ALLOW_CHANGE=DATA.")
    if about["digest"] != mark["data"]:
        raise UserError("the prepared data is not what it began with. Set it back, or ALLOW_CHANGE=DATA.")

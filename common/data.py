"""Data: chats from their sources, filtered, encoded and split, with an account of every row."""

import bisect
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import sources
from common.encoding import ChatEncoder, Encoded
from common.settings import UserError, check_choice

IGNORE_INDEX = -100  # label of a token that is not learned
BATCH = 256  # chats encoded at once
POOL_FROM = 16  # batches from which on worker processes are worth starting
# DROP_PATTERN="auto": turns that claim to be another assistant. "Are you ChatGPT?" and "I am not ChatGPT" stay.
NAMES = r"(?:open[ -]?assistant|chatgpt|gpt-?\d|claude|bard|gemini|copilot|llama|vicuna|alpaca|mistral|qwen|deepseek)"
MAKERS = r"(?:open ?ai|anthropic|google|deepmind|meta(?: ai)?|microsoft|laion|mistral(?: ai)?|alibaba)"
WHAT = r"(?:(?:an?|the|ai|large|language|virtual|model|chat ?bot|assistant|called|named|known as),? )*"
OTHER_ASSISTANTS = (
    rf"\b(?:i am|i[’']m|my name is|call me) {WHAT}{NAMES}\b|\bas {WHAT}{NAMES}, i\b"
    rf"|\b(?:i am|i was|i[’']m|language model|assistant)\b(?! not)[^.!?]{{0,40}}\b\w+ed by {MAKERS}\b"
)
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "assistant_masks": pa.list_(pa.int8())})
# Settings that decide what rows become; a folder of prepared data is good for these values only.
SHAPING = ("MAX_LENGTH", "TRAIN_ON")


def check_settings(settings: dict) -> None:
    """Refuse what no data can be prepared with: UserError naming the setting."""
    check_choice("TRAIN_ON", settings["TRAIN_ON"], ("assistant", "all"))
    check_choice("TOO_LONG", settings["TOO_LONG"], ("cut", "drop", "error"))
    if settings["MAX_LENGTH"] < 1:
        raise UserError(f"MAX_LENGTH={settings['MAX_LENGTH']}: it must be at least 1.")
    if settings["EVAL_SIZE"] < 0 or settings["EVAL_SIZE"] > 1 and settings["EVAL_SIZE"] % 1:
        raise UserError(f"EVAL_SIZE={settings['EVAL_SIZE']}: a number of chats, or their share below 1; 0: none.")
    matcher(settings["DROP_PATTERN"])


def matcher(pattern: str | None):
    """A function that tells whether a text matches DROP_PATTERN, whatever its case."""
    if pattern == "auto":
        search = re.compile(OTHER_ASSISTANTS).search
        return lambda text: search(text.lower())  # twice as fast as ignoring the case
    try:
        return re.compile(pattern, re.IGNORECASE).search if pattern else lambda text: None
    except re.error as error:
        raise UserError(f"DROP_PATTERN={pattern} is no regular expression: {error}.") from error


# --- From chats to tokens ---


def encode_batch(encoder: ChatEncoder, settings: dict, items: list[tuple[str, list[dict]]]):
    """Encode chats, each with its place `file:line`: (table, counts of `dropped: reason` and `changed: reason`)."""
    matches, counts, chats = matcher(settings["DROP_PATTERN"]), Counter(), []
    for place, chat in items:
        if any(matches(turn["content"]) for turn in chat):
            counts["dropped: matches DROP_PATTERN"] += 1
            continue
        if chat[-1]["role"] == "user":
            counts["changed: cut at a question without an answer"] += 1
            chat = chat[:-1]
        chats.append((place, chat))
    rows = []
    encoded = encoder.encode([chat for _, chat in chats], settings["TRAIN_ON"])
    for (place, _), row in zip(chats, encoded, strict=True):
        if len(row.ids) > settings["MAX_LENGTH"]:
            if settings["TOO_LONG"] == "error":
                raise UserError(
                    f"{place}: {len(row.ids):,} tokens, more than MAX_LENGTH={settings['MAX_LENGTH']}. "
                    "TOO_LONG=cut cuts at a turn."
                )
            row = cut(row, settings["MAX_LENGTH"]) if settings["TOO_LONG"] == "cut" else None
            counts[
                "dropped: longer than MAX_LENGTH" if row is None else "changed: cut at a turn to fit MAX_LENGTH"
            ] += 1
        if row is not None:
            rows.append(row)
    return as_table(rows), counts


def cut(row: Encoded, max_length: int) -> Encoded | None:
    """The row up to the last answer that fits; None when not even the first does."""
    fitting = row.ends[row.ends <= max_length]
    return Encoded(row.ids[: fitting[-1]], row.learned[: fitting[-1]], fitting) if len(fitting) else None


def as_table(rows: list[Encoded]) -> pa.Table:
    """Columns input_ids (lists of int32) and assistant_masks (lists of int8, 1 where learned)."""
    offsets = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)])
    masks = np.concatenate([np.zeros(0, np.int8), *(row.learned for row in rows)]).astype(np.int8)
    return pa.table([pa.ListArray.from_arrays(offsets, values) for values in (ids, masks)], schema=SCHEMA)


def chat_key(chat: list[dict]) -> bytes:
    """Tells chats of the same words apart from others."""
    words = [(turn["role"], turn["content"].strip()) for turn in chat]
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).digest()


def read_sources(data: str, setting: str, counts: Counter, seen: set, elsewhere=frozenset(), vocabulary=None):
    """Yield (times, [(place, chat), ...]) in batches, each of one source; every row is yielded or counted.

    seen: keys of the chats so far, added to. elsewhere: keys that must not come, those of the training chats.
    """
    for source in sources.parse(data, setting):
        if not source.file:
            print(sources.describe_licence(source))
        chats = fresh_chats(source, setting, counts, seen, elsewhere, vocabulary)
        while batch := list(itertools.islice(chats, BATCH)):
            yield source.times, batch


def fresh_chats(source: sources.Source, setting: str, counts: Counter, seen: set, elsewhere, vocabulary):
    for number, chat in sources.read_chats(source, vocabulary):
        place = f"{source.name}:{number}"
        counts["rows"] += 1
        if isinstance(chat, sources.Fault):
            if source.file:
                raise UserError(f"{place}: {chat}")
            counts["dropped: broken, " + re.sub(r"\[\d+\]", "", chat.rpartition(": ")[0] or chat)] += 1
        elif isinstance(chat, str):
            counts[f"dropped: {chat}"] += 1
        elif (key := chat_key(chat)) in elsewhere:
            raise UserError(
                f"{setting}: the chat at {place} is in DATA, too; it would score what was learned by heart."
            )
        elif key in seen:
            counts["dropped: duplicate"] += 1
        else:
            seen.add(key)
            yield place, chat


worker_encode = None  # in a worker process: encode_batch with its encoder and settings


def start_worker(encoder: ChatEncoder, settings: dict) -> None:
    global worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores already
    worker_encode = functools.partial(encode_batch, encoder, settings)


def run_worker(items):
    return worker_encode(items)


def encode_all(batches: Iterator, encoder: ChatEncoder, settings: dict, counts: Counter, processes: int | None = None):
    """Yield (table, times) for each batch, in order, from worker processes where there is much to do."""
    processes = processes or os.cpu_count()
    head = list(itertools.islice(batches, POOL_FROM))
    batches = itertools.chain(head, batches)
    if processes == 1 or len(head) < POOL_FROM:
        for times, batch in batches:
            table, more = encode_batch(encoder, settings, batch)
            counts.update(more)
            yield table, times
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start_worker, (encoder, settings)) as pool:
        waiting = deque()
        for times, batch in itertools.chain(batches, [(0, None)] * 4 * processes):
            if batch is not None:
                waiting.append((times, pool.submit(run_worker, batch)))
            if waiting and (batch is None or len(waiting) > 4 * processes):
                times, future = waiting.popleft()
                table, more = future.result()
                counts.update(more)
                yield table, times


# --- From tokens to datasets ---


def split(rows: int, eval_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (to train on, to hold out), each in random order."""
    held_out = round(eval_size * rows) if eval_size < 1 else int(eval_size)
    if not 0 <= held_out < rows:
        raise UserError(f"EVAL_SIZE={eval_size} holds out {held_out} of {rows} chats; leave some to train on.")
    order = np.array(random.Random(seed).sample(range(rows), rows), dtype=np.int64)
    return order[held_out:], order[:held_out]


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


def account(counts: Counter, trained: np.ndarray, held_out: np.ndarray, times: np.ndarray, max_length: int) -> dict:
    """The account of a data set; rows = trained + held_out + all dropped.

    trained, held_out: (chats, 2), tokens and learned tokens of each. times: (chats trained,), repetitions.
    """
    reasons = {
        kind: {reason.partition(": ")[2]: n for reason, n in sorted(counts.items()) if reason.startswith(kind)}
        for kind in ("dropped", "changed")
    }
    repeated = np.repeat(trained, times, axis=0)
    tokens = repeated[:, 0]
    return dict(
        rows=counts["rows"],
        trained=len(trained),
        held_out=len(held_out),
        **reasons,
        sequences=len(repeated),
        tokens=int(tokens.sum()),
        learned_tokens=int(repeated[:, 1].sum()),
        held_out_tokens=int(held_out[:, 0].sum()),
        length_percentiles={str(p): int(np.percentile(tokens, p)) for p in (0, 25, 50, 75, 95, 100)},
        packed_fill={
            str(rows): round(tokens.sum() / (best_fit(tokens, rows * max_length) * rows * max_length), 4)
            for rows in (1, 2, 4)
        },
    )


def describe(account: dict) -> str:
    """The account in a few lines."""
    a = account
    lines = [
        f"data: {a['rows']:,} rows = {a['trained']:,} trained + {a['held_out']:,} held out "
        f"+ {sum(a['dropped'].values()):,} dropped"
    ]
    lines += [f"  {kind} {n:,}: {reason}" for kind in ("dropped", "changed") for reason, n in a[kind].items()]
    repeated = f"{a['sequences']:,} with repetitions; " if a["sequences"] > a["trained"] else ""
    shortest, median, longest = (a["length_percentiles"][p] for p in ("0", "50", "100"))
    fill = ", ".join(f"{share:.0%}" for share in a["packed_fill"].values())
    return "\n".join([
        *lines,
        f"  {repeated}{a['tokens']:,} tokens, {a['learned_tokens']:,} learned; {a['held_out_tokens']:,} held out",
        f"  a chat has {shortest:,} to {longest:,} tokens, median {median:,}; packed rows are full to {fill} "
        "(at PER_DEVICE_TRAIN_BATCH_SIZE=1, 2, 4)",
    ])  # fmt: skip


def make_datasets(settings: dict, encoder: ChatEncoder, keep_unlearned: bool = True):
    """Read DATA (and EVAL_DATA), encode and split it: (train, evaluation or None, account).

    The datasets have input_ids and labels. keep_unlearned: whether chats without a learned token are of use, as places
    to hold the base's predictions.
    Raises UserError where nothing is left to train on, or DATA is a prepared folder that does not fit.
    """
    if Path(settings["DATA"]).is_dir():
        return load_prepared(settings, encoder, keep_unlearned)
    counts, seen = Counter(), set()
    table, times = encode_setting("DATA", settings, encoder, counts, seen, keep_unlearned)
    if settings["EVAL_DATA"]:
        evaluation, _ = encode_setting("EVAL_DATA", settings, encoder, counts, set(), True, elsewhere=seen)
        training, _ = split(len(table), 0, settings["SEED"])
    else:
        training, held_out = split(len(table), settings["EVAL_SIZE"], settings["SEED"])
        evaluation = table.take(held_out)
    sizes = lengths(table)[training], lengths(evaluation)
    about = account(counts, *sizes, times[training], settings["MAX_LENGTH"])
    if not about["learned_tokens"]:
        raise UserError("DATA: nothing is left to learn, every answer has weight 0.")
    repeated = np.repeat(training, times[training])
    if len(repeated) > len(training):
        random.Random(settings["SEED"]).shuffle(repeated)
    return as_dataset(table.take(repeated)), as_dataset(evaluation) if len(evaluation) else None, about


def encode_setting(
    name: str, settings: dict, encoder, counts: Counter, seen: set, keep_unlearned, elsewhere=frozenset()
):
    """All chats of DATA or EVAL_DATA: (table, repetitions of each row)."""
    batches = read_sources(settings[name], name, counts, seen, elsewhere)
    tables, times = [as_table([])], []
    for table, repetitions in encode_all(batches, encoder, settings, counts):
        tables.append(table)
        times += [repetitions] * len(table)
    table, times = pa.concat_tables(tables).combine_chunks(), np.array(times, dtype=np.int64)
    useful = lengths(table)[:, 1] > 0
    if not keep_unlearned and not useful.all():
        counts["dropped: no answer to learn, all have weight 0"] += int((~useful).sum())
        table, times = table.filter(pa.array(useful)).combine_chunks(), times[useful]
    if not len(table):
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in counts.items() if reason != "rows")
        raise UserError(f"{name}={settings[name]}: none of {counts['rows']:,} rows is left ({reasons}).")
    return table, times


def add_labels(table: pa.Table) -> pa.Table:
    """The table with `labels`, IGNORE_INDEX where nothing is learned, in place of the masks."""
    (offsets, ids), (_, masks) = flat(table, "input_ids"), flat(table, "assistant_masks")
    labels = np.where(masks == 1, ids, IGNORE_INDEX).astype(np.int32)
    columns = {"input_ids": ids, "labels": labels}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def as_dataset(table: pa.Table):
    import datasets  # slow import

    return datasets.Dataset(datasets.table.InMemoryTable(add_labels(table)))


def load_prepared(settings: dict, encoder: ChatEncoder, keep_unlearned: bool):
    """The datasets that prepare_data.py wrote into the folder DATA."""
    import datasets  # slow import

    folder = Path(settings["DATA"])
    if not (folder / "report.json").is_file():
        raise UserError(
            f"DATA={folder}: no report.json of prepare_data.py in this folder. Name a file, or prepare again."
        )
    about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    before = about["prepared_with"]
    now = {name: settings[name] for name in SHAPING} | {"encoding": encoder.fingerprint()}
    if changed := [name for name in now if before[name] != now[name]]:
        raise UserError(
            f"DATA={folder} was prepared with other values of {', '.join(changed)} "
            f"({', '.join(f'{name}={before[name]}' for name in changed)}); prepare it again, or set them back. "
            "`encoding` is the tokenizer with its template (MODEL, CHAT_TEMPLATE)."
        )
    parts = []
    for name in ("train", "eval"):
        part = datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"))
        part = part.with_format("arrow")
        if not keep_unlearned:
            part = part.select(np.flatnonzero(np.concatenate([lengths(table)[:, 1] for table in part.iter(10_000)])))
        parts.append(part.map(add_labels, batched=True, remove_columns=part.column_names).with_format(None))
    train, evaluation = parts
    return train.shuffle(settings["SEED"]), evaluation if len(evaluation) and settings["EVAL_SIZE"] else None, about


# --- Prepared folders, for data that is large or used often ---

ROW_GROUP = 16  # batches in a row group of the files


def prepare(settings: dict, encoder: ChatEncoder, folder: Path, processes: int | None = None) -> dict:
    """Write train.parquet, eval.parquet and report.json into the folder; returns the account.

    Needs memory for one row group and a few bytes per chat, whatever the size of the sources.
    """
    import pyarrow.parquet as parquet  # slow import

    counts, seen, sizes, times, spools = Counter(), set(), {}, [], []
    vocabulary = sources.read_vocabulary(settings["VOCAB"]) if settings["VOCAB"] else None
    for name, keys, others in (("DATA", seen, frozenset()), ("EVAL_DATA", set(), seen)):
        if settings[name]:
            batches = read_sources(settings[name], name, counts, keys, others, vocabulary)
            encoded = encode_all(batches, encoder, settings, counts, processes)
            spools.append(folder / f"{name}.spool")
            sizes[name] = write_spool(spools[-1], encoded, times if name == "DATA" else [])
    training, held_out = split(
        len(sizes["DATA"]), 0 if settings["EVAL_DATA"] else settings["EVAL_SIZE"], settings["SEED"]
    )
    repetitions = np.array(times)
    held = np.zeros(len(repetitions), dtype=bool)
    held[held_out] = True
    passes = [np.flatnonzero((repetitions > i) & ~held) for i in range(repetitions.max())]
    with parquet.ParquetWriter(folder / "train.parquet", SCHEMA) as writer:
        for rows in passes:  # the copies of a chat come in different passes, far apart
            copy_rows(spools[0], rows, writer)
    with parquet.ParquetWriter(folder / "eval.parquet", SCHEMA) as writer:
        evaluation = sizes.get("EVAL_DATA", sizes["DATA"])
        copy_rows(spools[-1], np.arange(len(evaluation)) if settings["EVAL_DATA"] else np.sort(held_out), writer)
    for spool in spools:
        spool.unlink()
    held_sizes = evaluation if settings["EVAL_DATA"] else evaluation[held_out]
    about = account(counts, sizes["DATA"][training], held_sizes, repetitions[training], settings["MAX_LENGTH"])
    about["prepared_with"] = {name: settings[name] for name in SHAPING} | {"encoding": encoder.fingerprint()}
    (folder / "report.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return about


def write_spool(file: Path, encoded: Iterator, times: list[int]) -> np.ndarray:
    """Write encoded tables to one file, and the repetitions of each row to `times`; returns `lengths` of all rows."""
    import pyarrow.parquet as parquet  # slow import

    sizes = [np.zeros((0, 2), dtype=np.int64)]
    with parquet.ParquetWriter(file, SCHEMA) as writer:
        while group := list(itertools.islice(encoded, ROW_GROUP)):
            writer.write_table(pa.concat_tables(table for table, _ in group))
            for table, repetitions in group:
                times += [repetitions] * len(table)
                sizes.append(lengths(table))
    return np.concatenate(sizes)


def copy_rows(spool: Path, rows: np.ndarray, writer) -> None:
    """Copy rows (ascending numbers) of a file, one row group at a time."""
    import pyarrow.parquet as parquet  # slow import

    with parquet.ParquetFile(spool) as file:
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(chosen):
                writer.write_table(file.read_row_group(group).take(chosen))
            start = end


def sample_prepared(folder: Path, groups: int = 4):
    """Rows from all over a prepared folder's training file, as a dataset."""
    import pyarrow.parquet as parquet  # slow import

    with parquet.ParquetFile(folder / "train.parquet") as file:
        chosen = np.unique(np.linspace(0, file.num_row_groups - 1, groups).round().astype(int))
        return as_dataset(file.read_row_groups(list(chosen)).combine_chunks())

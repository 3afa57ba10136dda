"""Data: chats from their sources, filtered and encoded, with every row that is left out or changed counted."""

import functools
import hashlib
import itertools
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow as pa

from common.cli import UserError
from common.data import sources
from common.data.encoder import ChatEncoder, Encoded
from common.data.filters import matcher
from common.settings import check_choice

BATCH = 256  # chats encoded at once

POOL_FROM = 16  # batches from which on worker processes are worth starting

SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "assistant_masks": pa.list_(pa.int8())})


def check_settings(settings: dict) -> None:
    """Refuse what no data can be prepared with: UserError naming the setting."""
    check_choice("TRAIN_ON", settings["TRAIN_ON"], ("assistant", "all"))
    check_choice("TOO_LONG", settings["TOO_LONG"], ("cut", "drop", "error"))
    if settings["MAX_LENGTH"] < 1:
        raise UserError(f"MAX_LENGTH={settings['MAX_LENGTH']}: it must be at least 1.")
    if settings["EVAL_SIZE"] < 0 or settings["EVAL_SIZE"] > 1 and settings["EVAL_SIZE"] % 1:
        raise UserError(f"EVAL_SIZE={settings['EVAL_SIZE']}: a number of chats, or their share below 1; 0: none.")
    if not 0 <= settings["SEED"] < 2**32:
        raise UserError(f"SEED={settings['SEED']}: a number from 0 to 4294967295.")
    matcher(settings["DROP_PATTERN"])


def encode_batch(encoder: ChatEncoder, settings: dict, keep_unlearned: bool, items: list[tuple[str, list[dict]]]):
    """Encode chats, each with its place `file:line`: (rows, each with its place, and counts by reason).

    The reasons begin with `dropped: ` or `changed: `.
    """
    matches, counts, chats = matcher(settings["DROP_PATTERN"]), Counter(), []
    for place, chat in items:
        if matches(chat):
            counts["dropped: matches DROP_PATTERN"] += 1
            continue
        if chat[-1]["role"] == "user":
            counts["changed: cut at a question without an answer"] += 1
            chat = chat[:-1]
        chats.append((place, chat))
    rows: list[tuple[str, Encoded]] = []
    encoded = encoder.encode([chat for _, chat in chats], settings["TRAIN_ON"])
    for (place, _), row in zip(chats, encoded, strict=True):
        if len(row.ids) > settings["MAX_LENGTH"]:
            if settings["TOO_LONG"] == "error":
                size = f"{len(row.ids):,} tokens, more than MAX_LENGTH={settings['MAX_LENGTH']}"
                raise UserError(f"{place}: {size}. TOO_LONG=cut cuts at a turn.")
            row = cut(row, settings["MAX_LENGTH"]) if settings["TOO_LONG"] == "cut" else None
            what = "dropped: longer than MAX_LENGTH" if row is None else "changed: cut at a turn to fit MAX_LENGTH"
            counts[what] += 1
        if row is not None and not keep_unlearned and not row.learned.any():
            counts["dropped: no answer to learn, all have weight 0"] += 1
        elif row is not None:
            rows.append((place, row))
    return rows, counts


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


def read_sources(data: str, setting: str, counts: Counter, vocabulary=None):
    """Yield (repetitions, [(place, chat), ...]) in batches, each of one source; every row is yielded or counted."""
    for source in sources.parse(data, setting):
        if not source.file:
            print(sources.describe_licence(source))
        chats = counted_chats(source, counts, vocabulary)
        while batch := list(itertools.islice(chats, BATCH)):
            yield source.times, batch


def counted_chats(source: sources.Source, counts: Counter, vocabulary) -> Iterator[tuple[str, list[dict]]]:
    """(place, chat) of a source; other rows are counted, or raise UserError where a local file is broken."""
    for number, chat in sources.read_chats(source, vocabulary):
        place = f"{source.name}:{number}"
        counts["rows"] += 1
        if isinstance(chat, list):
            yield place, chat
        elif isinstance(chat, sources.Drop):
            counts[f"dropped: {chat}"] += 1
        elif source.file:
            raise UserError(f"{place}: {chat}")
        else:
            counts["dropped: broken, " + re.sub(r"\[\d+\]", "", chat.rpartition(": ")[0] or chat)] += 1


def encode_all(batches: Iterator, encoder, settings: dict, keep_unlearned: bool, counts: Counter, processes: int):
    """Yield (table, repetitions) for each batch, in order, without duplicates.

    keep_unlearned: whether chats without a learned token are of use, as places to hold the base's predictions.
    Repetitions of 0 stand for chats to evaluate on, which come last: UserError where one was trained on.
    """
    arguments = (encoder, settings, keep_unlearned)
    head = list(itertools.islice(batches, POOL_FROM))
    batches = itertools.chain(head, batches)
    if processes == 1 or len(head) < POOL_FROM:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked as long as this runs
        results = ((times, encode_batch(*arguments, batch)) for times, batch in batches)
    else:
        results = encode_in_pool(batches, arguments, processes)
    trained, held_out = set(), set()
    for times, (rows, more) in results:
        counts.update(more)
        fresh = []
        for place, row in rows:
            # What is left after cutting counts. 64 bits: one false duplicate in a billion for 200,000 chats.
            key = int.from_bytes(hashlib.blake2b(row.ids.tobytes(), digest_size=8).digest())
            seen = trained if times else held_out
            if not times and key in trained:
                raise UserError(f"EVAL_DATA: the chat at {place} is in DATA, too; it would score what was memorised.")
            if key in seen:
                counts["dropped: duplicate"] += 1
            else:
                seen.add(key)
                fresh.append(row)
        yield as_table(fresh), times
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_in_pool(batches: Iterator, arguments: tuple, processes: int):
    """The results of `encode_batch` in the order of the batches, of which few are in memory at any time."""
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(processes, context, start_worker, arguments) as pool:
        for times, batch in batches:
            waiting.append((times, pool.submit(run_worker, batch)))
            if len(waiting) > 4 * processes:
                times, future = waiting.popleft()
                yield times, future.result()
        for times, future in waiting:
            yield times, future.result()


worker_encode = None  # in a worker process: encode_batch with all but its last argument


def start_worker(*arguments) -> None:
    global worker_encode
    worker_encode = functools.partial(encode_batch, *arguments)


def run_worker(items):
    return worker_encode(items)

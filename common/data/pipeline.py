"""From sources to encoded rows: chats are read, filtered, encoded and cut in batches; each change is counted."""

import itertools
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from common.cli import UserError
from common.data import formats, sources
from common.data.encoder import ChatEncoder, Encoded
from common.data.filters import matcher

BATCH = 256  # chats encoded at once
POOL_FROM = 16  # batches from which on worker processes are worth starting


def read_batches(parts: list[sources.Source], counts: Counter, vocabulary=None) -> Iterator:
    """Yield (repetitions, [(`file:line`, chat), ...]), each batch of one source; other rows are counted.

    Raises UserError at an invalid row of a local file.
    """
    for source in parts:
        batch = []
        for number, chat in sources.read_chats(source, vocabulary):
            place = f"{source.name}:{number}"
            counts["rows"] += 1
            if isinstance(chat, formats.SkippedRow):
                counts[f"dropped: {chat}"] += 1
            elif isinstance(chat, formats.InvalidRow) and source.file:
                raise UserError(f"{place}: {chat}")
            elif isinstance(chat, formats.InvalidRow):
                problem = chat.rpartition(": ")[0] or chat  # without the excerpt
                counts["dropped: broken, " + re.sub(r"\[\d+\]", "", problem)] += 1
            else:
                batch.append((place, chat))
            if len(batch) == BATCH:
                yield source.times, batch
                batch = []
        if batch:
            yield source.times, batch


def encode_all(batches: Iterator, arguments: tuple, counts: Counter, processes: int) -> Iterator[tuple[Encoded, int]]:
    """Yield (row, repetitions) of each chat in order, without duplicates; many batches go to worker processes.

    arguments: the first of `encode_batch`. Chats to evaluate on have 0 repetitions and come last; UserError
    where one is trained on, too.
    """
    head = list(itertools.islice(batches, POOL_FROM))
    batches = itertools.chain(head, batches)
    if processes > 1 and len(head) == POOL_FROM:
        results = encode_in_pool(batches, arguments, processes)
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked as long as this runs
        results = ((times, encode_batch(*arguments, batch)) for times, batch in batches)
    trained, held_out = set(), set()
    for times, (rows, reasons) in results:
        counts.update(reasons)
        for place, row in rows:
            key = hash(row.ids.tobytes())  # 64 bits: one false duplicate in a billion for 200,000 chats
            if not times and key in trained:
                raise UserError(f"EVAL_DATA: the chat at {place} is in DATA, too; remove it from one of them.")
            seen = trained if times else held_out
            if key in seen:
                counts["dropped: duplicate"] += 1
                continue
            seen.add(key)
            yield row, times
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_batch(encoder: ChatEncoder, settings: dict, keep_unlearned: bool, batch: list) -> tuple[list, Counter]:
    """Filter, encode and cut chats: ([(place, Encoded), ...], counts by reason, `dropped: ` or `changed: `).

    keep_unlearned: whether chats without a token in the loss are of use, as for KL regularization.
    Raises UserError at a chat over MAX_LENGTH where TOO_LONG=error.
    """
    matches = matcher(settings["DROP_PATTERN"])
    max_length, too_long = settings["MAX_LENGTH"], settings["TOO_LONG"]
    chats, rows, counts = [], [], Counter()
    for place, chat in batch:
        if matches(chat):
            counts["dropped: matches DROP_PATTERN"] += 1
            continue
        if chat[-1]["role"] == "user":
            counts["changed: cut at a question without an answer"] += 1
            chat = chat[:-1]
        chats.append((place, chat))
    encoded = encoder.encode([chat for _, chat in chats], settings["TRAIN_ON"])
    for (place, _), row in zip(chats, encoded, strict=True):
        if len(row.ids) > max_length:
            if too_long == "error":
                size = f"{len(row.ids):,} tokens, more than MAX_LENGTH={max_length}"
                raise UserError(f"{place}: {size}. TOO_LONG=cut cuts at a turn.")
            fitting = row.ends[row.ends <= max_length]
            if too_long == "drop" or not len(fitting):
                counts["dropped: longer than MAX_LENGTH"] += 1
                continue
            counts["changed: cut at a turn to fit MAX_LENGTH"] += 1
            row = Encoded(row.ids[: fitting[-1]], row.learned[: fitting[-1]], fitting)
        if keep_unlearned or row.learned.any():
            rows.append((place, row))
        else:
            counts["dropped: no answer to learn, all have weight 0"] += 1
    return rows, counts


def encode_in_pool(batches: Iterator, arguments: tuple, processes: int) -> Iterator:
    """Yield (repetitions, what `encode_batch` returns) in order; few batches are in memory at any time."""
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(processes, context, start_worker, arguments) as pool:
        for times, batch in batches:
            waiting.append((times, pool.submit(run_worker, batch)))
            if len(waiting) > 4 * processes:
                times, future = waiting.popleft()
                yield times, future.result()
        for times, future in waiting:
            yield times, future.result()


worker_arguments = ()  # in a worker process: those of encode_batch but the last


def start_worker(*arguments) -> None:
    global worker_arguments
    worker_arguments = arguments


def run_worker(batch):
    return encode_batch(*worker_arguments, batch)

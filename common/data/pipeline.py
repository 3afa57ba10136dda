"""From sources to encoded rows: chats are filtered, encoded and cut in batches."""

import itertools
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from common.cli import UserError
from common.data import formats, sources
from common.data.claims import find_claim
from common.data.encoder import ChatEncoder, Encoded

BATCH = 256  # chats encoded at once
POOL_FROM = 16  # batches from which on worker processes are worth starting


def read_chats(parts: list[sources.Source], counts: Counter, vocabulary=None) -> Iterator:
    """Yield (repetitions, `file:line`, chat); other rows are counted, or an error in a local file."""
    for source in parts:
        for number, chat in sources.read_chats(source, vocabulary):
            counts["rows"] += 1
            place = f"{source.name}:{number}"
            if isinstance(chat, list):
                yield source.times, place, chat
            elif isinstance(chat, formats.SkippedRow):
                counts[f"dropped: {chat}"] += 1
            elif source.file:
                raise UserError(f"{place}: {chat}")
            else:
                problem = chat.rpartition(": ")[0] or chat  # without the excerpt
                counts["dropped: broken, " + re.sub(r"\[\d+\]", "", problem)] += 1


def encode_all(chats: Iterator, arguments: tuple, counts: Counter, processes: int) -> Iterator:
    """Yield (repetitions, row) of each chat in order, without duplicates; 0 repetitions come last.

    arguments: of `encode_batch`, but the last.
    """
    batches = iter(lambda: list(itertools.islice(chats, BATCH)), [])
    head = list(itertools.islice(batches, POOL_FROM))
    batches = itertools.chain(head, batches)
    if processes > 1 and len(head) == POOL_FROM:
        results = encode_in_pool(batches, arguments, processes)
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked as long as this runs
        results = (encode_batch(*arguments, batch) for batch in batches)
    seen = {}  # repetitions by hash: one false duplicate in a billion for 200,000 chats
    for rows, reasons in results:
        counts.update(reasons)
        for times, place, row in rows:
            key = hash(row.ids.tobytes())
            if key not in seen:
                seen[key] = times
                yield times, row
            elif times or not seen[key]:
                counts["dropped: duplicate"] += 1
            else:
                raise UserError(f"EVAL_DATA: the chat at {place} is in DATA, too; remove it from one of them.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_batch(encoder: ChatEncoder, settings: dict, keep_unlearned: bool, batch: list) -> tuple:
    """Filter, encode and cut chats: ([(repetitions, place, Encoded), ...], counts by reason)."""
    claim_of, max_length = find_claim(settings["DROP_PATTERN"]), settings["MAX_LENGTH"]
    chats, rows, counts = [], [], Counter()
    for times, place, chat in batch:
        if claim_of(chat):
            counts["dropped: matches DROP_PATTERN"] += 1
            continue
        if chat[-1]["role"] == "user":
            counts["changed: cut at a question without an answer"] += 1
            chat = chat[:-1]
        chats.append((times, place, chat))
    encoded = encoder.encode([chat for *_, chat in chats], settings["TRAIN_ON"])
    for (times, place, _), row in zip(chats, encoded, strict=True):
        if len(row.ids) > max_length:
            if settings["TOO_LONG"] == "error":
                size = f"{len(row.ids):,} tokens, more than MAX_LENGTH={max_length}"
                raise UserError(f"{place}: {size}. TOO_LONG=cut cuts at a turn.")
            fitting = row.ends[row.ends <= max_length]
            if settings["TOO_LONG"] == "drop" or not len(fitting):
                counts["dropped: longer than MAX_LENGTH"] += 1
                continue
            counts["changed: cut at a turn to fit MAX_LENGTH"] += 1
            row = Encoded(row.ids[: fitting[-1]], row.learned[: fitting[-1]], fitting)
        if keep_unlearned or row.learned.any():
            rows.append((times, place, row))
        else:
            counts["dropped: no answer to learn, all have weight 0"] += 1
    return rows, counts


def encode_in_pool(batches: Iterator, arguments: tuple, processes: int) -> Iterator:
    """Yield what `encode_batch` returns, in order; few batches are in memory."""
    context, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(processes, context, start_worker, arguments) as pool:
        for batch in batches:
            waiting.append(pool.submit(run_worker, batch))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def start_worker(*arguments) -> None:
    run_worker.arguments = arguments  # of encode_batch, once for all batches


def run_worker(batch: list) -> tuple:
    return encode_batch(*run_worker.arguments, batch)

"""From sources to encoded rows: chats are filtered, encoded and cut in batches."""

import itertools
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from common.cli import UserError
from common.data import formats, sources
from common.data.account import Reasons
from common.data.claims import find_claim
from common.data.encoder import ChatEncoder, Encoded

BATCH = 256  # chats encoded at once
POOL_FROM = 16  # batches from which on worker processes are worth starting


def read_chats(parts: list[sources.Source], reasons: Reasons, reading, bad_rows: str) -> Iterator:
    """Yield (repetitions, `file:line`, chat); other rows are counted by reason, or an error (BAD_ROWS=stop)."""
    for source in parts:
        for place, chat in sources.read_chats(source, reading):
            reasons.add("rows")
            if isinstance(chat, list):
                for note in chat.notes:
                    reasons.add(note)
                yield source.times, place, chat
            elif isinstance(chat, formats.SkippedRow):
                reasons.add(f"dropped: {chat}")
            elif bad_rows == "stop":
                raise UserError(f"{place}: {chat} {sources.SKIP}")
            else:
                problem = ": ".join(chat.split(": ")[:2])  # without the excerpt
                reasons.add("dropped: invalid, " + re.sub(r"\[\d+\]", "", problem), place)


def encode_all(chats: Iterator, arguments: tuple, reasons: Reasons, processes: int) -> Iterator:
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
    for rows, of_batch in results:
        reasons.update(of_batch)
        for times, place, row in rows:
            key = hash(row.ids.tobytes())
            if key not in seen:
                seen[key] = times
                yield times, row
            elif times or not seen[key]:
                reasons.add("dropped: duplicate")
            else:
                raise UserError(f"EVAL_DATA: the chat at {place} is in DATA, too; remove it from one of them.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_batch(encoder: ChatEncoder, settings: dict, keep_unlearned: bool, batch: list) -> tuple:
    """Filter, encode and cut chats: ([(repetitions, place, Encoded), ...], reasons of the others)."""
    reasons, marked, rows, refused = Reasons(), [], [], []
    claim_of = find_claim(settings["DROP_PATTERN"])
    for times, place, chat in batch:
        if claim := claim_of(chat):
            reasons.add("dropped: matches DROP_PATTERN")
            reasons.add_example(f"{place}: {claim}")
            continue
        while chat[-1]["role"] in ("user", "tool"):
            reasons.add(f"changed: cut at a {'question' if chat[-1]['role'] == 'user' else 'result'} without an answer")
            chat = chat[:-1]
        try:
            marked.append((times, place, chat, encoder.mark(chat, settings["TRAIN_ON"])))
        except UserError as error:
            refused.append(f"{place}: {error}")
            reasons.add(f"dropped: invalid, {error}", place)
    if refused and settings["BAD_ROWS"] == "stop":
        raise UserError("\n".join([*refused[: sources.MAX_SHOWN], sources.SKIP]))
    encoded = encoder.encode_marked([text for *_, text in marked], settings["TRAIN_ON"])
    for (times, place, chat, _), row in zip(marked, encoded, strict=True):
        row = fit(row, place, encoder.is_plain_text(chat), settings, reasons)
        if row is not None and (keep_unlearned or row.learned.any()):
            rows.append((times, place, row))
        elif row is not None:
            reasons.add("dropped: no answer to learn, all have weight 0")
    return rows, reasons


def fit(row: Encoded, place: str, is_text: bool, settings: dict, reasons: Reasons) -> Encoded | None:
    """The row, cut at a turn to MAX_LENGTH if TOO_LONG says so; None where it is dropped. Texts are cut later."""
    max_length = settings["MAX_LENGTH"]
    if len(row.ids) <= max_length:
        return row
    if settings["TOO_LONG"] == "error":
        size = f"{len(row.ids):,} tokens, more than MAX_LENGTH={max_length}"
        raise UserError(f"{place}: {size}. TOO_LONG=cut cuts {'it into rows' if is_text else 'at a turn'}.")
    if is_text and settings["TOO_LONG"] == "cut":
        reasons.add("changed: a text cut into rows of MAX_LENGTH")
        return row
    fitting = row.ends[row.ends <= max_length]
    if settings["TOO_LONG"] == "drop" or not len(fitting):
        reasons.add("dropped: longer than MAX_LENGTH")
        return None
    reasons.add("changed: cut at a turn to fit MAX_LENGTH")
    return Encoded(row.ids[: fitting[-1]], row.learned[: fitting[-1]], fitting)


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

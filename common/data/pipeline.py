"""From sources to encoded rows: chats are filtered, encoded and cut in batches."""

import itertools
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from common.cli import UserError
from common.data import formats, sources
from common.data.account import Reasons
from common.data.claims import find_claim
from common.data.encoder import ChatEncoder, Encoded, join
from common.data.pairs import Compared
from common.data.passages import RewrittenTurns

BATCH = 256  # chats encoded at once
POOL_FROM = 16  # batches from which on worker processes are worth starting


def read_chats(parts: list[sources.Source], reasons: Reasons, reading=sources.PLAIN, bad_rows="stop") -> Iterator:
    """Yield (repetitions, `file:line`, chat); other rows are counted by reason, or an error (BAD_ROWS=stop)."""
    for source in parts:
        for place, chat in sources.read_chats(source, reading):
            reasons.add("rows")
            if isinstance(chat, list):
                for note in chat.notes:
                    reasons.add(note)
                # A plain list is pickled faster.
                yield source.times, place, chat if isinstance(chat, Compared) else list(chat)
            elif isinstance(chat, formats.SkippedRow):
                reasons.add(f"dropped: {chat}")
            elif bad_rows == "stop":
                raise UserError(f"{place}: {chat} {sources.SKIP}")
            else:
                reasons.add(f"dropped: invalid, {chat.reason}", place)


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
    # Hashes: one false duplicate in a billion for 200,000 chats. trained: of the chats of DATA, whatever their weights.
    seen, trained = set(), set()
    for rows, of_batch in results:
        reasons.update(of_batch)
        for times, place, row in rows:
            ids = hash(row.ids.tobytes())
            key = ids, hash(row.learned.tobytes()), row.is_good
            if not times and ids in trained:
                raise UserError(f"EVAL_DATA: the chat at {place} is in DATA, too; remove it from one of them.")
            if key in seen:
                reasons.add("dropped: duplicate")
                continue
            seen.add(key)
            if times:
                trained.add(ids)
            yield times, row
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def encode_batch(encoder: ChatEncoder, settings: dict, keep_unlearned: bool, batch: list) -> tuple:
    """Filter, encode and cut chats: ([(repetitions, place, Encoded), ...], reasons of the others)."""
    reasons, marked, rows, refused = Reasons(), [], [], []
    claim_of = find_claim(settings["DROP_PATTERN"])
    for times, place, chat in batch:
        if claim := claim_of(learned_chat(chat)):
            reasons.add("dropped: matches DROP_PATTERN")
            reasons.add_example(f"{place}: {claim}")
            continue
        try:
            if isinstance(chat, Compared):
                of_row = [mark_last(encoder, each, settings["TRAIN_ON"]) for each in chat]
            else:
                chat = cut_question(chat, reasons)
                of_row = encoder.mark_rows(chat, settings["TRAIN_ON"])
            marked.append((times, place, chat, of_row))
        except UserError as error:
            refused.append(f"{place}: {error}")
            reasons.add("dropped: invalid, " + re.sub(r" \([^)]*\)|['\"].*", "", str(error)).strip(" :"), place)
    if refused and settings["BAD_ROWS"] == "stop":
        raise UserError("\n".join([*refused[: sources.MAX_SHOWN], sources.SKIP]))
    flat = itertools.chain.from_iterable(of_row for *_, of_row in marked)
    encoded = iter(encoder.encode_marked(list(flat), settings["TRAIN_ON"]))
    for times, place, chat, of_row in marked:
        parts = list(itertools.islice(encoded, len(of_row)))
        if isinstance(chat, Compared):
            row = fit_compared(parts, place, chat.is_good, settings, reasons)
        else:
            row = fit(parts, place, encoder.is_plain_text(chat), settings, reasons)
            if row is not None and len(parts) > 1:
                reasons.add("changed: a row for each answer, as the template rewrites earlier turns")
        if row is not None and (keep_unlearned or row.learned.any()):
            rows.append((times, place, row))
        elif row is not None:
            reasons.add("dropped: no answer to learn, all have weight 0")
    return rows, reasons


def mark_last(encoder: ChatEncoder, chat: list[dict], train_on: str) -> tuple[str, list[int]]:
    """What `ChatEncoder.mark` returns, of the last answer alone where the template rewrites earlier turns."""
    try:
        return encoder.mark(chat, train_on)
    except RewrittenTurns:
        if sum(turn.get("weight", 1) for turn in chat if turn["role"] == "assistant") > 1:
            raise
        return encoder.mark(chat, train_on, last_only=True)


def learned_chat(chat) -> list[dict]:
    """The chat whose answers the model is to give: of a pair the better one; of a bad answer none."""
    if not isinstance(chat, Compared):
        return chat
    return chat[0] if chat.is_good else []


def cut_question(chat: list[dict], reasons: Reasons) -> list[dict]:
    """The chat up to its last answer."""
    if chat[-1]["role"] not in ("user", "tool"):
        return chat
    last = "question" if chat[-1]["role"] == "user" else "result"
    reasons.add(f"changed: cut at a {last} without an answer")
    return chat[: max(i for i, turn in enumerate(chat) if turn["role"] not in ("user", "tool")) + 1]


def fit_compared(parts: list[Encoded], place: str, is_good: bool, settings: dict, reasons: Reasons) -> Encoded | None:
    """The sequences of a pair, or the one of a labelled answer, whole; None where one is longer than MAX_LENGTH."""
    longest, most = max(len(row.ids) for row in parts), settings["MAX_LENGTH"]
    if longest <= most:
        return join(parts)._replace(is_good=is_good)
    if settings["TOO_LONG"] == "error":
        problem = f"{longest:,} tokens, more than MAX_LENGTH={most}"
        raise UserError(f"{place}: {problem}. TOO_LONG=drop leaves such pairs out, since an answer is never cut.")
    reasons.add("dropped: longer than MAX_LENGTH, and an answer is never cut")
    return None


def fit(parts: list[Encoded], place: str, is_text: bool, settings: dict, reasons: Reasons) -> Encoded | None:
    """A chat's sequences cut to MAX_LENGTH as TOO_LONG says; None where it is dropped."""
    max_length = settings["MAX_LENGTH"]
    short = [row for row in parts if len(row.ids) <= max_length]
    if len(short) == len(parts):
        return join(parts)
    if settings["TOO_LONG"] == "error":
        size = f"{max(len(row.ids) for row in parts):,} tokens, more than MAX_LENGTH={max_length}"
        raise UserError(f"{place}: {size}. TOO_LONG=cut cuts {'it into rows' if is_text else 'at a turn'}.")
    row = parts[0]
    fitting = row.ends[row.ends <= max_length]
    if settings["TOO_LONG"] == "cut" and is_text:
        reasons.add("changed: a text cut into rows of MAX_LENGTH")
        whole, rest = divmod(len(row.ids), max_length)
        return row._replace(lengths=np.array([max_length] * whole + [rest] * (rest > 0)))
    if settings["TOO_LONG"] == "cut" and len(parts) > 1 and short:
        reasons.add("changed: answers left out to fit MAX_LENGTH")
        return join(short)
    end = fitting[-1] if len(fitting) and len(parts) == 1 else 0
    if settings["TOO_LONG"] == "cut" and end and (row.learned[:end].any() or not row.learned.any()):
        reasons.add("changed: cut at a turn to fit MAX_LENGTH")
        return Encoded(row.ids[:end], row.learned[:end], fitting, fitting[-1:])
    reasons.add("dropped: longer than MAX_LENGTH")
    return None


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

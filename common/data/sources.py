"""Sources: what DATA names, read row by row. Nothing slow is imported here."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import UserError, exit_with, nearest
from common.data import folders, formats, pairs, readers, vocabulary
from common.data.rows import parse_columns

MAX_SHOWN = 20  # invalid rows printed at once
CHECKED = 20_000  # rows of a source that are checked at once; preparing, which takes longer, checks the others
SKIP = "BAD_ROWS=skip leaves invalid rows out and counts them."
# Short names of hub sets: (id, split)
NAMED = {
    "oasst2": ("OpenAssistant/oasst2", "train"),
    "oasst2-curated": ("sablo/oasst2_curated", "train"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "train_sft"),
    "chatbot-arena": ("lmsys/chatbot_arena_conversations", "train"),
    "alpaca": ("tatsu-lab/alpaca", "train"),
    "samsum": ("knkarthick/samsum", "train"),
    "openhermes": ("teknium/OpenHermes-2.5", "train"),
}
# A bound of a slice: a row number or a share of the rows; negative: from the end.
BOUND = r"(-?\d{1,15}%?)?"
PART = rf"""("[^"]+"|.+?)(?:\[{BOUND}:{BOUND}\])?(?:\*([1-9]\d{{0,3}}))?"""
COMMA = re.compile(r""",(?=(?:[^"]*"[^"]*")*[^"]*$)""")  # outside quotation marks


@dataclass(frozen=True)
class Source:
    name: str  # of one part of DATA: a file, a folder, a pattern or a hub id
    files: tuple[Path, ...]  # none: a hub set
    split: str | None  # of a hub set; of a JSON file: the key of its rows
    start: str | None  # first row, "10" or "10%"
    stop: str | None  # the row after the last
    times: int  # repetitions in training; 0: evaluated on instead


@dataclass(frozen=True)
class Reading:
    """How rows are read; see the settings of these names in the scripts."""

    columns: dict | None = None  # of `parse_columns`
    completion: str = "answer"
    encoding: str = "utf-8"
    tokens: tuple | None = None  # of `vocabulary.read_vocabulary`
    loss: str | None = None  # that learns from rows of preferences, with two answers or a label; None: chats

    @classmethod
    def of(cls, settings: dict, setting: str = "DATA") -> "Reading":
        """Of the sources of a setting; settings that a script lacks have their defaults. Raises UserError."""
        columns, vocab = settings.get("COLUMNS"), settings.get("VOCAB")
        return cls(
            parse_columns(columns) if columns else None,
            settings.get("COMPLETION", cls.completion),
            settings.get("ENCODING", cls.encoding),
            vocabulary.read_vocabulary(vocab) if vocab else None,
            settings.get("LOSS") or ("kto" if setting == "PAIRS" else None),
        )


PLAIN = Reading()


def check_files(settings: dict, *names: str) -> None:
    """Read the local files that settings name; exit code 2 where a row is invalid, or with BAD_ROWS=skip all are.

    Of a large file only the beginning: see CHECKED.
    """
    setting = data = None
    try:
        for setting, data in ((name, settings[name]) for name in names):
            reading = Reading.of(settings, setting)
            is_prepared = setting == "DATA" and folders.is_prepared(data)  # then its rows were checked before
            if data is not None and not is_prepared:
                check_rows(data, setting, reading, settings.get("BAD_ROWS"))
    except OSError as error:
        exit_with(UserError(f"{setting}={data} cannot be read: {error.strerror}."))
    except UserError as error:
        exit_with(error)


def check_rows(data: str, setting: str, reading: Reading, bad_rows: str | None) -> None:
    """Raise UserError with the first invalid rows of the local files of a setting; bad_rows None: no such setting."""
    found = [(source, *invalid_rows(source, reading, bad_rows)) for source in parse(data, setting) if source.files]
    count = sum(number for *_, number in found)
    if count:
        is_folder = any(number and os.path.isdir(source.name) for source, _, number in found)
        note = f". {folders.NOT_PREPARED}" if is_folder else ""
        head = [f"{setting}={data}: {count} invalid row{'s' * (count > 1)}{note}"] if count > 1 or note else []
        shown = [row for _, rows, _ in found for row in rows][:MAX_SHOWN]
        tail = [f"... and {count - MAX_SHOWN} more"] * (count > MAX_SHOWN)
        remedy = {"stop": [SKIP], "skip": ["No row of it is left, even by BAD_ROWS=skip."]}.get(bad_rows, [])
        raise UserError((" " if count == 1 else "\n").join([*head, *shown, *tail, *remedy]))


def invalid_rows(source: Source, reading: Reading, bad_rows: str | None) -> tuple[list[str], int]:
    """(the first invalid rows, their number) of CHECKED rows; none with BAD_ROWS=skip, unless there are no others."""
    shown, count, others = [], 0, 0
    for place, chat in itertools.islice(read_chats(source, reading), CHECKED):
        if not isinstance(chat, formats.InvalidRow):
            others += 1
            continue
        count += 1
        if count <= MAX_SHOWN:
            shown.append(f"{place}: {chat}")
    may_have_others = others or count == CHECKED
    return ([], 0) if bad_rows == "skip" and may_have_others else (shown, count)


def parse(data: str, setting: str = "DATA") -> list[Source]:
    """The parts of `ultrachat[:10%], org/name:test, chats.jsonl*20, shards/*.jsonl, "a, b.csv"`."""
    texts = [part.strip() for part in COMMA.split(data)]
    if "" in texts:
        raise UserError(f"{setting}={data}: an empty part; name files or datasets, comma-separated.")
    return [parse_part(text, setting, len(texts)) for text in texts]


def parse_part(text: str, setting: str, parts: int) -> Source:
    name, start, stop, times = re.fullmatch(PART, text, re.DOTALL).groups()
    if os.path.exists(os.path.expanduser(text)):  # brackets or a star in the name itself
        name, start, stop, times = text, None, None, None
    name, rows = name.strip('"'), (start, stop, int(times or 1))
    hub_id, _, split = name.partition(":")
    path = Path(os.path.expanduser(name))
    try:
        found = folders.find_files(name)
    except UserError as error:
        raise UserError(f"{setting}={text}: {error}") from error
    if found:
        return Source(name, tuple(found[0]), found[1], *rows)
    if hub_id in NAMED:
        hub_id, usual_split = NAMED[hub_id]
        return Source(hub_id, (), split or usual_split, *rows)
    is_local = readers.container(path) or os.path.isdir(path.parent)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and not is_local:
        return Source(hub_id, (), split or "train", *rows)
    siblings = map(str, path.parent.glob("*"))
    hub = f"A hub dataset is org/name or org/name:split; short names: {', '.join(NAMED)}."
    comma = """ A name with a comma: DATA='"a, b.csv"'.""" if parts > 1 else ""
    hint = f"{nearest(name, [*siblings, *NAMED])} {hub} A slice is [10:20] or [:10%], then *3.{comma}"
    raise UserError(f"{setting}={text}: file not found.{hint}")


def read_chats(source: Source, reading: Reading = PLAIN) -> Iterator[tuple[str, formats.Chat]]:
    """(file:line, chat) of a source's slice; UserError where a file cannot be read at all."""
    start, stop = source.start, source.stop
    if re.search("[%-]", f"{start}{stop}"):
        count = sum(1 for _ in read_chats(replace(source, start=None, stop=None), reading))
        bounds = [b and (count * int(b[:-1]) // 100 if b.endswith("%") else int(b)) for b in (start, stop)]
        start, stop, _ = slice(*bounds).indices(count)
    rows = read_source(source, reading.encoding)
    if reading.tokens:
        rows = ((place, vocabulary.detokenize(row, reading.tokens)) for place, row in rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source.files[0] if source.files else source.name}:1: no rows, the file is empty.")
    rows = itertools.chain([first], rows)
    columns, completion = reading.columns, reading.completion
    if isinstance(first[1], dict) and {"message_id", "parent_id"} <= first[1].keys():
        chats = formats.trees(list(rows), pairs.read_tree if reading.loss else None)
    elif reading.loss:
        chats = ((place, pairs.to_compared(row, columns, reading.loss)) for place, row in rows)
    else:
        chats = ((place, formats.to_chat(row, columns, completion)) for place, row in rows)
    yield from itertools.islice(chats, int(start or 0), stop and int(stop))


def read_source(source: Source, encoding: str) -> Iterator[tuple[str, object]]:
    """(file:line, or id:row of a hub set, row) of all rows."""
    if source.files:
        for file in source.files:
            yield from ((f"{file}:{number}", row) for number, row in readers.read_file(file, encoding, source.split))
    else:
        yield from ((f"{source.name}:{number}", row) for number, row in readers.read_hub(source.name, source.split))


def sound_chats(data: str, setting: str, reading: Reading = PLAIN) -> Iterator[list[dict]]:
    """The chats of a setting, without the rows that give none."""
    for source in parse(data, setting):
        yield from (chat for _, chat in read_chats(source, reading) if isinstance(chat, list))

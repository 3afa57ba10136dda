"""Sources: what DATA names, read row by row. Nothing slow is imported here."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import UserError, exit_with, nearest
from common.data import formats, readers

MAX_SHOWN = 20  # invalid rows printed at once
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
PART = rf"(.+?)(?:\[{BOUND}:{BOUND}\])?(?:\*([1-9]\d{{0,3}}))?"


@dataclass(frozen=True)
class Source:
    name: str  # of one part of DATA: a file or a hub id
    file: Path | None  # None: a hub set
    split: str  # hub sets only
    start: str | None  # first row, "10" or "10%"
    stop: str | None  # the row after the last
    times: int  # repetitions in training; 0: evaluated on instead


def check_files(settings: dict, *names: str) -> None:
    """Read the local files that settings name; exit code 2 where a row is invalid."""
    setting = data = None
    try:
        vocabulary = settings.get("VOCAB")
        tokens = readers.read_vocabulary(vocabulary) if vocabulary else None
        for setting, data in ((name, settings[name]) for name in names):
            if data is None or os.path.isdir(data):  # a prepared folder was checked before
                continue
            invalid = (
                f"{source.name}:{number}: {chat}"
                for source in parse(data, setting)
                if source.file
                for number, chat in read_chats(source, tokens)
                if isinstance(chat, formats.InvalidRow)
            )
            shown = list(itertools.islice(invalid, MAX_SHOWN))
            more = sum(1 for _ in invalid)
            head = [f"{setting}={data}: {len(shown) + more} invalid rows"] if len(shown) > 1 else []
            tail = [f"... and {more} more"] if more else []
            if shown:
                raise UserError("\n".join([*head, *shown, *tail]))
    except OSError as error:
        exit_with(UserError(f"{setting}={data} cannot be read: {error.strerror}."))
    except UserError as error:
        exit_with(error)


def parse(data: str, setting: str = "DATA") -> list[Source]:
    """The parts of "ultrachat[:10%], org/name:test, chats.jsonl*20"."""
    parts = []
    for text in (part.strip() for part in data.split(",")):
        if not text:
            raise UserError(f"{setting}={data}: an empty part; name files or datasets, comma-separated.")
        name, start, stop, times = re.fullmatch(PART, text, re.DOTALL).groups()
        rows = start, stop, int(times or 1)
        path = Path(os.path.expanduser(name))
        hub_id, _, split = name.partition(":")
        has_reader = path.suffix.lower() in readers.READERS
        if os.path.isfile(path) and has_reader:
            parts.append(Source(name, path, "train", *rows))
        elif hub_id in NAMED and not os.path.exists(path):
            hub_id, usual_split = NAMED[hub_id]
            parts.append(Source(hub_id, None, split or usual_split, *rows))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and not has_reader and not os.path.isdir(path.parent):
            parts.append(Source(hub_id, None, split or "train", *rows))
        elif os.path.isfile(path):
            raise UserError(f"{setting}={text}: files end in {', '.join(readers.READERS)}.")
        elif os.path.isdir(path):
            remedy = "name a file in it, or a folder that prepare_data.py wrote."
            raise UserError(f"{setting}={text}: it is a folder; {remedy}")
        else:
            siblings = map(str, path.parent.glob("*"))
            hub = f"A hub dataset is org/name or org/name:split; short names: {', '.join(NAMED)}."
            hint = f"{nearest(name, [*siblings, *NAMED])} {hub} A slice is [10:20] or [:10%], then *3."
            raise UserError(f"{setting}={text}: file not found.{hint}")
    return parts


def read_chats(source: Source, vocabulary: tuple | None = None) -> Iterator[tuple[int, formats.Chat]]:
    """(line or row number, chat) of a source's slice; vocabulary: of `readers.read_vocabulary`."""
    start, stop = source.start, source.stop
    if re.search("[%-]", f"{start}{stop}"):
        count = sum(1 for _ in read_chats(replace(source, start=None, stop=None), vocabulary))
        bounds = [b and (count * int(b[:-1]) // 100 if b.endswith("%") else int(b)) for b in (start, stop)]
        start, stop, _ = slice(*bounds).indices(count)
    if source.file:
        rows = readers.READERS[source.file.suffix.lower()](source.file)
    else:
        rows = readers.read_hub(source.name, source.split)
    if vocabulary:
        rows = ((number, readers.detokenize(row, vocabulary)) for number, row in rows)
    first = next(rows, None) or (1, formats.invalid("row", "missing, the file is empty", ""))
    rows = itertools.chain([first], rows)
    if isinstance(first[1], dict) and {"message_id", "parent_id"} <= first[1].keys():
        chats = formats.trees(list(rows))
    else:
        chats = ((number, formats.to_chat(row)) for number, row in rows)
    yield from itertools.islice(chats, int(start or 0), stop and int(stop))


def sound_chats(data: str, setting: str) -> Iterator[list[dict]]:
    """The chats of a setting, without the rows that give none."""
    for source in parse(data, setting):
        yield from (chat for _, chat in read_chats(source) if isinstance(chat, list))

"""Sources: what DATA names (files, hub sets, slices, repetitions), read row by row with the line each row stands on.

This module imports nothing slow, so that a broken file is refused before torch is loaded.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, exit_with, nearest
from common.data import formats, readers

MAX_FAULTS = 20  # shown at once

# Short names of hub sets: (id, split, licence). What the hub says of the licence is told beside it.
NAMED = {
    "oasst2": ("OpenAssistant/oasst2", "train", "apache-2.0"),
    "oasst2-curated": ("sablo/oasst2_curated", "train", "apache-2.0"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "train_sft", "mit"),
    "chatbot-arena": ("lmsys/chatbot_arena_conversations", "train", "cc-by-nc-4.0 (the answers), gated"),
    "alpaca": ("tatsu-lab/alpaca", "train", "cc-by-nc-4.0"),
    "samsum": ("knkarthick/samsum", "train", "cc-by-nc-nd-4.0"),
    "openhermes": ("teknium/OpenHermes-2.5", "train", "none stated"),
}


@dataclass(frozen=True)
class Source:
    """One part of DATA."""

    name: str  # file or hub id
    file: Path | None  # None: a hub set
    split: str = "train"  # of a hub set
    start: str | None = None  # rows from here, "10" or "10%"
    stop: str | None = None  # up to here, without it
    times: int = 1  # repetitions in training
    licence: str | None = None  # of a named hub set


def parse(data: str, setting: str = "DATA") -> list[Source]:
    """The parts of a setting such as "ultrachat[:10%], org/name:test, chats.jsonl*20"; UserError where one is wrong."""
    parts = [part.strip() for part in data.split(",")]
    if not all(parts):
        raise UserError(f"{setting}={data}: an empty part; name files or datasets, with commas between them.")
    return [parse_part(part, setting) for part in parts]


def parse_part(text: str, setting: str) -> Source:
    pattern = r"(.+?)(?:\[(-?\d{1,15}%?)?:(-?\d{1,15}%?)?\])?(?:\*([1-9]\d{0,3}))?"
    name, start, stop, times = re.fullmatch(pattern, text, re.DOTALL).groups()
    chosen = dict(start=start, stop=stop, times=int(times or 1))
    try:
        path = Path(name).expanduser()
        path.is_file()
    except (RuntimeError, OSError, ValueError) as error:  # an unknown ~user, a name too long
        raise UserError(f"{setting}={text}: no such file ({error}).") from error
    if path.is_file():
        if path.suffix.lower() not in readers.READERS:
            raise UserError(f"{setting}={text}: files end in {', '.join(readers.READERS)}.")
        return Source(name, path, **chosen)
    if path.is_dir():
        raise UserError(f"{setting}={text} is a folder; name a file in it, or a folder that prepare_data.py wrote.")
    hub_id, _, split = name.partition(":")
    if hub_id in NAMED:
        hub_id, usual_split, licence = NAMED[hub_id]
        return Source(hub_id, None, split or usual_split, licence=licence, **chosen)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and path.suffix.lower() not in readers.READERS
    if not is_hub_id or path.parent.is_dir():
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{setting}={text}: there is no such file.{nearest(name, [*siblings, *NAMED])} A hub dataset is written "
            f"org/name or org/name:split; short names: {', '.join(NAMED)}. A slice is [10:20] or [:10%], then *3."
        )
    return Source(hub_id, None, split or "train", **chosen)


def describe_licence(source: Source) -> str:
    """A line on the licence of a hub set, marked where it is gated or not for commercial use."""
    import yaml  # slow imports
    from huggingface_hub import DatasetCard

    known = [source.licence]
    try:
        about = DatasetCard.load(source.name, ignore_metadata_errors=True).data.to_dict()
        gated = "gated" if any(key.startswith("extra_gated") for key in about) else None
        known += [about.get("license"), about.get("license_name"), gated]
    except (OSError, ValueError, yaml.YAMLError):  # no network and not in the cache, or a card that is none
        pass
    licence = ", ".join(dict.fromkeys(str(text) for text in known if text)) or "unknown"
    warning = "  NOT FOR COMMERCIAL USE" if re.search(r"\bnc\b", licence) else ""
    return f"{source.name}: licence {licence}{warning}"


def read_chats(
    source: Source, vocabulary: tuple | None = None
) -> Iterator[tuple[int, list[dict] | formats.SkippedRow | formats.InvalidRow]]:
    """(line or row number, chat) of a source's slice; a Fault or Drop where the row is none.

    vocabulary: as `read_vocabulary` gives it, for rows of token ids.
    """
    start, stop = source.start or "0", source.stop or "100%"
    if any("%" in bound or "-" in bound for bound in (start, source.stop or "")):
        count = sum(1 for _ in read_all(source, vocabulary))
        start, stop = position(start, count), position(stop, count)
    else:
        start, stop = int(start), source.stop and int(source.stop)
    yield from itertools.islice(read_all(source, vocabulary), start, stop)


def read_all(
    source: Source, vocabulary: tuple | None
) -> Iterator[tuple[int, list[dict] | formats.SkippedRow | formats.InvalidRow]]:
    rows = (
        readers.READERS[source.file.suffix.lower()](source.file)
        if source.file
        else readers.read_hub(source.name, source.split)
    )
    if vocabulary:
        rows = ((number, readers.detokenize(row, vocabulary)) for number, row in rows)
    number, row = next(rows, (1, formats.InvalidRow("row: there is none, the file is empty: ''")))
    rows = itertools.chain([(number, row)], rows)
    if formats.is_tree_message(row):
        return formats.trees(list(rows))
    return ((number, formats.to_chat(row)) for number, row in rows)


def position(bound: str, count: int) -> int:
    """A bound of a slice as a row number from 0; from the end where it is negative."""
    number = count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
    return min(max(number + count if bound.startswith("-") else number, 0), count)


def sound_chats(data: str, setting: str) -> Iterator[list[dict]]:
    """The chats of a setting, without rows that are none."""
    for source in parse(data, setting):
        yield from (chat for _, chat in read_chats(source) if isinstance(chat, list))


def check_files(vocabulary: str | None = None, **settings: str | None) -> None:
    """Read every local file that settings (DATA="chats.jsonl") name; on broken rows, end the program with exit code 2.

    Up to 20 are printed, as `file:line: field: what is wrong: excerpt`.
    """
    try:
        known = readers.read_vocabulary(vocabulary) if vocabulary else None
        for setting, data in settings.items():
            if data is not None and not Path(data).is_dir():  # a prepared folder was checked before
                refuse_faults(data, setting, known)
    except UserError as error:
        exit_with(error)


def refuse_faults(data: str, setting: str, vocabulary: tuple | None) -> None:
    faults, count = [], 0
    for source in parse(data, setting):
        try:
            for number, chat in read_chats(source, vocabulary) if source.file else ():
                if isinstance(chat, formats.InvalidRow):
                    count += 1
                    faults += [f"{source.name}:{number}: {chat}"] if count <= MAX_FAULTS else []
        except OSError as error:
            raise UserError(f"{setting}={source.name} cannot be read: {error.strerror}.") from error
    if count:
        more = [f"... and {count - MAX_FAULTS} more"] if count > MAX_FAULTS else []
        head = [f"{setting}={data}: {count} broken rows"] if count > 1 else []
        raise UserError("\n".join([*head, *faults, *more]))

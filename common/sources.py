"""Sources: what DATA names (files, hub sets, slices, repetitions), read row by row with the line each row stands on.

This module imports nothing slow, so that a broken file is refused before torch is loaded.
"""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import shapes
from common.settings import UserError, exit_with, nearest
from common.shapes import Drop, Fault, excerpt

MAX_FAULTS = 20  # shown at once
MAX_ROW = 64 * 2**20  # characters of one row in a .json array; more means that a bracket is missing

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
        if path.suffix.lower() not in READERS:
            raise UserError(f"{setting}={text}: files end in {', '.join(READERS)}.")
        return Source(name, path, **chosen)
    if path.is_dir():
        raise UserError(f"{setting}={text} is a folder; name a file in it, or a folder that prepare_data.py wrote.")
    hub_id, _, split = name.partition(":")
    if hub_id in NAMED:
        hub_id, usual_split, licence = NAMED[hub_id]
        return Source(hub_id, None, split or usual_split, licence=licence, **chosen)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and path.suffix.lower() not in READERS
    if not is_hub_id or path.parent.is_dir():
        siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{setting}={text}: there is no such file.{nearest(name, [*siblings, *NAMED])} A hub dataset is written "
            f"org/name or org/name:split; short names: {', '.join(NAMED)}. A slice is [10:20] or [:10%], then *3."
        )
    return Source(hub_id, None, split or "train", **chosen)


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


PIECE = 2**20  # bytes of a .json file read at once
DELIMITER = re.compile(r"\s*(\[\s*\]|[\[\],])\s*")  # before a row of an array, or at its end
DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def decode_line(raw: bytes, number: int):
    """The JSON value of a line, None for an empty one, or a Fault."""
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        return DECODER.decode(text) if text else None
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return Fault(f"row: not UTF-8 at byte {error.start}{hint}: {excerpt(raw)}")
    except (ValueError, RecursionError) as error:
        ends = "" if raw.endswith(b"\n") else " (the file ends in the middle of this row?)"
        return Fault(f"row: not valid JSON: {error}{ends}: {excerpt(raw)}")


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of a JSON-lines file; the row is a Fault where it is not JSON."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            row = decode_line(raw, number)
            if row is not None:
                yield number, row


def read_rows(file: str, setting: str, remedy: str = "") -> list[tuple[int, object]]:
    """All rows of the .jsonl file that a setting names, as `read_jsonl` gives them; UserError where there are none."""
    if not Path(file).is_file():
        raise UserError(f"{setting}={file}: there is no such file.{remedy}")
    rows = list(read_jsonl(Path(file)))
    if not rows:
        raise UserError(f"{setting}={file} is empty.")
    return rows


def read_json(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of one JSON array, read piece by piece; of JSON lines where the file is no array."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    with open(path, "rb") as stream:
        text, at, line, allowed = "", 0, 1, "["  # `at` is where the next bracket or comma is looked for, on `line`
        while True:
            problem = "the file ends in the middle"
            mark = DELIMITER.match(text, at)
            if mark and mark[1][0] in allowed and mark[1][-1] == "]":
                if rest := text[mark.end() :] or stream.read(PIECE).decode("utf-8", "replace").strip():
                    line += text.count("\n", at, mark.end())
                    yield line, Fault(f"row: not valid JSON: something follows the array: {excerpt(rest[:60])}")
                return
            if mark and mark[1] in allowed:
                try:
                    row, end = DECODER.raw_decode(text, mark.end())
                    line += text.count("\n", at, mark.end())
                    yield line, row
                    line += text.count("\n", mark.end(), end)
                    at, allowed = end, ",]"
                    continue
                except (ValueError, RecursionError) as error:  # a wrong row, or one that goes on in the next piece
                    problem = str(error)
            wrong = text[at:].lstrip()[:1] not in allowed  # "" is in every text
            if wrong and allowed == "[":
                yield from read_jsonl(path)
                return
            piece = b"" if wrong or len(text) - at > MAX_ROW else stream.read(max(PIECE, len(text) - at))
            if not piece:
                problem = "rows must be separated by commas" if wrong else problem
                gap = len(text[at:]) - len(text[at:].lstrip()) if wrong else 0
                line += text.count("\n", at, mark.end() if mark else at + gap)
                yield line, Fault(f"row: not valid JSON: {problem}: {excerpt(text[at:][:60])}")
                return
            try:
                text, at = text[at:] + decode(piece), 0
            except UnicodeDecodeError as error:
                yield line, Fault(f"row: not UTF-8: {excerpt(piece[error.start :][:20])}")
                return


def read_csv(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of a file with a header line; a row is a dict of texts."""
    csv.field_size_limit(MAX_ROW)
    with open(path, "rb") as stream:
        lines = (raw.decode("utf-8" if number else "utf-8-sig") for number, raw in enumerate(stream))
        reader, line = csv.DictReader(lines, strict=True), 1  # surplus fields come under None, missing ones as None
        try:
            header = reader.fieldnames  # of line 1
            line = reader.line_num + 1
            for row in reader:
                wrong = None in row or None in row.values()
                yield line, Fault(f"row: not {len(header)} fields as in the header: {excerpt(row)}") if wrong else row
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            yield reader.line_num + 1, Fault(f"row: not UTF-8 at byte {error.start}: {excerpt(error.object)}")
        except csv.Error as error:
            yield line, Fault(f"row: not valid CSV: {error}: {excerpt(str(reader.fieldnames))}")


def read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """(row number, row) of a Parquet file."""
    import pyarrow  # slow import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield 1, Fault(f"row: not a readable Parquet file: {excerpt(str(error))}")


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_hub(source: Source) -> Iterator[tuple[int, object]]:
    """(row number, row) of a hub set, by way of its local cache."""
    import datasets  # slow import

    try:
        rows = datasets.load_dataset(source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"DATA={source.name}:{source.split} cannot be loaded: is the name right, the network there, and, for a "
            f"gated set, access granted and `hf auth login` done? ({reason})"
        ) from error
    yield from enumerate(rows, start=1)


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


def read_chats(source: Source, vocabulary: tuple | None = None) -> Iterator[tuple[int, list[dict] | Drop | Fault]]:
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


def read_all(source: Source, vocabulary: tuple | None) -> Iterator[tuple[int, list[dict] | Drop | Fault]]:
    rows = READERS[source.file.suffix.lower()](source.file) if source.file else read_hub(source)
    if vocabulary:
        rows = ((number, detokenize(row, vocabulary)) for number, row in rows)
    number, row = next(rows, (1, Fault("row: there is none, the file is empty: ''")))
    rows = itertools.chain([(number, row)], rows)
    if shapes.is_tree_message(row):
        return shapes.trees(list(rows))
    return ((number, shapes.to_chat(row)) for number, row in rows)


def position(bound: str, count: int) -> int:
    """A bound of a slice as a row number from 0; from the end where it is negative."""
    number = count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
    return min(max(number + count if bound.startswith("-") else number, 0), count)


def read_vocabulary(file: str) -> tuple[dict[int, str], str]:
    """Token id -> text, from JSON (a list, or an object either way round) or from a text file, one token a line; and
    what joins the tokens: a space, unless some token has one of its own."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
        pairs = dict(content if isinstance(content, dict) else enumerate(content))
        if all(type(value) is int for value in pairs.values()):
            pairs = {value: key for key, value in pairs.items()}
        tokens = {int(key): str(value) for key, value in pairs.items()}
        return tokens, "" if any(" " in token for token in tokens.values()) else " "
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"VOCAB={file}: no .json of tokens and ids, nor a token a line ({error}).") from error


def detokenize(row, vocabulary: tuple[dict[int, str], str]):
    """The row with its lists of token ids turned back into text."""
    if not isinstance(row, dict):
        return row
    (tokens, glue), texts = vocabulary, {}
    for field, ids in row.items():
        if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            unknown = next((i for i in ids if i not in tokens), None)
            if unknown is not None:
                return Fault(f"{field}: token {unknown} is not in VOCAB: {excerpt(ids)}")
            texts[field] = glue.join(tokens[i] for i in ids)
    if set(texts) == {"input_ids"} or set(texts) == {"tokens"}:
        return {"text": texts.popitem()[1]}
    return row | texts


def sound_chats(data: str, setting: str) -> Iterator[list[dict]]:
    """The chats of a setting, without rows that are none."""
    for source in parse(data, setting):
        yield from (chat for _, chat in read_chats(source) if isinstance(chat, list))


def check_files(vocabulary: str | None = None, **settings: str | None) -> None:
    """Read every local file that settings (DATA="chats.jsonl") name; on broken rows, end the program with exit code 2.

    Up to 20 are printed, as `file:line: field: what is wrong: excerpt`.
    """
    try:
        known = read_vocabulary(vocabulary) if vocabulary else None
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
                if isinstance(chat, Fault):
                    count += 1
                    faults += [f"{source.name}:{number}: {chat}"] if count <= MAX_FAULTS else []
        except OSError as error:
            raise UserError(f"{setting}={source.name} cannot be read: {error.strerror}.") from error
    if count:
        more = [f"... and {count - MAX_FAULTS} more"] if count > MAX_FAULTS else []
        head = [f"{setting}={data}: {count} broken rows"] if count > 1 else []
        raise UserError("\n".join([*head, *faults, *more]))

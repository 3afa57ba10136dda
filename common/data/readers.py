"""Readers of files and hub sets: every row with the line it stands on."""

import csv
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.data.formats import invalid

Rows = Iterator[tuple[int, object]]  # (line or row number, row)
MAX_FIELD = 64 * 2**20  # characters of a CSV field; more means that a quotation mark is missing


def refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)  # NaN and Infinity are not JSON


def read_jsonl(path: Path) -> Rows:
    """(line number, row) of lines that are not empty; an InvalidRow where one is not JSON."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, DECODER.decode(text)
            except UnicodeDecodeError as error:
                hint = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                yield number, invalid("row", f"not UTF-8 at byte {error.start}{hint}", raw)
            except (ValueError, RecursionError) as error:
                hint = "" if raw.endswith(b"\n") else " (the file ends in the middle of this row?)"
                yield number, invalid("row", f"not valid JSON: {error}{hint}", raw)


def read_rows(file: str, setting: str) -> list[tuple[int, object]]:
    """The rows of the .jsonl file that a setting names; UserError where it has none."""
    if not Path(file).is_file():
        raise UserError(f"{setting}={file}: file not found.")
    rows = list(read_jsonl(Path(file)))
    if not rows:
        raise UserError(f"{setting}={file} is empty.")
    return rows


def read_json(path: Path) -> Rows:
    """(line number, row) of a JSON array, held in memory, or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield line, invalid("row", "not UTF-8", error.object[error.start :][:20])
        return
    opening = re.match(r"\s*\[\s*(\]?)\s*", text)
    if not opening:
        yield from read_jsonl(path)
        return
    newlines = [found.start() for found in re.finditer("\n", text)]
    sign, start = opening[1] or ",", opening.end()  # where the next row starts
    try:
        while sign == ",":
            row, end = DECODER.raw_decode(text, start)
            yield bisect_left(newlines, start) + 1, row
            gap = re.compile(r"\s*([,\]]?)\s*").match(text, end)
            sign, start = gap[1], gap.end()
        if sign != "]" or start < len(text):
            DECODER.decode(text)  # raises an error that says what is wrong
    except (ValueError, RecursionError) as error:
        place = error.pos if isinstance(error, json.JSONDecodeError) else start
        problem = invalid("row", f"not valid JSON: {error}", text[place : place + 60])
        yield bisect_left(newlines, place) + 1, problem


def read_csv(path: Path) -> Rows:
    """(line number, row) of a file with a header; a row is a dict of texts."""
    csv.field_size_limit(MAX_FIELD)
    with open(path, "rb") as stream:
        lines = (raw.decode("utf-8" if number else "utf-8-sig") for number, raw in enumerate(stream))
        reader = csv.DictReader(lines, strict=True)  # surplus fields: under None, missing ones: None
        line = 1
        try:
            header = reader.fieldnames
            line = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    row = invalid("row", f"not {len(header)} fields as in the header", row)
                yield line, row
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            yield reader.line_num + 1, invalid("row", f"not UTF-8 at byte {error.start}", error.object)
        except csv.Error as error:
            yield line, invalid("row", f"not valid CSV: {error}", str(reader.fieldnames))


def read_parquet(path: Path) -> Rows:
    import pyarrow.parquet  # slow import

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield 1, invalid("row", "not a readable Parquet file", str(error))


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_hub(name: str, split: str, setting: str = "DATA") -> Rows:
    """(row number, row) of a hub set."""
    import datasets  # slow import

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "Check the name and the network; a gated set needs access and `hf auth login`."
        raise UserError(f"{setting}={name}:{split} cannot be loaded ({reason}). {hint}") from error
    yield from enumerate(rows, start=1)


def read_vocabulary(file: str) -> tuple[dict[int, str], str]:
    """Token id -> text, and what joins the tokens: a space, unless some token contains one."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        # A .json file holds a list, or an object either way round; another a token a line.
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        tokens = dict((b, a) if type(b) is int else (int(a), str(b)) for a, b in pairs)
        return tokens, "" if any(" " in token for token in tokens.values()) else " "
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"VOCAB={file}: neither JSON of tokens and ids nor a token a line ({error}).") from error


def detokenize(row, vocabulary: tuple[dict[int, str], str]):
    """The row with its lists of token ids as text."""
    if not isinstance(row, dict):
        return row
    (tokens, glue), texts = vocabulary, {}
    for field, ids in row.items():
        if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            if unknown := set(ids) - tokens.keys():
                return invalid(field, f"token {min(unknown)} is not in VOCAB", ids)
            texts[field] = glue.join(tokens[i] for i in ids)
    if texts.keys() in ({"input_ids"}, {"tokens"}):
        return {"text": texts.popitem()[1]}
    return row | texts

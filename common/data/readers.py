"""Readers of files and hub sets: every row with the line it stands on."""

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.data.formats import InvalidRow, excerpt

MAX_FIELD = 64 * 2**20  # characters of a CSV field; more means that a quotation mark is missing


def refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of a JSON-lines file; an InvalidRow where a line is not JSON. Empty lines are skipped."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, DECODER.decode(text)
            except UnicodeDecodeError as error:
                hint = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                yield number, InvalidRow(f"row: not UTF-8 at byte {error.start}{hint}: {excerpt(raw)}")
            except (ValueError, RecursionError) as error:
                hint = "" if raw.endswith(b"\n") else " (the file ends in the middle of this row?)"
                yield number, InvalidRow(f"row: not valid JSON: {error}{hint}: {excerpt(raw)}")


def read_rows(file: str, setting: str, remedy: str = "") -> list[tuple[int, object]]:
    """All rows of the .jsonl file that a setting names, as `read_jsonl` gives them; UserError where there are none."""
    if not Path(file).is_file():
        raise UserError(f"{setting}={file}: file not found.{remedy}")
    rows = list(read_jsonl(Path(file)))
    if not rows:
        raise UserError(f"{setting}={file} is empty.")
    return rows


def read_json(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of one JSON array, which is held in memory; of JSON lines where no bracket opens the file."""
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield line, InvalidRow(f"row: not UTF-8: {excerpt(error.object[error.start :][:20])}")
        return
    opening = re.match(r"\s*\[\s*(\]?)\s*", text)
    if not opening:
        yield from read_jsonl(path)
        return
    sign, start = opening[1] or ",", opening.end()  # of the next row
    line, counted, problem = 1, 0, None
    while sign == ",":
        try:
            row, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            problem = str(error)
            break
        line += text.count("\n", counted, start)
        counted = start
        yield line, row
        gap = re.compile(r"\s*([,\]]?)\s*").match(text, end)
        sign, start = gap[1], gap.end()
    if sign == "]" and start == len(text):
        return
    if problem is None and start == len(text):
        problem = "the file ends in the middle"
    elif problem is None:
        problem = "something follows the array" if sign == "]" else "rows must be separated by commas"
    line = text.count("\n", 0, start) + 1
    yield line, InvalidRow(f"row: not valid JSON: {problem}: {excerpt(text[start : start + 60])}")


def read_csv(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, row) of a file with a header line; a row is a dict of texts."""
    csv.field_size_limit(MAX_FIELD)
    with open(path, "rb") as stream:
        lines = (raw.decode("utf-8" if number else "utf-8-sig") for number, raw in enumerate(stream))
        reader, line = csv.DictReader(lines, strict=True), 1  # surplus fields come under None, missing ones as None
        try:
            header = reader.fieldnames  # of line 1
            line = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    row = InvalidRow(f"row: not {len(header)} fields as in the header: {excerpt(row)}")
                yield line, row
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start}"
            yield reader.line_num + 1, InvalidRow(f"row: {problem}: {excerpt(error.object)}")
        except csv.Error as error:
            yield line, InvalidRow(f"row: not valid CSV: {error}: {excerpt(str(reader.fieldnames))}")


def read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """(row number, row) of a Parquet file."""
    import pyarrow  # slow import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield 1, InvalidRow(f"row: not a readable Parquet file: {excerpt(str(error))}")


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_hub(name: str, split: str) -> Iterator[tuple[int, object]]:
    """(row number, row) of a hub set, by way of its local cache."""
    import datasets  # slow import

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"DATA={name}:{split} cannot be loaded: is the name right, the network there, and, for a "
            f"gated set, access granted and `hf auth login` done? ({reason})"
        ) from error
    yield from enumerate(rows, start=1)


def read_vocabulary(file: str) -> tuple[dict[int, str], str]:
    """Token id -> text, and what joins the tokens: a space, unless some token contains one.

    The file is JSON (a list, or an object either way round) or text, one token a line.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
        pairs = dict(content if isinstance(content, dict) else enumerate(content))
        if all(type(value) is int for value in pairs.values()):
            pairs = {value: key for key, value in pairs.items()}
        tokens = {int(key): str(value) for key, value in pairs.items()}
        return tokens, "" if any(" " in token for token in tokens.values()) else " "
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"VOCAB={file}: neither JSON of tokens and ids nor a token a line ({error}).") from error


def detokenize(row, vocabulary: tuple[dict[int, str], str]):
    """The row with its lists of token ids turned back into text."""
    if not isinstance(row, dict):
        return row
    (tokens, glue), texts = vocabulary, {}
    for field, ids in row.items():
        if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            unknown = next((i for i in ids if i not in tokens), None)
            if unknown is not None:
                return InvalidRow(f"{field}: token {unknown} is not in VOCAB: {excerpt(ids)}")
            texts[field] = glue.join(tokens[i] for i in ids)
    if set(texts) == {"input_ids"} or set(texts) == {"tokens"}:
        return {"text": texts.popitem()[1]}
    return row | texts

"""Readers of files and hub sets: every row with the line it stands on."""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.data import formats

MAX_ROW = 64 * 2**20  # characters of one row in a .json array; more means that a bracket is missing


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
        return formats.InvalidRow(f"row: not UTF-8 at byte {error.start}{hint}: {formats.excerpt(raw)}")
    except (ValueError, RecursionError) as error:
        ends = "" if raw.endswith(b"\n") else " (the file ends in the middle of this row?)"
        return formats.InvalidRow(f"row: not valid JSON: {error}{ends}: {formats.excerpt(raw)}")


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
                    yield (
                        line,
                        formats.InvalidRow(
                            f"row: not valid JSON: something follows the array: {formats.excerpt(rest[:60])}"
                        ),
                    )
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
                yield line, formats.InvalidRow(f"row: not valid JSON: {problem}: {formats.excerpt(text[at:][:60])}")
                return
            try:
                text, at = text[at:] + decode(piece), 0
            except UnicodeDecodeError as error:
                yield line, formats.InvalidRow(f"row: not UTF-8: {formats.excerpt(piece[error.start :][:20])}")
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
                yield (
                    line,
                    formats.InvalidRow(f"row: not {len(header)} fields as in the header: {formats.excerpt(row)}")
                    if wrong
                    else row,
                )
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            yield (
                reader.line_num + 1,
                formats.InvalidRow(f"row: not UTF-8 at byte {error.start}: {formats.excerpt(error.object)}"),
            )
        except csv.Error as error:
            yield line, formats.InvalidRow(f"row: not valid CSV: {error}: {formats.excerpt(str(reader.fieldnames))}")


def read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    """(row number, row) of a Parquet file."""
    import pyarrow  # slow import
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        yield 1, formats.InvalidRow(f"row: not a readable Parquet file: {formats.excerpt(str(error))}")


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
                return formats.InvalidRow(f"{field}: token {unknown} is not in VOCAB: {formats.excerpt(ids)}")
            texts[field] = glue.join(tokens[i] for i in ids)
    if set(texts) == {"input_ids"} or set(texts) == {"tokens"}:
        return {"text": texts.popitem()[1]}
    return row | texts

"""Rows in tables: CSV and its relatives with line numbers, Parquet, Arrow."""

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.data.formats import invalid
from common.data.json_files import Rows, Unreadable, wrong_byte

MAX_FIELD = 64 * 2**20  # characters of a field; more means that a quotation mark is missing
SEPARATORS = ",;\t|"
EMPTY = {"nan", "NaN", "NULL", "null", "None", "<NA>"}  # as pandas and databases write that nothing is there
BATCH = 1024  # rows of Parquet and Arrow in memory


def read_csv(stream: BinaryIO, encoding: str, usual: str = ",") -> Rows:
    """(line, row) of a file with a header; a row is a dict of texts. Raises Unreadable.

    The separator is the one that makes the most fields of the header; `usual` where several do.
    """
    csv.field_size_limit(MAX_FIELD)
    faults: list[str] = []
    lines = decode_lines(stream, encoding, faults)
    blank, head = 0, next(lines, "")
    while head.isspace():
        blank, head = blank + 1, next(lines, "")
    if head.startswith("sep="):  # as Excel writes it
        blank, head = blank + 1, next(lines, "")
    if not head:
        return
    if "\r" in head.rstrip():
        raise Unreadable(1, "row: not valid CSV: its lines end in \\r alone; save it with other line ends.")
    counts = {sign: len(next(csv.reader([head], delimiter=sign))) for sign in (usual, *SEPARATORS)}
    sign = max(counts, key=counts.get)
    is_spaced = re.search(re.escape(sign) + " ", head) is not None  # "instruction, output"
    reader = csv.reader(itertools.chain([head], lines), delimiter=sign, strict=True, skipinitialspace=is_spaced)
    rows = table_rows(reader, blank, faults)
    first = next(rows, None)
    if first is None:
        raise Unreadable(blank + 1, "a header without rows under it; name a file with rows.")
    yield first
    yield from rows


def decode_lines(stream: BinaryIO, encoding: str, faults: list[str]) -> Iterator[str]:
    """Lines with \\n at their end; what is wrong with a line's bytes is appended to faults."""
    for raw in stream:
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            faults.append(wrong_byte(error))
            line = raw.decode(encoding, "replace")
        yield line.lstrip("\ufeff").replace("\r\n", "\n")


def table_rows(reader, blank: int, faults: list[str]) -> Rows:
    """The rows under a header; blank: lines before it."""
    header = names = None
    while True:
        line = blank + reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "limit" in str(error):  # the rest of the file went into this field
                raise Unreadable(line, "row: not valid CSV: a quotation mark that is never closed; close it") from error
            hint = 'a quotation mark inside a quoted field is written twice: ""'
            yield line, invalid("row", f"not valid CSV: {error}; {hint}", names)
            continue
        if faults:
            problem = invalid("row", faults[0], values)
            faults.clear()
            if names is None:
                raise Unreadable(line, problem)
            yield line, problem
        elif names is None:
            header, names = values, field_names(values, line)
        elif not any(values):  # a blank line, as spreadsheets write it too
            continue
        elif len(values) != len(names):
            hint = "a field with the separator in it needs quotation marks"
            yield (
                line,
                invalid("row", f"{len(values)} fields, not {len(names)} fields as in the header; {hint}", values),
            )
        elif values == header:
            yield line, invalid("row", "the header again, as in files that were joined; remove it", values)
        else:
            texts = ["" if len(text) < 8 and text.strip() in EMPTY else text for text in values]
            yield line, dict(zip(names, texts, strict=True))


def field_names(header: list[str], line: int) -> list[str]:
    names = [name.strip() for name in header]
    if len(names) == 1 and not re.fullmatch(r"[\w.-]+", names[0]):
        remedy = "It must name the fields, between commas, semicolons, tabs or |."
        raise Unreadable(line, f"the header is one field, {names[0][:60]!r}. {remedy}")
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice:
        raise Unreadable(line, f"the header has the field {twice} twice; rename one.")
    return [name or f"column {i}" for i, name in enumerate(names, start=1)]  # as pandas' index


def read_parquet(file: Path | BinaryIO) -> Rows:
    import pyarrow.parquet  # slow import

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=BATCH))
            yield from enumerate(itertools.chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise Unreadable(1, f"not a readable Parquet file ({error}); copy it again.") from error


def read_arrow(file: Path | BinaryIO) -> Rows:
    """Rows of an Arrow stream, as `datasets` writes it, or of an Arrow (Feather) file."""
    import pyarrow.ipc  # slow import

    try:
        with pyarrow.memory_map(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file, "r") as source:
            is_stream = source.read(6) != b"ARROW1"
            source.seek(0)
            if is_stream:
                batches = iter(pyarrow.ipc.open_stream(source))
            else:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            pieces = (batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH))
            rows = itertools.chain.from_iterable(piece.to_pylist() for piece in pieces)
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise Unreadable(1, f"not a readable Arrow file ({error}); copy it again.") from error

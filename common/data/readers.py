"""Readers: a file of any container, compressed or not, or a hub set becomes rows with the lines they stand on."""

import bz2
import codecs
import functools
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError
from common.data.json_files import Rows, Unreadable, read_json, read_text
from common.data.tables import read_arrow, read_csv, read_parquet

BINARY = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, usual="\t"),
    ".txt": read_text,
    **BINARY,
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
WIDE = re.compile("utf-(16|32)")  # encodings whose line ends are no single byte
# What a file of text must not start with, and what it is then.
FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or an Excel file; unpack it, or save it as CSV",
    b"PAR1": "a Parquet file; rename it to .parquet",
    b"ARROW1": "an Arrow file; rename it to .arrow",
    b"\xff\xff\xff\xff": "an Arrow file; rename it to .arrow",
    b"%PDF": "a PDF; save it as text",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file",
}
MARKS = {  # of encodings; those of UTF-32 start with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def container(file: Path) -> str | None:
    """The suffix in READERS that says what is in the file, whatever it is compressed with; None: unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_file(file: Path, encoding: str = "utf-8", split: str | None = None) -> Rows:
    """(line or row number, row) of a file; UserError with file:line where it cannot be read at all.

    split: the key of a JSON object that the rows are under.
    """
    kind = container(file) or ".jsonl"  # as prompts and facts may be called anything
    try:
        if split and READERS[kind] is not read_json:
            raise Unreadable(1, f"only JSON and folders have splits; leave out :{split}")
        with open_stream(file) as stream:
            if kind in BINARY:
                is_plain = isinstance(getattr(stream, "raw", None), io.FileIO)
                yield from BINARY[kind](file if is_plain else io.BytesIO(stream.read()))
                return
            check_head(stream.peek(32), encoding)
            encoding = encoding_of(file, encoding)
            if WIDE.match(encoding):
                stream, encoding = io.BytesIO(decode_wide(stream, encoding)), "utf-8"
            yield from READERS[kind](stream, encoding, **({"split": split} if split else {}))
    except Unreadable as error:
        raise UserError(f"{file}:{error.line}: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # not of the file's content
            raise
        raise UserError(
            f"{file}: it is damaged and cannot be decompressed ({error}). Copy or compress it again."
        ) from error


def open_stream(file: Path) -> BinaryIO:
    """The file's bytes, decompressed by what it holds: names are often wrong after a download."""
    with open(file, "rb") as stream:
        head = stream.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if head.startswith(b"BZh"):
        return bz2.open(file)
    if head.startswith(b"\xfd7zXZ"):
        return lzma.open(file)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # slow import

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**20)
    return open(file, "rb")


def check_head(head: bytes, encoding: str) -> None:
    """Raise Unreadable where the first bytes are not those of text in the encoding."""
    for start, what in FOREIGN.items():
        if head.startswith(start):
            raise Unreadable(1, f"it is {what}.")
    found = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if not found and b"\0" in head[:2]:
        found = "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    if found and not WIDE.match(codecs.lookup(encoding).name):
        remedy = f"save it as UTF-8, or set ENCODING={found} for DATA."
        raise Unreadable(1, f"row: not {encoding.upper()}: it looks like UTF-{found[4:6]}; {remedy}")


def encoding_of(file: Path, wanted: str) -> str:
    """UTF-8 for a file that beyond doubt is UTF-8, as another one in DATA may be, else what is wanted."""
    name = codecs.lookup(wanted).name
    if name in ("utf-8", "utf-8-sig"):
        return "utf-8"
    decoder, is_ascii = codecs.getincrementaldecoder("utf-8")(), True
    with open_stream(file) as stream:
        chunk = None
        while chunk != b"":
            chunk = stream.read(2**20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                return name
            if b"\0" in chunk:
                return name
            is_ascii = is_ascii and chunk.isascii()
    return name if is_ascii and not WIDE.match(name) else "utf-8"


def decode_wide(stream: BinaryIO, encoding: str) -> bytes:
    """The stream in UTF-8."""
    try:
        return stream.read().decode(encoding).encode()
    except UnicodeError as error:
        raise Unreadable(1, f"row: not {encoding.upper()}: {error}") from error


def read_rows(file: str, setting: str) -> list[tuple[int, object]]:
    """The rows of the file that a setting names; UserError where it has none."""
    if not Path(file).is_file():
        raise UserError(f"{setting}={file}: file not found.")
    rows = list(read_file(Path(file)))
    if not rows:
        raise UserError(f"{setting}={file} is empty.")
    return rows


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

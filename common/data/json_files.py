"""Rows in JSON: one a line, an array, objects over several lines, or a list under a key; and plain text."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from common.data import formats

Rows = Iterator[tuple[int, object]]  # (line or row number, row)
DECODER = json.JSONDecoder()
GAP = re.compile(r"[\s\ufeff]*,?[\s\ufeff]*")  # between objects: joined files have a byte order mark there
OPENING, CLOSING = re.compile(r"\[\s*(\]?)\s*"), re.compile(r"\s*([,\]]?)\s*")  # of an array, and between its rows
HEAD = 20  # lines that show whether there is a row on each
NO_ROWS = ("tools", "functions")  # lists of objects that belong to a row


class Unreadable(Exception):
    """What is wrong with a whole file, and the line where it shows."""

    def __init__(self, line: int, problem: str):
        super().__init__(problem)
        self.line = line


def read_json(stream: BinaryIO, encoding: str, split: str | None = None) -> Rows:
    """(line, row) of each row; an InvalidRow where one is not JSON. split: the key that the rows are under.

    Rows that stand one on each line are streamed; anything else is read into memory. Raises Unreadable.
    """
    lines, head = [], []
    for raw in stream:
        lines.append(raw)
        if raw.strip(b"\xef\xbb\xbf \t\r\n"):
            head.append(raw)
        if len(head) == HEAD or len(head) > 1 and is_lines(head[:2], encoding):
            break
    if not split and is_lines(head, encoding):
        yield from read_lines(enumerate(itertools.chain(lines, stream), start=1), encoding)
    else:
        yield from read_whole(decode_whole(b"".join(lines) + stream.read(), encoding), split)


def is_lines(head: list[bytes], encoding: str) -> bool:
    """Whether a row stands on each line: one that starts its line is complete. head: lines that are not blank."""
    first = head[0].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] if head else b"{"
    if first not in (b"{", b"["):
        return True  # each line is then named as one that is no row
    is_open = head[0].rstrip().endswith((b"{", b"[")) if head else True
    if len(head) < 2 or is_open:
        return False
    if first == b"[":
        return all(is_complete(raw, encoding, "[") for raw in head[:2])
    return any(is_complete(raw, encoding, "{") for raw in head)


def is_complete(raw: bytes, encoding: str, start: str) -> bool:
    """Whether a line is JSON that starts so: an object or a list."""
    try:
        text = raw.decode(encoding).lstrip("\ufeff")
        return text.startswith(start) and DECODER.decode(text) is not None
    except (ValueError, RecursionError):
        return False


def read_lines(numbered: Iterator[tuple[int, bytes]], encoding: str) -> Rows:
    for number, raw in numbered:
        try:
            text = raw.decode(encoding).strip().lstrip("\ufeff")
            if text == "{":
                text += rest_of_object(numbered, encoding)
            if text:
                yield number, DECODER.decode(text)
        except UnicodeDecodeError as error:
            yield number, formats.invalid("row", wrong_byte(error), raw)
        except (ValueError, RecursionError) as error:
            hint = "; a row is one JSON object on one line" if raw.endswith(b"\n") else ""
            yield number, formats.invalid("row", wrong_json(error, hint), raw)


def rest_of_object(numbered: Iterator[tuple[int, bytes]], encoding: str) -> str:
    """The lines up to the one that closes an object over several lines."""
    lines = []
    for _, raw in numbered:
        lines.append(raw.decode(encoding))
        if raw.startswith(b"}"):
            break
    return "".join(lines)


def wrong_byte(error: UnicodeDecodeError, line_start: int = 0) -> str:
    place = f"byte 0x{error.object[error.start]:02X} at {error.start - line_start + 1}"
    other = "ENCODING=cp1252 (Windows)" if error.encoding == "utf-8" else "another ENCODING"
    remedy = f"save it as UTF-8, or set {other} for DATA"
    return f"not {error.encoding.upper()}: {place}; {remedy}"


def wrong_json(error: Exception, hint: str) -> str:
    """Python's words without its line, which is not the file's, and the remedy. hint: for a fault of no known kind."""
    if not isinstance(error, json.JSONDecodeError):  # a number too long, or nested too deeply
        return f"not valid JSON: {error}"
    if error.doc[error.pos : error.pos + 1] == "'":
        hint = "; JSON has double quotes, json.dumps(row) writes them"
    elif error.doc[error.pos : error.pos + 1] in ("}", "]"):
        hint = "; is there a comma too many before it?"
    elif error.msg == "Extra data" and not hint:
        hint = "; a file holds one array, or one object after another"
    elif error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        hint = " (the file ends in the middle of this row?)" if not hint else hint
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}{hint}"


def decode_whole(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line, line_start = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start) + 1
        raise Unreadable(line, f"row: {wrong_byte(error, line_start)}") from error


def read_whole(text: str, split: str | None) -> Rows:
    """(line, row) of an array, of objects one after another, or of the list under a key of a single object."""
    start, counted, line = GAP.match(text).end(), 0, 1
    if text.startswith("[", start) and not split:
        found = elements(text, start, is_all=True)
    elif key := sole_key(text, start, split):
        found = elements(text, place_of(text, start, key))
    else:
        found = objects(text, start)
    for place, row in found:
        line, counted = line + text.count("\n", counted, place), place
        yield line, row


def decode(text: str, start: int, parse=DECODER.raw_decode):
    """What `parse` makes of the text from there on; Unreadable with the line of a fault."""
    try:
        return parse(text, start)
    except (ValueError, RecursionError) as error:
        place = getattr(error, "pos", start)
        excerpt = text[place : place + 60].partition("\n")[0]
        problem = formats.invalid("row", wrong_json(error, ""), excerpt)
        raise Unreadable(text.rstrip().count("\n", 0, place) + 1, problem) from error


def objects(text: str, start: int) -> Iterator[tuple[int, object]]:
    while start < len(text):
        row, end = decode(text, start)
        yield start, row
        start = GAP.match(text, end).end()


def elements(text: str, start: int, is_all: bool = False) -> Iterator[tuple[int, object]]:
    """(place, element) of the array that starts there; is_all: nothing must follow it."""
    opening = OPENING.match(text, start)
    sign, place = opening[1] or ",", opening.end()
    while sign == ",":
        row, end = decode(text, place)
        yield place, row
        gap = CLOSING.match(text, end)
        sign, place = gap[1], gap.end()
    if sign != "]" or is_all and place < len(text):
        decode(text, 0, lambda text, _: DECODER.decode(text.rstrip()))  # raises an error that says what is wrong


def sole_key(text: str, start: int, split: str | None) -> str | None:
    """The key of the rows where the text is one object that holds them; None where it is a row, or several."""
    value, end = decode(text, start) if start < len(text) else (None, 0)
    is_sole = isinstance(value, dict) and GAP.match(text, end).end() == len(text)
    lists = [key for key, rows in value.items() if key not in NO_ROWS and are_rows(rows)] if is_sole else []
    if split:
        if split not in lists:
            listed = ", ".join(lists) or "none"
            raise Unreadable(1, f"no rows under a key {split}; keys with rows: {listed}.")
        return split
    if not lists or not isinstance(formats.to_chat(value), formats.InvalidRow):
        return None
    if len(lists) > 1 and "train" not in lists:
        raise Unreadable(1, f"rows under several keys ({', '.join(lists)}); name one: file.json:{lists[0]}.")
    return "train" if "train" in lists else lists[0]


def are_rows(value) -> bool:
    """Whether a value is a list of rows, not of a row's turns."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())


def place_of(text: str, start: int, key: str) -> int:
    """Where the value of a key starts in an object that is valid JSON."""
    name, place = None, start
    while name != key:
        if name is not None:
            place = GAP.match(text, DECODER.raw_decode(text, place)[1]).end() - 1
        name, end = DECODER.raw_decode(text, GAP.match(text, place + 1).end())
        place = re.compile(r"\s*:\s*").match(text, end).end()
    return place


def read_text(stream: BinaryIO, encoding: str) -> Rows:
    """The file as one document, a `text` row: whoever has a story in a file means all of it.

    Lines stay together, unlike in `datasets`; texts that are apart stand in files of their own, or in JSON lines.
    """
    text = decode_whole(stream.read(), encoding).replace("\r\n", "\n").replace("\ufeff", "").strip()
    if text:
        yield 1, {"text": text}

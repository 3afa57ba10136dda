"""Rows: what a row of the data becomes, and how a value of it is read or refused."""

import functools
import json
import math
import re
from typing import NoReturn

# NUL, halves of surrogate pairs, and the noncharacters by which encoder.py marks answers.
FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdd3]")
# Control tokens of chat templates, whichever family's.
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<\uff5c[^<>\uff5c]+\uff5c>")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a content's parts that are text


class Chat(list):
    """The turns of a row; `notes` says what of the row was changed or is not used."""

    def __init__(self, turns=(), notes: tuple[str, ...] = ()):
        super().__init__(turns)
        self.notes = notes


class InvalidRow(str):
    """What is wrong with a row: `field: problem; remedy: excerpt`.

    `reason` is the same for all rows with the fault: field without numbers, and problem.
    """

    reason = ""


class RowError(Exception):
    """Raised with the InvalidRow that formats.to_chat returns."""


class SkippedRow(str):
    """Why a valid row is not used."""


def invalid(field: str, problem: str, value, limit: int = 60) -> InvalidRow:
    """limit: characters of the value that are shown."""
    try:
        excerpt = repr(value).encode("utf-8", "backslashreplace").decode()
    except RecursionError:
        excerpt = "nested too deeply to show"
    row = InvalidRow(f"{field}: {problem}: {excerpt if len(excerpt) <= limit else excerpt[: limit - 3] + '...'}")
    row.reason = re.sub(r"\[\d+\]", "", f"{field}: {problem.partition('; ')[0]}")
    return row


def refuse(field: str, problem: str, value, limit: int = 60) -> NoReturn:
    """Raise what formats.to_chat returns as InvalidRow."""
    raise RowError(invalid(field, problem, value, limit))


def is_missing(value) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def is_empty(value) -> bool:
    """Whether a value says nothing: null, NaN, blank, [] or {}."""
    if isinstance(value, str):
        return not value.strip()
    return is_missing(value) or isinstance(value, list | tuple | dict) and not value


@functools.lru_cache(maxsize=256)  # the rows of a file have few sets of names
def lowered(names: tuple) -> dict[str, str]:
    """The names in small letters, without blanks around them, and each as it was; fewer where two are the same."""
    return {str(name).strip().lower(): str(name).strip() for name in names}


def lower_keys(row: dict, field: str) -> dict:
    """The row by its names in small letters, without blanks around them."""
    names = lowered(tuple(row))
    if len(names) < len(row):
        refuse(field, "two names that differ in capitals or blanks only; rename or remove one", list(row))
    return dict(zip(names, row.values(), strict=True))


def as_text(value, field: str, notes: list[str]) -> str:
    """The text of a value: a text, a number, or a list of texts and of text parts, joined as templates join them."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value):
        notes.append("changed: numbers read as text")
        return str(value)
    if isinstance(value, list) and value:
        if len(value) > 1:
            notes.append("changed: parts of a content joined")
        value = "".join(part_text(part, field) for part in value)
    if is_empty(value):
        refuse(field, "must be a text that is not empty; write one, or remove the row", value)
    if not isinstance(value, str):
        refuse(field, "must be a text; write it as one, in quotes", value)
    check_characters(value, field)
    return value


def part_text(part, field: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        refuse(field, 'the parts of a list must be texts or {"type": "text", "text": ...}', part)
    if part.get("type") not in TEXT_PARTS:
        refuse(field, f"only text is supported, not parts of type {part['type']}; remove the part or the row", part)
    if not isinstance(part.get("text"), str):
        refuse(field, "a part without a text; remove it or give it one", part)
    return part["text"]


def check_characters(text: str, field: str) -> None:
    if bad := FORBIDDEN.search(text):
        refuse(field, f"character U+{ord(bad[0]):04X} is not text; remove it", text[bad.start() :])


def from_json(value, field: str, what: str):
    """The value that a text holds as JSON; other values as they are. what: it must be, for the message."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        refuse(field, f"must be {what}, or JSON of it; {error}", value)


def to_json(value, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        refuse(field, f"cannot be written as JSON; write it as a text ({error})", value)


def as_bit(value) -> int | None:
    """0 or 1 for true, false, 0, 1 and their texts; None for anything else."""
    if isinstance(value, str):
        return {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower())
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None

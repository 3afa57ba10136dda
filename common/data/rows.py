"""Rows: the fields that a row may have, what it becomes, and how a value of it is read or refused."""

import csv
import functools
import json
import math
import re
from typing import NoReturn

from common.cli import UserError

# NUL, halves of surrogate pairs, and the noncharacters by which encoder.py marks answers.
FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdd3]")
# Control tokens of chat templates, whichever family's; <s> and </s> only at the ends of a text, as they are HTML, too.
CONTROL = (
    r"<\|\w{3,40}\|>|<\|\"\|>|<\|(?:turn|channel|think|tool\w*)>|<(?:turn|channel|tool\w*)\|>"
    r"|<\uff5c[^<>\uff5c]{1,40}\uff5c>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]"
    r"|\[(?:TOOL_CALLS|gMASK)\]|<(?:start|end)_of_turn>|<end_of_utterance>|<[be]os>"
)
CONTROL_TOKEN = re.compile(rf"{CONTROL}|\A\s*<s>|</s>\s*\Z")
# At an end of a question they say that it is formatted; elsewhere a question may be about them.
FORMATTED = re.compile(rf"\A\s*(?:<s>\s*)?(?:{CONTROL})|(?:{CONTROL})\s*(?:(?:user|assistant|model|system)\s*)?\Z")
END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|END_OF_TURN_TOKEN|>"),
    *("</s>", "<eos>", "<end_of_turn>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
BITS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}  # 1.0: as pandas writes them beside a null
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a content's parts that are text
WEIGHTS = ("weight", "loss", "train", "training")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue")
ARENA, TREE = ("conversation_a", "conversation_b", "winner"), ("message_tree_id", "prompt")
SUMMARY, COMPLETION, TEXT = ("dialogue", "summary"), ("prompt", "completion"), ("text",)
QUESTIONS = (
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "output")),
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("problem", "solution"), ("user", "assistant"), ("human", "assistant"), ("input", "output")),
    ("inputs", "targets"),
)
# The first whose fields a row has counts: Alpaca's rows also have `text`.
SCHEMAS = (SUMMARY, *((name,) for name in LISTS), ARENA, TREE, *QUESTIONS, COMPLETION, TEXT)
CHOSEN = ("chosen", "chosen_response", "chosen_messages", "preferred_output")  # the last: OpenAI's
REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
# What COLUMNS may name.
TARGETS = {name for fields in SCHEMAS if fields not in (ARENA, TREE) for name in fields}
TARGETS |= {"system", "context", "history", "tools", "chosen", "rejected", "label", *WEIGHTS, *REASONING}


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


def read_safely(read, row, form: str, *arguments):
    """What read(row, *arguments) returns, or the InvalidRow by which it refuses the row. form: of a row, as JSON."""
    if not isinstance(row, dict):
        return row if isinstance(row, InvalidRow) else invalid("row", f"must be an object, as {form}", row)
    try:
        return read(row, *arguments)
    except RowError as error:
        return error.args[0]
    except RecursionError:
        return invalid("row", "nested too deeply; remove it", list(row))


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


def parse_columns(text: str | None) -> dict[str, str]:
    """COLUMNS="question:user, answer:assistant" as {"question": "user", ...}; {} for None.

    A name with a comma stands in quotes, a.b is b in a. Raises UserError.
    """
    columns = {}
    for item in next(csv.reader([text or ""], skipinitialspace=True), []):
        name, _, target = (part.strip().lower() for part in item.rpartition(":"))
        if not name or target not in TARGETS:
            known = ", ".join(["system", "user", "assistant", *sorted(TARGETS - {"system", "user", "assistant"})])
            raise UserError(f'COLUMNS={text}: {item!r} is not "field:name" with a name of: {known}.')
        if target in columns.values() or name in columns:
            raise UserError(f"COLUMNS={text}: {item!r} names a field or a name that is taken; give each once.")
        columns[name] = target
    return columns


def rename(row: dict, columns: dict[str, str], notes: list[str]) -> dict | None:
    """The row by the names that COLUMNS gives; None where it has none of the fields, as in other sources of DATA."""
    renamed, rest, missing = {}, dict(row), []
    for name, target in columns.items():
        outer, _, inner = name.partition(".")
        fields = lower_keys(row[outer], outer) if isinstance(row.get(outer), dict) else {}
        if name in row:
            renamed[target] = rest.pop(name)
        elif inner in fields:
            renamed[target] = fields[inner]
            rest.pop(outer, None)
            notes += [f"unused: {outer}.{other}" for other in fields if f"{outer}.{other}" not in columns]
        else:
            missing.append(name)
    if not renamed:
        return None
    if missing:
        refuse("row", f"has no field {missing[0]}, which COLUMNS names; it has", list(row), limit=300)
    notes += [f"unused: {name}" for name in rest if name in renamed and not is_empty(rest[name])]
    return rest | renamed


def as_text(value, field: str, notes: list[str]) -> str:
    """The text of a value: a text, a number, or a list of texts and of text parts, joined as templates join them.

    A list of texts or an object that is a field of the row itself is refused: files of columns have them.
    """
    if isinstance(value, str) and value.strip():  # as most are
        check_characters(value, field)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value):
        notes.append("changed: numbers read as text")
        return str(value)
    is_list = isinstance(value, list) and len(value) > 0
    if "[" not in field and (isinstance(value, dict) or is_list and not isinstance(value[0], dict)):
        hint = 'is this JSON of columns? one row is one object (pandas: to_json(name, orient="records", lines=True))'
        refuse(field, f"must be a text; {hint}", value)
    if is_list:
        if len(value) > 1:
            notes.append("changed: parts of a content joined")
        value = "".join(part_text(part, field) for part in value)
    if is_empty(value):
        refuse(field, "must be a text that is not empty; write one, or remove the row", value)
    if not isinstance(value, str):
        refuse(field, "must be a text; write it as one, in quotes", value)
    check_characters(value, field)
    return value


def without_end_tokens(text: str, notes: list[str]) -> str:
    """The text without the end token that other tools want after an answer: the template writes its own."""
    stripped = rest = text.rstrip()
    while rest.endswith(END_TOKENS) and not (rest.endswith("</s>") and "<s>" in rest):  # which is HTML
        rest = rest[: rest.rindex("<")].rstrip()
    if rest in ("", stripped):  # an answer that is a token means it
        return text
    notes.append("changed: end tokens at the end of answers removed")
    return rest


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
    """The value that a text holds as JSON, None for a blank one; other values as they are.

    what: it must be, for the message.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        refuse(field, f"must be {what}, or JSON of it, as json.dumps writes it; {error}", value)


def to_json(value, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        refuse(field, f"cannot be written as JSON; write it as a text ({error})", value)


def as_bit(value) -> int | None:
    """0 or 1 for true, false, 0, 1 and their texts; None for anything else."""
    return BITS.get(str(value).strip().lower())

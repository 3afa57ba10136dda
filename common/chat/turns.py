"""Turns of a chat: its tools, its calls and their results."""

import codecs
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.data import tools
from common.data.rows import RowError

WRONG = re.compile("[\0\ufffd\udc80-\udcff]")  # what text does not have, bytes by surrogateescape
REMEDY = 'Write [{"type": "function", "function": {"name": "get_time", "description": ..., "parameters": {...}}}].'


def begin(turns: list[dict], opening: list[dict], offered: list[dict]) -> list[dict]:
    """A chat with the system message and the tools that it lacks."""
    offered = turns[0].get("tools", offered)
    asked = {name: value for name, value in turns[0].items() if name != "tools"}
    first, *rest = [*([] if asked["role"] == "system" else opening), asked, *turns[1:]]
    return [first | ({"tools": offered} if offered else {}), *rest]


def read_tools(file: str, setting: str) -> list[dict]:
    """The tools of a .json file: a list in OpenAI's schema, or of the functions alone."""
    try:
        value = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        offered = tools.read_tools(value, "tools")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={file}: it cannot be read as JSON: {error}") from error
    except RowError as error:
        raise UserError(f"{setting}={file}: {error.args[0]}. {REMEDY}") from error
    if not offered:
        raise UserError(f"{setting}={file}: no tool in it. {REMEDY}")
    return offered


def pending_calls(chat: list[dict]) -> list[dict]:
    """The calls of the last answer that have no result."""
    answered = set()
    for turn in reversed(chat):
        if turn["role"] != "tool":
            return [call for call in turn.get("tool_calls", []) if call["id"] not in answered]
        answered.add(turn["tool_call_id"])
    return []


def number_calls(message: dict, chat: list[dict]) -> dict:
    """The message with ids of its calls that the chat does not have."""
    before = sum(len(turn.get("tool_calls", [])) for turn in chat)
    for number, call in enumerate(message.get("tool_calls", []), before + 1):
        call["id"] = tools.OUR_ID.format(number)
    return message


def explain_empty(answer) -> str:
    """Why a generation.Answer shows nothing, "" where it does."""
    message = answer.message
    if message["content"] or "tool_calls" in message or "reasoning_content" not in message:
        return ""
    remedy = "; raise MAX_NEW_TOKENS, so that it comes to its end" if answer.stop == "length" else ""
    return f"all of the answer was reasoning{remedy}"


def answer_line(message: dict) -> str:
    """An answer on one line: its content, or its call as JSON; several calls as a list."""
    if calls := [call["function"] for call in message.get("tool_calls", [])]:
        return json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
    return " ".join(message["content"].split())


def read_lines(stream: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty; bytes that are no text are told, and lose no line.

    UTF-8, or UTF-16 with a byte order mark.
    """
    is_wide = stream.buffer.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "replace") if is_wide else ("utf-8-sig", "surrogateescape")  # UTF-16 has no such
    stream.reconfigure(encoding=encoding, errors=errors, newline="\n")
    for number, line in enumerate(stream, 1):
        text, count = WRONG.subn("\ufffd", line.strip())
        if count:
            remedy = "Convert it before (iconv -f latin1 -t utf-8)."
            print(f"note: line {number}: {count} bytes are no text, read as \ufffd. {remedy}", file=sys.stderr)
        if text:
            yield number, text

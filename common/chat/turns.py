"""Turns of a chat: its tools, its calls and their results."""

import json
from pathlib import Path

from common.cli import UserError
from common.model import responses


def split_tools(chat: list[dict]) -> tuple[list[dict], list[dict]]:
    """(turns, tools) of a chat, whose first turn carries the tools."""
    first = {key: value for key, value in chat[0].items() if key != "tools"}
    return [first, *chat[1:]], chat[0].get("tools", [])


def join_tools(turns: list[dict], tools: list[dict]) -> list[dict]:
    return [turns[0] | {"tools": tools}, *turns[1:]] if tools else turns


def begin(turns: list[dict], opening: list[dict], tools: list[dict]) -> list[dict]:
    """A chat with the system message and the tools that it lacks."""
    turns, own = split_tools(turns)
    return join_tools(turns if turns[0]["role"] == "system" else [*opening, *turns], own or tools)


def read_tools(file: str, setting: str) -> list[dict]:
    """The tools of a .json file: a list in OpenAI's schema, or of the functions alone."""
    try:
        tools = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={file}: it cannot be read as JSON: {error}") from error
    tools = [wrap_tool(tool) for tool in tools] if isinstance(tools, list) else []
    if not tools or None in tools:
        remedy = '[{"type": "function", "function": {"name": "get_time", "description": ..., "parameters": {...}}}]'
        raise UserError(f"{setting}={file}: it must be a list of functions, each with a name. Write {remedy}.")
    return tools


def wrap_tool(tool) -> dict | None:
    match tool:
        case {"function": {"name": str()}}:
            return {"type": "function"} | tool
        case {"name": str()}:
            return {"type": "function", "function": tool}


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
        call["id"] = responses.id_of(number)
    return message


def explain_empty(message: dict) -> str:
    """Why an answer shows nothing, "" where it does."""
    if message["content"] or "tool_calls" in message or "reasoning_content" not in message:
        return ""
    return "all of the answer was reasoning; raise MAX_NEW_TOKENS, so that it comes to its end"


def answer_line(message: dict) -> str:
    """An answer on one line: its content, or its call as JSON; several calls as a list."""
    if calls := [call["function"] for call in message.get("tool_calls", [])]:
        return json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
    return " ".join(message["content"].split())

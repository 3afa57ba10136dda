"""Tools: the functions that a row lists, the calls of its answers, and what they gave, in OpenAI's form."""

import ast
import re
from collections.abc import Iterator

from common.data.rows import RowError, as_text, check_characters, from_json, is_empty, refuse, to_json

TOOL = '{"name": ..., "description": ..., "parameters": {...}}'
CALL = '{"name": ..., "arguments": {...}}'
ARGUMENTS = ("arguments", "parameters", "args", "input")
OUR_ID = "call{:05d}"  # 9 letters and digits: Mistral's templates take no other length


def take_tools(holders: list[tuple[str, dict]]) -> list[dict]:
    """The tools of a row and its system turns, (place, fields) each, which are taken out of both; [] without any."""
    found = []
    for place, holder in holders:
        for name in ("tools", "functions"):
            value = holder.pop(name, None)
            tools = [] if is_empty(value) else read_tools(value, place + name)
            if found and tools and tools != found:
                refuse(place + name, "the row lists other tools elsewhere; keep one list", tools)
            found = found or tools
    return found


def read_tools(value, field: str) -> list[dict]:
    """A list of tools, from a list or one tool, each perhaps as JSON or without its wrapper."""
    value = from_json(value, field, "a list of tools")
    if is_empty(value):
        return []
    tools = []
    for _, function in functions_in(value, field, "a tool", TOOL):
        function = without_nulls({name: part for name, part in function.items() if name != "type"})
        check_characters(to_json(function, field), field)
        tools.append({"type": "function", "function": function})
    return tools


def functions_in(value, field: str, what: str, form: str) -> Iterator[tuple[dict, dict]]:
    """(item, its function) of one item or a list, each perhaps as JSON. Raises RowError for one without a name."""
    for item in value if isinstance(value, list) else [value]:
        item = from_json(item, field, form)
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not has_name(function):
            refuse(field, f"{what} must be {form}", item)
        yield item, function


def has_name(function: dict) -> bool:
    return isinstance(function.get("name"), str) and bool(function["name"].strip())


def without_nulls(value):
    """Parquet gives every tool the parameters of all tools, as null."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def take_calls(turn: dict, field: str, calls_before: int, notes: list[str]) -> list[dict]:
    """The calls of an answer, taken out of its turn; [] without any.

    calls_before: of the chat, for the ids of calls that have none.
    """
    place, calls = field.rpartition(".")[0], []
    for name in ("tool_calls", "function_call"):
        value = turn.pop(name, None)
        if not is_empty(value):
            calls += read_calls(value, f"{place}.{name}", calls_before + len(calls), notes)
    content = turn["content"]
    if not calls and isinstance(content, str):
        turn["content"], written = blocks_at_end(content, "tool_call", field)
        calls = read_calls([written_call(text, field) for text in written], field, calls_before, notes)
    return calls


def blocks_at_end(text: str, tag: str, field: str) -> tuple[str, list[str]]:
    """(text before, what is in the <tag>...</tag> that end the text), as Hermes' sets write calls and results."""
    opening, closing, found = f"<{tag}>", f"</{tag}>", []
    while text.rstrip().endswith(closing):
        before, start, block = text.rstrip().removesuffix(closing).rpartition(opening)
        if not start:
            refuse(field, f"{closing} without {opening}; write both, or neither", text)
        found.insert(0, block.strip())
        text = before.rstrip()
    return text, found


def written_call(text: str, field: str):
    """The call in JSON, or as Python prints it, which some of Hermes' sets have."""
    try:
        return from_json(text, field, CALL)
    except RowError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
        raise


def read_calls(value, field: str, calls_before: int, notes: list[str]) -> list[dict]:
    value = from_json(value, field, CALL)
    calls = []
    for item, function in functions_in(value, field, "a call", CALL):
        function = item | function
        name = next((name for name in ARGUMENTS if not is_empty(function.get(name))), "arguments")
        arguments = function.get(name)
        others = sorted(function.keys() - {"id", "type", "function", "name", name})
        notes += [f"unused: tool_calls[].{part}" for part in others if not is_empty(function[part])]
        arguments = {} if is_empty(arguments) else from_json(arguments, f"{field}.arguments", "an object")
        if not isinstance(arguments, dict):
            refuse(f"{field}.arguments", "must be an object, or JSON of one", arguments)
        check_characters(to_json(arguments, field) + function["name"], field)
        identity = str(item.get("id") or OUR_ID.format(calls_before + len(calls) + 1))
        if identity in [call["id"] for call in calls]:
            refuse(field, "two calls have one id; give each its own", identity)
        call = {"name": function["name"], "arguments": arguments}
        calls.append({"id": identity, "type": "function", "function": call})
    return calls


def read_result(turn: dict, field: str, chat: list[dict], notes: list[str]) -> dict:
    """The tool turn of a result, with the id and the name of the call that it answers."""
    results = []
    for before in reversed(chat):
        if before["role"] != "tool":
            break
        results.append(before["tool_call_id"])
    asking = chat[-1 - len(results)] if len(results) < len(chat) else {}
    waiting = [call for call in asking.get("tool_calls", ()) if call["id"] not in results]
    identity, name = turn.pop("tool_call_id", None), turn.pop("name", None)
    has_ids = any(not re.fullmatch(r"call\d{5}", call["id"]) for call in waiting)
    matching = waiting
    if not is_empty(identity) and has_ids:
        matching = [call for call in waiting if call["id"] == str(identity)]
    elif not is_empty(name):
        matching = [call for call in waiting if call["function"]["name"] == name]
    if not matching:
        problem = "the result of no call; the assistant turn before must have the call in tool_calls"
        refuse(field, problem, turn["content"] if is_empty(identity) else identity)
    content = turn["content"]
    parts = content if isinstance(content, list) else []
    is_content = parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    if isinstance(content, dict | list | bool) and not is_content:
        content = to_json(content, field)
    call = matching[0]
    is_blank = isinstance(content, str) and not content.strip()  # a function that gives nothing
    content = "" if is_blank else as_text(content, field, notes)
    return {"role": "tool", "content": content, "tool_call_id": call["id"], "name": call["function"]["name"]}

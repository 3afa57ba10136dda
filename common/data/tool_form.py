"""The form in which a chat template takes tools, calls and results, found by trying."""

import itertools
import json
from collections.abc import Callable
from typing import NamedTuple

from common.cli import UserError
from common.data.tools import OUR_ID

QUESTION = {"role": "user", "content": "aq"}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "d",
        "parameters": {"type": "object", "properties": {"k": {"type": "string", "description": "d"}}},
    },
}


class ToolForm(NamedTuple):
    writes: frozenset[str]  # which of "tools", "calls" and "results"
    takes_text: bool  # arguments as JSON text, else as an object
    short_ids: bool  # calls need ids of nine letters and digits
    takes_null: bool = False  # no content is None beside a call, not ""


def find_tool_form(render: Callable) -> ToolForm:
    """The form of a template. render: `ChatTemplate.render`."""
    question = QUESTION | {"tools": [TOOL]}
    prompt = try_to(render, [question], add_generation_prompt=True)
    writes = {"tools"} if "lookup" in prompt else set()
    for content, takes_text, call_id in itertools.product(("", None), (False, True), ("call_1", "call00001")):
        arguments = '{"k": "vw"}' if takes_text else {"k": "vw"}
        call = {"id": call_id, "type": "function", "function": {"name": "lookup", "arguments": arguments}}
        asked = [question, {"role": "assistant", "content": content, "tool_calls": [call]}]
        result = {"role": "tool", "content": "rz7", "name": "lookup", "tool_call_id": call_id}
        text = try_to(render, asked).removeprefix(prompt)
        answered = try_to(render, [*asked, result, {"role": "assistant", "content": "bz"}])
        # {'k': ...}: an object written as Python does it, which is no JSON.
        if answered and "lookup" in text and "vw" in text and "{'k'" not in text:
            writes |= {"calls", "results"} if "rz7" in answered else {"calls"}
            return ToolForm(frozenset(writes), takes_text, call_id == "call00001", content is None)
    return ToolForm(frozenset(writes), False, False)


def try_to(render: Callable, messages: list[dict], **options) -> str:
    """The text of messages; "" where a template refuses them."""
    try:
        return render(messages, **options)[0]
    except UserError:
        return ""


def write_tools(messages: list[dict], form: ToolForm) -> list[dict]:
    """The messages of a chat with tools in a template's form; UserError where it has none."""
    used = {"tools": "tools" in messages[0]}
    used["calls"] = any("tool_calls" in turn for turn in messages)
    used["results"] = any(turn["role"] == "tool" for turn in messages)
    if missing := [what for what, is_used in used.items() if is_used and what not in form.writes]:
        problem = f"this one does not write the {' and '.join(missing)} of a chat with tools"
        raise UserError(f"CHAT_TEMPLATE: {problem}. CHAT_TEMPLATE=chatml does, and llama3.")
    ids = {}  # those that the template takes, by the chat's own
    turns = []
    for turn in messages:
        if "tool_calls" in turn:
            turn = turn | {"tool_calls": [write_call(call, form, ids) for call in turn["tool_calls"]]}
            turn["content"] = turn["content"] or (None if form.takes_null else "")
        elif turn["role"] == "tool":
            turn = turn | {"tool_call_id": ids.get(turn["tool_call_id"], turn["tool_call_id"])}
        turns.append(turn)
    return turns


def write_call(call: dict, form: ToolForm, ids: dict[str, str]) -> dict:
    function = call["function"]
    if form.takes_text:
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    ids[call["id"]] = OUR_ID.format(len(ids)) if form.short_ids else call["id"]
    return call | {"function": function, "id": ids[call["id"]]}

"""Responses: the raw text of an answer becomes a message with its content, reasoning and tool calls.

transformers' ResponseParser reads it. How a model writes its calls and reasoning is seen in the source of its chat
template; TRL's table knows exact copies of templates only, and takes seconds to import.
"""

import ast
import functools
import json
import re
from collections.abc import Iterable, Iterator

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from common.data.template import control_pattern
from common.data.tools import OUR_ID

ENDS = ("open_pattern", "close_pattern")
CALL = {"function": {"name": "{name}", "arguments": "{content}"}}
JSON = {"content": "json"}
TEXT = {"content": "text", "content_args": {"strip": False}}


def tags(pattern: str) -> dict:
    """Arguments between tags, as text: `tools` give them types."""
    as_text = {"name": "text", "args": {"strip": False}}
    return {"content": "xml-inline", "content_args": {"tag_pattern": pattern, "value_parser": as_text}}


# What a template's source contains -> how it writes a call: (opens, closes, content); the first that fits counts. An
# opening is none without its close: what is cut off stays text.
CALLS = {
    "<atem:invoke": (
        r'<atem:invoke name="(?P<name>[^"]+)">(?=.*?</atem:invoke>)',
        r"</atem:invoke>",
        tags(r'<atem:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</atem:parameter>'),
    ),
    "<function=": (  # Qwen 3.5, Nemotron 3
        r"<tool_call>\s*<function=(?P<name>[^>\n]+)>(?=.*?</tool_call>)",
        r"</tool_call>",
        tags(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"),
    ),
    "<arg_key>": (  # GLM 4
        r"<tool_call>\s*(?P<name>[^\s<]+)\s*(?=.*?</tool_call>)",
        r"</tool_call>",
        tags(r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
    ),
    "<|tool_call>call:": (  # Gemma 4
        r"<\|tool_call>call:(?P<name>[\w.-]+)(?=.*?<tool_call\|>)",
        r"<tool_call\|>",
        JSON | {"content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}},
    ),
    "<|channel|>": (  # gpt-oss, in the form of its template and that of its answers
        r"to=functions\.(?P<name>[^\s<]+)(?:(?!<\|message\|>).)*<\|message\|>",
        r"<\|call\|>|<\|end\|>",
        JSON,
    ),
    "<｜tool▁call▁begin｜>": (  # DeepSeek
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]+)"
        r"(?:<｜tool▁sep｜>|\n```json\n)(?=.*?<｜tool▁call▁end｜>)",
        r"(?:\n```)?<｜tool▁call▁end｜>",
        JSON,
    ),
    # LFM 2: [f(x=1), g()]
    "<|tool_call_start|>": (r"<\|tool_call_start\|>(?=.*?<\|tool_call_end\|>)", r"<\|tool_call_end\|>", TEXT),
    # Mistral: [{"name": ...}], later name[ARGS]{...}
    "[TOOL_CALLS]": (r"\[TOOL_CALLS\]", r"(?=\[TOOL_CALLS\])", TEXT),
    # Granite, Phi 4
    "<|tool_call|>": (r"<\|tool_call\|>(?=\s*\[)", r"<\|/tool_call\|>", JSON),
    # Hermes, Qwen 2.5 and 3, our chatml
    "<tool_call>": (r"<tool_call>(?=.*?</tool_call>)", r"</tool_call>", JSON),
    # Llama 3: the object alone, which is a call by its arguments
    '"parameters": ': (
        r'\A\s*(?:<\|python_tag\|>\s*)?(?=\{\s*"(?:name|type)".*"(?:arguments|parameters)"\s*:)',
        r"(?!)",
        JSON,
    ),
}
# Else reasoning is what an answer begins with: (opens, closes); the first is how templates without any are trained.
THOUGHTS = [("<think>", "</think>"), ("<|channel>thought\n", "<channel|>"), ("[THINK]", "[/THINK]")]
OPENING, CLOSE = ("|".join(map(re.escape, marks)) for marks in zip(*THOUGHTS, strict=True))
# What a template contains -> (opens, closes) of reasoning and of content; for some, all parts have a header.
PARTS = {
    "<|channel|>": {
        "reasoning_content": (r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>"),
        "content": (r"<\|channel\|>(?:final|commentary)<\|message\|>", r"<\|end\|>|<\|return\|>"),
    },
    "<atem:invoke": {
        "reasoning_content": (r" to=self<\|message\|>", r"<\|eom\|>"),
        "content": (r" to=user<\|message\|>", r"<\|eot\|>|<\|eom\|>"),
    },
    "": {"reasoning_content": (rf"\A\s*(?:{OPENING})", rf"(?:{CLOSE})\s*")},
}
JOINED_BY = {"reasoning_content": "\n", "content": ""}


@functools.lru_cache(maxsize=16)
def response_template(template: str, with_calls: bool, with_content: bool = True):
    """How the answers of a chat template are read; without its calls or headers of content, they are content."""
    parts = next(parts for marker, parts in PARTS.items() if marker in template)
    fields = {}
    for name, joint in JOINED_BY.items():
        ends = parts.get(name, ()) if with_content or name != "content" else ()
        fields[name] = dict(zip(ENDS, ends, strict=False)) | TEXT | {"repeats": True, "join": joint}
    syntax = next((syntax for marker, syntax in CALLS.items() if marker in template), None)
    if syntax and with_calls:
        *ends, content = syntax
        named = {"transform": CALL} if "?P<name>" in ends[0] else {}
        fields["tool_calls"] = dict(zip(ENDS, ends, strict=True)) | content | named | {"repeats": True}
    return load_response_template({"start_anchor": "\0", "fields": fields})  # no anchor: the prefix is ours


def prefix_of(template: str, prompt: str, text: str = "") -> str:
    """What the prompt has of the answer: the opening of its reasoning, or "".

    An answer of a model that reasons may close what neither it nor the prompt opened.
    """
    for opening, close in THOUGHTS:
        before, found, _ = text.partition(close)
        unopened = found and close in template and opening not in before
        if unopened or prompt.rstrip().endswith(opening.rstrip()):
            return opening
    return ""


control_tokens = functools.lru_cache(maxsize=4)(control_pattern)


def parse(text: str, prompt: str, tokenizer, tools: Iterable[dict] = ()) -> dict:
    """The message of an answer: role, content, and reasoning_content and tool_calls where it has some.

    text: with its special tokens, without the end token. prompt: its end suffices. tools: those offered, which give
    types to arguments. A malformed call is content, and so is any where no tools were offered.
    """
    template, clean, tools = tokenizer.chat_template, control_tokens(tokenizer), list(tools)
    prefix = prefix_of(template, prompt, text)
    try:
        found = read(text, response_template(template, bool(tools)), prefix, tools)
        values = [call for value in found.get("tool_calls", ()) for call in calls_in(value)]
        calls = [to_call(value, number) for number, value in enumerate(values, 1)]
    except (ValueError, SyntaxError, RecursionError):
        found, calls = {}, []
    if not calls and not found.get("content"):
        found = read(text, response_template(template, False, with_content=False), prefix, [])
    message = {"role": "assistant"}
    for name in JOINED_BY:
        message[name] = clean.sub("", found.get(name, "")).strip()
    if not message["reasoning_content"]:
        del message["reasoning_content"]
    return message | ({"tool_calls": calls} if calls else {})


def read(text: str, template, prefix: str, tools: list[dict]) -> dict:
    parser = ResponseParser(template, prefix=prefix, tools=tools)
    parser.feed(text)
    return parser.finalize()[0]


def follow(pieces: Iterable[str], prompt: str, tokenizer, tools: Iterable[dict] = ()) -> Iterator[tuple[str, str]]:
    """(field, text) for each piece of an answer, the text "" while it is not known what it belongs to.

    After a malformed call nothing more is told; `parse` has it as content.
    """
    template, clean = tokenizer.chat_template, control_tokens(tokenizer)
    prefix = prefix_of(template, prompt)
    field = "reasoning_content" if prefix else "content"
    parser, pieces = ResponseParser(response_template(template, bool(tools)), prefix=prefix), iter(pieces)
    for piece in pieces:
        try:
            chunks = [event for event in parser.feed(piece) if event["type"] == "region_chunk"]
        except (ValueError, RecursionError):
            break
        for chunk in chunks or [{"field": field, "text": ""}]:
            field = chunk["field"]
            yield field, clean.sub("", chunk["text"])
    for _ in pieces:
        yield "tool_calls", ""


def calls_in(value) -> list:
    """The calls of one region: of JSON, of Mistral's name[ARGS]{...}, or of LFM's Python."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    text = value.strip()
    if text.startswith("[{"):
        return json.loads(text)
    if "[ARGS]" in text:
        name, arguments = text.split("[ARGS]", 1)
        return [{"name": name.partition("[CALL_ID]")[0], "arguments": arguments}]
    calls = getattr(JsonWords().visit(ast.parse(text, mode="eval")).body, "elts", [None])
    if not all(isinstance(call, ast.Call) and not call.args for call in calls):
        raise ValueError(f"not a list of calls: {text}")
    return [
        {"name": ast.unparse(call.func), "arguments": {a.arg: ast.literal_eval(a.value) for a in call.keywords}}
        for call in calls
    ]


class JsonWords(ast.NodeTransformer):
    """true, false and null in Python."""

    def visit_Name(self, node):
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


def to_call(value, number: int) -> dict:
    """A call in OpenAI's schema; ValueError where it lacks a name or its arguments are no object."""
    call = value.get("function", value) if isinstance(value, dict) else {}
    arguments = call.get("arguments", call.get("parameters", {} if set(call) == {"name"} else None))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise ValueError(f"not a call: {value}")
    function = {"name": call["name"].strip(), "arguments": arguments}
    return {"id": OUR_ID.format(number), "type": "function", "function": function}

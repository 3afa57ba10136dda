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

CALL = {"function": {"name": "{name}", "arguments": "{content}"}}
TEXT = {"content": "text", "content_args": {"strip": False}}


def tags(pattern: str) -> dict:
    """Arguments between tags, as text: `tools` give them types."""
    as_text = {"name": "text", "args": {"strip": False}}
    return {"content": "xml-inline", "content_args": {"tag_pattern": pattern, "value_parser": as_text}}


# What a template's source contains -> how it writes a call; the first that fits counts. An opening is none without
# its close: what is cut off stays text.
CALLS = {
    "<atem:invoke": {
        "open_pattern": r'<atem:invoke name="(?P<name>[^"]+)">(?=.*?</atem:invoke>)',
        "close_pattern": r"</atem:invoke>",
        **tags(r'<atem:parameter name="(?P<key>[^"]+)">(?P<value>.*?)</atem:parameter>'),
    },
    "<function=": {  # Qwen 3.5, Nemotron 3
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>(?=.*?</tool_call>)",
        "close_pattern": r"</tool_call>",
        **tags(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"),
    },
    "<arg_key>": {  # GLM 4
        "open_pattern": r"<tool_call>\s*(?P<name>[^\s<]+)\s*(?=.*?</tool_call>)",
        "close_pattern": r"</tool_call>",
        **tags(r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
    },
    "<|tool_call>call:": {  # Gemma 4
        "open_pattern": r"<\|tool_call>call:(?P<name>[\w.-]+)(?=.*?<tool_call\|>)",
        "close_pattern": r"<tool_call\|>",
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    },
    "<|channel|>": {  # gpt-oss, in the form of its template and that of its answers
        "open_pattern": r"to=functions\.(?P<name>[^\s<]+)(?:(?!<\|message\|>).)*<\|message\|>",
        "close_pattern": r"<\|call\|>|<\|end\|>",
        "content": "json",
    },
    "<|tool_call_start|>": {  # LFM 2: [f(x=1), g()]
        "open_pattern": r"<\|tool_call_start\|>(?=.*?<\|tool_call_end\|>)",
        "close_pattern": r"<\|tool_call_end\|>",
        "content": "text",
    },
    "<｜tool▁call▁begin｜>": {  # DeepSeek
        "open_pattern": r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]+)"
        r"(?:<｜tool▁sep｜>|\n```json\n)(?=.*?<｜tool▁call▁end｜>)",
        "close_pattern": r"(?:\n```)?<｜tool▁call▁end｜>",
        "content": "json",
    },
    "[TOOL_CALLS]": {  # Mistral: [{"name": ...}], later name[ARGS]{...}
        "open_pattern": r"\[TOOL_CALLS\]",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "content": "text",
    },
    "<|tool_call|>": {  # Granite, Phi 4
        "open_pattern": r"<\|tool_call\|>(?=\s*\[)",
        "close_pattern": r"<\|/tool_call\|>",
        "content": "json",
    },
    "<tool_call>": {  # Hermes, Qwen 2.5 and 3, our chatml
        "open_pattern": r"<tool_call>(?=.*?</tool_call>)",
        "close_pattern": r"</tool_call>",
        "content": "json",
    },
    '"parameters": ': {  # Llama 3: the object alone
        "open_pattern": r'\A\s*(?:<\|python_tag\|>\s*)?(?=\{\s*"(?:name|type)")',
        "content": "json",
    },
}
# Where every part of an answer has a header: (reasoning opens, closes, content opens, closes)
CHANNELS = {
    "<|channel|>": (
        r"<\|channel\|>analysis<\|message\|>", r"<\|end\|>",
        r"<\|channel\|>(?:final|commentary)<\|message\|>", r"<\|end\|>|<\|return\|>",
    ),
    "<atem:invoke": (
        r" to=self<\|message\|>", r"<\|eom\|>", r" to=user<\|message\|>", r"<\|eot\|>|<\|eom\|>",
    ),
}  # fmt: skip
# Else reasoning is what an answer begins with: (opens, closes); the first is how templates without any are trained.
THOUGHTS = [("<think>", "</think>"), ("<|channel>thought\n", "<channel|>"), ("[THINK]", "[/THINK]")]


@functools.lru_cache(maxsize=16)
def response_template(template: str, with_calls: bool = True):
    """How the answers of a chat template are read; without its calls, they are content."""
    channels = next((patterns for marker, patterns in CHANNELS.items() if marker in template), None)
    opening, close = ("|".join(map(re.escape, marks)) for marks in zip(*THOUGHTS, strict=True))
    fields = {
        "reasoning_content": {"open_pattern": rf"\A\s*(?:{opening})", "close_pattern": rf"(?:{close})\s*"},
        "content": {},
    }
    if channels:
        patterns = dict(zip(("open_pattern", "close_pattern"), channels[:2], strict=True))
        fields["reasoning_content"] = patterns
        if with_calls:
            fields["content"] = dict(zip(("open_pattern", "close_pattern"), channels[2:], strict=True))
    fields["reasoning_content"] |= TEXT | {"repeats": True, "join": "\n"}
    fields["content"] |= TEXT | {"repeats": True, "join": ""}
    syntax = next((syntax for marker, syntax in CALLS.items() if marker in template), None)
    if syntax and with_calls:
        named = {"transform": CALL} if "?P<name>" in syntax["open_pattern"] else {}
        fields["tool_calls"] = syntax | named | {"repeats": True}
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


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer) -> re.Pattern:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def parse(text: str, prompt: str, tokenizer, tools: Iterable[dict] = ()) -> dict:
    """The message of an answer: role, content, and reasoning_content and tool_calls where it has some.

    text: with its special tokens, without the end token. prompt: its end suffices. tools: they give types to
    arguments. A malformed call is content.
    """
    template, clean = tokenizer.chat_template, control_tokens(tokenizer)
    prefix = prefix_of(template, prompt, text)
    calls = []
    try:
        found = read(text, response_template(template), prefix, list(tools))
        values = [call for value in found.get("tool_calls", ()) for call in calls_in(value)]
        calls = [to_call(value, number) for number, value in enumerate(values, 1)]
    except (ValueError, SyntaxError, RecursionError):
        found = {}
    if not calls and not found.get("content"):
        found = read(text, response_template(template, with_calls=False), prefix, [])
    message = {"role": "assistant", "content": clean.sub("", found.get("content", "")).strip()}
    if reasoning := clean.sub("", found.get("reasoning_content", "")).strip():
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": calls} if calls else {})


def read(text: str, template, prefix: str, tools: list[dict]) -> dict:
    parser = ResponseParser(template, prefix=prefix, tools=tools)
    parser.feed(text)
    return parser.finalize()[0]


def follow(pieces: Iterable[str], prompt: str, tokenizer) -> Iterator[tuple[str, str]]:
    """(field, text) for each piece of an answer, the text "" while it is not known what it belongs to.

    After a malformed call nothing more is told; `parse` has it as content.
    """
    template, clean = tokenizer.chat_template, control_tokens(tokenizer)
    prefix = prefix_of(template, prompt)
    field = "reasoning_content" if prefix else "content"
    parser, pieces = ResponseParser(response_template(template), prefix=prefix), iter(pieces)
    for piece in pieces:
        try:
            events = parser.feed(piece)
        except (ValueError, RecursionError):
            break
        texts = []
        for event in events:
            if event["type"] == "region_chunk":
                texts.append((event["field"], clean.sub("", event["text"])))
        field = texts[-1][0] if texts else field
        yield from texts or [(field, "")]
    for _ in pieces:
        yield "tool_calls", ""


def calls_in(value) -> list:
    """The calls of one region: of JSON, of LFM's Python, or of Mistral's two forms."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text.startswith("[{") or text == "[]":
        return json.loads(text)
    if "[ARGS]" in text:
        name, arguments = text.split("[ARGS]", 1)
        return [{"name": name.partition("[CALL_ID]")[0], "arguments": json.loads(arguments)}]
    calls = getattr(JsonWords().visit(ast.parse(text, mode="eval")).body, "elts", [])
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
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    bare = arguments is None and set(call) == {"name"}
    if not isinstance(call.get("name"), str) or not (bare or isinstance(arguments, dict)):
        raise ValueError(f"not a call: {value}")
    function = {"name": call["name"].strip(), "arguments": arguments or {}}
    return {"id": id_of(number), "type": "function", "function": function}


def id_of(number: int) -> str:
    """The id of a call: 9 letters and digits, as Mistral's templates want them."""
    return f"call{number:05}"

"""Answers as text become messages: every template of TRL, the families' own forms, and what models get wrong."""

import os
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken
from transformers import AutoTokenizer

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.model import generation, load, location, responses

PUBLISHED = sorted(
    file for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in file.stem
)
TYPES = {"zone": "string", "days": "integer", "exact": "boolean", "list": "array", "more": "object"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time",
            "parameters": {"type": "object", "properties": {name: {"type": of} for name, of in TYPES.items()}},
        },
    }
]
ARGUMENTS = {"zone": "75001, Paris", "days": 3, "exact": False, "list": [1, "a"], "more": {"k": "v"}}
QUESTION = {"role": "user", "content": "What time is it?"}
ENDS = """<|im_end|> <|endoftext|> <|eot_id|> <|return|> <|call|> <turn|> <|eot|> <end_of_turn> <|end|> <|user|>
<｜end▁of▁sentence｜> <|END_OF_TURN_TOKEN|> <|tool_response> <end_of_utterance>""".split()
OTHERS = "<|END_RESPONSE|> <|START_RESPONSE|> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>".split()


def call(number=1, **arguments):
    function = {"name": "get_time", "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


ANSWERS = {
    "content": {"content": "It is late, say(x)."},
    "reasoning": {"content": "It is late.", "reasoning_content": "Let me see."},
    "call": {"content": "", "tool_calls": [call(**ARGUMENTS)]},
    "call without arguments": {"content": "", "tool_calls": [call()]},
    "two calls": {"content": "", "tool_calls": [call(days=1), call(2, days=2)]},
    "reasoning and call": {"content": "", "reasoning_content": "Let me see.", "tool_calls": [call(days=1)]},
    "content and call": {"content": "Wait.", "tool_calls": [call(days=1)]},
}


class Tokenizer:
    """What `responses` needs of one."""

    def __init__(self, template: str):
        self.chat_template = template
        special = ("<|im_end|>", "<|message|>", "<|start|>", "<|channel|>", "<|end|>")
        self.added_tokens_decoder = {i: AddedToken(token, special=True) for i, token in enumerate(special)}


def parse(template, text, prompt="", tools=TOOLS, size=3) -> tuple[str, str, list[tuple[str, dict]]]:
    """(content, reasoning, calls) of an answer; what is shown of it piece by piece is no more than that."""
    tokenizer = Tokenizer(template)
    message = responses.parse(text, prompt, tokenizer, tools)
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    shown = {"content": "", "reasoning_content": "", "tool_calls": ""}
    for field, part in responses.follow(pieces, prompt, tokenizer, tools):
        shown[field] += part
    assert message["content"].startswith(shown["content"].strip())
    assert message.get("reasoning_content", "") == shown["reasoning_content"].strip()
    calls = [(item["function"]["name"], item["function"]["arguments"]) for item in message.get("tool_calls", [])]
    return message["content"], message.get("reasoning_content", ""), calls


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_an_answer_of_a_published_template_comes_back(file, kind, tokenizer_folder):
    """Written by the template, cut out where the model begins, and read."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*ENDS, *OTHERS]})
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    encoder, answer = ChatEncoder(tokenizer), {"role": "assistant", **ANSWERS[kind]}
    question = QUESTION | ({"tools": TOOLS} if "tool_calls" in answer else {})
    try:
        prompt = encoder.render([question], add_generation_prompt=True)
        text = encoder.render([question, answer])
    except UserError as refusal:
        pytest.skip(str(refusal))
    start = len(os.path.commonprefix([prompt, text]))  # some prompts open reasoning that the answer does not have
    prompt, text = text[:start], text[start:].rstrip()
    while end := next((token for token in ENDS if text.endswith(token)), ""):
        text = text.removesuffix(end).rstrip()
    parts = ("Wait.", "It is late", "Let me see.", "get_time")
    if left_out := [part for part in parts if text.count(part) < str(answer).count(part)]:
        pytest.skip(f"the template leaves out {left_out}")
    if file.stem == "gptoss" and kind == "content and call" or 0 <= text.find("get_time") < text.find("Let me see."):
        pytest.skip("the template writes the content as reasoning, or the reasoning after the call")
    assert responses.parse(text, prompt, tokenizer, TOOLS) == answer


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<|channel|>", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to="
         'functions.f <|constrain|>json<|message|>{"x": 1}', ("", "Hm.", [("f", {"x": 1})])),
        ("<|channel|>", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>"
         'commentary json<|message|>{"x": 1}', ("I look.", "", [("f", {"x": 1})])),
        ("<|channel|>", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
         ("Yes.", "Hm.", [])),
        ("<|channel|>", "Without channels.", ("Without channels.", "", [])),
        ("[TOOL_CALLS]", 'Yes.[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]',
         ("Yes.", "", [("f", {"x": 1})])),
        ("[TOOL_CALLS]", '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}',
         ("", "", [("f", {"x": 1}), ("g", {})])),
        ("[TOOL_CALLS]", "[THINK]Hm.[/THINK]Yes.", ("Yes.", "Hm.", [])),
        ("<|tool_call_start|>", '<|tool_call_start|>[f(a={"x": true, "y": [null]}, b=-1.5, c=\'d\'), g()]'
         "<|tool_call_end|>Wait",
         ("Wait", "", [("f", {"a": {"x": True, "y": [None]}, "b": -1.5, "c": "d"}), ("g", {})])),
        ("<|tool_call_start|>", "Then, say(x), or call(y).", ("Then, say(x), or call(y).", "", [])),
        ("<｜tool▁call▁begin｜>",
         "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": 1}\n```<｜tool▁call▁end｜>\n"
         '<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>', ("", "", [("f", {"x": 1}), ("g", {})])),
        ('"parameters": ', '{"type": "function", "name": "f", "parameters": {"x": 1}}', ("", "", [("f", {"x": 1})])),
        ('"parameters": ', '<|python_tag|>{"name": "f", "parameters": {}}', ("", "", [("f", {})])),
        ("<|tool_call|>", '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]', ("", "", [("f", {"x": 1})])),
        ("<arg_key>", "<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>",
         ("", "", [("f", {"x": "1"})])),
        ("<tool_call>", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
         ("", "", [("f", {"x": 1})])),
        ("<tool_call>", '<tool_call>{"name": "f"}</tool_call>Wait', ("Wait", "", [("f", {})])),
        ("", "<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
        ("", "<think>Hm.", ("", "Hm.", [])),
        ("", "Put <think> before it, </think> after it.", ("Put <think> before it, </think> after it.", "", [])),
    ],
)  # fmt: skip
def test_the_forms_in_which_models_answer(template, text, expected, size):
    assert parse(template, text, size=size) == expected


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("<tool_call>", 'Yes. <tool_call>{"name": "f", "arg</tool_call> No.'),
        ("<tool_call>", 'Yes. <tool_call>{"name": "f", "arguments": {"x": 1}}'),  # cut off
        ("<tool_call>", "<tool_call>7</tool_call>"),
        ("<tool_call>", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("<tool_call>", '<tool_call>{"arguments": {}}</tool_call>'),
        ("<tool_call>", "<tool_call>" + "[" * 50_000 + "</tool_call>"),
        ("<function=", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>"),
        ("<|tool_call_start|>", "<|tool_call_start|>[f(a='it's')]<|tool_call_end|>"),
        ("<|tool_call_start|>", "<|tool_call_start|>[f(1)]<|tool_call_end|>"),
        ("<|tool_call_start|>", "<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>"),
        ("[TOOL_CALLS]", "[TOOL_CALLS] f"),
        ('"parameters": ', '{"name": "Bob", "age": 3}'),  # asked for JSON
        ('"parameters": ', '{"name": "Bob"}'),
        ('"parameters": ', '{"name": "Bob", "arguments": "none"}'),
        ('"parameters": ', '{"name": "Bob", "children": [{"arguments": {}}]}'),
    ],
    ids=range(15),
)
def test_a_malformed_call_is_content(template, text, size):
    assert parse(template, text, size=min(size, len(text))) == (text, "", [])


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ('"parameters": ', '{"name": "f", "parameters": {"x": 1}}', None),
        ("<tool_call>", 'So: <tool_call>{"name": "f", "arguments": {}}</tool_call>', None),
        ("[TOOL_CALLS]", 'So: [TOOL_CALLS][{"name": "f", "arguments": {}}]', None),
        ("<|channel|>", "<|channel|>final<|message|>Yes.", "Yes."),
    ],
)
def test_without_tools_there_are_no_calls(template, text, expected):
    assert parse(template, text, tools=()) == (expected or text, "", [])


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
        ("<|im_start|>assistant\n<think>\n", "Hm.", ("", "Hm.", [])),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", ("Yes.", "", [])),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", "A tag.", ("A tag.", "", [])),
    ],
)
def test_a_prompt_may_begin_the_reasoning(prompt, text, expected):
    assert parse("<think> </think>", text, prompt) == expected


def test_control_tokens_are_no_content():
    tokenizer = Tokenizer("")
    assert list(responses.follow(["Yes.", "<|im_end|>"], "", tokenizer)) == [("content", "Yes."), ("content", "")]
    assert responses.parse("Yes.<|im_end|>", "", tokenizer)["content"] == "Yes."


def test_reasoning_that_nothing_opened_is_reasoning_where_the_template_knows_it():
    message = responses.parse("Hm.</think>Yes.", "", Tokenizer("...split('</think>')"))
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert responses.parse("Hm.</think>Yes.", "", Tokenizer(""))["content"] == "Hm.</think>Yes."


@pytest.mark.parametrize(("name", "ends"), [("gptoss", "return call"), ("phi3", "end")])
def test_what_ends_a_part_of_an_answer_does_not_end_it(name, ends, tiny, tokenizer_folder):
    """gpt-oss writes <|end|> after its reasoning, Phi after its answer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|end|>", "<|return|>", "<|call|>"][: 3 if "oss" in name else 1]}
    )
    tokenizer.chat_template = next(file for file in PUBLISHED if file.stem == name).read_text(encoding="utf-8")
    model = load.load_model(location.locate(str(tiny())), None, None, "sdpa")
    found = set(tokenizer.convert_ids_to_tokens(generation.end_tokens(model, tokenizer)))
    assert {f"<|{end}|>" for end in ends.split()} == found & {"<|end|>", "<|return|>", "<|call|>"}

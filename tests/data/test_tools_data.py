"""The rows that teach calls, and the questions that measure them."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

from common.chat.turns import read_tools
from common.data import sources
from common.data.encoder import ChatEncoder
from common.eval.answers import read_prompts

TOOLS = read_tools(ROOT / "data/tools.json", "TOOLS")
NAMES = [tool["function"]["name"] for tool in TOOLS]
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="module")
def chats():
    return list(sources.sound_chats(str(ROOT / "data/tools.jsonl"), "DATA"))


def calls_of(chat: list[dict]) -> list[dict]:
    return [call["function"] for turn in chat for call in turn.get("tool_calls", ())]


def test_rows_are_valid_and_offer_the_same_tools(chats):
    assert len(chats) == 40 and all(chat[0]["tools"] == TOOLS and not chat.notes for chat in chats)
    assert Counter(call["name"] for chat in chats for call in calls_of(chat)) == dict.fromkeys(NAMES, 12)
    arguments = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in TOOLS}
    for call in (call for chat in chats for call in calls_of(chat)):
        assert list(call["arguments"]) == arguments[call["name"]]


def test_calls_and_answers_are_learned_and_results_are_not(chats, tokenizer):
    for chat, row in zip(chats, ChatEncoder(tokenizer).encode(chats), strict=True):
        expected = ""
        for turn in (turn for turn in chat if turn["role"] == "assistant"):
            thought = f"<think>\n{turn['reasoning_content']}\n</think>\n\n" if "reasoning_content" in turn else ""
            functions = [call["function"] for call in turn.get("tool_calls", ())]
            calls = [CALL.format(name=call["name"], arguments=json.dumps(call["arguments"])) for call in functions]
            expected += thought + turn["content"] + "\n".join(calls) + "<|im_end|>"
        assert tokenizer.decode(row.ids[row.learned]) == expected


def test_results_of_calculations_are_right(chats):
    for chat in chats:
        if [call["name"] for call in calls_of(chat)] == ["calculate"]:
            expression = calls_of(chat)[0]["arguments"]["expression"]
            assert re.fullmatch(r"[\d .()*/+-]+", expression) and eval(expression) == float(chat[2]["content"])


def test_questions_are_no_training_rows(chats):
    """Neither their wording nor the value that they ask for."""
    rows = [row for row, _ in read_prompts(str(ROOT / "data/tool_questions.jsonl"))]
    assert Counter(row["expects"] for row in rows) == dict.fromkeys(NAMES, 10)
    asked = {turn["content"].lower() for chat in chats for turn in chat if turn["role"] == "user"}
    assert not asked & {row["prompt"].lower() for row in rows}
    given = [value for chat in chats for call in calls_of(chat) for value in call["arguments"].values()]
    assert not [value for value in given for row in rows if re.search(row["pattern"], value, re.IGNORECASE)]

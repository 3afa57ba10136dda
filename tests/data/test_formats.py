"""Formats: every schema becomes a chat, odd shapes are read or refused with a remedy, no field is lost in silence."""

import json
import pickle
from collections import Counter
from datetime import date

import pytest
from conftest import write_jsonl

from common.bounds import find_problem
from common.cli import UserError
from common.data import formats, rows, sources

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
S = {"role": "system", "content": "Be kind."}
TOOL = {"type": "function", "function": {"name": "clock", "description": "Time", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"tz": "UTC"}}}
JSON_CALL = '{"name": "clock", "arguments": {"tz": "UTC"}}'
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
HI = "user: Hi | assistant: Hello"


def chats(data):
    return [chat for source in sources.parse(str(data)) for _, chat in sources.read_chats(source)]


def short(chat):
    """A chat as one text; what is wrong with the row, where it gives none."""
    return chat if isinstance(chat, str) else " | ".join(f"{turn['role']}: {turn['content']}" for turn in chat)


def arena(**changes):
    """A row in the schema of lmsys/chatbot_arena_conversations."""
    return {
        "question_id": "q1", "model_a": "gpt-4", "model_b": "alpaca-13b", "winner": "model_a", "judge": "arena_user_1",
        "conversation_a": [U, A], "conversation_b": [U, {"role": "assistant", "content": "Hm."}], "turn": 1,
        "language": "English", "tstamp": 1682351591.13, "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"t5-large": {"flagged": False, "score": -1.0}},
    } | changes  # fmt: skip


def oasst(message_id, parent_id, role, text, **changes):
    """A row in the schema of OpenAssistant/oasst2."""
    return {
        "message_id": message_id, "parent_id": parent_id, "user_id": "u1", "text": text, "role": role, "lang": "en",
        "review_count": 3, "review_result": True, "deleted": False, "rank": None, "synthetic": False,
        "message_tree_id": "m1", "tree_state": "ready_for_export",
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [U, A]}, "user: Hi | assistant: Hello"),
        ({"prompt": "Hi", "prompt_id": "x", "messages": [U, A]}, "user: Hi | assistant: Hello"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "1"},
            "user: Hi | assistant: Hello",
        ),
        ({"conversations": [U, A]}, "user: Hi | assistant: Hello"),
        ({"instruction": "Add.", "input": "2", "output": "5", "text": "Below"}, "user: Add.\n\n2 | assistant: 5"),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, "user: Greet. | assistant: Hi"),
        ({"prompt": "Hi", "completion": "Hello"}, "user: Hi | assistant: Hello"),
        ({"prompt": [U], "completion": [A]}, "user: Hi | assistant: Hello"),
        ({"conversations": [U, A], "system_prompt": "Be kind."}, "system: Be kind. | user: Hi | assistant: Hello"),
        (
            {"id": "1", "dialogue": "Ann: Hi\r\nBob: Yo", "summary": "Ann greets Bob."},
            "user: Summarize this dialogue:\n\nAnn: Hi\nBob: Yo | assistant: Ann greets Bob.",
        ),
        (arena(), "user: Hi | assistant: Hello"),
        (arena(winner="model_b", model_b="claude-v1"), "user: Hi | assistant: Hm."),
        ({"text": "Once upon a time."}, "text: Once upon a time."),
        (
            {"message_tree_id": "m1", "prompt": oasst("m1", None, "prompter", "Hi", replies=[
                oasst("m2", "m1", "assistant", "Yo", rank=1, replies=[]),
                oasst("m3", "m1", "assistant", "Hello", rank=0, replies=[]),
            ])},
            "user: Hi | assistant: Hello",
        ),
        ({"messages": [U | {"content": [{"type": "text", "text": "Hi"}]}, A]}, "user: Hi | assistant: Hello"),
    ],
)  # fmt: skip
def test_every_schema_becomes_a_chat(row, turns):
    assert " | ".join(f"{turn['role']}: {turn['content']}" for turn in formats.to_chat(row)) == turns


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"winner": "tie"}, "tie"),
        ({"winner": "tie (bothbad)"}, "tie"),
        ({"model_a": "vicuna-13b", "model_b": "gpt-4"}, "neither GPT-4 nor Claude"),
        ({"language": "German"}, "not English"),
        ({"openai_moderation": {"flagged": True}}, "flagged"),
        ({"toxic_chat_tag": {"t5-large": {"flagged": True}}}, "flagged"),
    ],
)
def test_arena_pairs_not_worth_learning_are_dropped_by_reason(changes, words):
    result = formats.to_chat(arena(**changes))
    assert isinstance(result, formats.SkippedRow) and words in result


def test_trees_follow_the_best_ranked_answers_to_the_last_answer(tmp_path):
    rows = [
        oasst("q", None, "prompter", "Q"),
        oasst("unranked", "q", "assistant", "bad"),
        oasst("second", "q", "assistant", "worse", rank=1),
        oasst("first", "q", "assistant", "best", rank=0),
        oasst("gone", "first", "prompter", "deleted", rank=0, deleted=True),
        oasst("more", "first", "prompter", "More?", rank=1),
        oasst("german", "more", "assistant", "Ja", lang="de", rank=0),
        oasst("yes", "more", "assistant", "Yes", rank=1),
        oasst("thanks", "yes", "prompter", "Thanks"),
        oasst("lonely", None, "prompter", "Nobody answers"),
        oasst("bad", None, "prompter", "x", review_result=False),
        oasst("orphan", "elsewhere", "assistant", "y"),
    ]
    first, *others = chats(write_jsonl(tmp_path / "oasst.jsonl", rows))
    assert first.notes == ()
    assert [turn["content"] for turn in first] == ["Q", "best", "More?", "Yes", "Thanks"]
    assert len(others) == len(rows) - 1 and Counter(other.partition(": ")[2] for other in others) == {
        "part of the chat of its tree, or of another branch": 8,
        "no answer": 1,
        "deleted, rejected or not English": 1,
        "the message it answers is missing": 1,
    }
    (tmp_path / "a-line.json").write_text(json.dumps(rows))  # all rows have the same number
    assert Counter(map(str, chats(tmp_path / "a-line.json"))) == Counter(map(str, [first, *others]))
    assert "a message of a tree" in chats(write_jsonl(tmp_path / "mixed.jsonl", [{"text": "hi"}, rows[0]]))[1]
    assert "no message of a tree" in chats(write_jsonl(tmp_path / "mixed.jsonl", [rows[0], {"text": "hi"}]))[1]


def said(role, value, **more):
    return {"from": role, "value": value} | more


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Hi", "response": "Hello"}, HI),
        ({"question": "Hi", "answer": "Hello"}, HI),
        ({"query": "Hi", "response": "Hello"}, HI),
        ({"problem": "Hi", "solution": "Hello"}, HI),
        ({"user": "Hi", "assistant": "Hello"}, HI),
        ({"input": "Hi", "output": "Hello"}, HI),
        ({"instruction": "Hi", "response": "Hello", "context": ""}, HI),
        ({"instruction": "Sum up.", "context": "Hi", "response": "Hello"}, "user: Sum up.\n\nHi | assistant: Hello"),
        ({"Instruction": "Hi", " Output": "Hello"}, HI),
        ({"Messages": [{"Role": "User", "Content": "Hi"}, {"Role": " Assistant ", "Content": "Hello"}]}, HI),
        ({"conversation": [U, A]}, HI),
        ({"conversation": [["Hi", "Hello"]]}, HI),
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, HI),
        ({"conversation": [{"system": "Be kind.", "input": "Hi", "output": "Hello"}]}, f"system: Be kind. | {HI}"),
        ({"dialog": [said("human", "Hi"), said("chatbot", "Hello")]}, HI),
        ({"messages": json.dumps([U, A])}, HI),
        ({"messages": None, "prompt": "Hi", "completion": "Hello"}, HI),
        ({"messages": [{"role": None, "from": "human", "value": "Hi", "content": None}, A]}, HI),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, HI),
        ({"instruction": None, "input": "Hi", "output": "Hello"}, HI),
        ({"instruction": "Hi", "input": float("nan"), "output": "Hello", "score": float("nan")}, HI),
        ({"prompt": [U], "completion": "Hello"}, HI),
        ({"prompt": [U], "completion": A}, HI),
        ({"prompt": "Hi", "completion": [A]}, HI),
        ({"prompt": U, "completion": A}, HI),
        ({"prompt": [U], "response": "Hello"}, HI),
        ({"question": [said("human", "Hi")], "answer": said("gpt", "Hello")}, HI),
        ({"messages": [U | {"content": ["H", "i"]}, A]}, HI),
        ({"messages": [U | {"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, A]}, HI),
        ({"messages": [S | {"role": "developer"}, U, A]}, f"system: Be kind. | {HI}"),
        ({"messages": [S | {"content": ""}, U, A]}, HI),
        ({"instruction": "Hi", "output": "Hello", "system": "Be kind."}, f"system: Be kind. | {HI}"),
        ({"question": "Hi", "response": "Hello", "system_prompt": "Be kind."}, f"system: Be kind. | {HI}"),
        ({"messages": [U, A], "system": "Be kind."}, f"system: Be kind. | {HI}"),
        ({"messages": [S, U, A], "system": "Be kind."}, f"system: Be kind. | {HI}"),
        ({"messages": [U, A], "system": " "}, HI),
        ({"instruction": "Ho", "output": "Hm", "history": [["Hi", "Hello"]]}, f"{HI} | user: Ho | assistant: Hm"),
        ({"query": "Ho", "response": "Hm", "history": [U, A]}, f"{HI} | user: Ho | assistant: Hm"),
        ({"prompt": "Hi", "response": "Hello", "history": []}, HI),
        ({"messages": [U, A, U]}, f"{HI} | user: Hi"),
        ({"messages": [["user", "Hi"], ["assistant", "Hello"]]}, HI),
        ({"conversations": [["System", "Be kind."], ["human", "Hi"], ["gpt", "Hello"]]}, f"system: Be kind. | {HI}"),
        ({"messages": [["user", "Hello"], ["Hi", "Hello"]]}, f"user: user | assistant: Hello | {HI}"),
        ({"instruction": "Hi", "output": "Hello", "history": "[]", "tools": ""}, HI),
        ({"instruction": "Hi", "output": "Hello", "history": " ", "tools": "[]"}, HI),
        ({"query": "Ho", "response": "Hm", "history": '[["Hi", "Hello"]]'}, f"{HI} | user: Ho | assistant: Hm"),
        (
            {"prompt": [U], "completion": "Hm", "history": [["Hi", "Hello"]]},
            f"{HI} | user: Hi | assistant: Hm",
        ),
    ],
)
def test_odd_shapes_are_read(row, turns):
    chat = formats.to_chat(row)
    joined = "['H', 'i']" in str(row) or "'text': 'i'" in str(row)
    assert short(chat) == turns and chat.notes == (("changed: parts of a content joined",) if joined else ())


@pytest.mark.parametrize(
    ("turns", "expected", "note"),
    [
        ([U, U, A], "user: Hi\n\nHi | assistant: Hello", "user"),
        ([U, A, U, U, A], f"{HI} | user: Hi\n\nHi | assistant: Hello", "user"),
        ([U, A, U, U], f"{HI} | user: Hi\n\nHi", "user"),
        ([U, A, A], "user: Hi | assistant: Hello\n\nHello", "assistant"),
        ([S, S, U, A], f"system: Be kind.\n\nBe kind. | {HI}", "system"),
    ],
)
def test_consecutive_turns_of_a_role_are_joined_everywhere(turns, expected, note):
    chat = formats.to_chat({"messages": turns})
    assert short(chat) == expected and chat.notes == (f"changed: consecutive {note} turns joined",)


def test_numbers_are_read_as_text():
    for row in (
        {"messages": [U, A | {"content": 4}]},
        {"instruction": "Hi", "input": 4, "output": "Hello"},
        {"question": 2.5, "answer": 4},
        {"text": 7},
    ):
        chat = formats.to_chat(row)
        assert all(isinstance(turn["content"], str) for turn in chat), row
        assert chat.notes == ("changed: numbers read as text",)
    assert short(formats.to_chat({"question": 2.5, "answer": 4})) == "user: 2.5 | assistant: 4"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"subject": "Hi", "Body": "Hello"}, ["'subject', 'Body'", 'COLUMNS="field:user, field:assistant"']),
        ({"instruction": "Hi", "output": ""}, ["output: ", "not empty"]),
        ({"instruction": "Hi", "output": None}, ["output: ", "not empty"]),
        ({"instruction": "", "input": "", "output": "Hello"}, ["instruction: ", "not empty"]),
        ({"output": "Hi", "Output": "Hello", "instruction": "x"}, ["capitals", "rename"]),
        ({"messages": [U, A | {"content": True}]}, ["messages[1].content", "write it as one"]),
        ({"messages": [U, A | {"content": {"a": 1}}]}, ["messages[1].content", "write it as one"]),
        ({"messages": [U | {"content": [{"type": "image_url"}]}, A]}, ["type image_url", "only text", "remove"]),
        ({"messages": [U | {"content": [{"type": "text"}]}, A]}, ["without a text"]),
        ({"messages": [U | {"content": [7]}, A]}, ["the parts of a list must be"]),
        ({"messages": [U | {"role": "wizard"}, A]}, ["messages[0]: ", "system, user, assistant or tool", "wizard"]),
        ({"messages": [U, A | {"role": "text"}]}, ["messages[1]: ", "the role must be"]),
        ({"messages": "Hi"}, ["messages: must be a list of turns"]),
        ({"messages": []}, ["messages: must be a list of turns that is not empty"]),
        ({"messages": {"role": "user"}}, ["messages: must be a list of turns that is not empty"]),
        (arena(toxic_chat_tag="yes"), ["another type", "remove"]),
        ({"messages": ["Hi", "Hello"]}, ["messages[0]: must be an object", "pair"]),
        ({"conversations": [said("gpt", "Welcome"), said("human", "Hi"), said("gpt", "Hello")]},
         ["conversations[0].value: assistant follows the start", "put a user turn before it"]),
        ({"messages": [U, A, S, U, A]}, ["messages[2].content: system follows assistant", "move it"]),
        ({"messages": [S, U]}, ["no turn of the assistant", "remove"]),
        ({"messages": [U, A, A | {"weight": 0}]}, ["different weights"]),
        ({"messages": [U, A | {"weight": 0.5}]}, ["messages[1].weight", "must be 0"]),
        ({"messages": [U, A | {"train": "maybe"}]}, ["messages[1].train", "must be 0"]),
        ({"messages": [U, A | {"train": False, "loss": True}]}, ["loss and train contradict each other"]),
        ({"messages": [U, A], "weight": 0, "train": True}, ["contradict each other"]),
        ({"messages": [U, A], "weight": 0.5}, ["row.weight", "must be 0"]),
        ({"question": ["a", "b"], "answer": ["c", "d"]}, ["question: must be a text", "columns", 'orient="records"']),
        ({"instruction": {"0": "a"}, "output": {"0": "b"}}, ["instruction: must be a text", "columns"]),
        ({"prompt": ["Hi"], "completion": ["Hello"]}, ["prompt: must be a text", "columns"]),
        ([U, A], ["row: must be an object, as", "messages"]),
        (U, ["a turn alone; one row is", "messages"]),
        (said("human", "Hi"), ["a turn alone"]),
        ({"messages": [U, A], "history": [["a", "b"]]}, ["history: it belongs to a turn", "before the others"]),
        ({"messages": [U, A], "thinking": "Hm."}, ["thinking: it belongs to a turn", "assistant turn"]),
        ({"messages": [U, A], "tool_calls": [CALL]}, ["tool_calls: it belongs to a turn"]),
        ({"prompt": [U], "completion": [A], "reasoning_content": "Hm."}, ["reasoning_content: it belongs"]),
        ({"text": "Hi", "system": "Be kind."}, ["system: it belongs to a turn", "into the text"]),
        ({"text": "Hi", "tools": [TOOL]}, ["tools: it belongs to a turn"]),
        ({"messages": "[{'role': 'user'}]"}, ["messages: must be a list of turns", "json.dumps"]),
        ({"messages": [S, U, A], "system": "Be rude."}, ["two different system texts"]),
        ({"messages": [U, A], "system": "Be rude.", "system_prompt": "Be kind."}, ["two different system texts"]),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, ["chosen: ", "preference_train.py", "COLUMNS"]),
        ({"chosen": [U, A], "rejected": [U, A]}, ["preference_train.py"]),
        ({"messages": [U, A], "rejected_response": "No"}, ["preference_train.py"]),
        ({"conversations": [said("human", "Hi")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
         ["preference_train.py"]),
        ({"messages": [U, A | {"reasoning": "a", "thinking": "b"}]}, ["two fields"]),
        ({"instruction": "x", "output": "y", "history": "z"}, ["history: must be a list of turns"]),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_a_remedy(row, words):
    result = formats.to_chat(row)
    assert isinstance(result, formats.InvalidRow) and all(word in result for word in words), result


@pytest.mark.parametrize(
    ("turn", "weight"),
    [
        ({"weight": 0}, 0), ({"weight": 1.0}, 1), ({"train": False}, 0), ({"training": False}, 0), ({"loss": 0.0}, 0),
        ({"loss": "True"}, 1), ({"Weight": 0}, 0), ({"weight": 0, "train": False}, 0), ({"weight": None}, None),
    ],
)  # fmt: skip
def test_weights_have_many_names(turn, weight):
    for row in ({"messages": [U, A | turn]}, {"conversations": [said("human", "Hi"), said("gpt", "Hello", **turn)]}):
        chat = formats.to_chat(row)
        assert chat[1].get("weight") == weight and chat.notes == () and "weight" not in chat[0]


def test_weights_of_rows_and_of_user_turns():
    chat = formats.to_chat({"messages": [U, A, U, A | {"weight": 1}], "train": False})
    assert [turn.get("weight") for turn in chat] == [None, 0, None, 1]
    assert formats.to_chat({"question": "Hi", "answer": "Hello", "loss": 0.37}).notes == ("unused: loss",)
    assert formats.to_chat({"messages": [U | {"weight": 0}, A]}).notes == ()
    assert formats.to_chat({"messages": [U | {"weight": 1}, A]}).notes == ("unused: weight of user turns",)
    weights = [turn.get("weight") for turn in formats.to_chat({"prompt": [U, A, U], "completion": [A]})]
    assert weights == [None, 0, None, None]
    weights = [
        turn.get("weight") for turn in formats.to_chat({"prompt": [U, A | {"train": True}, U], "completion": "a"})
    ]
    assert weights == [None, 1, None, None]


def test_labels_of_kto():
    for row in ({"prompt": "Hi", "completion": "No"}, {"prompt": [U], "completion": [A]}, {"messages": [U, A]}):
        for bad in (False, 0, "False", 0.0, "0.0", -1, "bad", "Negative", "no"):
            result = formats.to_chat(row | {"label": bad})
            assert isinstance(result, formats.SkippedRow) and "preference_train.py" in result
        for good in (True, 1, "true", "1.0", "positive"):
            assert formats.to_chat(row | {"label": good, "kto_tag": True}).notes == ()
        assert "label and kto_label contradict" in formats.to_chat(row | {"label": 1, "kto_label": False})
        for other in ("neutral", 3):
            assert formats.to_chat(row | {"label": other}).notes == ("unused: label",)
    assert isinstance(formats.to_chat({"messages": [U, A], "kto_tag": False}), formats.SkippedRow)
    assert formats.to_chat({"text": "A film.", "label": 0}).notes == ("unused: label",)
    assert isinstance(formats.to_chat({"text": "A film.", "label": False}), formats.SkippedRow)
    pair = {"instruction": "Hi", "output": "Hello"}
    for name, label in (("label", False), ("label", "false"), ("kto_label", 0), ("kto_tag", "0.0")):
        assert isinstance(formats.to_chat(pair | {name: label}), formats.SkippedRow)
    for label in (0, 1, -1, "0", "bad", 0.0):  # classes
        assert formats.to_chat(pair | {"label": label}).notes == ("unused: label",)
    turns = [U, A | {"label": False}, U | {"label": True}, A | {"label": True}, U, A | {"label": 0}]
    chat = formats.to_chat({"messages": turns})
    assert [turn.get("weight") for turn in chat] == [None, 0, None, 1, None, None]
    assert chat.notes == ("unused: messages[].label",)
    assert "contradict" in formats.to_chat({"messages": [U, A | {"label": False, "weight": 1}]})


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"messages": [U, A], "split": "test", "Score": 3}, ["split", "Score"]),
        ({"messages": [U | {"name": "x"}, A | {"id": 1}, U | {"name": "y"}, A]}, ["messages[].name", "messages[].id"]),
        ({"conversations": [said("human", "Hi"), said("gpt", "Hello", mask=True)]}, ["conversations[].mask"]),
        ({"messages": [U, A], "text": "Hi", "prompt": "Hi"}, ["text", "prompt"]),
        ({"messages": [U | {"reasoning": "x"}, A]}, ["messages[].reasoning"]),
        ({"messages": [U, A], "reasoning": "off", "history": "[]"}, ["reasoning", "history"]),
        ({"input": [U], "output": "Hello", "reasoning": "on"}, ["reasoning"]),
        ({"text": "Hi", "system": "", "tools": "[]"}, []),
        ({"messages": [U, A], "a": None, "b": "", "c": [], "d": float("nan"), "e": {}, "f": False}, ["f"]),
        ({"": 0, "question": "Hi", "answer": "Hello"}, ["(no name)"]),
    ],
)  # fmt: skip
def test_no_field_is_lost_in_silence(row, notes):
    assert formats.to_chat(row).notes == tuple(f"unused: {note}" for note in notes)


def test_fields_of_published_schemas_need_no_line():
    assert formats.to_chat(arena()).notes == ()
    assert formats.to_chat(arena(colour="red")).notes == ("unused: colour",)
    root = oasst("m1", None, "prompter", "Hi", replies=[oasst("m2", "m1", "assistant", "Yo", stars=5, replies=[])])
    assert formats.to_chat({"message_tree_id": "m1", "prompt": root}).notes == ("unused: message[].stars",)


@pytest.mark.parametrize(
    "turns",
    [
        [U, CALLS, RESULT, A],
        [U, CALLS | {"content": ""}, {"role": "tool", "content": "12:00"}, A],
        [U, {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}, RESULT, A],
        [U, CALLS | {"tool_calls": [{"id": "c1", "name": "clock", "arguments": '{"tz": "UTC"}'}]}, RESULT, A],
        [U, CALLS | {"function_call": None}, RESULT | {"name": "clock"}, A | {"tool_calls": []}],
    ],
)
def test_calls_and_results_in_many_shapes(turns):
    for tools in ([TOOL], json.dumps([TOOL]), TOOL, [TOOL["function"]], [json.dumps(TOOL)]):
        chat = formats.to_chat({"messages": turns, "tools": tools})
        assert chat == [
            U | {"tools": [TOOL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            RESULT | {"name": "clock"},
            A,
        ]
        assert chat.notes == ()


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (said("function_call", JSON_CALL), said("observation", "12")),
        (said("tool_call", f"[{JSON_CALL}]"), said("tool_response", 12)),
        (
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "content": "12"},
        ),
        ({"role": "assistant", "tool_calls": [{"function": CALL["function"]}]}, {"role": "ipython", "content": "12"}),
    ],
)
def test_calls_without_ids_get_them(call, result):
    made = CALL | {"id": "call00001"}
    assert formats.to_chat({"conversations": [U, call, result, A]}) == [
        U,
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "12", "tool_call_id": "call00001", "name": "clock"},
        A,
    ]


def test_a_text_and_its_call_are_one_turn_and_results_find_their_calls():
    two = [CALL, {"id": "c2", "type": "function", "function": {"name": "sum", "arguments": {}}}]
    answers = [{"role": "tool", "tool_call_id": "c2", "content": {"a": 1}}, {"role": "tool", "content": ["x"]}]
    chat = formats.to_chat({"messages": [U, A, CALLS | {"tool_calls": two}, *answers, A, U, CALLS, RESULT, A]})
    assert [turn["role"] for turn in chat] == "user assistant tool tool assistant user assistant tool assistant".split()
    assert chat[1] == A | {"tool_calls": two}
    assert [turn["name"] for turn in chat if turn["role"] == "tool"] == ["sum", "clock", "clock"]
    assert [turn["content"] for turn in chat if turn["role"] == "tool"] == ['{"a": 1}', '["x"]', "12:00"]
    parallel = [said("human", "Hi"), said("function_call", JSON_CALL), said("function_call", '{"name": "sum"}')]
    chat = formats.to_chat({"conversations": [*parallel, said("observation", "a"), said("observation", "b")]})
    assert [call["id"] for call in chat[1]["tool_calls"]] == ["call00001", "call00002"]
    assert chat[1]["tool_calls"][1]["function"]["arguments"] == {}
    assert [(turn["name"], turn["content"]) for turn in chat[2:]] == [("clock", "a"), ("sum", "b")]


def test_calls_and_results_that_stand_in_the_text_as_in_the_sets_of_hermes():
    python = "{'name': 'sum', 'arguments': {'a': None}}"
    text = f"<think>Hm.</think>\n<tool_call>\n{JSON_CALL}\n</tool_call>\n<tool_call>\n{python}\n</tool_call><|im_end|>"
    results = "<tool_response>\n12\n</tool_response>\n<tool_response></tool_response>"
    chat = formats.to_chat({"conversations": [said("human", "Hi"), said("gpt", text), said("tool", results), A]})
    assert [turn["content"] for turn in chat] == ["Hi", "<think>Hm.</think>", "12", "", "Hello"]
    assert [call["function"] for call in chat[1]["tool_calls"]] == [
        CALL["function"],
        {"name": "sum", "arguments": {"a": None}},
    ]
    assert [turn.get("name") for turn in chat[2:]] == ["clock", "sum", None]
    for about in (f"Write <tool_call>{JSON_CALL}</tool_call>, then wait.", "Say </tool_call> at the end."):
        assert formats.to_chat({"messages": [U, A | {"content": about}]}) == [U, A | {"content": about}]


def test_arguments_of_calls_have_many_names():
    for name in ("arguments", "parameters", "args", "input"):
        turn = CALLS | {
            "tool_calls": [{"id": "c1", "name": "clock", name: {"tz": "UTC"}, "index": 0, "type": "tool_use"}]
        }
        chat = formats.to_chat({"messages": [U, turn, RESULT | {"content": ""}, A]})
        assert chat[1]["tool_calls"] == [CALL] and chat[2]["content"] == ""
        assert chat.notes == ("unused: tool_calls[].index",)
    turn = CALLS | {"tool_calls": [{"id": "c1", "function": {"name": "clock"}, "arguments": {"tz": "UTC"}}]}
    assert formats.to_chat({"messages": [U, turn]})[1]["tool_calls"] == [CALL]


def test_tools_stand_on_the_row_or_on_the_system_turn():
    for row in (
        {"messages": [S | {"tools": [TOOL]}, U, A]},
        {"messages": [S, U, A], "functions": [TOOL["function"]]},
        {"messages": [S, U | {"tools": [TOOL]}, A]},
        {"messages": [S | {"role": "developer", "functions": json.dumps([TOOL])}, U, A], "tools": [TOOL]},
        {"instruction": "Hi", "output": "Hello", "system": "Be kind.", "tools": [TOOL]},
    ):
        assert formats.to_chat(row) == [S | {"tools": [TOOL]}, U, A], row
    assert formats.to_chat({"messages": [S | {"content": "", "tools": [TOOL]}, U, A]})[0] == U | {"tools": [TOOL]}
    filled = {"name": "clock", "parameters": {"properties": {"tz": {"type": "string"}, "of another": None}}}
    function = formats.to_chat({"messages": [U, A], "tools": [filled]})[0]["tools"][0]["function"]
    assert function["parameters"]["properties"] == {"tz": {"type": "string"}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [U, RESULT, A]}, "the result of no call"),
        ({"messages": [U, CALLS, RESULT, RESULT, A]}, "the result of no call"),
        ({"messages": [U, CALLS, RESULT | {"tool_call_id": "c9"}, A]}, "the result of no call"),
        ({"messages": [U, CALLS, {"role": "tool", "name": "sum", "content": "1"}, A]}, "the result of no call"),
        ({"messages": [U, CALLS, RESULT | {"content": None}, A]}, "not empty"),
        ({"messages": [U, CALLS, A]}, "a call without a result"),
        ({"messages": [CALLS, RESULT, A]}, "assistant follows the start"),
        ({"messages": [U, CALLS | {"tool_calls": [CALL, CALL]}]}, "two calls have one id"),
        ({"messages": [U, CALLS | {"tool_calls": [{"name": "clock", "arguments": "UTC"}]}]}, "must be an object"),
        ({"messages": [U, CALLS | {"tool_calls": [{"name": "clock", "arguments": "[1]"}]}]}, "must be an object"),
        ({"messages": [U, CALLS | {"tool_calls": [{"arguments": {}}]}]}, "a call must be"),
        (
            {"messages": [U, CALLS | {"tool_calls": [{"name": "clock", "arguments": {"day": date(2026, 1, 1)}}]}]},
            "as JSON",
        ),
        ({"messages": [U, CALLS | {"tool_calls": [{"name": "clock", "arguments": {"a": "\ufdd0"}}]}]}, "U+FDD0"),
        ({"conversations": [said("human", "Hi"), said("function_call", "look at the clock")]}, "or JSON of it"),
        ({"conversations": [said("human", "Hi"), said("function_call", "")]}, "must be a call"),
        ({"messages": [U, A | {"content": "<tool_call>look</tool_call>"}]}, "or JSON of it"),
        ({"messages": [U, A | {"content": "look</tool_call>"}]}, "</tool_call> without <tool_call>"),
        ({"messages": [U, CALLS, RESULT | {"content": "<tool_response>1"}]}, "not closed"),
        ({"messages": [U, A | {"content": "", "tool_calls": []}, U, A]}, "messages[1].content: must be a text"),
        ({"messages": [U, A], "tools": "clock"}, "tools: must be a list of tools"),
        ({"messages": [U, A], "tools": [{"description": "Time"}]}, "a tool must be"),
        ({"messages": [S | {"tools": [TOOL]}, U, A], "tools": [{"name": "sum"}]}, "other tools elsewhere"),
    ],
)
def test_wrong_calls_and_tools_are_refused(row, words):
    result = formats.to_chat(row)
    assert isinstance(result, formats.InvalidRow) and words in result, result


def test_reasoning_has_many_names():
    for name in ("reasoning_content", "reasoning", "thinking", "thought"):
        chat = formats.to_chat({"messages": [U, A | {name: "Greet."}, U, A | {name: ""}]})
        assert chat == [U, A | {"reasoning_content": "Greet."}, U, A] and chat.notes == ()
        assert formats.to_chat({"question": "Hi", "answer": "Hello", name: "Greet."}) == chat[:2]
        assert formats.to_chat({"prompt": [U], "completion": "Hello", name: "Greet."}) == chat[:2]
    called = formats.to_chat({"messages": [U, CALLS | {"reasoning": "Look."}, RESULT, A]})
    assert called[1] == CALLS | {"content": "", "reasoning_content": "Look."}
    inline = {"role": "assistant", "content": "<think>\nGreet.\n</think>\n\nHello"}
    assert formats.to_chat({"messages": [U, inline]}) == [U, inline]
    assert "with reasoning" in formats.to_chat({"messages": [U, A, A | {"reasoning": "Greet."}]})


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<s>[INST] Hi [/INST]",
        "[INST] Hi [/INST]",
        "<|user|>\nHi<|end|>\n<|assistant|>",
        "Hi<|im_end|>\n<|im_start|>assistant\n",
        "<｜User｜>Hi<｜Assistant｜>",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ],
)
def test_formatted_prompts_are_texts(prompt):
    expected = [{"role": "text", "content": prompt, "weight": 0}, {"role": "text", "content": "Hello"}]
    assert formats.to_chat({"prompt": prompt, "completion": "Hello"}) == expected
    assert formats.to_chat({"instruction": prompt, "output": "Hello"}) == expected
    assert rows.CONTROL_TOKEN.search(prompt)


@pytest.mark.parametrize("token", rows.END_TOKENS)
def test_end_tokens_at_the_end_of_answers_are_removed(token):
    assert rows.CONTROL_TOKEN.search("Hello" + token)
    answer = f"Hello{token}\n{token}\n"
    for row in (
        {"prompt": "Hi", "completion": answer},
        {"prompt": "Hi", "response": answer},
        {"question": "Hi", "answer": answer},
        {"instruction": "Hi", "input": "", "output": answer},
        {"prompt": [U], "completion": answer},
        {"messages": [U, A | {"content": answer}]},
        {"messages": [U, A | {"content": [{"type": "text", "text": answer}]}]},
        {"conversations": [said("human", "Hi"), said("gpt", answer)]},
    ):
        chat = formats.to_chat(row)
        assert chat == [U, A] and chat.notes == ("changed: end tokens at the end of answers removed",)
    meant = {"question": "Which token ends a turn?", "answer": token}
    assert formats.to_chat(meant)[1]["content"] == token and formats.to_chat(meant).notes == ()
    for question, formatted in ((f"<s>{rows.END_TOKENS[0]}Hi", True), (f"Hi{token}", token != "</s>")):
        assert (formats.to_chat({"prompt": question, "completion": answer})[0]["role"] == "text") == formatted


def test_struck_words_in_html_are_no_control_tokens():
    for text in ("<s>struck</s>", "<s>struck</s> out", "It is <s>struck</s>"):
        for row in ({"prompt": text, "completion": "Hello"}, {"question": "Hi", "answer": text}):
            assert short(formats.to_chat(row)) == f"user: {[*row.values()][0]} | assistant: {[*row.values()][1]}"
            assert formats.to_chat(row).notes == ()


def test_control_tokens_are_told_from_prose_code_and_html():
    for text in (
        "a <| b |> c", "x |> f <| y", "if a<b|c>d", "<|x|>", "List<T>", "<b>Hi</b> <s>no</s> <a href='#'>", "[INSTALL]",
        "std::vector<int>", "[1] [INFO] [/b]", "a || b && c <= d >= e", "|---|---|", "<turn>", "<think>a</think>",
        "<tool_call>{}</tool_call>", "<p>a</p></section>", "<end>", "<|>", "$<x|y>$",
    ):  # fmt: skip
        assert not rows.CONTROL_TOKEN.search(text), text
    for text in (
        "a<|eot_id|>b", "<|turn>user\nHi<turn|>", "<|tool_call>", "x<tool_response|>", "<bos>a", "<s> a", "a</s>\n",
        "[TOOL_CALLS][{}]", "[gMASK]<sop>", "a<｜tool▁calls▁begin｜>", "[AVAILABLE_TOOLS]",
    ):  # fmt: skip
        assert rows.CONTROL_TOKEN.search(text), text


def test_questions_about_control_tokens_are_questions():
    for prompt in ("What is <|im_end|> for?", "Why does [INST] come before my text?", "<b>Hi</b>"):
        assert formats.to_chat({"prompt": prompt, "completion": "It ends a turn."})[0]["role"] == "user"


def test_completions_continue_by_setting():
    row = {"prompt": "The sky is", "completion": " blue."}
    assert short(formats.to_chat(row)) == "user: The sky is | assistant:  blue."
    assert formats.to_chat(row, completion="continue") == [
        {"role": "text", "content": "The sky is", "weight": 0},
        {"role": "text", "content": " blue."},
    ]
    only = {"prompt": "", "completion": "A story."}
    assert formats.to_chat(only, completion="continue") == [{"role": "text", "content": "A story."}]
    assert formats.to_chat({"prompt": [U], "completion": [A]}, completion="continue") == [U, A]
    assert formats.to_chat({"question": "Hi", "answer": "Hello"}, completion="continue") == [U, A]


@pytest.mark.parametrize(
    ("columns", "row", "turns"),
    [
        ("q:user, a:assistant", {"q": "Hi", "a": "Hello"}, HI),
        ("Q : User,A:ASSISTANT", {"q ": "Hi", "A": "Hello"}, HI),
        ("q:instruction, a:output", {"q": "Hi", "a": "Hello", "input": "you"}, "user: Hi\n\nyou | assistant: Hello"),
        ("chat:messages, s:system", {"chat": [U, A], "s": "Be kind."}, f"system: Be kind. | {HI}"),
        ("log.turns:messages", {"log": {"Turns": [U, A]}}, HI),
        ('"q, de":user, a:assistant', {"q, de": "Hi", "a": "Hello"}, HI),
        ("a:b:user, c:assistant", {"a:b": "Hi", "c": "Hello"}, HI),
        ("q:user, chosen:assistant", {"q": "Hi", "chosen": "Hello", "rejected": "No"}, HI),
        ("q:user, a:assistant", {"q": "Hi", "a": "Hello", "messages": [A, U]}, HI),
        ("q:prompt, a:completion", {"q": "Hi", "a": "Hello"}, HI),
    ],
)
def test_columns_name_the_fields(columns, row, turns):
    assert find_problem("COLUMNS", columns) is None
    assert short(formats.to_chat(row, rows.parse_columns(columns))) == turns


def test_columns_leave_no_field_in_silence():
    columns = rows.parse_columns("q:user, log.a:assistant")
    chat = formats.to_chat({"q": "Hi", "log": {"a": "Hello", "b": 1}, "user": "Ann", "chosen": None}, columns)
    assert chat == [U, A] and chat.notes == ("unused: log.b", "unused: user")
    missing = formats.to_chat({"question": "Hi", "log": {"a": "Hello"}}, columns)
    assert isinstance(missing, formats.InvalidRow) and "'question'" in missing
    assert "no field q, which COLUMNS names" in missing
    assert formats.to_chat({"question": "Hi", "answer": "Hello"}, columns) == [U, A]  # of another source
    unknown = formats.to_chat({"Frage": "Hi", "log": {}}, columns)
    assert "none that COLUMNS names (q, log.a), and none of the known sets" in unknown and "'Frage'" in unknown
    assert formats.to_chat({"q": "", "log": {"a": "Hello"}}, columns).startswith("q: must be a text")


@pytest.mark.parametrize("columns", ["q", "q:", ":user", "q:user,", "q:user, , a:assistant", '"q:user'])
def test_columns_are_checked(columns):
    assert "field:name" in find_problem("COLUMNS", columns)


@pytest.mark.parametrize("columns", ["q:wizard", "q:user, p:user", "q:user, q:assistant"])
def test_columns_name_known_fields_once(columns):
    with pytest.raises(UserError, match="COLUMNS="):
        rows.parse_columns(columns)
    assert rows.parse_columns(None) == {}


def test_a_chat_keeps_its_notes_on_its_way_to_a_worker():
    chat = formats.to_chat({"messages": [U, A], "id": 7})
    again = pickle.loads(pickle.dumps(chat))
    assert again == chat == [U, A] and again.notes == ("unused: id",)


def test_faults_are_counted_by_their_reason():
    for content in ("", {"a": "b: c"}):
        row = pickle.loads(pickle.dumps(formats.to_chat({"messages": [U, A | {"content": content}]})))
        assert row.startswith("messages[1].content: must be a text")
        assert row.reason.startswith("messages.content: must be a text") and ";" not in row.reason
    assert ";" not in formats.to_chat({"prompt": "Hi", "chosen": "a", "rejected": "b"}).reason


def test_rows_are_left_as_they_are():
    row = {"messages": [S | {"tools": [TOOL]}, U, CALLS, RESULT, A | {"thinking": "x", "train": False}], "label": True}
    before = json.dumps(row)
    assert formats.to_chat(row) == formats.to_chat(row) and json.dumps(row) == before

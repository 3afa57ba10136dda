"""Pairs: every schema of preferences becomes the same two chats, faulty rows are named, and what is learned of them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_jsonl
from test_data import SETTINGS, check_account, make
from test_families import tokenizer_of

from common.cli import UserError
from common.data import checks, pair_checks, pairs, prepare, rows, sources, templates
from common.data.compared import IGNORE_INDEX, sequences_of
from common.data.rows import InvalidRow, SkippedRow

U, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "g"), ("assistant", "b"))
)
S = {"role": "system", "content": "S"}
SAID = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "g"}, {"from": "gpt", "value": "b"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "name": "f", "content": "1"}
HH = "\n\nHuman: P\n\nAssistant: a\n\nHuman: Q\n\nAssistant:"
PLAIN, WITH_SYSTEM, LONGER = (
    "u:Q",
    "s:S u:Q",
    "u:P (a:a) u:Q",
)  # before the answers; answers in brackets are not learned
P, A = {"role": "user", "content": "P"}, {"role": "assistant", "content": "a"}


def written(chat: list[dict]) -> str:
    return " ".join(
        f"({turn['role'][0]}:{turn['content']})" if turn.get("weight") == 0 else f"{turn['role'][0]}:{turn['content']}"
        for turn in chat
    )


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "Q", "chosen": "g", "rejected": "b"}, PLAIN),
        ({"Prompt": "Q", " Chosen": "g", "REJECTED": "b"}, PLAIN),
        ({"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
        ({"prompt": [S, U], "chosen": GOOD, "rejected": BAD}, WITH_SYSTEM),
        ({"prompt": [P, A, U], "chosen": "g", "rejected": "b"}, LONGER),
        ({"prompt": "Q", "history": [["P", "a"]], "chosen": "g", "rejected": "b"}, LONGER),
        ({"chosen": [U, GOOD], "rejected": [U, BAD]}, PLAIN),  # the question in both
        ({"chosen": [S, P, A, U, GOOD], "rejected": [S, P, A, U, BAD]}, "s:S u:P (a:a) u:Q"),
        ({"prompt": "Q", "chosen": [U, GOOD], "rejected": [U, BAD], "messages": [U, GOOD]}, PLAIN),  # ultrafeedback
        ({"prompt": "P", "question": "P", "chosen": [P, A, U, GOOD], "rejected": [P, A, U, BAD]}, LONGER),  # orpo-mix
        ({"conversations": SAID[:1], "chosen": SAID[1], "rejected": SAID[2]}, PLAIN),  # LLaMA-Factory
        ({"conversations": SAID[:1], "system": "S", "chosen": SAID[1], "rejected": SAID[2]}, WITH_SYSTEM),
        ({"instruction": "Q", "input": "R", "chosen": "g", "rejected": "b"}, "u:Q\n\nR"),
        ({"instruction": "Q", "input": "", "chosen": "g", "rejected": "b"}, PLAIN),
        ({"system": "S", "question": "Q", "chosen": "g", "rejected": "b"}, WITH_SYSTEM),  # orca
        ({"system": "S", "input": "Q", "chosen": "g", "rejected": "b"}, WITH_SYSTEM),
        ({"chosen": f"{HH} g", "rejected": f"{HH} b"}, LONGER),
        ({"chosen": f"{HH} g".strip(), "rejected": f"{HH} b".strip()}, LONGER),
        ({"prompt": HH, "chosen": " g", "rejected": " b"}, LONGER),
        ({"messages": [S, U, GOOD], "rejected_response": "b"}, WITH_SYSTEM),  # ms-swift
        ({"messages": [U, GOOD], "rejected_messages": [U, BAD]}, PLAIN),
        ({"messages": [P, A, U, GOOD], "rejected_response": "b"}, LONGER),
        ({"query": "Q", "response": "g", "rejected_response": "b", "history": [["P", "a"]]}, LONGER),
        ({"chosen_response": "g", "rejected_response": "b", "prompt": "Q"}, PLAIN),
        ({"conversation_a": [U, BAD], "conversation_b": [U, GOOD], "winner": "model_b", "language": "English"}, PLAIN),
        ({name: json.dumps(turns, indent=1) for name, turns in (("chosen", [U, GOOD]), ("rejected", [U, BAD]))}, PLAIN),
        ({"prompt": json.dumps([U]), "chosen": json.dumps(GOOD), "rejected": "b"}, PLAIN),  # cells of a table
        ({name: json.dumps([dict(reversed(t.items())) for t in turns])  # content first, as in ultrafeedback
          for name, turns in (("chosen", [U, GOOD]), ("rejected", [U, BAD]))}, PLAIN),
        ({"input": {"messages": [S, U], "tools": [], "parallel_tool_calls": True},  # OpenAI
          "preferred_output": [GOOD], "non_preferred_output": [BAD]}, WITH_SYSTEM),
        ({"instruction": "Q", "input": "R", "chosen": [GOOD], "rejected": [BAD]}, "u:Q\n\nR"),
        ({"prompt": "R\n\nQ", "context": "R", "chosen": "g", "rejected": "b"}, "u:R\n\nQ"),  # is in the prompt
        # turns beside whole chats, which have some of them
        ({"prompt": [S, U], "chosen": [U, GOOD], "rejected": [U, BAD]}, WITH_SYSTEM),
        ({"prompt": [U], "chosen": [S, U, GOOD], "rejected": [S, U, BAD]}, WITH_SYSTEM),
        ({"messages": [P, A, U], "chosen": [U, GOOD], "rejected": [U, BAD]}, LONGER),
        ({"messages": [P, A, U, GOOD], "chosen": [U, GOOD], "rejected": [U, BAD]}, LONGER),
        ({"prompt": [U], "chosen": [U, GOOD], "rejected": [U | {"content": [{"text": "Q"}]}, BAD]}, PLAIN),
        ({"conversation": [{"input": "Q", "output": "c"}], "chosen": [U, GOOD], "rejected": [U, BAD]}, PLAIN),
        ({"conversation": [["P", "a"], ["Q", "c"]], "chosen": [U, GOOD], "rejected": [U, BAD]}, LONGER),
        ({"conversations": SAID[:2], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),  # the better answer once more
        ({"prompt": [U, CALL, RESULT], "tools": [TOOL], "chosen": [GOOD], "rejected": [BAD]}, "u:Q (a:) t:1"),
        ({"chosen": [U, GOOD, P], "rejected": [U, BAD, P]}, PLAIN),  # what is asked after the answers
        ({"prompt": "Q", "chosen": "g</s>", "rejected": "b<|im_end|>"}, PLAIN),
        ({"prompt": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "chosen": "g<|im_end|>",
          "rejected": "b<|im_end|>"}, None),
    ],
)  # fmt: skip
def test_every_schema_gives_the_same_pair(row, before):
    pair = pairs.to_compared(row, loss="dpo")
    assert isinstance(pair, pairs.Compared), pair
    better, worse = map(written, pair)
    if before is None:  # text in a template's own form
        assert (
            better.startswith("(t:<|im_start|>")
            and better.endswith(" t:g<|im_end|>")
            and worse.endswith(" t:b<|im_end|>")
        )
    else:
        assert (better, worse) == (f"{before} a:g", f"{before} a:b")


def test_tools_reasoning_and_several_turns_may_be_the_answer():
    better, worse = pairs.to_compared({"prompt": "Q", "tools": [TOOL], "chosen": [CALL, RESULT, GOOD], "rejected": "b"})
    assert written(better) == "u:Q a: t:1 a:g" and better[1]["tool_calls"] and better[0]["tools"] == worse[0]["tools"]
    thoughts = {"prompt": [U], "chosen": [GOOD | {"reasoning_content": "1"}], "rejected": [GOOD | {"reasoning": "2"}]}
    better, worse = pairs.to_compared(thoughts)
    assert [chat[1]["reasoning_content"] for chat in (better, worse)] == ["1", "2"]
    better, worse = pairs.to_compared({"chosen": [U, GOOD, P, A], "rejected": [U, BAD]})  # of different lengths
    assert written(better) == "u:Q a:g u:P a:a" and written(worse) == "u:Q a:b"


@pytest.mark.parametrize(
    "text",
    [
        *('{"role": "admin", "name": "x"}', '[{"from": "Oslo", "text": "x"}]', "[{'a': 1}]", "{}", '{"role": "user"}'),
        *('[{"role": "user", "content": "x"}, {"a": 1}]', '[{"role": "user", "content": "x"}] is JSON'),
    ],
)
def test_answers_that_are_json_stay_texts(text):
    better, worse = pairs.to_compared({"prompt": "Q", "chosen": text, "rejected": "b"}, loss="dpo")
    assert (written(better), written(worse)) == (f"u:Q a:{text}", "u:Q a:b")


def test_answers_of_weight_0_are_not_compared():
    unasked = {"chosen": [U, GOOD | {"weight": 0}, P, A], "rejected": [U, BAD | {"weight": 0}, P, GOOD]}
    assert list(map(written, pairs.to_compared(unasked, loss="dpo"))) == ["u:Q (a:g) u:P a:a", "u:Q (a:b) u:P a:g"]
    same = {"messages": [P, A, U, GOOD], "rejected_response": "g"}
    assert pairs.to_compared(same, loss="dpo") == "chosen and rejected are the same"


def test_doubtful_pairs_are_counted_and_ties_left_out():
    pair = {"prompt": "Q?", "chosen": "g", "rejected": "b"}
    for more in ({"status": "tie"}, {"winner": "tie (bothbad)"}):
        assert isinstance(pairs.to_compared(pair | more), SkippedRow)
    for better, worse in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        for (one, other), count in {(8, 9): 1, ("1.0", 1): 1, (9, 8): 0, (None, 8): 0}.items():
            notes = pairs.to_compared(pair | {better: one, worse: other}).notes
            assert sum("scored no higher" in note for note in notes) == count, (one, other)
    assert "chosen begins with the whole question" in " ".join(pairs.to_compared(pair | {"chosen": "Q? g"}).notes)


@pytest.mark.parametrize(
    ("row", "is_good"),
    [
        ({"prompt": "Q", "completion": "g", "label": True}, True),
        ({"prompt": [U], "completion": [GOOD], "label": False}, False),
        ({"messages": [U, GOOD], "kto_tag": "false"}, False),
        ({"instruction": "Q", "output": "g", "label": 1}, True),
        ({"prompt": "Q", "response": "g", "kto_label": "good"}, True),
        ({"prompt": json.dumps([U]), "completion": json.dumps([GOOD]), "label": True, "kto_tag": None}, True),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "completion": " g", "label": True}, True),
    ],
)
def test_labelled_answers_are_for_kto(row, is_good):
    (chat,) = one = pairs.to_compared(row, loss="kto")
    assert written(chat) == "u:Q a:g" and one.is_good is is_good
    refused = pairs.to_compared(row, loss="dpo")
    assert isinstance(refused, InvalidRow) and re.match("(kto_)?(label|tag): .*LOSS=dpo.*set LOSS=kto", refused)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "g", "label": True, "kto_label": False}, "row: label and kto_label contradict"),
        ({"text": "A great film", "label": 1}, "label: beside a text a label may be a class"),
        ({"prompt": "Q", "completion": "g", "label": True, "weight": 0}, "completion: the answer has the weight 0"),
    ],
)
def test_labels_that_may_mean_something_else_are_refused(row, expected):
    found = pairs.to_compared(row, loss="kto")
    assert isinstance(found, InvalidRow) and found.startswith(expected), found


def test_arena_pairs_are_english_under_either_name():
    row = {"winner": "model_a", "conversation_a": [U, GOOD], "conversation_b": [U, BAD]}
    for language, is_read in (("English", True), ("en", True), (None, True), ("German", False), ("de", False)):
        assert isinstance(pairs.to_compared(row | {"language": language}), pairs.Compared) == is_read, language


def test_trees_give_the_best_and_the_worst_answer_to_the_last_ranked_question(tmp_path):
    def message(name, parent, role, text, rank=None):
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}

    tree = [message("1", None, "prompter", "Q"), message("2", "1", "assistant", "b", 1)]
    tree.append(message("3", "1", "assistant", "g", 0))
    file = write_jsonl(tmp_path / "oasst.jsonl", tree)
    found = list(sources.sound_chats(str(file), "DATA", sources.Reading(loss="dpo")))
    assert [list(map(written, pair)) for pair in found if isinstance(pair, pairs.Compared)] == [["u:Q a:g", "u:Q a:b"]]


def test_fields_may_have_other_names_and_those_not_used_are_told():
    columns = rows.parse_columns("q:user, good:chosen, bad:rejected")
    pair = pairs.to_compared({"q": "Q", "good": "g", "bad": "b", "score": 1, "Id": "x"}, columns)
    assert list(map(written, pair)) == ["u:Q a:g", "u:Q a:b"] and pair.notes == ("unused: score", "unused: Id")
    assert str(pairs.to_compared({"q": "Q", "good": "g", "bad": ""}, columns)).startswith("bad: must be a text")
    row = {"prompt": "R", "q": "Q", "good": "g", "bad": "b"}
    assert list(map(written, pairs.to_compared(row, columns))) == ["u:Q a:g", "u:Q a:b"]
    pair = pairs.to_compared({"instruction": "Q", "q": "R", "good": "g", "bad": "b"}, columns | {"q": "input"})
    assert written(pair[0]) == "u:Q\n\nR a:g"
    for taken in ("prompt", "instruction"):
        row = {"instruction": "Q", "prompt": "R"} | {"chosen": "g", "rejected": "b"}
        pair = pairs.to_compared(row, rows.parse_columns(f"{taken}:{taken}"))
        assert written(pair[0]) == f"u:{row[taken]} a:g" and len(pair.notes) == 1
    row = {"question": "Q", "context": "R", "chosen": "g", "rejected": "b"}
    pair = pairs.to_compared(row, rows.parse_columns("question:instruction"))
    assert written(pair[0]) == "u:Q\n\nR a:g"
    pair = pairs.to_compared({"prompt": "Q", "chosen": "g", "rejected": "b", "label": 0, "chosen_response": "x"})
    assert pair.notes == ("unused: label", "unused: chosen_response")


FAULTS = [
    ({"prompt": "Q", "chosen": "g", "rejected": ""}, "rejected: must be a text that is not empty; write one"),
    ({"prompt": "Q", "chosen": " ", "rejected": "b"}, "chosen: must be a text that is not empty; write one"),
    ({"prompt": "Q", "Chosen": "g", "Rejected": None}, "Rejected: no answer to compare Chosen with; write one"),
    ({"prompt": "Q", "rejected": "b"}, "chosen: no answer to compare rejected with; write one"),
    ({"prompt": [U], "chosen": [GOOD], "rejected": []}, "rejected: must be a text that is not empty"),
    ({"prompt": [U], "chosen": [GOOD], "rejected": [BAD | {"content": ""}]}, "rejected[0].content: must be a text"),
    ({"instruction": "Q", "chosen": "g", "rejected": ""}, "rejected: must be a text that is not empty"),
    ({"messages": [U, GOOD], "rejected_response": " "}, "rejected_response: must be a text that is not empty"),
    ({"chosen": f"{HH} g", "rejected": HH}, 'rejected: no text after "Assistant:"; write one'),
    ({"chosen": "g", "rejected": "b"}, "row: no question beside chosen; write {"),
    ({"prompt": "", "chosen": "g", "rejected": "b"}, "row: no question beside chosen; write {"),
    ({"chosen": [U, GOOD], "rejected": [P, BAD]}, "rejected: answers another question than chosen; both must"),
    ({"chosen": [U, GOOD], "rejected": [U]}, "rejected: no turn of the assistant, nothing to learn; remove the row"),
    ({"chosen": [U, GOOD, P, A], "rejected": [U, GOOD, P]}, "rejected: it ends in a question without"),
    ({"prompt": [U], "chosen": [{"role": "bob", "content": "g"}], "rejected": [BAD]}, "chosen[0]: the role must be"),
    ({"prompt": "Q", "chosen": "g", "rejected": "b\0"}, "rejected: character U+0000 is not text; remove it"),
    ({"prompt": "Q", "chosen": ["g", "h"], "rejected": ["b"]}, "chosen: must be one answer"),
    ({"prompt": "Q", "chosen": {"text": "g", "score": 1}, "rejected": "b"}, "chosen: must be one answer"),
    ({"prompt": ["Q"], "chosen": ["g"], "rejected": ["b"]}, "prompt: must be a text; is this JSON of columns?"),
    ({"prompt": "Q", "responses": ["g", "b"], "chosen": 0, "rejected": 1}, "chosen: a number; if it says which"),
    ({"prompt": "Q", "chosen": str([GOOD]), "rejected": "b"}, "chosen: turns that are not JSON; write them by json"),
    ({"prompt": "Q", "Chosen": json.dumps([GOOD])[:-1], "rejected": "b"}, "Chosen: turns that are not JSON"),
    ({"prompt": [P], "chosen": [U, GOOD], "rejected": [U, BAD]}, "prompt: its turns are neither part of chosen nor"),
    ({"prompt": [U, A], "chosen": "g", "rejected": "b"}, "prompt: ends in an answer; put it into both sides, or"),
    ({"messages": [U, A], "chosen": [GOOD], "rejected": [BAD]}, "messages: ends in an answer; put it into both"),
    ({"prompt": "Q", "chosen": "g", "rejected": "b", "reasoning": "R"}, "reasoning: reasoning of which answer?"),
    ({"prompt": "Q", "chosen": "g", "rejected": "b", "weight": 0}, "chosen: the answer has the weight 0"),
    ({"prompt": [U], "chosen": GOOD, "rejected": BAD | {"weight": 0}}, "rejected: the answer has the weight 0"),
    ({"instruction": "P", "prompt": "Q", "chosen": "g", "rejected": "b"}, "prompt: another question than instruction"),
    ({"prompt": [U], "messages": [P, A, U], "chosen": "g", "rejected": "b"}, "messages: another question than prompt"),
    ({"question": "Q", "context": "R", "chosen": "g", "rejected": "b"}, "context: is it part of the question? join"),
    ({"prompt": "Q", "images": ["x.jpg"], "chosen": "g", "rejected": "b"}, "images: only text is supported; remove"),
    ({"prompt": "Q", "accepted": "g", "rejected": "b"}, "chosen: no answer to compare rejected with; write one, or n"),
    ({"prompt": "Q", "chosen": True, "rejected": False}, "chosen: must be a text; write it as one"),
    ({"prompt": "Q", "completion": "g", "label": True}, "label: one answer with its label, of which"),
    ({"messages": [U, GOOD]}, "row: no preference; write {"),
    ({"winner": "model_a", "conversation_a": [U, BAD], "conversation_b": [P, GOOD]}, "conversation_b: answers another"),
    ("Q", "row: must be an object"),
]  # fmt: skip


def test_every_fault_is_named_with_its_line_and_the_row_s_own_field(tmp_path):
    file = write_jsonl(
        tmp_path / "faulty.jsonl", [{"prompt": "Q", "chosen": "g", "rejected": "b"}, *(r for r, _ in FAULTS)]
    )
    told = str(pairs.to_compared({"Prompt": "", "Chosen": "g", "Rejected": "b"}))
    assert told.endswith("the row has: ['Prompt', 'Chosen', 'Rejected']") and 'COLUMNS="yours:prompt"' in told
    told = pairs.to_compared({"question": "Q", "response_j": "g", "response_k": "b"})
    assert 'COLUMNS="yours:chosen, yours:rejected"' in told
    shown, count = sources.invalid_rows(sources.parse(str(file))[0], sources.Reading(loss="dpo"), "stop")
    assert count == len(FAULTS) > sources.MAX_SHOWN
    for number, (row, expected) in enumerate(FAULTS, start=2):
        found = f"{file}:{number}: {pairs.to_compared(row, loss='dpo')}"
        assert found.startswith(f"{file}:{number}: {expected}"), found
    assert shown == [f"{file}:{n}: {pairs.to_compared(row, loss='dpo')}" for n, (row, _) in enumerate(FAULTS, 2)][:20]
    with pytest.raises(UserError, match="BAD_ROWS=skip leaves"):
        sources.check_rows(str(file), "DATA", sources.Reading(loss="dpo"), "stop")
    sources.check_rows(str(file), "DATA", sources.Reading(loss="dpo"), "skip")


def test_equal_sides_are_left_out_not_refused():
    for row in ({"prompt": "Q", "chosen": "g", "rejected": "g"}, {"chosen": [U, GOOD], "rejected": [U, GOOD]}):
        assert pairs.to_compared(row) == "chosen and rejected are the same"
        assert isinstance(pairs.to_compared(row), SkippedRow)
    assert pairs.to_compared({"winner": "tie", "conversation_a": [], "conversation_b": []}) == "arena: a tie"


def test_faulty_pairs_end_the_script_before_anything_slow(tmp_path):
    faulty = write_jsonl(tmp_path / "faulty.jsonl", [{"prompt": "Q", "chosen": "g", "rejected": ""}])
    pair = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Q", "chosen": "g", "rejected": "b"}])
    code = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print(sorted({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    for script, file, message in (
        ("preference_train.py", faulty, f"{faulty}:1: rejected: must be"),
        ("qlora_train.py", pair, f"{pair}:1: chosen: a row of preferences; use preference_train.py"),
    ):
        command = [sys.executable, "-c", code, script, f"DATA={file}", f"OUT_DIR={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stdout.splitlines()[-1] == "[]", done.stderr


# What is learned


@pytest.fixture
def encoder(tokenizer):
    return templates.set_template(tokenizer, "chatml")[0]


def settings_of(tmp_path, rows: list[dict], loss="dpo", **more) -> dict:
    return SETTINGS | {"DATA": str(write_jsonl(tmp_path / "pairs.jsonl", rows)), "LOSS": loss} | more


def learned(row: dict, tokenizer) -> list[tuple[str, str]]:
    """(what stands before, what is learned) of each sequence."""
    found = []
    for part in sequences_of(row):
        in_loss = np.array(part["labels"]) != IGNORE_INDEX
        ids, start = np.array(part["input_ids"]), int(in_loss.argmax())
        assert ids[in_loss].tolist() == np.array(part["labels"])[in_loss].tolist()
        found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:][in_loss[start:]])))
    return found


def test_both_answers_are_learned_with_their_end_token_and_nothing_else(tokenizer, encoder, tmp_path):
    row = {"prompt": [S, P, A, U], "chosen": "Good.", "rejected": "Not so good."}
    train, _, about = make(settings_of(tmp_path, [row]), encoder)
    before = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    before += "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert learned(train[0], tokenizer) == [(before, "Good.<|im_end|>"), (before, "Not so good.<|im_end|>")]
    assert sum(train[0]["seq_lengths"]) == len(train[0]["input_ids"]) == about["tokens"]
    row["chosen"] = [{"role": "assistant", "content": "Good.", "reasoning_content": "Hm."}]
    train, *_ = make(settings_of(tmp_path, [row], TRAIN_ON="content"), encoder)
    assert [text for _, text in learned(train[0], tokenizer)] == ["\n\nGood.<|im_end|>", "Not so good.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "thought", "end"),
    [
        ("qwen3", "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|>", "<|return|>"),  # which ends earlier answers otherwise
        ("gemma", "", "<end_of_turn>"),  # without system messages
    ],
)
def test_templates_that_rewrite_turns_or_have_no_system_message_do(name, thought, end, tokenizer_folder, tmp_path):
    tokenizer = tokenizer_of(name, tokenizer_folder)
    encoder = templates.set_template(tokenizer, None)[0]
    row = {"prompt": [S, P, A, U], "chosen": "g", "rejected": "b"}
    train, *_ = make(settings_of(tmp_path, [row], MAX_LENGTH=1024), encoder)
    (before, good), (same, bad) = learned(train[0], tokenizer)
    assert before == same and (good, bad) == (f"{thought}g{end}", f"{thought}b{end}")
    assert re.search(r"(?s)S.*P.*a.*Q", before)


def test_every_pair_is_trained_on_held_out_or_counted(tokenizer, encoder, tmp_path):
    made = [{"prompt": f"Question {n // 2}", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n in range(40)]
    made += [
        made[3],
        {"prompt": "Q", "chosen": "g", "rejected": "g"},
        {"prompt": "Q", "chosen": "x " * 400, "rejected": "b"},
    ]
    made += [
        {"prompt": "Q", "chosen": "g", "rejected": ""},
        {"prompt": "Q", "chosen": "I am ChatGPT.", "rejected": "b"},
    ]
    made += [
        {"prompt": "Q", "chosen": "I cannot.", "rejected": "I am ChatGPT.", "score": 3}
    ]  # that is what is unlearned
    settings = settings_of(tmp_path, made, EVAL_SIZE=0.25, BAD_ROWS="skip")
    train, held_out, about = make(settings, encoder)
    check_account(about)
    assert about["dropped"] == {
        "chosen and rejected are the same": 1, "duplicate": 1, "longer than MAX_LENGTH, and an answer is never cut": 1,
        "matches DROP_PATTERN": 1,
        f"invalid, rejected: must be a text that is not empty, first at {settings['DATA']}:44": 1,
    }  # fmt: skip
    assert about["unused"] == {"score": 1} and about["rows"] == 46 and about["trained"] == len(train)
    asked = [{learned(row, tokenizer)[0][0] for row in rows} for rows in (train, held_out)]
    assert len(asked[1]) == 5 and len(held_out) == 10 and not asked[0] & asked[1]  # both pairs of a question together
    assert all(len(row["seq_lengths"]) == 2 for rows in (train, held_out) for row in rows)
    with pytest.raises(UserError, match=":43: .* more than MAX_LENGTH=128. TOO_LONG=drop leaves such pairs out"):
        make(settings | {"TOO_LONG": "error"}, encoder)


def test_held_out_pairs_of_trained_questions_are_counted(encoder, tmp_path):
    trained = [{"prompt": f"Question {n}?", "chosen": "Good.", "rejected": "Bad."} for n in range(4)]
    held_out = [row | {"chosen": "Better."} for row in trained[:2]] + [trained[0] | {"prompt": "Another?"}]
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((trained, held_out))]
    settings = SETTINGS | {"LOSS": "dpo", "DATA": files[0], "EVAL_DATA": files[1], "EVAL_SIZE": 0}
    _, _, about = make(settings, encoder)
    assert (about["trained"], about["held_out"]) == (4, 3)
    assert [n for reason, n in about["changed"].items() if "trained on, too" in reason] == [2]


def test_for_kto_a_pair_is_a_good_and_a_bad_answer_and_each_has_another_to_its_question(tokenizer, encoder, tmp_path):
    made = [{"prompt": f"Q{n}", "chosen": f"g{n}", "rejected": f"b{n}"} for n in range(3)]
    made.append({"prompt": "Q9", "completion": "b9", "label": False})
    train, _, about = make(settings_of(tmp_path, made, "kto"), encoder)
    found = {text.removesuffix("<|im_end|>"): row["is_good"] for row in train for _, text in learned(row, tokenizer)}
    assert found == {"g0": True, "b0": False, "g1": True, "b1": False, "g2": True, "b2": False, "b9": False}
    for row in train:
        other = row["mismatched"] | {"seq_lengths": [len(row["mismatched"]["labels"])]}
        (before, answer), (asked, mismatched) = learned(row, tokenizer)[0], learned(other, tokenizer)[0]
        assert asked == before and mismatched != answer and mismatched.endswith("<|im_end|>")
    check_account(about)


def test_a_folder_prepared_for_the_other_kind_is_refused(encoder, tmp_path, chats_file):
    for settings, what, other in (
        (SETTINGS | {"DATA": str(chats_file)}, "chats", {"LOSS": "dpo"}),
        (settings_of(tmp_path, [{"prompt": "Q", "chosen": "g", "rejected": "b"}]), "pairs", None),
    ):
        folder = tmp_path / what
        folder.mkdir()
        account = prepare.prepare(settings, encoder, folder, workers=1)
        (folder / "report.json").write_text(json.dumps(account))
        settings = settings | {"DATA": str(folder)} | (other or {})
        if other is None:
            del settings["LOSS"]
        with pytest.raises(UserError, match=f"was prepared for {what}. Name the files"):
            make(settings, encoder)


# The doctor


def test_the_doctor_tells_what_pairs_would_teach_by_mistake(tokenizer, encoder, tmp_path, capsys, monkeypatch):
    made = [
        {"prompt": f"Q{n}", "chosen": f"It is {n}, as everybody knows.", "rejected": f"It is {n}"} for n in range(20)
    ]
    made += [{"prompt": "Q", "chosen": "g", "rejected": "b"}, {"prompt": "Q", "chosen": "b", "rejected": "g"}]
    settings = settings_of(tmp_path, made)
    train, *_ = make(settings, encoder)
    checks.examine(train, tokenizer, encoder, settings, False, encoder.new_token_ids)
    said = capsys.readouterr().out
    monkeypatch.setattr(checks, "ROWS", 11)
    checks.examine(train, tokenizer, encoder, settings, False, encoder.new_token_ids)
    assert re.search(r"doctor: note: of 11 rows checked: in \d+ of 11 pairs", capsys.readouterr().out)
    assert "doctor: note: 1 pair is there the other way round as well" in said
    assert "in 20 of 22 pairs one answer is the beginning of the other" in said
    assert "91% of the better answers are longer: the model may learn length instead" in said
    assert list(pair_checks.pair_notes([dict(row) for row in train][:0])) == []
    made += [{"prompt": "Q9", "completion": "c", "label": label} for label in (True, False, True)]
    train, _, about = make(settings_of(tmp_path, made[-5:], "kto"), encoder)
    assert about["dropped"] == {"duplicate": 1}
    both = [train[-1], train[-1] | {"is_good": not train[-1]["is_good"]}]
    assert "1 answer is labelled good and bad" in " ".join(pair_checks.pair_notes(both))
    assert "3 answers are labelled good and bad" in " ".join(pair_checks.pair_notes(list(train)))

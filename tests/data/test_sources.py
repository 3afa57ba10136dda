"""Sources and formats: every schema becomes a chat, every broken file is refused with its line before anything slow."""

import json
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script, write_jsonl

from common.cli import UserError
from common.data import formats, pipeline, sources, vocabulary
from common.data.account import Reasons

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
S = {"role": "system", "content": "Be kind."}
GOOD = json.dumps({"messages": [U, A]})


def chats(data, setting="DATA"):
    return [chat for source in sources.parse(str(data), setting) for _, chat in sources.read_chats(source)]


def test_all_file_formats_give_the_same_chats_and_places(tmp_path):
    long = "x" * 140_000  # more than the csv module takes by itself
    rows = [{"instruction": f"Say {i}.", "output": f'{i}{long}, with "quotes",\nand a line'} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    write_jsonl(tmp_path / "lines.json", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = [",instruction,output"]  # as pandas writes it, with a column of numbers
    lines += [f'{i},Say {i}.,"{i}{long}, with ""quotes"",\nand a line"' for i in range(3)]
    (tmp_path / "a.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    expected = [formats.to_chat(row) for row in rows]
    lines_of = {
        "a.jsonl": [1, 2, 3],
        "a.json": [2, 6, 10],
        "lines.json": [1, 2, 3],
        "a.parquet": [1, 2, 3],
        "a.csv": [2, 4, 6],
    }
    for name, lines in lines_of.items():
        found = list(sources.read_chats(sources.parse(str(tmp_path / name))[0]))
        places = [f"{tmp_path / name}:{line}" for line in lines]
        assert [place for place, _ in found] == places and [chat for _, chat in found] == expected, name


def test_a_json_array_may_stand_in_one_line(tmp_path):
    rows = [{"text": f'row {i} with ünïcödé, [brackets], "quotes" and \\ '} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [chat[0]["content"] for chat in chats(tmp_path / "a.json")] == [row["text"] for row in rows]
    (tmp_path / "empty.json").write_text("[ ]\n")
    with pytest.raises(UserError, match="the file is empty"):
        chats(tmp_path / "empty.json")


def test_slices_repetitions_and_mixtures(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(20)])

    def picked(text):
        return [int(chat[0]["content"]) for chat in chats(f"{file}{text}")]

    assert picked("[:10%]") == [0, 1] and picked("[15:18]") == [15, 16, 17] and picked("[-2:]") == [18, 19]
    assert (
        picked("[-99:2]") == [0, 1]
        and picked("[90%:]") == [18, 19]
        and picked("[18:99]") == [18, 19]
        and picked("[:-18]*3") == [0, 1]
    )
    parts = sources.parse(f"ultrachat[:10%], oasst2, {file}*20, org/name:test[5:]")
    assert [(p.name, p.split, p.start, p.stop, p.times, p.files) for p in parts] == [
        ("HuggingFaceH4/ultrachat_200k", "train_sft", None, "10%", 1, ()),
        ("OpenAssistant/oasst2", "train", None, None, 1, ()),
        (str(file), None, None, None, 20, (file,)),
        ("org/name", "test", "5", None, 1, ()),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere.jsonl", "file not found"),
        ("chat.txt", "file not found"),
        ("ultrachad", "ultrachat"),
        ("oasst2,,alpaca", "empty part"),
        ("README.md", "files end in"),
        ("tests", "folder"),
        ("data/brief.jsonl*0", "file not found"),
        ("data/breif.jsonl", "data/brief.jsonl"),
        ("~nobody-of-this-name/x.jsonl", "file not found"),
        ("a\nb", "file not found"),
        ("x" * 300 + ".jsonl", "file not found"),
        ("data/brief.jsonl*99999", "file not found"),
        ("data/brief.jsonl[:99999999999999999999]", "file not found"),
    ],
)
def test_wrong_sources_are_refused_with_a_remedy(data, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words):
        sources.parse(data)


def test_hub_sets_are_loaded_by_their_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [{"messages": [U, A]}]
    )
    assert chats("ultrachat") == [[U, A]] and asked == [("HuggingFaceH4/ultrachat_200k", "train_sft")]


def test_token_ids_become_text_by_a_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"the": 0, "moon": 1, "is": 2, "far": 3}))
    (tmp_path / "vocab.txt").write_text("the\nmoon\nis\nfar\n")
    for name in ("vocab.json", "vocab.txt"):
        known = vocabulary.read_vocabulary(str(tmp_path / name))
        assert known[1] == " "
        assert vocabulary.detokenize({"tokens": [0, 1, 2, 3]}, known) == {"text": "the moon is far"}
        row = vocabulary.detokenize({"prompt": [0, 1], "completion": [2, 3], "id": 7}, known)
        assert formats.to_chat(row) == [
            {"role": "user", "content": "the moon"},
            {"role": "assistant", "content": "is far"},
        ]
        assert "token 9" in vocabulary.detokenize({"tokens": [0, 9]}, known)
    spaced = {0: "The", 1: " moon"}
    assert vocabulary.detokenize({"input_ids": [0, 1]}, (spaced, "")) == {"text": "The moon"}
    with pytest.raises(UserError, match="VOCAB=nowhere"):
        vocabulary.read_vocabulary("nowhere")


def messages(*turns):
    return json.dumps({"messages": list(turns)})


ARENA = {"conversation_a": [U, A], "conversation_b": [U, A], "winner": "model_a", "model_a": "gpt-4"}
ARENA |= {"toxic_chat_tag": "yes"}
# name of the file -> (its bytes, line of the fault, words of the message); a number of good lines goes before.
BROKEN = {
    "cut-short.jsonl": (GOOD[:30].encode(), 3, "ends in the middle"),
    "not-json.jsonl": (b"hello\n", 3, "not valid JSON"),
    "two-in-a-line.jsonl": (f"{GOOD} {GOOD}\n".encode(), 3, "Extra data"),
    "single-quotes.jsonl": (b"{'messages': []}\n", 3, "not valid JSON"),
    "nan.jsonl": (b'{"messages": [], "x": NaN}\n', 3, "messages: must be a list"),
    "huge-number.jsonl": (b'{"messages": ' + b"9" * 5000 + b"}\n", 3, "not valid JSON"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", 3, "not valid JSON"),
    "latin1.jsonl": (GOOD.replace("Hi", "Olé").encode("latin-1"), 3, "not UTF-8"),
    "surrogate.jsonl": (messages(U, A).replace("Hello", r"\ud83d").encode(), 3, "U+D83D"),
    "nul.jsonl": (messages(U, A).replace("Hello", r"\u0000").encode(), 3, "U+0000"),
    "noncharacter.jsonl": (messages(U, A).replace("Hello", r"\ufdd0").encode(), 3, "U+FDD0"),
    "list.jsonl": (b'["Hi", "Hello"]\n', 3, "must be an object"),
    "number.jsonl": (b"7\n", 3, "must be an object"),
    "null.jsonl": (b"null\n", 3, "must be an object"),
    "unknown-fields.jsonl": (b'{"subject": "Hi", "body": "Hello"}\n', 3, "none of the known sets"),
    "no-messages.jsonl": (b'{"messages": []}\n', 3, "messages: must be a list"),
    "text-messages.jsonl": (b'{"messages": "Hi"}\n', 3, "messages: must be a list"),
    "null-messages.jsonl": (b'{"messages": null}\n', 3, "messages: must be a list"),
    "strings.jsonl": (b'{"messages": ["Hi", "Hello"]}\n', 3, "messages[0]: must be an object"),
    "no-role.jsonl": (messages({"content": "Hi"}, A).encode(), 3, "messages[0]: the role"),
    "wrong-role.jsonl": (messages(U, A | {"role": "wizard"}).encode(), 3, "'wizard'"),
    "no-content.jsonl": (messages(U, {"role": "assistant"}).encode(), 3, "messages[1].content: must be a text"),
    "null-content.jsonl": (messages(U, A | {"content": None}).encode(), 3, "messages[1].content: must be a text"),
    "bool-content.jsonl": (messages(U, A | {"content": True}).encode(), 3, "messages[1].content: must be a text"),
    "blank-content.jsonl": (messages(U, A | {"content": " \n"}).encode(), 3, "messages[1].content: must be a text"),
    "picture.jsonl": (messages(U | {"content": [{"type": "image", "url": "x"}]}, A).encode(), 3, "messages[0].content"),
    "weight.jsonl": (messages(U, A | {"weight": 0.5}).encode(), 3, "weight must be 0"),
    "two-weights.jsonl": (messages(U, A, A | {"weight": 0}).encode(), 3, "different weights"),
    "assistant-first.jsonl": (messages(A, U, A).encode(), 3, "assistant follows the start"),
    "system-late.jsonl": (messages(U, A, S, U, A).encode(), 3, "system follows assistant"),
    "no-answer.jsonl": (messages(U).encode(), 3, "no turn of the assistant"),
    "only-system.jsonl": (messages(S).encode(), 3, "no turn of the assistant"),
    "sharegpt.jsonl": (b'{"conversations": [{"from": "human", "value": ""}]}\n', 3, "conversations[0].value"),
    "alpaca.jsonl": (b'{"instruction": "x", "input": "", "output": ""}\n', 3, "output: must be a text"),
    "alpaca-input.jsonl": (b'{"instruction": "x", "input": {"a": 3}, "output": "y"}\n', 3, "input: must be a text"),
    "samsum.jsonl": (b'{"dialogue": null, "summary": "y"}\n', 3, "dialogue: must be a text"),
    "arena.jsonl": (json.dumps(ARENA).encode(), 3, "another type"),
    "empty.jsonl": (None, 1, "the file is empty"),
    "utf16.jsonl": (GOOD.encode("utf-16"), 1, "UTF-16"),
    "no-comma.json": (f"[{GOOD}\n{GOOD}]".encode(), 2, "Expecting ',' delimiter"),
    "unclosed.json": (f"[\n{GOOD},\n{GOOD}\n".encode(), 3, "Expecting ',' delimiter"),
    "two-arrays.json": (f"[\n{GOOD}]\n[{GOOD}]".encode(), 3, "Extra data"),
    "after.json": (b"[]\n" + GOOD.encode(), 2, "Extra data"),
    "deep.json": (b"[" + b'{"a":' * 950 + b"1" + b"}" * 950 + b"]", 1, "none of the known sets"),
    "closed.json": (b"]", 1, "not valid JSON"),
    "half.json": (f"[\n{GOOD},\n{GOOD[:20]}".encode(), 3, "not valid JSON"),
    "latin1.json": (b'[{"text": "Ol\xe9"}]', 1, "not UTF-8"),
    "row.json": (f"[\n{GOOD},\n7]".encode(), 3, "must be an object"),
    "fields.csv": (b"instruction,output\nHi,Hello\nHi,Hello,and more\n", 3, "not 2 fields"),
    "few.csv": (b"instruction,output\nHi,Hello\nHi\n", 3, "not 2 fields"),
    "quote.csv": (b'instruction,output\nHi,Hello\n"Hi,Hello\n', 3, "not valid CSV"),
    "latin1.csv": (b"instruction,output\nHi,Hello\nHi,Ol\xe9\n", 3, "not UTF-8"),
    "header.csv": (b"subject,body\nHi,Hello\n", 2, "none of the known sets"),
    "parent.jsonl": (b'{"message_id": "m", "parent_id": ["a"], "text": "Hi"}\n', 3, "message of a tree"),
    "damaged.parquet": (b"PAR1 and nothing else", 1, "not a readable Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_their_line_in_two_seconds_and_nothing_is_written(name, tmp_path):
    content, line, words = BROKEN[name]
    before = f"{GOOD}\n\n".encode() if name.endswith(".jsonl") and line > 1 else b""
    (tmp_path / name).write_bytes(b"" if content is None else before + content)
    started = time.perf_counter()
    result = run_script("prepare_data.py", f"DATA={tmp_path / name}", f"OUT_DIR={tmp_path / 'out'}", "RUN_NAME=x")
    seconds = time.perf_counter() - started
    assert result.returncode == 2 and "Traceback" not in result.stderr and seconds < 2
    faults = [text for text in result.stderr.splitlines() if f"{tmp_path / name}:{line}: " in text]
    assert len(faults) == 1 and words in faults[0] and not (tmp_path / "out").exists(), result.stderr


def test_sources_import_nothing_slow():
    slow = {"torch", "transformers", "numpy", "pyarrow"}
    code = f"import sys, common.data.sources; print({slow} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_invalid_rows_come_up_to_twenty_at_once_in_every_script(tmp_path):
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": []}] * 30)
    for script, setting in (
        ("qlora_train.py", "DATA"),
        ("qlora_train.py", "EVAL_DATA"),
        ("evaluate_model.py", "CHATS"),
    ):
        result = run_script(script, f"{setting}={file}")
        assert result.returncode == 2 and result.stderr.count(f"{file}:") == 21 and "10 more" in result.stderr


def test_a_large_file_is_checked_at_its_beginning_and_the_rest_when_it_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHECKED", 3)
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [U, A]}] * 3 + [{"messages": []}])
    sources.check_rows(str(file), "DATA", sources.PLAIN, "stop")
    with pytest.raises(UserError, match=r"chats\.jsonl:4: .*BAD_ROWS=skip"):
        list(pipeline.read_chats(sources.parse(str(file)), Reasons()))
    bad_first = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}] * 3 + [{"messages": [U, A]}])
    sources.check_rows(str(bad_first), "DATA", sources.PLAIN, "skip")  # there may be sound ones behind

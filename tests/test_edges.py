"""Edges: readers that go away, bytes that are no text, prompts that are too long, folders that cannot be written."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT, run_script, save_tiny, write_jsonl

from common import cli
from common.eval import facts, statistics
from common.model import generation

LONG = "long " * 600  # more tokens than the tiny models have positions
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def talking(tmp_path_factory, tokenizer_folder, tokenizer):
    """A model whose answers are never empty."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("talking"), tokenizer_folder, endless=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(monkeypatch, run_here):
    """pipe(bytes, "NAME=value", ...): chat_pipe.py with these at its standard input."""

    def run(data: bytes, *settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
        return run_here("chat_pipe.py", *settings)

    return run


def shell(command: str, **options) -> subprocess.CompletedProcess:
    """In bash, where $P is python; the exit code is that of the first command of a pipe."""
    command = f"{command}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "P": sys.executable}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, timeout=300, **options
    )


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
@pytest.mark.parametrize("end", ["2>&1 | head -2", "<&- >/dev/full 2>&-"])
def test_a_training_outlives_its_reader(end, arguments, tmp_path):
    words = " ".join(map(str, arguments("run", "MAX_STEPS=2")))
    done = shell(f"$P qlora_train.py {words} {end}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file() and (tmp_path / "run" / "final").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_a_conversation_ends_quietly_with_its_reader(talking):
    settings = f"MODEL={talking} MAX_NEW_TOKENS=3"
    done = shell(f"$P chat_pipe.py {settings} < <(yes Hello) | head -1")
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1, done.stderr
    assert not re.search(b"(?i)error|exception|broken", done.stderr)
    done = shell("$P chat_pipe.py --help | true")
    assert done.returncode == 0 and done.stderr == b""
    done = shell(f"echo Hi | $P chat_pipe.py {settings} > /dev/full; exit $?")
    assert done.returncode == 2 and done.stderr.decode().splitlines()[-1].startswith("error: standard output: No space")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("latin-1", "Hi\nschön\r\nlast"), ("utf-16", "Hi\nschön\r\nlast"), ("utf-8-sig", "Hi\nschön\r\n\n\0\nlast\n")],
)
def test_piped_bytes_lose_no_answer(encoding, text, talking, pipe):
    settings = [f"MODEL={talking}", "MAX_NEW_TOKENS=3", "TEMPERATURE=0"]
    code, out, error = pipe(text.encode(encoding), *settings)
    assert code == 0 and out.count("\n") == sum(map(bool, map(str.strip, text.split("\n")))), error
    told = re.findall(r"note: line (\d): .*iconv", error)
    assert told == {"latin-1": ["2"], "utf-16": [], "utf-8-sig": ["4"]}[encoding]
    if encoding == "utf-16":  # cut off in the middle of a character
        code, out, error = pipe(text.encode(encoding)[:-1], *settings)
        assert code == 0 and out.count("\n") == 3 and "note: line 3" in error


def test_a_long_prompt_loses_no_other_answer(talking, tmp_path, run_here, pipe):
    settings = [f"MODEL={talking}", "MAX_NEW_TOKENS=12", "TEMPERATURE=0"]
    code, out, error = pipe(f"Hi\n{LONG}\nBye\n".encode(), *settings)
    answers = out.split("\n")
    assert code == 2 and len(answers) == 4 and not answers[1]
    assert "line 2 is not answered: CONTEXT=512: the prompt has" in error
    assert error.splitlines()[-1].startswith("error: CONTEXT=None: prompts not answered: 1 (lines 2;")

    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("Hi", LONG, "Bye")])
    file = tmp_path / "prompts-answers.jsonl"
    for _ in range(2):  # the second time it is complete, and still not all was answered
        code, _, error = run_here("chat_pipe.py", *settings, f"PROMPTS={prompts}", "GENERATION_BATCH_SIZE=2")
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        assert code == 2 and "row 2 is not answered" in error and "error: PROMPTS: 1 of 3" in error.splitlines()[-1]
        assert rows[1]["answer"] is None and "not answered" in rows[1]["stop"]
        assert [" ".join(rows[i]["answer"].split()) for i in (0, 2)] == [answers[0], answers[2]]


def test_questions_of_any_length_are_asked_beside_each_other(talking, capsys):
    """In a training, too; one that leaves little room does not shorten the answers beside it."""
    model, tokenizer = generation.load_for_chat(str(talking))
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "x " * 240, LONG, "Bye")]
    answers = list(generation.answers(model, tokenizer, chats, max_new_tokens=30))
    assert [answer.stop for answer in answers] == ["length", "length", "too long", "length"]
    assert answers[0].tokens == answers[3].tokens == 30 and 0 < answers[1].tokens < 30
    assert "not answered: a prompt of" in capsys.readouterr().err
    (asked,) = facts.ask(model, tokenizer, [{"kind": "a", "question": LONG, "pattern": ""}])
    assert not asked["right"]


def test_one_chat_has_no_interval(talking, chats_file, tmp_path, run_here):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    same = [f"MODEL={talking}", f"BASE={talking}", f"OUT_DIR={tmp_path}", f"PROMPTS={prompts}", "MAX_LENGTH=256"]
    code, out, error = run_here("evaluate_model.py", *same, f"CHATS={chats_file}[:1]", "SUITES=loss,health")
    assert code == 0 and "no interval: it takes two chats" in out and "nothing shown" in out, error
    assert not re.search(r"\b(inf|nan)\b", out)
    file = next(tmp_path.rglob("scores.json"))
    scores = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert scores["intervals"]["loss"] is None
    code, _, error = run_here("evaluate_model.py", *same, f"CHATS={chats_file}[:0]", "SUITES=loss")
    assert code == 2 and error.splitlines()[-1].startswith("error: CHATS=")
    assert statistics.mean_interval([7.0]) is None and statistics.verdict(None) == "nothing shown"


@pytest.mark.skipif(sys.platform == "win32", reason="/proc")
def test_folders_that_cannot_be_written(talking, tmp_path):
    (tmp_path / "file").write_text("")
    place = {name: str(tmp_path / "file" / "below") for name in ("HOME", "HF_HOME", "TMPDIR", "MPLCONFIGDIR")}
    done = run_script("chat_pipe.py", "PROMPT=Hi", **place)  # the embedded model is converted there
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: HF_HOME={place['HF_HOME']}")
    done = run_script("chat_pipe.py", f"MODEL={talking}", "PROMPT=Hi", "MAX_NEW_TOKENS=2", **place)
    assert done.returncode == 0, done.stderr


def test_errors_of_libraries_are_one_line_until_the_first_step(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "secret-in-the-traceback")
    MODEL = "org/name"

    def library():
        json.loads("secret-in-the-traceback")

    main = type(library)(library.__code__, {"json": json, "MODEL": MODEL})
    with pytest.raises(SystemExit) as stop:
        cli.run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: MODEL=org/name: ") and error.count("\n") == 1
    kept = next(tmp_path.glob("traceback-*.txt")).read_text()
    assert "JSONDecodeError" in kept and "secret-in" not in kept

    def begun():
        cli.is_training = True
        json.loads("")

    with pytest.raises(json.JSONDecodeError):
        cli.run_main(begun)
    with pytest.raises(TypeError):  # our own mistakes stay what they are
        cli.run_main(type(library)(compile("1 + ''", ROOT / "common" / "x.py", "exec"), {}))

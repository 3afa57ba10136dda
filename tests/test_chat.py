"""Talking to a model: streaming from a cache that is kept, the terminal as a person uses it, and files of prompts."""

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCHITECTURES, CHAT, ROOT, run_script, save_tiny, write_jsonl

from common.cli import UserError
from common.model import generation

CHAT_PIPE = runpy.run_path(str(ROOT / "chat_pipe.py"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, tokenizer):
    """A tiny model with our template, room for long answers, and no wish to end them."""
    folder = tmp_path_factory.mktemp("chatty")
    changes = dict(max_position_embeddings=20_000, initializer_range=0.2)
    save_tiny("llama", folder, tokenizer.name_or_path, endless=True, **changes)
    tokenizer.save_pretrained(folder)
    return folder


def generator_of(folder):
    model, tokenizer = generation.load_for_chat(str(folder), dtype="float32")
    return generation.Generator(model, tokenizer)


def answer(generator, messages, tokens=24):
    return "".join(generator.stream(generator.encoder.prompt(messages), tokens, 0, 1)), generator.last


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral with a window"])
def test_answers_are_those_of_generate_and_turns_read_only_what_is_new(architecture, tokenizer, tmp_path):
    window = {"sliding_window": 16} if "window" in architecture else {}
    save_tiny(architecture.split()[0], tmp_path, tokenizer.name_or_path, initializer_range=0.2, **window)
    tokenizer.save_pretrained(tmp_path)
    generator = generator_of(tmp_path)
    generator.ends = set()  # a random model must not end here
    for length in (2, 4):
        ids = generator.encoder.prompt(CHAT[:length])
        text, last = answer(generator, CHAT[:length])
        inputs = torch.tensor([ids])
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = generator.model.generate(inputs, **options)[0, len(ids) :]
        assert text == generator.tokenizer.decode(expected, skip_special_tokens=True).replace("\ufffd", "") or (
            generator.seen[len(ids) :] == expected.tolist()[:-1]
        )
        assert last.tokens == 24 and last.stop == "length" and last.prompt_tokens == len(ids)
    assert last.read < len(ids)


def test_an_interrupted_forward_pass_leaves_the_cache_sound(chatty):
    expected, _ = answer(generator_of(chatty), CHAT[:4])
    generator = generator_of(chatty)
    answer(generator, CHAT[:2], tokens=4)
    hook = generator.model.model.layers[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        answer(generator, CHAT[:4])
    assert generator.last.stop == "stopped"
    hook.remove()
    assert answer(generator, CHAT[:4])[0] == expected


def test_the_oldest_turns_leave_a_full_context(chatty, monkeypatch):
    monkeypatch.setitem(CHAT_PIPE["window"].__globals__, "MAX_NEW_TOKENS", 10)
    generator = generator_of(chatty)
    whole = len(generator.encoder.prompt(CHAT[:4]))
    for context, kept in ((whole + 10, CHAT[:4]), (whole + 9, [CHAT[0], CHAT[3]])):
        monkeypatch.setitem(CHAT_PIPE["window"].__globals__, "CONTEXT", context)
        assert CHAT_PIPE["window"](generator, CHAT[:4]) == (kept, generator.encoder.prompt(kept))
    list(CHAT_PIPE["stream"](generator, generator.encoder.prompt(CHAT[:4])))
    assert generator.last.stop == "length" and generator.last.tokens == 10
    monkeypatch.setitem(CHAT_PIPE["window"].__globals__, "CONTEXT", whole + 4)
    list(CHAT_PIPE["stream"](generator, generator.encoder.prompt(CHAT[:4])))
    assert generator.last.stop == "context" and len(generator.seen) == whole + 4
    monkeypatch.setitem(CHAT_PIPE["window"].__globals__, "CONTEXT", 20)
    with pytest.raises(UserError, match="CONTEXT=20"):
        CHAT_PIPE["window"](generator, CHAT[:4])


class Terminal:
    """chat_pipe.py on a pseudo-terminal."""

    def __init__(self, *settings, **environment):
        import fcntl
        import pty
        import termios

        self.ours, theirs = pty.openpty()
        self.text, self.at = "", 0
        self.process = subprocess.Popen(
            [sys.executable, "chat_pipe.py", *settings, "HISTORY=None"],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: (fcntl.ioctl(0, termios.TIOCSCTTY, 0), signal.signal(signal.SIGINT, signal.SIG_DFL)),
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", **environment},
        )  # fmt: skip
        os.close(theirs)

    def read(self, seconds: float) -> bool:
        """Take in what comes within some time; whether anything did."""
        import select

        ready = bool(select.select([self.ours], [], [], seconds)[0])
        if ready:
            with contextlib.suppress(OSError):  # the end of a pseudo-terminal
                piece = os.read(self.ours, 65536).decode(errors="replace")
                self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", piece)
        return ready

    def expect(self, pattern: str) -> str:
        """Read on until the pattern comes; the text up to there."""
        until = time.time() + 60
        while time.time() < until:
            if found := re.search(pattern, self.text[self.at :]):
                read = self.text[self.at : self.at + found.end()]
                self.at += found.end()
                return read
            self.read(0.1)
        raise AssertionError(f"{pattern!r} did not come after {self.text[self.at - 500 :]!r}")

    def type(self, text: str, expected: str, end="\r") -> str:
        self.expect(">")
        while self.read(0.3):  # until the prompt is drawn
            pass
        self.at = len(self.text)
        os.write(self.ours, (text + end).encode())
        return self.expect(expected)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "TERM": "dumb"}])
def test_a_conversation_in_a_terminal(environment, chatty, tmp_path):
    saved = tmp_path / "saved.jsonl"
    terminal = Terminal(f"MODEL={chatty}", "TEMPERATURE=0", "MAX_NEW_TOKENS=5", **environment)
    terminal.expect("/help lists")
    assert "stopped at MAX_NEW_TOKENS" in terminal.type("Hi there", r"\[5 tokens, .*\]")
    terminal.type('"""', r"\n\.")
    os.write(terminal.ours, b'second line"""\r')
    terminal.expect(r"\[5 tokens")
    if not environment:  # a dumb terminal does not bracket what is pasted
        terminal.type("\x1b[200~pasted one\npasted two\x1b[201~", r"\[5 tokens")
        assert "pasted one\npasted two" in terminal.type("/undo", r"\(taken back: [^)]*\)")
    terminal.type(f"/save {saved}", r"\(saved")
    chat = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * 2
    assert [m["content"] for m in chat[::2]] == ["Hi there", "second line"]
    terminal.type("/undo", "taken back: second line")
    terminal.type("/retry", r"\[5 tokens")
    terminal.type("/reset", "forgotten")
    terminal.type("/undo", "there is no prompt yet")
    terminal.type(f"/load {saved}", "loaded: 4 messages")
    terminal.type("/system Be kind.", "")
    assert "system: Be kind." in terminal.type("/show", "second line")
    terminal.type("/set TEMPERATURE=-1", "temperature is 0 or more")
    terminal.type(f"/load {tmp_path}/none.jsonl", "no such file")
    terminal.type("/save chat.txt", "/save FILE.jsonl")
    terminal.type("/set max_new_tokens = 5000", "was 5")
    terminal.type("/what", "no command.* /help")
    terminal.type("Go on and on", r"and on *\n+[^\s>]")  # the answer has begun
    os.write(terminal.ours, b"\x03")
    stopped = terminal.expect(r"\[(\d+) tokens, .* stopped\]")
    assert int(re.search(r"\[(\d+) tokens", stopped)[1]) < 5000
    terminal.type("/set MAX_NEW_TOKENS=5", "was 5000")
    terminal.type("/set CONTEXT=60", "was None")
    assert "messages are left out" in terminal.type("Once more", r"\[5 tokens, .* of 60")
    terminal.type("/stats", "5 answers|6 answers|7 answers")
    terminal.type("", "", end="\x04")
    assert terminal.process.wait(10) == 0


def test_two_models_side_by_side(chatty, tiny, run_here):
    asked = [f"MODEL={chatty}", f"COMPARE={tiny()}", "TEMPERATURE=0", "MAX_NEW_TOKENS=4"]
    result = run_script("chat_pipe.py", *asked, stdin="Hi\n")
    assert result.returncode == 2 and "COMPARE=" in result.stderr
    tokenizer = generation.models.load_tokenizer(generation.models.locate(str(tiny())))
    assert not tokenizer.chat_template  # the second has none, and that is said
    assert run_here("chat_pipe.py", *asked, "PROMPT=Hi")[0] == 2
    code, out, _ = run_here("chat_pipe.py", f"MODEL={chatty}", f"COMPARE={chatty}/.", *asked[2:], "PROMPT=Hi")
    assert code == 0 and f"[{chatty}]\n" in out and f"[{chatty}/.]\n" in out


def test_a_file_of_prompts_is_answered_and_gone_on_with(chatty, tmp_path, run_here):
    """Killed in the middle, then the same command: the file an uninterrupted run writes, byte for byte."""
    rows = [{"prompt": f"Say {i}."} for i in range(9)]
    rows[4] = {"id": 7, "messages": CHAT}  # its last answer is made anew
    rows[5] = {"messages": CHAT[:2]}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    settings = [f"MODEL={chatty}", f"PROMPTS={prompts}", "BATCH_SIZE=2", "MAX_NEW_TOKENS=6"]
    code, _, error = run_here("chat_pipe.py", *settings, f"ANSWERS={tmp_path / 'whole.jsonl'}")
    assert code == 0, error
    whole = (tmp_path / "whole.jsonl").read_bytes()
    made = [json.loads(line) for line in whole.splitlines()]
    assert [{k: m[k] for k in row} for m, row in zip(made, rows, strict=True)] == rows
    assert all(m["stop"] in ("end", "length") and m["tokens"] <= 6 and m["by"]["SEED"] == 0 for m in made)
    part = tmp_path / "prompts-answers.jsonl"
    process = subprocess.Popen([sys.executable, "chat_pipe.py", *settings], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not part.exists() or part.stat().st_size < len(whole) // 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for torn in (part.read_bytes(), whole[: len(whole) // 2], whole[:-1], b""):
        part.write_bytes(torn)
        assert run_here("chat_pipe.py", *settings)[0] == 0
        assert part.read_bytes() == whole
    code, _, error = run_here("chat_pipe.py", *settings, "TEMPERATURE=0")
    assert code == 3 and "name another" in error and part.read_bytes() == whole
    for other in (b'{"precious": 1}', b"notes\n", whole + b"{", whole.replace(b"Say 0", b"Say 8")):
        part.write_bytes(other)
        assert run_here("chat_pipe.py", *settings)[0] == 3 and part.read_bytes() == other
    for broken in ('{"prompt": " "}', '{"prompt": "\\ud83d"}', '{"prompt": "Hi"', '{"text": "Hi"}', "7"):
        prompts.write_text(f'{{"prompt": "Hi"}}\n{broken}\n')
        code, _, error = run_here("chat_pipe.py", *settings)
        assert code == 2 and "prompts.jsonl:2: " in error
    write_jsonl(prompts, [{"prompt": "Hi", "answer": "Hello"}])
    assert run_here("chat_pipe.py", *settings, f"ANSWERS={tmp_path / 'new.jsonl'}")[0] == 2


def test_a_prompt_too_long_and_settings_that_cannot_be_are_refused(chatty, run_here):
    for settings, word in (
        (["CONTEXT=20", f"PROMPT={'word ' * 50}"], "Shorten"),
        (["TOP_P=0"], "TOP_P=0"),
        (["PROMPTS=nowhere.jsonl"], "PROMPTS=nowhere.jsonl"),
    ):
        code, _, error = run_here("chat_pipe.py", f"MODEL={chatty}", *settings)
        assert code == 2 and word in error


def test_sampling_follows_temperature_and_top_p(chatty):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    torch.manual_seed(0)
    assert {generation.choose_token(logits, 1.0, 0.5) for _ in range(50)} == {3}
    counts = torch.bincount(torch.tensor([generation.choose_token(logits, 1.0, 1.0) for _ in range(4000)]))
    # 5 standard deviations of a share of 4,000 draws
    assert torch.allclose(counts / 4000, logits[0].softmax(-1), atol=5 * (0.25 / 4000) ** 0.5)
    assert generation.choose_token(logits, 0, 1.0) == 3

"""Talking to a model: streaming from a cache that is kept, the terminal as a person uses it, and files of prompts."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCHITECTURES, CHAT, ROOT, run_script, save_tiny, write_jsonl

from common.chat.commands import run_command
from common.chat.conversation import Conversation
from common.cli import UserError
from common.model import generation, load, location


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
        assert text == generator.tokenizer.decode(expected, skip_special_tokens=False).replace("\ufffd", "") or (
            generator.seen[len(ids) :] == expected.tolist()[:-1]
        )
        assert last.tokens == 24 and last.stop == "length" and last.prompt_tokens == len(ids)
    assert last.read < len(ids)


@pytest.mark.parametrize("window", [None, 16])
def test_an_interrupted_forward_pass_leaves_the_cache_sound(window, tokenizer, tmp_path):
    """Ctrl-C between two layers leaves the first one's cache longer, also beyond a sliding window."""
    save_tiny("mistral", tmp_path, tokenizer.name_or_path, initializer_range=0.2, sliding_window=window)
    tokenizer.save_pretrained(tmp_path)
    expected, _ = answer(generator_of(tmp_path), CHAT[:4])
    generator = generator_of(tmp_path)
    answer(generator, CHAT[:2], tokens=4)
    hook = generator.model.model.layers[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        answer(generator, CHAT[:4])
    assert generator.last.stop == "stopped"
    first, second = (layer.get_seq_length() for layer in generator.cache.layers)
    assert first > second > 16
    hook.remove()
    text, last = answer(generator, CHAT[:4])
    assert text == expected and last.read < last.prompt_tokens


def test_the_oldest_turns_leave_a_full_context(chatty):
    generator = generator_of(chatty)
    ids = generator.encoder.prompt(CHAT[:4])
    for context, kept in ((len(ids) + 10, CHAT[:4]), (len(ids) + 9, [CHAT[0], CHAT[3]])):
        assert generator.fit_context(CHAT[:4], 10, context) == (kept, generator.encoder.prompt(kept))
    list(generator.stream(ids, 10, 0, 1, len(ids) + 10))
    assert generator.last.stop == "length" and generator.last.tokens == 10
    list(generator.stream(ids, 10, 0, 1, len(ids) + 4))
    assert generator.last.stop == "context" and len(generator.seen) == len(ids) + 4
    with pytest.raises(UserError, match="CONTEXT=20"):
        generator.fit_context(CHAT[:4], 10, 20)


def test_commands_change_the_conversation(chatty, tmp_path, capsys):
    settings = {"TEMPERATURE": 0.0, "TOP_P": 1.0, "MAX_NEW_TOKENS": 4, "CONTEXT": None}
    talk = Conversation({"one": generator_of(chatty)}, settings, opening=[])
    assert talk.ask("Hi")
    first = list(talk.histories["one"])
    run_command(talk, "/retry")
    assert talk.histories["one"] == first  # greedy
    talk.generators["one"].ends = set(range(640))
    run_command(talk, "/retry")  # now the answer is empty
    assert talk.histories["one"] == first and len(talk.answers) == 3
    run_command(talk, "/system Be kind.")
    run_command(talk, f"/save {tmp_path}/chat.jsonl")
    run_command(talk, "/system Be brief.")
    assert [m["content"] for m in talk.histories["one"] if m["role"] == "system"] == ["Be brief."]
    run_command(talk, "/system")
    assert talk.histories["one"] == first
    run_command(talk, f"/load {tmp_path}/chat.jsonl")
    assert talk.histories["one"] == [{"role": "system", "content": "Be kind."}, *first]
    for line in ("/set TEMPERATURE=-1", "/set TOP_P=0", "/set MAX_NEW_TOKENS=few", "/set CONTEXT=0", "/set SEED=1"):
        with pytest.raises(UserError, match=line[5:].partition("=")[0] if "SEED" not in line else "/set takes"):
            run_command(talk, line)
    assert talk.settings == settings
    run_command(talk, "/set context=None")
    run_command(talk, "/set top_p = 0.5")
    assert talk.settings == settings | {"TOP_P": 0.5} and settings["TOP_P"] == 1.0
    with pytest.raises(UserError, match="Did you mean /retry"):
        run_command(talk, "/retri")


class Terminal:
    """chat_pipe.py on a pseudo-terminal."""

    def __init__(self, *settings, **environment):
        import fcntl
        import pty
        import termios

        self.ours, theirs = pty.openpty()
        self.text, self.at = "", 0
        self.process = subprocess.Popen(
            [sys.executable, "chat_pipe.py", *settings, "DTYPE=float32", "HISTORY=None"],
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
    terminal.type("/set TEMPERATURE=-1", "TEMPERATURE=-1.0: ")
    terminal.type(f"/load {tmp_path}/none.jsonl", "file not found")
    terminal.type("/save chat.txt", "/save FILE.jsonl")
    terminal.type("/set max_new_tokens = 5000", "was 5")
    terminal.type("/what", "/what.* /help")
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
    tokenizer = load.load_tokenizer(location.locate(str(tiny())))
    assert not tokenizer.chat_template  # and a base model is refused
    assert run_here("chat_pipe.py", *asked, "PROMPT=Hi")[0] == 2
    code, out, _ = run_here("chat_pipe.py", f"MODEL={chatty}", f"COMPARE={chatty}/.", *asked[2:], "PROMPT=Hi")
    assert code == 0 and f"[{chatty}]\n" in out and f"[{chatty}/.]\n" in out


def test_a_file_of_prompts_is_answered_and_gone_on_with(chatty, tmp_path, run_here):
    """Killed in the middle, then the same command: the file an uninterrupted run writes, byte for byte."""
    rows = [{"prompt": f"Say {i}."} for i in range(9)]
    rows[4] = {"id": 7, "messages": CHAT}  # its last answer is made anew
    rows[5] = {"messages": CHAT[:2]}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    settings = [f"MODEL={chatty}", f"PROMPTS={prompts}", "GENERATION_BATCH_SIZE=2", "MAX_NEW_TOKENS=6", "DTYPE=float32"]
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

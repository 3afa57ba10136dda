"""Talking to a model: streaming from a cache that is kept, the terminal as a person uses it, and files of prompts."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCHITECTURES, CHAT, ROOT, save_tiny, write_jsonl
from transformers import AutoTokenizer

from common.chat import turns
from common.chat.conversation import Conversation
from common.chat.terminal import run_command
from common.cli import UserError
from common.eval import answers
from common.model import generation, load, location, responses


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


def test_two_models_side_by_side(chatty, tiny, run_here, monkeypatch):
    asked = [f"MODEL={chatty}", f"COMPARE={tiny()}", "TEMPERATURE=0", "MAX_NEW_TOKENS=4"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    code, _, error = run_here("chat_pipe.py", *asked)
    assert code == 2 and "COMPARE=" in error
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


# Tools and reasoning: answers written beforehand, in a real template


class Scripted(generation.Generator):
    """A generator whose answers are given; `asked` has the messages of each prompt."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.asked, self.context = tokenizer, list(texts), [], 10_000
        self.encoder, self.last = generation.encoder_of(tokenizer, tokenizer.chat_template), None

    def fit_context(self, messages, *bounds):
        self.asked.append(messages)
        return super().fit_context(messages, *bounds)

    def stream(self, prompt, max_new_tokens, temperature, top_p, context=None, tools=()):
        text = self.texts.pop(0)
        yield from re.findall(r"<[^>]*>|\s*\w+|.", text, re.DOTALL)
        message = responses.parse(text, generation.tail_of(prompt, self.tokenizer), self.tokenizer, tools)
        self.last = generation.Answer(message["content"], 7, "end", len(prompt), 0, 1.0, message)


TOOL = {"name": "get_time", "description": "The time", "parameters": {"type": "object", "properties": {"tz": {}}}}
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"tz": "UTC"}}\n</tool_call>'
SETTINGS = {"TEMPERATURE": 0.0, "TOP_P": 1.0, "MAX_NEW_TOKENS": 4, "CONTEXT": None}


@pytest.fixture
def qwen(tokenizer):
    """Our tokenizer with Qwen 3's template."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


@pytest.fixture
def tools_file(tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL]))
    return file


def test_a_call_is_shown_and_its_result_goes_on(qwen, tools_file, tmp_path, capsys):
    generator = Scripted(qwen, f"<think>\nHm.\n</think>\n\nI look. {CALL}", "It is noon.", "Bye.")
    talk = Conversation({"one": generator}, SETTINGS, opening=[{"role": "system", "content": "Be kind."}])
    with pytest.raises(UserError, match="when a call waits"):
        run_command(talk, "/tool noon")
    run_command(talk, f"/tools {tools_file}")
    assert "get_time(tz)  The time" in capsys.readouterr().out
    assert talk.ask("What time is it?")
    shown = capsys.readouterr().out
    assert '-> get_time(tz="UTC")' in shown and "I look." in shown and "<tool_call>" not in shown
    assert "Hm." not in shown and re.search(r"\(thinking \.\.\. \d+ tokens\)\n", shown)
    assert generator.asked[0][0]["tools"][0]["function"] == TOOL
    with pytest.raises(UserError, match="waits for its result: /tool RESULT, or /undo"):
        talk.ask("Well?")
    run_command(talk, "/tool 12:00")
    assert "It is noon." in capsys.readouterr().out
    system, question, asking, result, answer = generator.asked[1] + talk.histories["one"][-1:]
    assert asking["content"] == "I look." and asking["reasoning_content"] == "Hm."
    call = asking["tool_calls"][0]
    assert result == {"role": "tool", "content": "12:00", "tool_call_id": call["id"], "name": "get_time"}
    run_command(talk, "/show")
    assert 'I look.\n-> get_time(tz="UTC")\ntool get_time: 12:00\n' in capsys.readouterr().out
    run_command(talk, f"/save {tmp_path}/chat.jsonl")
    row = json.loads((tmp_path / "chat.jsonl").read_text())
    assert row == {"tools": talk.tools, "messages": talk.histories["one"]}
    assert talk.undo() == "What time is it?" and len(talk.histories["one"]) == 1  # one exchange
    talk.tools = []
    run_command(talk, f"/load {tmp_path}/chat.jsonl")
    assert talk.tools == row["tools"] and talk.histories["one"] == row["messages"]


def test_several_calls_are_answered_in_turn_or_by_name(qwen, tools_file, capsys):
    both = CALL + "\n" + CALL.replace("get_time", "get_place")
    generator = Scripted(qwen, both, "Noon, in Paris.", both, "Again.")
    talk = Conversation({"one": generator}, SETTINGS, opening=[])
    run_command(talk, f"/tools {tools_file}")
    assert talk.ask("When and where?")
    run_command(talk, "/tool get_place Paris")
    assert '(get_time(tz="UTC") waits, too)' in capsys.readouterr().out
    with pytest.raises(UserError, match="/save, when"):
        run_command(talk, "/save chat.jsonl")
    run_command(talk, "/tool It is noon")
    first, second = (turn for turn in talk.histories["one"] if turn["role"] == "tool")
    assert (first["name"], first["content"]) == ("get_place", "Paris")
    assert (second["name"], second["content"]) == ("get_time", "It is noon")
    assert talk.histories["one"][-1]["content"] == "Noon, in Paris."
    assert talk.ask("Once more?")
    ids = [call["id"] for turn in talk.histories["one"] for call in turn.get("tool_calls", [])]
    assert len(set(ids)) == 4


def test_a_name_without_a_result_is_no_result(qwen, tools_file):
    talk = Conversation({"one": Scripted(qwen, CALL)}, SETTINGS, [], turns.read_tools(tools_file, "TOOLS"))
    assert talk.ask("What time is it?")
    for text in ("get_time", "get_time  ", ""):
        with pytest.raises(UserError, match="/tool RESULT or /tool"):
            run_command(talk, f"/tool {text}")
    assert len(talk.histories["one"]) == 2


def test_tools_are_taken_back_and_then_calls_are_text(qwen, tools_file, capsys):
    talk = Conversation({"one": Scripted(qwen, CALL)}, SETTINGS, [], turns.read_tools(tools_file, "TOOLS"))
    run_command(talk, "/tools none")
    assert talk.tools == [] and "(none" in capsys.readouterr().out
    assert talk.ask("What time is it?")
    assert talk.histories["one"][-1] == {"role": "assistant", "content": CALL}
    assert f"{CALL}\n[" in capsys.readouterr().out


def test_a_template_without_tools_refuses_them_before_the_first_prompt(qwen, tools_file, tmp_path):
    qwen.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    talk = Conversation({"one": Scripted(qwen)}, SETTINGS, [])
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT, "tools": [TOOL]}))
    for line in (f"/tools {tools_file}", f"/load {tmp_path / 'chat.jsonl'}"):
        with pytest.raises(UserError, match="one does not write .*CHAT_TEMPLATE=chatml"):
            run_command(talk, line)
    assert talk.tools == [] and talk.histories["one"] == []
    with pytest.raises(UserError, match="TOOLS: "):
        Conversation({"one": Scripted(qwen)}, SETTINGS, [], turns.read_tools(tools_file, "TOOLS"))


def test_a_text_is_no_conversation_to_load(qwen, tmp_path):
    talk = Conversation({"one": Scripted(qwen)}, SETTINGS, [])
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time"}')
    with pytest.raises(UserError, match="a text, not a chat"):
        run_command(talk, f"/load {tmp_path / 'text.jsonl'}")


def test_two_models_with_calls_of_their_own(qwen, tools_file, capsys):
    generators = {"one": Scripted(qwen, CALL, "Noon."), "two": Scripted(qwen, "I do not know.")}
    talk = Conversation(generators, SETTINGS, opening=[], tools=turns.read_tools(tools_file, "TOOLS"))
    assert talk.ask("What time is it?")
    run_command(talk, "/tool 12:00")
    assert [len(history) for history in talk.histories.values()] == [4, 2]


def test_reasoning_is_hidden_or_shown_and_never_content(qwen, capsys):
    thought = "<think>\nLet me see.\n</think>\n\nYes."
    generator = Scripted(qwen, thought, thought, "<think>\nLet me", '<tool_call>{"name": </tool_call>')
    talk = Conversation({"one": generator}, SETTINGS, opening=[])
    talk.ask("Hi")
    assert re.match(r"\(thinking \.\.\. \d+ tokens\)\nYes\.\n\[", capsys.readouterr().out)
    run_command(talk, "/think")
    assert "shown" in capsys.readouterr().out
    talk.ask("Hi")
    assert capsys.readouterr().out.startswith("(thinking)\nLet me see.\n(answer)\nYes.\n[")
    history = [{key: turn[key] for key in turn if key != "role"} for turn in talk.histories["one"][1::2]]
    assert history == [{"content": "Yes.", "reasoning_content": "Let me see."}] * 2
    assert not talk.ask("And?") and len(talk.histories["one"]) == 4
    assert "all of the answer was reasoning" in capsys.readouterr().out
    assert talk.ask("And?")  # a malformed call
    assert '<tool_call>{"name": </tool_call>\n[' in capsys.readouterr().out


def test_a_full_context_keeps_tools_and_does_not_part_a_call_from_its_result(qwen):
    call = {"id": "call00001", "type": "function", "function": {"name": "get_time", "arguments": {"tz": "UTC"}}}
    exchange = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call00001", "name": "get_time"},
    ]
    chat = [*exchange, {"role": "assistant", "content": "Noon."}, *exchange]
    chat[0] = chat[0] | {"tools": [{"type": "function", "function": TOOL}]}
    generator = Scripted(qwen)
    whole = len(generator.encoder.prompt(chat))
    messages, ids = generator.fit_context(chat, 4, whole + 3)
    assert messages == [exchange[0] | {"tools": chat[0]["tools"]}, *exchange[1:]]
    assert "get_time" in qwen.decode(ids) and len(ids) < whole


@pytest.mark.parametrize("parameters", [None, {"type": "object", "properties": None}, "none", {"properties": 7}])
def test_tools_without_parameters_are_offered(parameters, qwen, tmp_path, capsys):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL | {"parameters": parameters}]))
    talk = Conversation({"one": Scripted(qwen, CALL)}, SETTINGS, [])
    run_command(talk, f"/tools {file}")
    assert "get_time()  The time" in capsys.readouterr().out
    assert talk.ask("What time is it?") and talk.histories["one"][-1]["tool_calls"]


@pytest.mark.parametrize(
    "content",
    ["", "7", "{}", "[]", "null", "[7]", '[{"description": "x"}]', '[{"function": {}}]', '[{"name": "f"}, 7]'],
)
def test_tools_that_are_none_are_refused(content, tmp_path, chatty, run_here):
    file = tmp_path / "tools.json"
    file.write_text(content)
    code, _, error = run_here("chat_pipe.py", f"MODEL={chatty}", f"TOOLS={file}", "PROMPT=Hi")
    assert code == 2 and "TOOLS=" in error and (not content or "Write [{" in error)


@pytest.fixture
def answering(monkeypatch, qwen, tmp_path):
    """answering(text, ...): settings by which chat_pipe.py has Qwen's template and gives these answers."""
    template = tmp_path / "qwen.jinja"
    template.write_text(qwen.chat_template, encoding="utf-8")

    def plan(*texts):
        scripted = Scripted(qwen, *texts)
        monkeypatch.setattr(generation, "Generator", lambda model, tokenizer: scripted)
        return [f"CHAT_TEMPLATE={template}", "TEMPERATURE=0"]

    return plan


def test_one_shot_and_pipes_give_the_content_or_the_call(answering, chatty, tools_file, run_here, monkeypatch):
    called = {"name": "get_time", "arguments": {"tz": "UTC"}}
    for text, expected in (
        ("<think>\nHm.\n</think>\n\nYes,\nit is.", "Yes,\nit is."),
        (f"<think>\nHm.\n</think>\n\n{CALL}", json.dumps(called)),
        (f"{CALL}\n{CALL}", json.dumps([called, called])),
    ):
        settings = [*answering(text), f"MODEL={chatty}", f"TOOLS={tools_file}"]
        code, out, error = run_here("chat_pipe.py", *settings, "PROMPT=Hi")
        assert (code, out.strip()) == (0, expected), error
        settings = [*answering(text), f"MODEL={chatty}", f"TOOLS={tools_file}"]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"Hi\n"))))
        code, out, error = run_here("chat_pipe.py", *settings)
        assert (code, out) == (0, " ".join(expected.split()) + "\n"), error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"Hi\n"))))
    code, out, error = run_here("chat_pipe.py", *answering("<think>\nHm"), f"MODEL={chatty}")
    assert (code, out) == (0, "\n") and "'Hi': all of the answer was reasoning" in error


ASKED, EARLIER = (
    {"role": "user", "content": "q"},
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "system": "s"}, [{"role": "system", "content": "s"}, ASKED]),
        ({"prompt": "q", "history": [["a", "b"]]}, [*EARLIER, ASKED]),
        ({"prompt": "q", "history": json.dumps(EARLIER), "reference": "r"}, [*EARLIER, ASKED]),
        ({"prompt": "Explain <|im_end|>"}, [{"role": "user", "content": "Explain <|im_end|>"}]),
        ({"prompt": [ASKED]}, [ASKED]),
        ({"prompt": [*EARLIER, {"from": "Human", "value": "q"}]}, [*EARLIER, ASKED]),
        ({"prompt": [ASKED, {"role": "assistant", "content": "made anew"}]}, [ASKED]),
        ({"Prompt": "q", "chosen": "x", "rejected": "y", "label": False}, [ASKED]),
        ({"messages": [{"role": "User", "content": "q"}]}, [ASKED]),
        ({"Messages": [*EARLIER, {"Role": "human", "Content": "q"}]}, [*EARLIER, ASKED]),
        ({"conversations": '[{"from": "human", "value": "q"}]'}, [ASKED]),
        ({"question": "q", "answer": "made anew"}, [ASKED]),
    ],
    ids=range(12),
)
def test_the_question_of_a_row(row, expected):
    chat = answers.question_of(row)
    assert [{key: turn[key] for key in turn if key != "weight"} for turn in chat] == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "<|im_start|>user\nq<|im_end|>\n"}, "prompt: begins with a control token.*as messages"),
        ({"prompt": ""}, "prompt.*not empty"),
        ({"prompt": "q", "history": 7}, "history: must be"),
        ({"prompt": "q", "tools": [7]}, "tools: "),
        ({"messages": [{"role": "Users", "content": "q"}]}, "the role must be"),
        ({"messages": []}, "messages: must be"),
        ({"text": "q"}, "a text without a question"),
        ({"id": 7}, "none of the known sets of fields"),
    ],
    ids=range(8),
)
def test_rows_without_a_question(row, problem):
    assert re.search(problem, answers.question_of(row))


def test_rows_with_tools_are_answered(answering, chatty, tools_file, tmp_path, run_here, monkeypatch):
    """The fields of an answer in a file of answers; the tools of the row before those of TOOLS."""
    other = [{"type": "function", "function": {"name": "get_place", "parameters": {}}}]
    rows = [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Where?"}], "tools": other}]
    prompts, asked = write_jsonl(tmp_path / "prompts.jsonl", rows), []
    message = {"content": "", "reasoning_content": "Hm.", "tool_calls": [{"id": "call00001"}]}

    def answer_all(model, tokenizer, chats, *_, **__):
        asked.extend(chats)
        return [generation.Answer("", 3, "end", message=message) for _ in chats]

    monkeypatch.setattr(generation, "answers", answer_all)
    settings = [*answering(), f"MODEL={chatty}", f"TOOLS={tools_file}", f"PROMPTS={prompts}", "MAX_NEW_TOKENS=9"]
    monkeypatch.setattr(Scripted, "model", None, raising=False)
    code, _, error = run_here("chat_pipe.py", *settings, "SYSTEM=Be kind.")
    assert code == 0, error
    assert [chat[0]["tools"][0]["function"]["name"] for chat in asked] == ["get_time", "get_place"]
    assert [chat[0]["role"] for chat in asked] == ["system", "system"]
    for line in (tmp_path / "prompts-answers.jsonl").read_text().splitlines():
        made = json.loads(line)
        assert made["answer"] == "" and made["reasoning_content"] == "Hm." and made["tool_calls"]


def test_a_base_model_is_asked_by_a_template_that_is_named(tiny, run_here):
    settings = [f"MODEL={tiny()}", "PROMPT=Hi", "MAX_NEW_TOKENS=2"]
    code, _, error = run_here("chat_pipe.py", *settings)
    assert code == 2 and "CHAT_TEMPLATE=chatml" in error
    assert run_here("chat_pipe.py", *settings, "CHAT_TEMPLATE=chatml")[0] == 0

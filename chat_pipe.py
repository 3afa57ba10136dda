"""Conversation to a model in the terminal: a checkpoint, a run, an adapter, a hub model or a .gguf file.

    python chat_pipe.py MODEL=out/first
    echo "What is your name?" | python chat_pipe.py MODEL=out/first TEMPERATURE=0

In the terminal /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Piped input gets one answer line per
prompt line and nothing else on standard output. PROMPTS=file.jsonl writes an answer for every row of a file.
"""

from common.cli import UserError, nearest, run_main
from common.model.location import check_models
from common.settings import apply_overrides, current, declared, parse_value

# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
COMPARE: str | None = None  # a second model, which answers the same prompts; each goes on from its own answers
QUANTIZATION: str | None = None  # nf4, int8 or hqq-1bit to hqq-4bit; None: 2 bytes a weight
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
# Conversation
SYSTEM: str | None = None  # system message put before the conversation
PROMPT: str | None = None  # answer this one prompt and leave
CONTEXT: int | None = None  # tokens in view, the oldest turns beyond are left out; None: as many as the model takes
HISTORY: str | None = "~/.chat_pipe_history"  # file of the prompts typed, for the arrow keys; None: none
# A file of prompts
PROMPTS: str | None = None  # .jsonl of {"prompt"}, or chats whose last question is to be answered
ANSWERS: str | None = None  # .jsonl to write; None: <PROMPTS>-answers.jsonl. The same command again goes on with it
BATCH_SIZE = 16  # prompts answered at once
# Generation
MAX_NEW_TOKENS = 512
TEMPERATURE = 0.7  # 0: always the likeliest token
TOP_P = 0.95  # sample from the likeliest tokens that make up this share
SEED = 0

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL, COMPARE=COMPARE)

import contextlib
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from transformers import set_seed
from transformers.utils import logging

from common import hardware
from common.data import formats, readers, sources
from common.model import generation, location

HELP = '''\
/reset           forget the conversation
/system TEXT     set the system message; without a text, remove it
/set NAME=VALUE  change TEMPERATURE, TOP_P, MAX_NEW_TOKENS or CONTEXT
/show            the settings and the conversation
/retry           answer the last prompt again
/undo            take the last prompt and its answer back
/save FILE       add the conversation to a .jsonl file, as a row to train on
/load FILE       go on with the last conversation of such a file
/stats           tokens and time so far
/quit            leave (or Ctrl-D)
"""              begins and ends a prompt of several lines; pasted lines stay together anyway'''
CHANGEABLE = ("TEMPERATURE", "TOP_P", "MAX_NEW_TOKENS", "CONTEXT")
COMMANDS = re.findall("^/[a-z]+", HELP, re.MULTILINE)
QUOTES = '"' * 3
STOPS = {"end": "ended", "length": "stopped at MAX_NEW_TOKENS", "context": "the context is full", "stopped": "stopped"}
MADE_BY = "MODEL QUANTIZATION DTYPE SYSTEM CONTEXT MAX_NEW_TOKENS TEMPERATURE TOP_P BATCH_SIZE SEED".split()
ADDED = {"answer", "tokens", "stop", "by"}  # to the rows of PROMPTS


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_settings()
    asked = read_prompts(Path(PROMPTS)) if PROMPTS else []
    names = [MODEL, COMPARE] if COMPARE else [MODEL]
    generators = {name: generation.Generator(*generation.load_for_chat(name, QUANTIZATION, DTYPE)) for name in names}
    set_seed(SEED)
    if PROMPTS:
        answer_file(generators[MODEL], asked, Path(ANSWERS or f"{PROMPTS.removesuffix('.jsonl')}-answers.jsonl"))
    elif PROMPT is not None:
        Conversation(generators).ask(PROMPT)
    elif not sys.stdin.isatty():
        for prompt in filter(None, map(str.strip, sys.stdin)):
            _, ids = window(generators[MODEL], [*opening(), {"role": "user", "content": prompt}])
            print(" ".join("".join(stream(generators[MODEL], ids)).split()), flush=True)
    else:
        converse(Conversation(generators))


def check_settings():
    """Refuse values that cannot work, and combinations of which one would be ignored."""
    if TEMPERATURE < 0 or not 0 < TOP_P <= 1 or min(MAX_NEW_TOKENS, BATCH_SIZE, CONTEXT or 1) < 1:
        raise UserError(
            f"TEMPERATURE={TEMPERATURE} TOP_P={TOP_P} MAX_NEW_TOKENS={MAX_NEW_TOKENS} BATCH_SIZE={BATCH_SIZE} "
            f"CONTEXT={CONTEXT}: temperature is 0 or more, TOP_P above 0 and at most 1, the others are at least 1."
        )
    if COMPARE and (PROMPTS or PROMPT is None and not sys.stdin.isatty()):
        raise UserError(f"COMPARE={COMPARE} is for the terminal and for PROMPT=. Run the second model by itself.")


def opening() -> list[dict]:
    """The messages a conversation begins with."""
    return [{"role": "system", "content": SYSTEM}] if SYSTEM else []


def has_system(messages: list[dict]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def context_of(generator) -> int:
    return min(CONTEXT or generator.context, generator.context)


def window(generator, messages: list[dict]) -> tuple[list[dict], list[int]]:
    """The messages without the oldest turns, so that an answer fits into the context, too; and their token ids."""
    context = context_of(generator)
    room, first = min(MAX_NEW_TOKENS, context // 4), int(has_system(messages))
    while len(ids := generator.encoder.prompt(messages)) + room > context:
        later = [i for i, message in enumerate(messages) if i > first and message["role"] == "user"]
        if not later:
            raise UserError(f"the prompt has {len(ids)} tokens, CONTEXT={context} leaves {context - room}. Shorten it.")
        messages = messages[:first] + messages[later[0] :]
    return messages, ids


def stream(generator, ids: list[int]):
    """The pieces of the answer, as the generation settings say."""
    return generator.stream(ids, MAX_NEW_TOKENS, TEMPERATURE, TOP_P, CONTEXT)


class Conversation:
    """A conversation with one model, or two side by side.

    generators: the models by name. histories: what was said with each, lists of messages.
    """

    def __init__(self, generators: dict):
        self.generators = generators
        self.histories = {name: opening() for name in generators}
        self.answers: list[generation.Answer] = []

    def ask(self, prompt: str) -> None:
        """Answer a prompt, streaming; where Ctrl-C stops the answer, what has come counts, if anything has."""
        asked = {"role": "user", "content": prompt}
        views = {name: window(self.generators[name], [*history, asked]) for name, history in self.histories.items()}
        answers = {}
        for name, generator in self.generators.items():
            kept, ids = views[name]
            left_out = len(self.histories[name]) + 1 - len(kept)
            if len(self.generators) > 1:
                print(f"[{name}]")
            if left_out:
                print(f"(the context is full: the oldest {left_out} messages are left out)")
            try:
                with contextlib.closing(stream(generator, ids)) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            print(flush=True)
            last = generator.last
            if last is None:  # stopped before it began
                return
            self.answers.append(last)
            answers[name] = last.text.strip()
            if PROMPT is None:
                used = f"context {last.prompt_tokens + last.tokens} of {context_of(generator)}"
                print(f"[{last.tokens} tokens, {last.tokens / last.seconds:.1f} tokens/s, {used}, {STOPS[last.stop]}]")
        if all(answers.values()):
            for name, history in self.histories.items():
                history += [asked, {"role": "assistant", "content": answers[name]}]

    def undo(self) -> str:
        """Take the last prompt and its answers back; returns the prompt."""
        for history in self.histories.values():
            asked = [i for i, message in enumerate(history) if message["role"] == "user"]
            if not asked:
                raise UserError("there is no prompt yet.")
            prompt = history[asked[-1]]["content"]
            del history[asked[-1] :]
        return prompt

    def run_command(self, line: str) -> None:
        """Carry out a command of HELP; UserError where it cannot be."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                print(HELP)
            case "/reset":
                self.histories = {name: opening() for name in self.generators}
                print("(forgotten)")
            case "/system":
                for history in self.histories.values():
                    history[: has_system(history)] = [{"role": "system", "content": rest}] if rest else []
            case "/set":
                print(change_setting(rest))
            case "/show":
                print(", ".join(f"{name}={value}" for name, value in current(globals()).items() if value is not None))
                for name, history in self.histories.items():
                    print(f"[{name}]", *(f"{message['role']}: {message['content']}" for message in history), sep="\n")
            case "/retry":
                before = {name: list(history) for name, history in self.histories.items()}
                self.ask(self.undo())
                if any(len(self.histories[name]) < len(history) for name, history in before.items()):
                    self.histories = before  # nothing came, the answer before stays
            case "/undo":
                print(f"(taken back: {self.undo()})")
            case "/save":
                self.save(rest)
            case "/load":
                self.load(rest)
            case "/stats":
                tokens, seconds = (sum(getattr(a, key) for a in self.answers) for key in ("tokens", "seconds"))
                memory = (
                    f"{hardware.vram_gib():.1f} GiB VRAM"
                    if hardware.vram_gib() is not None
                    else f"{hardware.rss_gib():.1f} GiB"
                )
                device = hardware.device_name()
                print(f"{len(self.answers)} answers, {tokens} tokens in {seconds:.1f} s, {device}, {memory}")
            case _:
                raise UserError(f"{command} is no command.{nearest(command, COMMANDS)} /help lists them all.")

    def save(self, file: str) -> None:
        """Add the conversation to a file of chats; of two models, that with MODEL."""
        if not any(message["role"] == "assistant" for message in self.histories[MODEL]) or not file.endswith(".jsonl"):
            raise UserError("/save FILE.jsonl, when there is an answer to save.")
        with open(Path(file).expanduser(), "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": self.histories[MODEL]}, ensure_ascii=False) + "\n")
        print(f"(saved as a row of {file})")

    def load(self, file: str) -> None:
        """Go on with the last chat of a file."""
        chats = list(sources.sound_chats(file, "/load")) if Path(file).expanduser().is_file() else []
        if not chats:
            raise UserError(f"/load {file}: there is no such file, or no chat in it.")
        self.histories = {name: list(chats[-1]) for name in self.generators}
        print(f"(loaded: {len(chats[-1])} messages, the last: {chats[-1][-1]['content'][:60]!r})")


def converse(talk: Conversation):
    """Prompt, answer, repeat, with the conversation so far in view of the model."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    history = InMemoryHistory()
    try:
        if HISTORY:
            open(Path(HISTORY).expanduser(), "ab").close()
            history = FileHistory(Path(HISTORY).expanduser())
    except OSError as error:
        print(f"HISTORY={HISTORY} cannot be written ({error.strerror}): what you type is not kept")
    session = PromptSession(history=history)
    print(f"{' and '.join(talk.generators)}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            prompt = session.prompt("\n> ").strip()
            while prompt.startswith(QUOTES) and (len(prompt) < 6 or not prompt.endswith(QUOTES)):
                prompt += "\n" + session.prompt(". ").rstrip()
            prompt = prompt.removeprefix(QUOTES).removesuffix(QUOTES).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if prompt == "/quit":
            return
        try:
            if prompt.startswith("/"):
                talk.run_command(prompt)
            elif prompt:
                talk.ask(prompt)
        except KeyboardInterrupt:
            print("(stopped)")
        except (UserError, OSError) as error:
            print(f"({error})")


def change_setting(text: str) -> str:
    """Set one of CHANGEABLE as NAME=VALUE says."""
    name, equals, value = text.partition("=")
    name = name.strip().upper()
    if name not in CHANGEABLE or not equals:
        raise UserError(f"/set takes one of {', '.join(CHANGEABLE)}, as in /set TEMPERATURE=0")
    before = globals()[name]
    globals()[name] = parse_value(
        name, value.strip(), next(s["types"] for s in declared(__file__) if s["name"] == name)
    )
    try:
        check_settings()
    except UserError:
        globals()[name] = before
        raise
    return f"({name}={globals()[name]}, was {before})"


def read_prompts(file: Path) -> list[tuple[dict, list[dict]]]:
    """The rows of PROMPTS, each with the chat up to the question to be answered; UserError for one that has none."""
    if not file.is_file():
        raise UserError(f"PROMPTS={file}: there is no such file.")
    asked = []
    for number, row in readers.read_jsonl(file):
        chat = question_of(row)
        if isinstance(chat, str):
            raise UserError(f"{file}:{number}: {chat}")
        if taken := ADDED & set(row):
            raise UserError(f"{file}:{number}: rows must not have a field {sorted(taken)[0]}, which the answers get.")
        asked.append((row, chat if has_system(chat) else opening() + chat))
    return asked


def question_of(row) -> list[dict] | str:
    """The chat up to the question that is to be answered, the last of a row; or what is wrong with the row."""
    match row:
        case {"prompt": str(prompt)} if prompt.strip():
            row = {"prompt": prompt, "completion": "to be answered"}
        case {"messages": [*turns, {"role": "user"} as last]}:
            row = row | {"messages": [*turns, last, {"role": "assistant", "content": "to be answered"}]}
    chat = formats.to_chat(row)
    if isinstance(chat, list) and chat[0]["role"] == "text":
        return "row: a text without a question"
    return chat[:-1] if isinstance(chat, list) and chat[-1]["role"] == "assistant" else chat


def answer_file(generator, asked: list[tuple[dict, list[dict]]], file: Path) -> None:
    """Write each row with its answer, batch by batch; go on where the same command was interrupted."""
    source = location.locate(MODEL)
    times = [weights.stat().st_mtime for weights in Path(source.adapter or source.path).glob("*.safetensors")]
    by = {name: value for name, value in current(globals()).items() if name in MADE_BY}
    by["weights"] = max(times, default=None)  # when they were written: tells the answers of an earlier training apart
    rows, views = [row for row, _ in asked], [window(generator, chat) for _, chat in asked]
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be half-written
    begins, ends = [as_line(row)[:-2] for row in rows], as_line({"by": by})[1:]
    ours = all(line[: len(begin)] == begin[: len(line)] for line, begin in zip(lines, begins, strict=False))
    if not ours or len(lines) > len(rows) or not all(line.endswith(ends) for line in whole):
        raise UserError(f"ANSWERS={file} holds something else, or answers by other settings: name another.", code=3)
    done = len(rows) if len(whole) == len(rows) else len(whole) // BATCH_SIZE * BATCH_SIZE
    with open(file, "ab") as stream:
        stream.truncate(sum(map(len, whole[:done])))
        starts = range(done, len(rows), BATCH_SIZE)
        for start in track(starts, f"{done} of {len(rows)} answered before;", console=Console(stderr=True)):
            set_seed(SEED + start)
            chats, ids = zip(*views[start : start + BATCH_SIZE], strict=True)
            length = min(MAX_NEW_TOKENS, context_of(generator) - max(map(len, ids)))
            how = dict(max_new_tokens=length, temperature=TEMPERATURE, top_p=TOP_P)
            given = generation.answers(generator.model, generator.tokenizer, chats, BATCH_SIZE, **how)
            for row, answer in zip(rows[start : start + BATCH_SIZE], given, strict=True):
                added = {"answer": answer.text, "tokens": answer.tokens, "stop": answer.stop, "by": by}
                stream.write(as_line(row | added))
            stream.flush()
    print(f"{len(rows)} answers: {file}")


def as_line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")  # half a surrogate pair


if __name__ == "__main__":
    run_main(main)

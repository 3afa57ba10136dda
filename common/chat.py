"""A conversation in the terminal, with one model or two side by side, and its /commands."""

import contextlib
import json
import re
from pathlib import Path

from common import hardware
from common.bounds import check_setting
from common.cli import UserError, nearest
from common.data import sources
from common.settings import parse_value

HELP = '''\
/reset           forget the conversation
/system TEXT     set the system message; without a text, remove it
/set NAME=VALUE  change TEMPERATURE, TOP_P, MAX_NEW_TOKENS or CONTEXT
/show            the settings and the conversation
/retry           answer the last prompt again
/undo            take the last prompt and its answer back
/save FILE       add the conversation to a .jsonl file, as a row to train on
/load FILE       continue the last conversation of such a file
/stats           tokens and time so far
/quit            leave (or Ctrl-D)
"""              begins and ends a prompt of several lines; pasted lines stay together anyway'''
COMMANDS = re.findall("^/[a-z]+", HELP, re.MULTILINE)
CHANGEABLE = {"TEMPERATURE": (float,), "TOP_P": (float,), "MAX_NEW_TOKENS": (int,), "CONTEXT": (int, type(None))}
STOPS = {"end": "ended", "length": "stopped at MAX_NEW_TOKENS", "context": "the context is full", "stopped": "stopped"}
QUOTES = '"' * 3  # around a prompt of several lines


class Conversation:
    """A conversation with one model, or with two side by side.

    generators: generation.Generator by name of the model. settings: those of chat_pipe.py.
    histories: the messages exchanged with each model.
    """

    def __init__(self, generators: dict, settings: dict, opening: list[dict]):
        self.generators, self.settings, self.opening = generators, dict(settings), opening
        self.answers = []  # each a generation.Answer
        self.reset(opening)

    def reset(self, messages: list[dict]) -> None:
        self.histories = {name: list(messages) for name in self.generators}

    def ask(self, prompt: str, show_stats: bool = True) -> bool:
        """Print the answer while it is generated; whether the turn was added to the conversation.

        An answer that Ctrl-C cuts short counts, unless it is empty.
        """
        question = {"role": "user", "content": prompt}
        temperature, top_p, length, context = (self.settings[name] for name in CHANGEABLE)
        views = {
            name: generator.fit_context([*self.histories[name], question], length, context)
            for name, generator in self.generators.items()
        }
        texts = {}
        for name, (messages, ids) in views.items():
            generator = self.generators[name]
            if len(views) > 1:
                print(f"[{name}]")
            if left_out := len(self.histories[name]) + 1 - len(messages):
                print(f"(the context is full: the oldest {left_out} messages are left out)")
            pieces = generator.stream(ids, length, temperature, top_p, context)
            with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
                for piece in pieces:
                    print(piece, end="", flush=True)
            print(flush=True)
            answer = generator.last
            if answer is None:  # stopped before its first token
                return False
            self.answers.append(answer)
            texts[name] = answer.text.strip()
            if show_stats:
                used = f"context {answer.prompt_tokens + answer.tokens} of {generator.limit(context)}"
                speed = f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.1f} tokens/s"
                print(f"[{speed}, {used}, {STOPS[answer.stop]}]")
        if all(texts.values()):
            for name, history in self.histories.items():
                history += [question, {"role": "assistant", "content": texts[name]}]
        return all(texts.values())

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
        """Execute a command of HELP; raises UserError where that is not possible."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        match command:
            case "/help":
                print(HELP)
            case "/reset":
                self.reset(self.opening)
                print("(forgotten)")
            case "/system":
                system = [{"role": "system", "content": argument}] if argument else []
                for history in self.histories.values():
                    history[:] = system + [message for message in history if message["role"] != "system"]
            case "/set":
                self.change_setting(argument)
            case "/show":
                print(", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None))
                for name, history in self.histories.items():
                    print(f"[{name}]", *(f"{message['role']}: {message['content']}" for message in history), sep="\n")
            case "/retry":
                before = {name: list(history) for name, history in self.histories.items()}
                if not self.ask(self.undo()):
                    self.histories = before  # the earlier answer stays
            case "/undo":
                print(f"(taken back: {self.undo()})")
            case "/save":
                self.save(argument)
            case "/load":
                self.load(argument)
            case "/stats":
                tokens = sum(answer.tokens for answer in self.answers)
                seconds = sum(answer.seconds for answer in self.answers)
                print(f"{len(self.answers)} answers, {tokens} tokens in {seconds:.1f} s, {hardware.device_name()}")
                vram = hardware.vram_gib()
                print(f"{hardware.rss_gib():.1f} GiB" if vram is None else f"{vram:.1f} GiB VRAM")
            case _:
                raise UserError(f"unknown command {command}.{nearest(command, COMMANDS)} /help lists all commands.")

    def change_setting(self, text: str) -> None:
        """Set one of CHANGEABLE from "NAME=VALUE"."""
        name, _, value = map(str.strip, text.partition("="))
        name = name.upper()
        if name not in CHANGEABLE or not value:
            raise UserError(f"/set takes one of {', '.join(CHANGEABLE)}, as in /set TEMPERATURE=0")
        value = parse_value(name, value, CHANGEABLE[name])
        check_setting(name, value)
        print(f"({name}={value}, was {self.settings[name]})")
        self.settings[name] = value

    def save(self, file: str) -> None:
        """Add the conversation with the first model to a file of chats."""
        history = next(iter(self.histories.values()))
        if not any(message["role"] == "assistant" for message in history) or not file.endswith(".jsonl"):
            raise UserError("/save FILE.jsonl, when there is an answer to save.")
        with open(Path(file).expanduser(), "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": history}, ensure_ascii=False) + "\n")
        print(f"(saved as a row of {file})")

    def load(self, file: str) -> None:
        """Continue the last chat of a file."""
        chats = list(sources.sound_chats(f'"{file}"', "/load")) if Path(file).expanduser().is_file() else []
        if not chats:
            raise UserError(f"/load {file}: file not found, or no chat in it.")
        self.reset(chats[-1])
        print(f"(loaded: {len(chats[-1])} messages, the last: {chats[-1][-1]['content'][:60]!r})")


def run_terminal(conversation: Conversation, history_file: str | None) -> None:
    """Read prompts and commands from the terminal until /quit or Ctrl-D."""
    from prompt_toolkit import PromptSession  # slow import
    from prompt_toolkit.history import FileHistory

    history = None
    try:
        if history_file:
            open(Path(history_file).expanduser(), "ab").close()
            history = FileHistory(Path(history_file).expanduser())
    except OSError as error:
        print(f"HISTORY={history_file} cannot be written ({error.strerror}): prompts are not kept")
    session = PromptSession(history=history)
    print(f"{' and '.join(conversation.generators)}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            prompt = session.prompt("\n> ").strip()
            while prompt.startswith(QUOTES) and (len(prompt) < 6 or not prompt.endswith(QUOTES)):
                prompt += "\n" + session.prompt(". ").rstrip()
            prompt = prompt.removeprefix(QUOTES).removesuffix(QUOTES).strip()
            if prompt == "/quit":
                return
            if prompt.startswith("/"):
                conversation.run_command(prompt)
            elif prompt:
                conversation.ask(prompt)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except (UserError, OSError) as error:
            print(f"({error})")

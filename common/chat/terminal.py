"""The terminal, where a person types prompts and /commands."""

import json
import re
from pathlib import Path

from common import hardware
from common.bounds import check_setting
from common.chat.conversation import CHANGEABLE, Conversation
from common.chat.show import show_tool, show_turn
from common.chat.turns import read_tools
from common.cli import UserError, nearest
from common.data import sources
from common.settings import parse_value

QUOTES = '"' * 3  # around a prompt of several lines
HELP = f"""\
/reset           forget the conversation
/system TEXT     set the system message; without a text, remove it
/tools FILE      offer the model the functions of a .json file; /tools none takes them back, /tools alone lists them
/tool RESULT     give the model's call its result, and it goes on; /tool NAME RESULT where several calls wait.
                 Until then no prompt is taken; /undo takes back the one that led to the call
/think           show the reasoning of answers, or hide it again
/set NAME=VALUE  change TEMPERATURE, TOP_P, MAX_NEW_TOKENS or CONTEXT
/show            the settings and the conversation
/retry           answer the last prompt again
/undo            take the last prompt and all that followed back
/save FILE       add the conversation to a .jsonl file, as a row to train on
/load FILE       continue the last conversation of such a file
/stats           tokens and time so far
/quit            leave (or Ctrl-D)
{QUOTES}              begins and ends a prompt of several lines; pasted lines stay together anyway"""
COMMANDS = re.findall("^/[a-z]+", HELP, re.MULTILINE)


def run_terminal(conversation: Conversation, history_file: str | None) -> None:
    """Read prompts and commands until /quit or Ctrl-D."""
    from prompt_toolkit import PromptSession  # slow import
    from prompt_toolkit.history import FileHistory

    history = None
    try:
        if history_file:
            open(Path(history_file).expanduser(), "ab").close()
            history = FileHistory(Path(history_file).expanduser())
    except (OSError, RuntimeError) as error:  # the latter: no home folder is known
        print(f"HISTORY={history_file} cannot be written ({error}): prompts are not kept")
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
                run_command(conversation, prompt)
            elif prompt:
                conversation.ask(prompt)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except (UserError, OSError) as error:
            print(f"({error})")


def run_command(conversation: Conversation, line: str) -> None:
    """Execute a command of HELP; raises UserError where that is not possible."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/help":
            print(HELP)
        case "/reset":
            conversation.reset(conversation.opening)
            print("(forgotten)")
        case "/system":
            set_system(conversation, argument)
        case "/tools":
            if argument:
                conversation.offer([] if argument == "none" else read_tools(argument, "/tools"))
            print("\n".join(map(show_tool, conversation.tools)) or "(none: /tools FILE.json)")
        case "/tool":
            conversation.answer_call(argument)
        case "/think":
            conversation.show_reasoning = not conversation.show_reasoning
            print(f"(reasoning is {'shown' if conversation.show_reasoning else 'hidden'})")
        case "/set":
            change_setting(conversation.settings, argument)
        case "/show":
            show(conversation)
        case "/retry":
            before = conversation.histories
            if not conversation.ask(conversation.undo()):
                conversation.histories = before  # the earlier answer stays
        case "/undo":
            print(f"(taken back: {conversation.undo()})")
        case "/save":
            save(conversation, argument)
        case "/load":
            load(conversation, argument)
        case "/stats":
            show_stats(conversation.answers)
        case _:
            raise UserError(f"unknown command {command}.{nearest(command, COMMANDS)} /help lists all commands.")


def set_system(conversation: Conversation, text: str) -> None:
    system = [{"role": "system", "content": text}] if text else []
    for history in conversation.histories.values():
        history[:] = system + [message for message in history if message["role"] != "system"]


def show(conversation: Conversation) -> None:
    print(", ".join(f"{name}={value}" for name, value in conversation.settings.items() if value not in (None, "")))
    for name, history in conversation.histories.items():
        print(f"[{name}]", *map(show_turn, history), sep="\n")


def show_stats(answers: list) -> None:
    tokens, seconds = sum(answer.tokens for answer in answers), sum(answer.seconds for answer in answers)
    print(f"{len(answers)} answers, {tokens} tokens in {seconds:.1f} s, {hardware.device_name()}")
    vram = hardware.vram_gib()
    print(f"{hardware.rss_gib():.1f} GiB" if vram is None else f"{vram:.1f} GiB VRAM")


def change_setting(settings: dict, text: str) -> None:
    """Set one of CHANGEABLE from "NAME=VALUE"."""
    name, _, value = map(str.strip, text.partition("="))
    name = name.upper()
    if name not in CHANGEABLE or not value:
        raise UserError(f"/set takes one of {', '.join(CHANGEABLE)}, as in /set TEMPERATURE=0")
    value = parse_value(name, value, CHANGEABLE[name])
    check_setting(name, value)
    print(f"({name}={value}, was {settings[name]})")
    settings[name] = value


def save(conversation: Conversation, file: str) -> None:
    """Add the conversation with the first model to a file of chats."""
    history = next(iter(conversation.histories.values()))
    if not any(message["role"] == "assistant" for message in history) or not file.endswith(".jsonl"):
        raise UserError("/save FILE.jsonl, when there is an answer to save.")
    if history[-1]["role"] == "tool":
        raise UserError("/save, when all calls have their results.")
    row = ({"tools": conversation.tools} if conversation.tools else {}) | {"messages": history}
    with open(Path(file).expanduser(), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"(saved as a row of {file})")


def load(conversation: Conversation, file: str) -> None:
    """Continue the last chat of a file."""
    chats = list(sources.sound_chats(f'"{file}"', "/load")) if Path(file).expanduser().is_file() else []
    if not chats:
        raise UserError(f"/load {file}: file not found, or no chat in it.")
    chat = chats[-1]
    if chat[0]["role"] == "text":
        raise UserError(f"/load {file}: its last row is a text, not a chat. Load a file of chats.")
    conversation.offer(chat[0].pop("tools", []))
    conversation.reset(chat)
    print(f"(loaded: {len(chat)} messages, the last: {show_turn(chat[-1])[:60]!r})")

"""The terminal, where a person types prompts and commands."""

from pathlib import Path

from common.chat.commands import run_command
from common.cli import UserError

QUOTES = '"' * 3  # around a prompt of several lines


def run_terminal(conversation, history_file: str | None) -> None:
    """Read prompts and commands for a Conversation until /quit or Ctrl-D."""
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
                run_command(conversation, prompt)
            elif prompt:
                conversation.ask(prompt)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except (UserError, OSError) as error:
            print(f"({error})")

"""What the terminal shows of answers, calls and tools."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable

from common.chat.turns import answer_line, explain_empty

STOPS = {"end": "ended", "length": "stopped at MAX_NEW_TOKENS", "context": "the context is full", "stopped": "stopped"}


def show_answer(parts: Iterable[tuple[str, str]], reasoning: str) -> str:
    """Print an answer while it comes, until its end or Ctrl-C; returns the content that was printed.

    parts: (field, text) of responses.follow. reasoning: "shown", "counted" or "" for not at all. Calls are not printed.
    """
    shown = ""
    with contextlib.suppress(KeyboardInterrupt):
        for field, group in itertools.groupby(parts, key=lambda part: part[0]):
            texts = (text for _, text in group)
            if field == "reasoning_content" and reasoning:
                show_reasoning(texts, reasoning == "shown")
            elif field == "content":
                for text in texts:
                    text = text if shown else text.lstrip()
                    shown += text
                    print(text, end="", flush=True)
    return shown


def show_reasoning(texts: Iterable[str], is_shown: bool) -> None:
    """Print reasoning while it comes, or how long it is."""
    counts = not is_shown and sys.stdout.isatty()  # over its own line
    tokens, space = 0, "(thinking)\n"
    try:
        for tokens, text in enumerate(filter(None, texts), 1):
            if is_shown:
                text = space + (text if tokens > 1 else text.lstrip())
                space = text[len(text.rstrip()) :]  # held back: perhaps it is the last
                print(text.removesuffix(space), end="", flush=True)
            elif counts:
                print(f"\r(thinking ... {tokens} tokens)", end="", flush=True)
    finally:
        print("\n(answer)" if is_shown else counts * "\r" + f"(thinking ... {tokens} tokens)", flush=True)


def show_end(answer, shown: str, limit: int | None) -> None:
    """Print what follows the content that was shown: a malformed call, calls, and with a limit numbers.

    answer: a generation.Answer. limit: tokens of the context; without one, calls are a line of JSON.
    """
    content, calls, shown = answer.message["content"], answer.message.get("tool_calls", []), shown.strip()
    if content or not calls:
        print(content.removeprefix(shown) if content.startswith(shown) else "", flush=True)
    if why := explain_empty(answer):
        print(f"({why})", file=sys.stdout if limit else sys.stderr)
    if calls and not limit:
        print(answer_line(answer.message))
    elif limit:
        print(*(f"-> {show_call(call)}\n" for call in calls), sep="", end="")
        speed = f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.1f} tokens/s"
        print(f"[{speed}, context {answer.prompt_tokens + answer.tokens} of {limit}, {STOPS[answer.stop]}]")


def show_call(call: dict) -> str:
    arguments = call["function"]["arguments"].items()
    listed = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments)
    return f"{call['function']['name']}({listed})"


def show_tool(tool: dict) -> str:
    function, names = tool["function"], ""
    match function.get("parameters"):
        case {"properties": {**properties}}:
            names = ", ".join(properties)
    return f"{function['name']}({names})  {function.get('description', '')}".rstrip()


def show_turn(turn: dict) -> str:
    who = f"{turn['role']} {turn['name']}" if turn["role"] == "tool" else turn["role"]
    calls = [f"-> {show_call(call)}" for call in turn.get("tool_calls", [])]
    return f"{who}: " + "\n".join(filter(None, [turn["content"], *calls]))

"""A conversation with one model, or with two side by side."""

import contextlib
import sys

from common.chat.show import show_answer, show_call
from common.chat.turns import answer_line, explain_empty, join_tools, number_calls, pending_calls
from common.cli import UserError
from common.model import generation, responses

CHANGEABLE = {"TEMPERATURE": (float,), "TOP_P": (float,), "MAX_NEW_TOKENS": (int,), "CONTEXT": (int, type(None))}
STOPS = {"end": "ended", "length": "stopped at MAX_NEW_TOKENS", "context": "the context is full", "stopped": "stopped"}


class Conversation:
    """A conversation with one model, or with two side by side.

    generators: generation.Generator by name of the model. settings: those of chat_pipe.py.
    histories: the messages exchanged with each model; tools, in OpenAI's schema, are offered with all of them.
    """

    def __init__(self, generators: dict, settings: dict, opening: list[dict], tools: list[dict] = ()):
        self.generators, self.settings, self.opening = generators, dict(settings), opening
        self.tools, self.show_reasoning = list(tools), False
        self.answers = []  # each a generation.Answer
        self.reset(opening)

    def reset(self, messages: list[dict]) -> None:
        self.histories = {name: list(messages) for name in self.generators}

    def ask(self, prompt: str, show_stats: bool = True) -> bool:
        """Print the answers to a prompt; whether they were added to the conversation."""
        for history in self.histories.values():
            if calls := pending_calls(history):
                call = show_call(calls[0])
                raise UserError(f"{call} waits for its result: /tool RESULT, or /undo takes the prompt back.")
        question = {"role": "user", "content": prompt}
        return self.answer({name: [*history, question] for name, history in self.histories.items()}, show_stats)

    def answer(self, chats: dict[str, list[dict]], show_stats: bool = True) -> bool:
        """Print each model's answer to its chat while it is generated; whether they were added.

        An answer that Ctrl-C cuts short counts, unless it is empty. Without show_stats only the content is printed,
        and a call as a line of JSON.
        """
        _, _, length, context = (self.settings[name] for name in CHANGEABLE)
        views = {
            name: self.generators[name].fit_context(join_tools(chat, self.tools), length, context)
            for name, chat in chats.items()
        }
        answered = {}
        for name, (messages, ids) in views.items():
            if len(self.generators) > 1:
                print(f"[{name}]")
            if left_out := len(chats[name]) - len(messages):
                print(f"(the context is full: the oldest {left_out} messages are left out)")
            answer = self.generate(self.generators[name], ids, show_stats)
            if answer is None:  # stopped before its first token
                return False
            self.answers.append(answer)
            turn = number_calls(answer.message, chats[name])
            if turn["content"] or "tool_calls" in turn:
                answered[name] = [*chats[name], turn]
        if len(answered) == len(chats):
            self.histories |= answered
        return len(answered) == len(chats)

    def generate(self, generator, ids: list[int], show_stats: bool):
        """Print an answer while it is generated; the generation.Answer, or None."""
        temperature, top_p, length, context = (self.settings[name] for name in CHANGEABLE)
        pieces = generator.stream(ids, length, temperature, top_p, context, self.tools)
        with contextlib.closing(pieces):
            parts = responses.follow(pieces, generation.tail_of(ids, generator.tokenizer), generator.tokenizer)
            how = "shown" if self.show_reasoning else "counted"
            shown = show_answer(parts, how if show_stats else "").strip()
        answer = generator.last
        if answer is None:
            print(flush=True)
            return None
        content, calls = answer.message["content"], answer.message.get("tool_calls", [])
        rest = content.removeprefix(shown) if content.startswith(shown) else ""  # a malformed call
        if content or not calls:
            print(rest, flush=True)
        if why := explain_empty(answer.message):
            print(f"({why})", file=sys.stdout if show_stats else sys.stderr)
        if not show_stats:
            if calls:
                print(answer_line(answer.message))
            return answer
        print(*(f"-> {show_call(call)}\n" for call in calls), sep="", end="")
        used = f"context {answer.prompt_tokens + answer.tokens} of {generator.limit(context)}"
        speed = f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.1f} tokens/s"
        print(f"[{speed}, {used}, {STOPS[answer.stop]}]")
        return answer

    def answer_call(self, result: str) -> bool:
        """Give a result to a call that waits; where it was the last one, the model goes on."""
        waiting = {name: pending_calls(history) for name, history in self.histories.items()}
        first, _, rest = result.partition(" ")
        named = {name: [c for c in calls if c["function"]["name"] == first] for name, calls in waiting.items()}
        if any(named.values()) and rest.strip():
            waiting, result = named, rest.strip()
        if not result or not any(waiting.values()):
            raise UserError("/tool RESULT or /tool NAME RESULT, when a call waits for its result.")
        ready = {}
        for name, calls in waiting.items():
            if calls:
                about = {"tool_call_id": calls[0]["id"], "name": calls[0]["function"]["name"]}
                chat = [*self.histories[name], {"role": "tool", "content": result} | about]
                if pending_calls(chat):
                    self.histories[name] = chat
                    print(f"({show_call(pending_calls(chat)[0])} waits, too)")
                else:
                    ready[name] = chat
        return not ready or self.answer(ready)

    def undo(self) -> str:
        """Take the last prompt and all that followed back; returns the prompt."""
        for history in self.histories.values():
            asked = [i for i, message in enumerate(history) if message["role"] == "user"]
            if not asked:
                raise UserError("there is no prompt yet.")
            prompt = history[asked[-1]]["content"]
            del history[asked[-1] :]
        return prompt

"""A conversation with one model, or with two side by side."""

import contextlib

from common.chat.show import show_answer, show_call, show_end
from common.chat.turns import begin, number_calls, pending_calls
from common.cli import UserError
from common.model import generation, responses

CHANGEABLE = {"TEMPERATURE": (float,), "TOP_P": (float,), "MAX_NEW_TOKENS": (int,), "CONTEXT": (int, type(None))}


class Conversation:
    """A conversation with one model, or with two side by side.

    generators: generation.Generator by name of the model. settings: those of chat_pipe.py.
    histories: the messages exchanged with each model; tools, in OpenAI's schema, are offered with all of them.
    """

    def __init__(self, generators: dict, settings: dict, opening: list[dict], tools: list[dict] = ()):
        self.generators, self.settings, self.opening = generators, dict(settings), opening
        self.show_reasoning, self.answers = False, []  # each a generation.Answer
        self.offer(tools)
        self.reset(opening)

    def offer(self, tools: list[dict]) -> None:
        """Offer the models functions instead of those before; UserError where a template does not write them."""
        for name, generator in self.generators.items():
            missing = {"tools", "calls", "results"} - generator.encoder.template.tool_form.writes
            if tools and missing:
                problem = f"the chat template of {name} does not write {', '.join(sorted(missing))}"
                raise UserError(f"TOOLS: {problem}. CHAT_TEMPLATE=chatml does, and llama3.")
        self.tools = list(tools)

    def reset(self, messages: list[dict]) -> None:
        self.histories = {name: list(messages) for name in self.generators}

    def ask(self, prompt: str, show_stats: bool = True) -> bool:
        """Print the answers to a prompt; whether they were added to the conversation."""
        waiting = [show_call(call) for history in self.histories.values() for call in pending_calls(history)]
        if waiting:
            raise UserError(f"{waiting[0]} waits for its result: /tool RESULT, or /undo takes the prompt back.")
        question = {"role": "user", "content": prompt}
        return self.answer({name: [*history, question] for name, history in self.histories.items()}, show_stats)

    def answer(self, chats: dict[str, list[dict]], show_stats: bool = True) -> bool:
        """Print each model's answer to its chat while it is generated; whether they were added.

        An answer that Ctrl-C cuts short counts, unless it is empty. Without show_stats only the content is printed,
        and a call as a line of JSON.
        """
        temperature, top_p, length, context = (self.settings[name] for name in CHANGEABLE)
        reasoning = "shown" if self.show_reasoning else "counted"
        views, answered = {}, {}
        for name, chat in chats.items():
            views[name] = self.generators[name].fit_context(begin(chat, [], self.tools), length, context)
        for name, (messages, ids) in views.items():
            generator = self.generators[name]
            if len(self.generators) > 1:
                print(f"[{name}]")
            if left_out := len(chats[name]) - len(messages):
                print(f"(the context is full: the oldest {left_out} messages are left out)")
            tail = generation.tail_of(ids, generator.tokenizer)
            with contextlib.closing(generator.stream(ids, length, temperature, top_p, context, self.tools)) as pieces:
                parts = responses.follow(pieces, tail, generator.tokenizer, self.tools)
                shown = show_answer(parts, reasoning if show_stats else "")
            answer = generator.last
            if answer is None:  # stopped before its first token
                print(flush=True)
                return False
            show_end(answer, shown, generator.limit(context) if show_stats else None)
            self.answers.append(answer)
            turn = number_calls(answer.message, chats[name])
            if turn["content"] or "tool_calls" in turn:
                answered[name] = [*chats[name], turn]
        if len(answered) == len(chats):
            self.histories = self.histories | answered
        return len(answered) == len(chats)

    def answer_call(self, text: str) -> bool:
        """Give a result to a call that waits; where it was the last one, the model goes on."""
        waiting = {name: pending_calls(history) for name, history in self.histories.items()}
        first, _, rest = text.partition(" ")
        is_named = first in [call["function"]["name"] for calls in waiting.values() for call in calls]
        if is_named:
            text = rest.strip()
        if not text or not any(waiting.values()):
            name = first if is_named else "NAME"
            raise UserError(f"/tool RESULT or /tool {name} RESULT, when a call waits for its result.")
        ready = {}
        for name, calls in waiting.items():
            call = next((call for call in calls if not is_named or call["function"]["name"] == first), None)
            if call is None:
                continue
            result = {"role": "tool", "content": text, "tool_call_id": call["id"], "name": call["function"]["name"]}
            chat = [*self.histories[name], result]
            if left := pending_calls(chat):
                self.histories[name] = chat
                print(f"({show_call(left[0])} waits, too)")
            else:
                ready[name] = chat
        return not ready or self.answer(ready)

    def undo(self) -> str:
        """Take the last prompt and all that followed back; returns the prompt."""
        before = {}
        for name, history in self.histories.items():
            asked = [i for i, message in enumerate(history) if message["role"] == "user"]
            if not asked:
                raise UserError("there is no prompt yet.")
            prompt, before[name] = history[asked[-1]]["content"], history[: asked[-1]]
        self.histories = before
        return prompt

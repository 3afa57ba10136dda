"""A chat template as this project uses it: messages become text in which each answer is found."""

import os
import re
from functools import cached_property

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from common.cli import UserError
from common.data.passages import OTHER, THOUGHT, find_answers
from common.data.tool_form import QUESTION, ToolForm, find_tool_form, try_to, write_tools

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)  # what rendering a faulty template raises
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")  # marks an answer in a template
PROBE = [QUESTION, {"role": "assistant", "content": "bz"}]
REASONING = ("reasoning_content", "thinking", "reasoning")  # the fields that templates read
REASONED = [PROBE[0], PROBE[1] | {"reasoning_content": "rx"}]


def control_pattern(tokenizer) -> re.Pattern:
    """Matches the special tokens of a tokenizer, the longest first."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "(?!)")


class ChatTemplate:
    """The template `source` of a tokenizer whose control tokens `control` matches.

    end_token: ends an answer; None where the template writes none. header: what a prompt for an answer adds to a
    chat, "" if nothing. cue: what stands before an answer to a question. lead: what is marked as the answer, but stands
    in its prompt. turn_tokens: those that begin and end other turns. probe_text: what it writes of a chat.
    fits: whether an answer is found. keeps_turns: whether it is written the same however the chat goes on.
    needs_reasoning: whether only answers with their reasoning are written as they are asked for.
    """

    def __init__(self, source: str, variables: dict, control: re.Pattern):
        self.source, self.variables, self.control = source, variables, control
        self.marked = GENERATION.search(source) is not None
        # A chat that it writes as it would be asked for: some templates need reasoning in every answer.
        self.needs_reasoning = False
        self.probe = max(PROBE, REASONED, key=self.learn_form)
        answers_found = self.learn_form(self.probe)
        self.fits, self.keeps_turns = answers_found > 0, answers_found > 1
        self.needs_reasoning = self.fits and self.probe is REASONED

    def learn_form(self, probe: list[dict]) -> int:
        """Find header, lead and end token by a chat; whether one answer (1), and all of several (2), are found."""
        self.end_token, self.header, self.cue, self.lead = None, "", "", ""
        self.keeps_turns, self.probe_text, self.turn_tokens = False, "", set()
        chat = self.as_written(probe)
        try:
            before, prompt = (self.render(chat[:1], add_generation_prompt=ask)[0] for ask in (False, True))
            text, passages = self.render(chat)
            longer = self.render([*chat, chat[0]])[0]
        except UserError:
            return 0
        self.header = prompt.removeprefix(before) if prompt.startswith(before) else ""
        self.cue = self.header or prompt[prompt.rfind("aq") + 2 :]  # before an answer to a question
        if passages and text.startswith(prompt):
            self.lead = text[passages[0][0] : len(prompt)]
        if "aq" not in text or "bz" not in text:
            return 0
        content, passage_end = text.rfind("bz") + 2, passages[-1][1] if passages else len(text)
        same = os.path.commonprefix([text[:passage_end], longer])
        ends = list(self.control.finditer(same, content)) or list(self.control.finditer(text, content, passage_end))
        self.end_token = ends[-1][0] if ends else None
        self.probe_text = longer
        answer = text[len(prompt) : content] if text.startswith(prompt) else ""
        self.turn_tokens = set(self.control.findall(prompt)) - set(self.control.findall(answer)) - {self.end_token}
        return sum(self.finds_answers(chat * turns) for turns in (1, 3)) if ends else 0

    def finds_answers(self, chat: list[dict]) -> bool:
        try:
            return bool(find_answers(self, chat, *self.render(chat)))
        except UserError:
            return False

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether it has a form for an answer's reasoning."""
        return "rx" in try_to(self.render, [PROBE[0], PROBE[1] | dict.fromkeys(REASONING, "rx")])

    def render(self, messages: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat and the (start, end) of its marked passages."""
        tools = messages[0].get("tools")
        try:
            texts, passages = render_jinja_template(
                [messages], tools=tools, chat_template=self.source, return_assistant_tokens_mask=self.marked,
                **self.variables, **options,
            )  # fmt: skip
        except TEMPLATE_ERRORS as error:
            chat = ", ".join(m["role"] for m in messages)
            problem = f"refuses a chat ({chat}): {error}"
            raise UserError(f"CHAT_TEMPLATE {problem}. Change the chat, or the template: {OTHER}.") from error
        return texts[0], passages[0] if self.marked else []

    # Messages as the template takes them

    def as_written(self, messages: list[dict]) -> list[dict]:
        """The turns in the template's own terms for reasoning and tools; UserError where it has none for tools."""
        if any("tools" in turn or "tool_calls" in turn or turn["role"] == "tool" for turn in messages):
            messages = write_tools(messages, self.tool_form)
        return [self.with_reasoning(turn) if turn["role"] == "assistant" else turn for turn in messages]

    def with_reasoning(self, turn: dict) -> dict:
        reasoning, content = turn.get("reasoning_content"), turn["content"] or ""
        found = THOUGHT.match(content)
        if not reasoning and found and self.writes_reasoning:
            reasoning, content = found[1].strip("\n"), content[found.end() :]
        if not reasoning:
            return turn
        if self.writes_reasoning:
            return turn | {"content": content} | dict.fromkeys(REASONING, reasoning)
        rest = {name: value for name, value in turn.items() if name != "reasoning_content"}
        return rest | {"content": f"<think>\n{reasoning}\n</think>" + (content and f"\n\n{content}")}

    @cached_property
    def tool_form(self) -> ToolForm:
        return find_tool_form(self.render)

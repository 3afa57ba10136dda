"""A chat template as this project uses it: messages become text in which each answer is found."""

import os
import re
from functools import cached_property

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from common.cli import UserError
from common.data.tool_form import QUESTION, ToolForm, find_tool_form, write_tools

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)  # what rendering a faulty template raises
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")  # marks an answer in a template
PROBE = [QUESTION, {"role": "assistant", "content": "bz"}]
REASONED = [PROBE[0], PROBE[1] | {"reasoning_content": "rx"}]
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # reasoning at the start of an answer
OTHER = "CHAT_TEMPLATE=chatml works with every model"


class ChatTemplate:
    """The template `source` of a tokenizer whose control tokens `control` matches.

    end_token: ends an answer; None where the template writes none. header: what a prompt for an answer adds to a
    chat, "" if nothing. keeps_turns: whether an answer is written the same however the chat goes on.
    """

    def __init__(self, source: str, variables: dict, control: re.Pattern):
        self.source, self.variables, self.control = source, variables, control
        self.marked = GENERATION.search(source) is not None
        # A chat that it writes as it would be asked for: some templates need reasoning in every answer.
        self.probe, self.fits = PROBE, False
        self.probe = max(PROBE, REASONED, key=self.learn_form)
        answers_found = self.learn_form(self.probe)
        self.fits, self.keeps_turns = answers_found > 0, answers_found > 1

    def learn_form(self, probe: list[dict]) -> int:
        """Find header, lead and end token by a chat; whether one answer (1), and all of several (2), are found."""
        self.end_token, self.header, self.cue, self.lead = None, "", "", ""
        self.keeps_turns = False
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
        content = text.rfind("bz") + 2
        same = os.path.commonprefix([text, longer])
        ends = list(self.control.finditer(same, content)) or list(self.control.finditer(text, content))
        self.end_token = ends[-1][0] if ends else None
        return sum(self.finds_answers(chat * turns) for turns in (1, 3)) if ends else 0

    def finds_answers(self, chat: list[dict]) -> bool:
        try:
            return bool(self.find_answers(chat, *self.render(chat)))
        except UserError:
            return False

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether it has a form for an answer's reasoning."""
        chat = [PROBE[0], PROBE[1] | dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "rx")]
        try:
            return "rx" in self.render(chat)[0]
        except UserError:
            return False

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
        reasoning, content = turn.get("reasoning_content"), turn["content"]
        found = THOUGHT.match(content)
        if not reasoning and found and self.writes_reasoning:
            reasoning, content = found[1].strip("\n"), content[found.end() :]
        if not reasoning:
            return turn
        if self.writes_reasoning:
            names = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), reasoning)
            return turn | {"content": content} | names
        rest = {name: value for name, value in turn.items() if name != "reasoning_content"}
        return rest | {"content": f"<think>\n{reasoning}\n</think>" + (content and f"\n\n{content}")}

    @cached_property
    def tool_form(self) -> ToolForm:
        return find_tool_form(self.render)

    # Answers in the text

    def find_answers(self, messages: list[dict], text: str, passages: list, last_only=False) -> list[tuple[int, int]]:
        """(start, end) in a chat's text of each answer with its end token.

        From what the model is asked to go on from, to the end token. passages: those that the template marks.
        last_only: a template that rewrites earlier turns gives the last answer.
        """
        answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        is_plain = not any("tool_calls" in messages[i] or "reasoning_content" in messages[i] for i in answers)
        if self.marked and is_plain:
            return self.trim_marks(text, passages, answers)
        if is_plain and self.keeps_turns and self.control.match(self.header):
            starts = [found.end() for found in re.finditer(re.escape(self.header), text)][: len(answers)]
            if len(starts) == len(answers):
                return [(start, text.index(self.end_token, start) + len(self.end_token)) for start in starts]
        try:
            return [self.find_answer(messages, i, text) for i in answers]
        except UserError:
            if not last_only:
                raise
            return [self.find_answer(messages, answers[-1], text)]

    def find_answer(self, messages: list[dict], i: int, text: str) -> tuple[int, int]:
        """Where the answer in turn `i` stands in the text of the whole chat."""
        prompt = self.render(messages[:i], add_generation_prompt=True)[0]
        answered = self.render(messages[: i + 1])[0]
        if not answered.startswith(prompt):
            self.refuse_prompt(messages[i], prompt, answered)
        end = self.end_of(answered[len(prompt) :], "tool_calls" in messages[i])
        if end is None or not text.startswith(answered[: len(prompt) + end]):
            problem = "this one rewrites earlier turns, so what to learn of the earlier answers is undefined"
            raise UserError(f"CHAT_TEMPLATE: {problem}. TRAIN_ON=last learns the last answer; {OTHER}.")
        self.check_complete(messages[i], answered[len(prompt) :])
        return len(prompt), len(prompt) + end

    @staticmethod
    def check_complete(turn: dict, answer: str) -> None:
        """Raise UserError where a part of an answer is not in its text."""
        names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
        content = THOUGHT.sub("", turn["content"], count=1).strip()
        parts = {"content": content in answer, "reasoning": turn.get("thinking", "").strip() in answer}
        parts["calls"] = all(answer.count(name) >= names.count(name) for name in names)
        if left_out := [part for part, is_written in parts.items() if not is_written]:
            problem = f"this one leaves out the {' and '.join(left_out)} of an answer"
            raise UserError(f"CHAT_TEMPLATE: {problem}. Change the row, or the template: {OTHER}.")

    def refuse_prompt(self, turn: dict, prompt: str, answered: str):
        """Raise UserError: an answer is not written as it would be asked for."""
        common = os.path.commonprefix([answered, prompt])
        problem = (
            f"a chat asks for an answer by {prompt[-40:]!r}, but this one goes on {answered[len(common) :][:40]!r}"
        )
        is_reasoned = "reasoning_content" in turn
        remedies = [OTHER]
        if "enable_thinking" in self.source:
            remedies.append(f"so may TEMPLATE_OPTIONS=enable_thinking={is_reasoned}")
        if self.probe is REASONED and self.fits and not is_reasoned:
            remedies.append("or give every answer its reasoning")
        raise UserError(f"CHAT_TEMPLATE: {problem}. {', '.join(remedies)}.")

    def end_of(self, answer: str, is_call: bool = False) -> int | None:
        """Where the end token in an answer's text ends; None if it has none.

        White space may follow it, and a token that ends the chat. Calls of tools may end with another token.
        """
        last = None
        for token in reversed(list(self.control.finditer(answer))):
            if self.control.sub("", answer[token.end() :]).strip():
                break
            last = last or token
            if token[0] == self.end_token:
                return token.end()
        return last.end() if last and is_call else None

    def find_written_answers(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the answers in a text that somebody else made by this template; UserError for none."""
        found = []
        for cue in re.finditer(re.escape(self.cue), text) if self.cue else ():
            end = text.find(self.end_token, cue.end())
            if end < 0 and text[cue.end() :].strip():
                problem = f"an answer in a text with control tokens lacks its end token {self.end_token}"
                raise UserError(f"text: {problem}. Put it after the answer, or give the chat as messages.")
            if end >= 0:
                found.append((cue.end(), end + len(self.end_token)))
        if not found:
            token = self.control.search(text)[0]
            problem = f"{token!r} is a control token, but no answer in the form of CHAT_TEMPLATE follows"
            raise UserError(f"text: {problem}. Give the chat as messages, or take it out.")
        return found

    def trim_marks(self, text: str, passages: list, answers: list[int]) -> list[tuple[int, int]]:
        """The marked passages without white space after the end token, and without what the prompt has already."""
        if len(passages) != len(answers):
            found = f"{len(passages)} passages in a chat of {len(answers)} answers"
            raise UserError(f"CHAT_TEMPLATE marks {found}; mark each once.")
        trimmed = []
        for start, end in passages:
            if text.startswith(self.lead, start):
                start += len(self.lead)
            if not text.endswith(self.end_token or "", start, end):
                end = start + (self.end_of(text[start:end]) or end - start)
            trimmed.append((start, end))
        return trimmed

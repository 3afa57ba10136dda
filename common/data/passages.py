"""The answers in the text of a chat: from what the model is asked to go on from, to the end token."""

import os
import re

from common.cli import UserError

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # reasoning at the start of an answer
SPECIAL = {"tool_calls", "reasoning_content"}  # what a template may write in another form, or leave out
OTHER = "CHAT_TEMPLATE=chatml works with every model"


class RewrittenTurns(UserError):
    """A template writes an answer in another way than when it was asked for, at least where the chat goes on."""


def find_answers(template, messages: list[dict], text: str, passages: list, last_only=False) -> list[tuple[int, int]]:
    """(start, end) in a chat's text of each answer with its end token.

    From what the model is asked to go on from, to the end token. passages: those that the template marks.
    last_only: a template that rewrites earlier turns gives the last answer.
    """
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    is_plain = not any(messages[i].keys() & SPECIAL or "</think>" in (messages[i]["content"] or "") for i in answers)
    if template.marked and is_plain:
        return trim_marks(template, text, passages, answers)
    if is_plain and template.keeps_turns and template.control.match(template.header):
        starts = [found.end() for found in re.finditer(re.escape(template.header), text)][: len(answers)]
        if len(starts) == len(answers):
            return [(start, text.index(template.end_token, start) + len(template.end_token)) for start in starts]
    try:
        return [find_answer(template, messages, i, text) for i in answers]
    except UserError:
        if not last_only:
            raise
        return [find_answer(template, messages, answers[-1], text)]


def find_answer(template, messages: list[dict], i: int, text: str) -> tuple[int, int]:
    """Where the answer in turn `i` stands in the text of the whole chat."""
    prompt = template.render(messages[:i], add_generation_prompt=True)[0]
    answered = template.render(messages[: i + 1])[0]
    if not answered.startswith(prompt):
        refuse_prompt(template, messages[i], prompt, answered)
    end = end_of(template, answered[len(prompt) :], "tool_calls" in messages[i])
    if end is None or not text.startswith(answered[: len(prompt) + end]):
        problem = "this one rewrites earlier turns, so what to learn of the earlier answers is undefined"
        raise RewrittenTurns(f"CHAT_TEMPLATE: {problem}. TRAIN_ON=last learns the last answer; {OTHER}.")
    check_complete(messages[i], answered[len(prompt) :])
    return len(prompt), len(prompt) + end


def check_complete(turn: dict, answer: str) -> None:
    """Raise UserError where a part of an answer is not in its text."""
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    content, reasoning = turn["content"] or "", turn.get("thinking", "")
    if inline := THOUGHT.match(content):
        content, reasoning = content[inline.end() :], inline[1]
    parts = {"content": content.strip() in answer, "reasoning": reasoning.strip() in answer}
    parts["calls"] = all(answer.count(name) >= names.count(name) for name in names)
    if left_out := [part for part, is_written in parts.items() if not is_written]:
        problem = f"this one leaves out the {' and '.join(left_out)} of an answer"
        raise UserError(f"CHAT_TEMPLATE: {problem}. Change the row, or the template: {OTHER}.")


def refuse_prompt(template, turn: dict, prompt: str, answered: str):
    """Raise UserError: an answer is not written as it would be asked for."""
    common = os.path.commonprefix([answered, prompt])
    problem = f"a chat asks for an answer by {prompt[-40:]!r}, but this one goes on {answered[len(common) :][:40]!r}"
    is_reasoned = "reasoning_content" in turn
    remedies = [OTHER]
    if "enable_thinking" in template.source:
        remedies.append(f"so may TEMPLATE_OPTIONS=enable_thinking={is_reasoned}")
    if template.needs_reasoning and not is_reasoned:
        remedies.append("or give every answer its reasoning")
    raise RewrittenTurns(f"CHAT_TEMPLATE: {problem}. {', '.join(remedies)}.")


def end_of(template, answer: str, is_call: bool = False) -> int | None:
    """Where the end token in an answer's text ends; None if it has none.

    White space may follow it, and a token that ends the chat. Calls of tools may end with another token.
    """
    last = None
    for token in reversed(list(template.control.finditer(answer))):
        if template.control.sub("", answer[token.end() :]).strip():
            break
        last = last or token
        if token[0] == template.end_token:
            return token.end()
    return last.end() if last and is_call else None


def find_written_answers(template, text: str) -> list[tuple[int, int]]:
    """(start, end) of the answers in a text that somebody else made by this template; UserError for none."""
    found = []
    for cue in re.finditer(re.escape(template.cue), text) if template.cue else ():
        end = text.find(template.end_token, cue.end())
        answer = text[cue.end() : end if end >= 0 else len(text)]
        runs_on = not template.turn_tokens.isdisjoint(template.control.findall(answer))
        if runs_on or (end < 0 and answer.strip()):
            problem = f"an answer in a text with control tokens lacks its end token {template.end_token}"
            raise UserError(f"text: {problem}. Put it after the answer, or give the chat as messages.")
        if end >= 0:
            found.append((cue.end(), end + len(template.end_token)))
    if not found:
        problem = "it has control tokens, but no answer in the form of CHAT_TEMPLATE"
        raise UserError(f"text: {problem}. Give the chat as messages, or take it out.")
    return found


def trim_marks(template, text: str, passages: list, answers: list[int]) -> list[tuple[int, int]]:
    """The marked passages without white space after the end token, and without what the prompt has already."""
    if len(passages) != len(answers):
        found = f"{len(passages)} passages in a chat of {len(answers)} answers"
        raise UserError(f"CHAT_TEMPLATE marks {found}; mark each once.")
    trimmed = []
    for start, end in passages:
        if text.startswith(template.lead, start):
            start += len(template.lead)
        if not text.endswith(template.end_token or "", start, end):
            end = start + (end_of(template, text[start:end]) or end - start)
        trimmed.append((start, end))
    return trimmed

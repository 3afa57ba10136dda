"""Formats: a row of any known schema becomes a chat; rows of each in tests/data/test_formats.py."""

import csv
import re
from functools import partial

from common.cli import UserError
from common.data.rows import Chat, InvalidRow, SkippedRow, as_bit, as_text, invalid, is_empty, is_missing
from common.data.rows import lower_keys, refuse
from common.data.tools import take_tools
from common.data.trees import arena, is_tree_message, tree, trees
from common.data.turns import REASONING, WEIGHTS, check_turns, role_of, turns_in

__all__ = ["Chat", "InvalidRow", "SkippedRow", "invalid", "is_tree_message", "parse_columns", "to_chat", "trees"]
# Control tokens of chat templates. Only at the ends of a text do they say that it is formatted: a question may be
# about them.
TOKEN = r"(?:<\|\w+\|?>|<\w+\|>|<｜[^｜<>]{1,40}｜>|</?s>|<[be]os>|\[/?INST\]|\[gMASK\]|<(?:start|end)_of_turn>)"
FORMATTED = re.compile(rf"^\s*{TOKEN}|{TOKEN}\s*(?:(?:user|assistant|model|system)\s*)?$")
REMEDY = 'name them by COLUMNS="field:user, field:assistant"'


def to_chat(row, columns: dict[str, str] | None = None, completion: str = "answer") -> Chat | InvalidRow | SkippedRow:
    """The chat in a row; its turns are plain dicts:

    - {"role": "system"|"user"|"assistant"|"tool"|"text", "content": str}; "" only beside tool_calls
    - assistant: "weight" 0|1, "reasoning_content", "tool_calls": [{"id", "type", "function": {"name", "arguments"}}]
    - tool: "tool_call_id" and "name" of the call it answers; the first turn of the chat: "tools"

    columns: of `parse_columns`. completion: "answer" or "continue", how plain prompt and completion are read.
    """
    if not isinstance(row, dict):
        return row if isinstance(row, InvalidRow) else invalid("row", "must be an object", row)
    notes = []
    try:
        return read_row(row, columns or {}, completion, notes)
    except ValueError as error:
        return InvalidRow(error)
    except (AttributeError, TypeError, KeyError) as error:
        return invalid("row", f"a field has another type than in its schema ({error}); remove the row", row)


def read_row(row: dict, columns: dict[str, str], completion: str, notes: list[str]) -> Chat | SkippedRow:
    rest, names = lower_keys(row, "row"), {str(name).strip().lower(): str(name).strip() for name in row}
    if columns:
        rest = rename(rest, columns, notes)
        names |= {target: name for name, target in columns.items()}
    if rest.keys() >= {"message_id", "parent_id"}:
        refuse("row", "a message of a tree with wrong ids, or among other rows; give it a file of its own", row)
    for name in ("chosen", "rejected"):
        if not is_empty(rest.get(name)) and "chosen" not in columns:
            remedy = 'or name the answer by COLUMNS="prompt:user, chosen:assistant"'
            refuse(name, f"a row of preferences is for preference_train.py; use that, {remedy}", rest[name])
    fields = schema_of(rest, columns, row)
    is_text = fields == ("text",)
    if rest.get("label") is False or not is_text and as_bit(rest.get("label")) == 0:
        return SkippedRow("label is false: a bad answer (preference_train.py learns from it)")
    if not is_text and as_bit(rest.get("label")) == 1:
        del rest["label"]
    convert = FORMATS[fields]
    raw = convert(rest, completion) if convert is prompt_and_completion else convert(rest)
    if isinstance(raw, SkippedRow):
        return raw
    raw = [(named(field, names), turn) for field, turn in raw]
    if raw[0][1]["role"] != "text":
        add_system(rest, raw, notes)
    add_weight(rest, raw)
    systems = [(field.rpartition(".")[0] + ".", turn) for field, turn in raw if role_of(turn) == "system"]
    tools = take_tools([("", rest), *systems])
    chat = check_turns(raw, notes)
    if tools:
        chat[0]["tools"] = tools
    notes += [f"unused: {names.get(name, name) or '(no name)'}" for name, value in rest.items() if not is_empty(value)]
    return Chat(chat, tuple(dict.fromkeys(notes)))


def named(field: str, names: dict[str, str]) -> str:
    """The place of a content by the row's own name of the field."""
    name = re.match(r"[^.\[]*", field)[0]
    return names.get(name, name) + field[len(name) :]


def parse_columns(text: str | None) -> dict[str, str]:
    """COLUMNS="question:user, answer:assistant" as {"question": "user", ...}; {} for None.

    A name with a comma stands in quotes, a.b is b in a. Raises UserError.
    """
    columns = {}
    for item in next(csv.reader([text or ""], skipinitialspace=True), []):
        name, _, target = (part.strip().lower() for part in item.rpartition(":"))
        if not name or target not in TARGETS:
            known = ", ".join(["system", "user", "assistant", *sorted(TARGETS - {"system", "user", "assistant"})])
            raise UserError(f'COLUMNS={text}: {item!r} is not "field:name" with a name of: {known}.')
        if target in columns.values() or name in columns:
            raise UserError(f"COLUMNS={text}: {item!r} names a field or a name that is taken; give each once.")
        columns[name] = target
    return columns


def rename(row: dict, columns: dict[str, str], notes: list[str]) -> dict:
    """The row by the names that COLUMNS gives."""
    renamed, rest = {}, dict(row)
    for name, target in columns.items():
        outer, _, inner = name.partition(".")
        if name in row:
            renamed[target] = rest.pop(name)
        elif isinstance(row.get(outer), dict) and inner in row[outer]:
            renamed[target] = row[outer][inner]
            rest.pop(outer, None)
            notes += [f"unused: {outer}.{other}" for other in row[outer] if f"{outer}.{other}" not in columns]
        else:
            refuse("row", f"COLUMNS names the field {name}; the row has other fields", list(row))
    notes += [f"unused: {name}" for name in renamed.keys() & rest.keys() if not is_empty(rest[name])]
    return rest | renamed


def schema_of(row: dict, columns: dict[str, str], original: dict) -> tuple[str, ...]:
    """The key of FORMATS: the first whose fields are all there and have a value; those of COLUMNS count more."""
    present = [fields for fields in FORMATS if row.keys() >= set(fields)]
    full = [fields for fields in present if not any(is_missing(row[name]) for name in fields)]
    mapped = [fields for fields in full if set(fields) & set(columns.values())]
    for candidates in (mapped, full, present):
        if candidates:
            return candidates[0]
    refuse("row", f"none of the known sets of fields; {REMEDY}; the row has", list(original))


def add_system(row: dict, raw: list[tuple[str, dict]], notes: list[str]) -> None:
    """Put the system text that stands beside the turns before them."""
    given = [name for name in ("system", "system_prompt") if name in row]
    texts = [(name, row.pop(name)) for name in given]
    texts = [(name, as_text(value, name, notes)) for name, value in texts if not is_empty(value)]
    if not texts:
        return
    name, text = texts[0]
    first = raw[0][1]
    others = [other for _, other in texts]
    if role_of(first) == "system" and not is_empty(first["content"]):
        others.append(as_text(first["content"], raw[0][0], notes))
    else:
        raw.insert(0, (name, {"role": "system", "content": text}))
    if set(others) != {text}:
        refuse(name, "the row has two different system texts; keep one", others)


def add_weight(row: dict, raw: list[tuple[str, dict]]) -> None:
    """A weight of the row is that of its answers; other values, such as a loss measured, stay unused."""
    for name in WEIGHTS:
        if as_bit(row.get(name)) is not None:
            weight = row.pop(name)
            for _, turn in raw:
                if role_of(turn) in ("assistant", "text") and turn.keys().isdisjoint(WEIGHTS):
                    turn[name] = weight


def pair(row: dict, question: str, answer: str) -> list[tuple[str, dict]]:
    """A question and its answer, with the earlier turns in `history`."""
    asked, answered = row.pop(question), row.pop(answer)
    field = question
    if question == "instruction":
        more = next((name for name in ("input", "context") if not is_empty(row.get(name))), "input")
        added = row.pop(more, None)
        if is_empty(asked) and not is_empty(added):
            field, asked = more, added
        elif not is_empty(added):
            texts = [as_text(asked, question, []), as_text(added, more, [])]
            asked = "\n\n".join(texts)
    if isinstance(asked, str) and FORMATTED.search(asked):
        return text_turns(question, asked, answer, answered)
    turn = {"role": "assistant", "content": answered}
    turn |= {name: row.pop(name) for name in REASONING if name in row}
    history = turns_in(row, "history") if not is_empty(row.get("history")) else []
    return [*history, (field, {"role": "user", "content": asked}), (answer, turn)]


def text_turns(question: str, asked, answer: str, answered) -> list[tuple[str, dict]]:
    """A text and its continuation, of which the text is not in the loss."""
    prompt = (question, {"role": "text", "content": asked, "weight": 0})
    return ([] if is_empty(asked) else [prompt]) + [(answer, {"role": "text", "content": answered})]


def prompt_and_completion(row: dict, completion: str) -> list[tuple[str, dict]]:
    """TRL's schema: each a text, a message or a list of messages."""
    prompt, answer = row["prompt"], row["completion"]
    is_plain = not isinstance(prompt, list | dict) and not isinstance(answer, list | dict)
    if is_plain and (completion == "continue" or any(FORMATTED.search(str(text)) for text in (prompt, answer))):
        return text_turns("prompt", row.pop("prompt"), "completion", row.pop("completion"))
    if is_plain:
        return pair(row, "prompt", "completion")
    raw = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[name], dict):
            row[name] = [row[name]]
        turns = (
            turns_in(row, name) if isinstance(row[name], list) else [(name, {"role": role, "content": row.pop(name)})]
        )
        if name == "prompt":
            answers = [turn for _, turn in turns if role_of(turn) == "assistant"]
            for turn in answers:
                if all(is_empty(turn.get(weight)) for weight in WEIGHTS):
                    turn["weight"] = 0
        raw += turns
    return raw


def summary(row: dict) -> list[tuple[str, dict]]:
    question = row.pop("dialogue")
    if isinstance(question, str) and question.strip():
        question = "Summarize this dialogue:\n\n" + question.replace("\r\n", "\n")
    turn = {"role": "assistant", "content": row.pop("summary")}
    return [("dialogue", {"role": "user", "content": question}), ("summary", turn)]


LISTS = ("messages", "conversations", "conversation", "dialog")
QUESTIONS = (
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "output")),
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("problem", "solution"), ("user", "assistant"), ("inputs", "targets"), ("input", "output")),
)
# Fields of a row -> its turns. The first that fits counts: Alpaca's rows also have `text`.
FORMATS = {(name,): partial(turns_in, name=name) for name in LISTS}
FORMATS |= {("conversation_a", "conversation_b", "winner"): arena, ("message_tree_id", "prompt"): tree}
FORMATS |= {names: partial(pair, question=names[0], answer=names[1]) for names in QUESTIONS}
FORMATS |= {("prompt", "completion"): prompt_and_completion, ("dialogue", "summary"): summary}
FORMATS |= {("text",): lambda row: [("text", {"role": "text", "content": row.pop("text")})]}
# What COLUMNS may name.
TARGETS = {name for names in FORMATS for name in names}
TARGETS |= {"system", "context", "history", "tools", "label", *WEIGHTS, *REASONING}

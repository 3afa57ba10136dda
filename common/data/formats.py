"""Formats: a row of any known schema becomes a chat; rows of each in tests/data/test_formats.py."""

import csv
import functools
import re

from common.cli import UserError
from common.data import rows
from common.data.rows import Chat, InvalidRow, RowError, SkippedRow, as_bit, as_text, invalid, is_empty, refuse
from common.data.tools import take_tools
from common.data.trees import arena, is_tree_message, ranked, tree, trees
from common.data.turns import REASONING, WEIGHTS, check_turns, give_weight, role_of, take_weight, turns_in

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
    except RowError as error:
        return error.args[0]
    except RecursionError:
        return invalid("row", "nested too deeply; remove it", list(row))


def read_row(row: dict, columns: dict[str, str], completion: str, notes: list[str]) -> Chat | SkippedRow:
    rest, names = rows.lower_keys(row, "row"), rows.lowered(tuple(row))
    if columns:
        rest = rename(rest, columns, notes)
        names = names | {target: name for name, target in columns.items()}
    if rest.keys() >= {"message_id", "parent_id"}:
        refuse("row", "a message of a tree with wrong ids, or among other rows; give it a file of its own", row)
    preferences = [name for name in PREFERENCES if not is_empty(rest.get(name))]
    if preferences and not columns:
        value = rest[preferences[0]]
        columns = {str: "prompt:user, chosen:assistant", list: "chosen:messages"}.get(type(value))
        remedy = f', or learn one side only, by COLUMNS="{columns}"' if columns else ""
        refuse(preferences[0], f"a row of preferences; use preference_train.py{remedy}", value)
    fields = schema_of(rest, columns, row)
    if is_bad(rest, fields):
        return SkippedRow("label is false: a bad answer (preference_train.py learns from it)")
    raw = turns_of(rest, fields, completion, notes)
    if isinstance(raw, SkippedRow):
        return raw
    if any(key != name for key, name in names.items()):
        raw = [(named(field, names), turn) for field, turn in raw]
    add_weight(rest, raw)
    listed = []
    if raw[0][1]["role"] != "text":
        add_system(rest, raw, notes)
        systems = [(field.rpartition(".")[0] + ".", turn) for field, turn in raw if role_of(turn) == "system"]
        listed = take_tools([("", rest), *systems])
    chat = check_turns(raw, notes)
    if listed:
        chat[0]["tools"] = listed
    notes += [f"unused: {names.get(name, name) or '(no name)'}" for name, value in rest.items() if not is_empty(value)]
    return Chat(chat, tuple(dict.fromkeys(notes)))


def is_bad(row: dict, fields: tuple[str, ...]) -> bool:
    """Whether a KTO label says so, which is taken out of the row. In rows of text, 0 and 1 are classes."""
    for name in ("label", "kto_tag"):
        bit = as_bit(row.get(name)) if fields != TEXT or isinstance(row.get(name), bool) else None
        if bit is not None:
            del row[name]
            return bit == 0
    return False


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
        fields = rows.lower_keys(row[outer], outer) if isinstance(row.get(outer), dict) else {}
        if name in row:
            renamed[target] = rest.pop(name)
        elif inner in fields:
            renamed[target] = fields[inner]
            rest.pop(outer, None)
            notes += [f"unused: {outer}.{other}" for other in fields if f"{outer}.{other}" not in columns]
        else:
            refuse("row", f"has no field {name}, which COLUMNS names; it has", list(row), limit=300)
    notes += [f"unused: {name}" for name in rest if name in renamed and not is_empty(rest[name])]
    return rest | renamed


def schema_of(row: dict, columns: dict[str, str], original: dict) -> tuple[str, ...]:
    """The first of SCHEMAS whose fields are all there and have a value; those of COLUMNS count more."""
    present = schemas_in(tuple(row))
    full = [fields for fields in present if not any(rows.is_missing(row[name]) for name in fields)]
    mapped = [fields for fields in full if set(fields) & set(columns.values())]
    for candidates in (mapped, full, present):
        if candidates:
            return candidates[0]
    refuse("row", f"none of the known sets of fields; {REMEDY}; the row has", list(original), limit=300)


@functools.lru_cache(maxsize=256)  # the rows of a file have few sets of names
def schemas_in(names: tuple) -> list[tuple[str, ...]]:
    return [fields for fields in SCHEMAS if set(names) >= set(fields)]


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
    if row.keys().isdisjoint(WEIGHTS):
        return
    given = {name: row.pop(name) for name in WEIGHTS if as_bit(row.get(name)) is not None}
    weight = take_weight(given, "row")
    if weight is not None:
        give_weight([turn for _, turn in raw], weight)


def turns_of(row: dict, fields: tuple[str, ...], completion: str, notes: list[str]) -> list[tuple] | SkippedRow:
    """The turns in the fields of a schema, which are taken out of the row: (place, turn) each."""
    if fields[0] in LISTS and len(fields) == 1:
        return turns_in(row, fields[0])
    if fields == ARENA:
        return ranked(arena, row)
    if fields == TREE:
        return ranked(tree, row)
    if fields == TEXT:
        return [("text", {"role": "text", "content": row.pop("text")})]
    if fields == SUMMARY and isinstance(row["dialogue"], str) and row["dialogue"].strip():
        row["dialogue"] = "Summarize this dialogue:\n\n" + row["dialogue"].replace("\r\n", "\n")
    values = [row[name] for name in fields]
    if any(has_roles(value) for value in values):
        return lists_of_turns(row, *fields)
    is_formatted = fields == COMPLETION and any(FORMATTED.search(str(value)) for value in values)
    if is_formatted or fields == COMPLETION and completion == "continue":
        return text_turns("prompt", row.pop("prompt"), "completion", row.pop("completion"))
    return pair(row, *fields, notes)


def pair(row: dict, question: str, answer: str, notes: list[str]) -> list[tuple[str, dict]]:
    """A question and its answer, after the earlier turns in `history`."""
    asked, answered = row.pop(question), row.pop(answer)
    field = question
    if question == "instruction":
        more = next((name for name in ("input", "context") if not is_empty(row.get(name))), None)
        added = row.pop(more, None)
        if more and is_empty(asked):
            field, asked = more, added
        elif more:
            asked = as_text(asked, question, notes) + "\n\n" + as_text(added, more, notes)
    if isinstance(asked, str) and FORMATTED.search(asked):
        return text_turns(field, asked, answer, answered)
    turn = {"role": "assistant", "content": answered}
    turn |= {name: row.pop(name) for name in REASONING if name in row}
    history = turns_in(row, "history") if not is_empty(row.get("history")) else []
    return [*history, (field, {"role": "user", "content": asked}), (answer, turn)]


def text_turns(question: str, asked, answer: str, answered) -> list[tuple[str, dict]]:
    """A text and its continuation, of which the text is not in the loss."""
    prompt = (question, {"role": "text", "content": asked, "weight": 0})
    return ([] if is_empty(asked) else [prompt]) + [(answer, {"role": "text", "content": answered})]


def has_roles(value) -> bool:
    """Whether a value is a turn or a list of turns."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(rows.lowered(tuple(first)))


def lists_of_turns(row: dict, question: str, answer: str) -> list[tuple[str, dict]]:
    """Turns and their continuation, each a text, a turn or a list; answers before the last are not in the loss."""
    raw = []
    for name, role in ((question, "user"), (answer, "assistant")):
        value = row[name]
        if not has_roles(value):
            raw.append((name, {"role": role, "content": row.pop(name)}))
            continue
        row[name] = [value] if isinstance(value, dict) else value
        raw += turns_in(row, name)
        if name == question:
            give_weight([turn for _, turn in raw], 0)
    return raw


PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue")
ARENA, TREE = ("conversation_a", "conversation_b", "winner"), ("message_tree_id", "prompt")
SUMMARY, COMPLETION, TEXT = ("dialogue", "summary"), ("prompt", "completion"), ("text",)
QUESTIONS = (
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "output")),
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
    *(("problem", "solution"), ("user", "assistant"), ("human", "assistant"), ("input", "output")),
    ("inputs", "targets"),
)
# The first whose fields a row has counts: Alpaca's rows also have `text`.
SCHEMAS = (SUMMARY, *((name,) for name in LISTS), ARENA, TREE, *QUESTIONS, COMPLETION, TEXT)
# What COLUMNS may name.
TARGETS = {name for fields in SCHEMAS if fields not in (ARENA, TREE) for name in fields}
TARGETS |= {"system", "context", "history", "tools", "label", *WEIGHTS, *REASONING}

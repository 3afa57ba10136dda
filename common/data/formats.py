"""Formats: a row of any known schema becomes a chat; rows of each in tests/data/test_formats.py."""

import functools
import re

from common.data import rows
from common.data.rows import REASONING, Chat, InvalidRow, SkippedRow, as_text, invalid, is_empty, refuse
from common.data.tools import take_tools
from common.data.trees import arena, ranked, tree, trees
from common.data.turns import PLAIN, check_turns, give_weight, role_of, take_weight, turns_in

__all__ = ["Chat", "InvalidRow", "SkippedRow", "invalid", "to_chat", "trees"]
REMEDY = 'name them by COLUMNS="field:user, field:assistant"'
MESSAGES = '{"messages": [{"role": "user", "content": ...}, ...]}'
VERDICTS = rows.BITS | {"good": 1, "positive": 1, "yes": 1, "bad": 0, "negative": 0, "no": 0, "-1": 0, "-1.0": 0}
FLAGS = (True, False, "on", "off", "[]")  # whether reasoning was on, in Nemotron's sets; an empty list in a table
LABELS = ("label", "kto_label", "kto_tag")
# What a row may not have beside messages, and beside a text, and what to do with it.
OF_TURNS = dict.fromkeys((*REASONING, "tool_calls", "function_call"), "move it into the assistant turn")
OF_TURNS["history"] = "put its turns before the others"
OF_CHATS = dict.fromkeys(("system", "system_prompt", "tools", "functions"), "write it into the text")
PREFERENCES = (*rows.CHOSEN, *rows.REJECTED)


def to_chat(row, columns: dict[str, str] | None = None, completion: str = "answer") -> Chat | InvalidRow | SkippedRow:
    """The chat in a row; its turns are plain dicts:

    - {"role": "system"|"user"|"assistant"|"tool"|"text", "content": str}; "" only beside tool_calls or of a tool
    - assistant: "weight" 0|1, "reasoning_content", "tool_calls": [{"id", "type", "function": {"name", "arguments"}}]
    - tool: "tool_call_id" and "name" of the call it answers; the first turn of the chat: "tools"

    columns: of `rows.parse_columns`. completion: "answer" or "continue", how plain prompt and completion are read.
    """
    return rows.read_safely(read_row, row, MESSAGES, columns or {}, completion, [])


def read_row(row: dict, columns: dict[str, str], completion: str, notes: list[str]) -> Chat | SkippedRow:
    rest, names, given = known_fields(row, columns, notes)
    if rest.keys() >= {"message_id", "parent_id"}:
        refuse("row", "a message of a tree with wrong ids, or among other rows; give it a file of its own", row)
    preferences = [name for name in PREFERENCES if not is_empty(rest.get(name))]
    if preferences and not given:
        name, value = preferences[0], rest[preferences[0]]
        side = {str: f"prompt:user, {name}:assistant", list: f"{name}:messages"}.get(type(value))
        remedy = f', or learn one side only, by COLUMNS="{side}"' if side else ""
        refuse(name, f"a row of preferences; use preference_train.py{remedy}", value)
    fields = schema_of(rest, columns, given, row)
    if is_bad(rest, fields):
        return SkippedRow("label is false: a bad answer (preference_train.py learns from it)")
    return read_fields(rest, fields, names, completion, notes)


def known_fields(row: dict, columns: dict[str, str], notes: list[str]) -> tuple[dict, dict[str, str], dict[str, str]]:
    """The row by the names that we know, its own names of them, and columns, where the row has their fields."""
    rest, names = rows.lower_keys(row, "row"), rows.lowered(tuple(row))
    renamed = rows.rename(rest, columns, notes)
    if not renamed:
        return rest, names, {}
    return renamed, names | {target: name for name, target in columns.items()}, columns


def read_fields(rest: dict, fields: tuple[str, ...], names: dict[str, str], completion: str, notes: list[str]):
    """The chat in the fields of a schema and in what belongs to it of the rest. names: the row's own."""
    raw = turns_of(rest, fields, completion, notes)
    if isinstance(raw, SkippedRow):
        return raw
    if any(key != name for key, name in names.items()):
        raw = [(named(field, names), turn) for field, turn in raw]
    add_weight(rest, raw)
    refuse_homeless(rest, raw)
    add_system(rest, raw, notes)
    listed = tools_of(rest, raw)
    chat = check_turns(raw, notes)
    if listed:
        chat[0]["tools"] = listed
    notes += [f"unused: {names.get(name, name) or '(no name)'}" for name, value in rest.items() if not is_empty(value)]
    return Chat(chat, tuple(dict.fromkeys(notes)))


def is_bad(row: dict, fields: tuple[str, ...]) -> bool:
    """Whether a KTO label says that the answer is bad; labels are taken out of the row.

    In messages, and in prompt and completion, as KTO's sets have them, numbers and words count, too. Elsewhere 0 and 1
    are classes, so that only true and false count.
    """
    is_kto = fields == rows.COMPLETION or len(fields) == 1 and fields != rows.TEXT
    found = {}
    for name in [name for name in LABELS if name in row]:
        word = str(row[name]).strip().lower()
        if word in (VERDICTS if is_kto or name != "label" else ("true", "false")):
            found[name] = VERDICTS[word]
            del row[name]
    if len(set(found.values())) > 1:
        refuse("row", f"{' and '.join(found)} contradict each other; keep one", found)
    return 0 in found.values()


def refuse_homeless(row: dict, raw: list[tuple[str, dict]]) -> None:
    """Refuse a field that no turn has taken, where its meaning would be lost."""
    remedies = OF_TURNS | OF_CHATS if raw[0][1]["role"] == "text" else OF_TURNS
    for name in [name for name in row if name in remedies]:
        if not is_empty(row[name]) and row[name] not in FLAGS:
            problem = f"it belongs to a turn, not beside these fields; {remedies[name]}, or remove it"
            refuse(name, problem, row[name])


def tools_of(row: dict, raw: list[tuple[str, dict]]) -> list[dict]:
    """The tools of the row, or of its system and user turns."""
    others = [(field, turn) for field, turn in raw if turn.keys() != PLAIN]
    asking = [(field, turn) for field, turn in others if role_of(turn) in ("system", "user")]
    return take_tools([("", row), *((field.rpartition(".")[0] + ".", turn) for field, turn in asking)])


def named(field: str, names: dict[str, str]) -> str:
    """The place of a content by the row's own name of the field."""
    name = re.match(r"[^.\[]*", field)[0]
    return names.get(name, name) + field[len(name) :]


def schema_of(row: dict, columns: dict[str, str], given: dict[str, str], original: dict) -> tuple[str, ...]:
    """The first of rows.SCHEMAS whose fields are all there and have a value; those of COLUMNS count more.

    given: the columns, where the row has their fields.
    """
    present = schemas_in(tuple(row))
    full = [fields for fields in present if not any(rows.is_missing(row[name]) for name in fields)]
    mapped = [fields for fields in full if set(fields) & set(given.values())]
    for candidates in (mapped, full, present):
        if candidates:
            return candidates[0]
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        refuse("row", f"a turn alone; one row is {MESSAGES}", original)
    wanted = f"none that COLUMNS names ({', '.join(columns)}), and " if columns else ""
    refuse("row", f"{wanted}none of the known sets of fields; {REMEDY}; the row has", list(original), limit=300)


@functools.lru_cache(maxsize=256)  # the rows of a file have few sets of names
def schemas_in(names: tuple) -> list[tuple[str, ...]]:
    return [fields for fields in rows.SCHEMAS if set(names) >= set(fields)]


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
    """A weight of the row is that of its answers; a loss that was measured stays unused."""
    if row.keys().isdisjoint(rows.WEIGHTS):
        return
    names = [name for name in rows.WEIGHTS if name in row]
    given = {name: row.pop(name) for name in names if name != "loss" or rows.as_bit(row[name]) is not None}
    weight = take_weight(given, "row")
    if weight is not None:
        give_weight([turn for _, turn in raw], weight)


def turns_of(row: dict, fields: tuple[str, ...], completion: str, notes: list[str]) -> list[tuple] | SkippedRow:
    """The turns in the fields of a schema, which are taken out of the row: (place, turn) each."""
    if fields == rows.ARENA:
        return ranked(arena, row)
    if fields == rows.TREE:
        return ranked(tree, row)
    if fields == rows.TEXT:
        return [("text", {"role": "text", "content": row.pop("text")})]
    if len(fields) == 1:
        return turns_in(row, fields[0])
    if fields == rows.SUMMARY and isinstance(row["dialogue"], str) and row["dialogue"].strip():
        row["dialogue"] = "Summarize this dialogue:\n\n" + row["dialogue"].replace("\r\n", "\n")
    values = [row[name] for name in fields]
    if any(has_roles(value) for value in values):
        return lists_of_turns(row, *fields, notes)
    if fields == rows.COMPLETION and completion == "continue":
        return text_turns("prompt", row.pop("prompt"), "completion", row.pop("completion"))
    return pair(row, *fields, notes)


def pair(row: dict, question: str, answer: str, notes: list[str]) -> list[tuple[str, dict]]:
    """A question and its answer, after the earlier turns in `history`."""
    (field, asked), answered = asked_in(row, question, notes), row.pop(answer)
    if isinstance(asked, str) and rows.FORMATTED.search(asked):
        return text_turns(field, asked, answer, answered)
    return [*history_in(row), (field, {"role": "user", "content": asked}), answer_in(row, answer, answered)]


def asked_in(row: dict, question: str, notes: list[str]) -> tuple:
    """A question and its field; an instruction is joined with its input."""
    asked = row.pop(question)
    more = next((name for name in ("input", "context") if not is_empty(row.get(name))), None)
    if question != "instruction" or not more:
        return question, asked
    added = row.pop(more)
    if is_empty(asked):
        return more, added
    return question, as_text(asked, question, notes) + "\n\n" + as_text(added, more, notes)


def history_in(row: dict) -> list[tuple[str, dict]]:
    """The turns before a question."""
    row["history"] = rows.from_json(row.get("history"), "history", "a list of turns")
    return [] if is_empty(row["history"]) else turns_in(row, "history")


def answer_in(row: dict, field: str, content) -> tuple[str, dict]:
    """An answer with the reasoning that stands beside it."""
    reasoning = [name for name in REASONING if name in row and row[name] not in FLAGS]
    return field, {"role": "assistant", "content": content} | {name: row.pop(name) for name in reasoning}


def text_turns(question: str, asked, answer: str, answered) -> list[tuple[str, dict]]:
    """A text and its continuation, of which the text is not in the loss."""
    prompt = (question, {"role": "text", "content": asked, "weight": 0})
    return ([] if is_empty(asked) else [prompt]) + [(answer, {"role": "text", "content": answered})]


def has_roles(value) -> bool:
    """Whether a value is a turn or a list of turns."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(rows.lowered(tuple(first)))


def lists_of_turns(row: dict, question: str, answer: str, notes: list[str]) -> list[tuple[str, dict]]:
    """Turns and their continuation, each a text, a turn or a list; answers before the last are not in the loss."""
    asked = turns_at(row, question)
    if not asked:
        field, text = asked_in(row, question, notes)
        asked = [(field, {"role": "user", "content": text})]
    give_weight([turn for _, turn in asked], 0)
    answered = turns_at(row, answer) or [answer_in(row, answer, row.pop(answer))]
    return history_in(row) + asked + answered


def turns_at(row: dict, name: str) -> list[tuple[str, dict]]:
    """The turns in a field that may hold one, or a list; [] for another value."""
    value = row[name]
    if not has_roles(value):
        return []
    row[name] = [value] if isinstance(value, dict) else value
    return turns_in(row, name)

"""Pairs: a row of preferences becomes two chats that end in a better and a worse answer; a labelled row one chat."""

import re

from common.data import formats, rows, trees
from common.data.rows import LISTS, Chat, InvalidRow, RowError, SkippedRow, invalid, is_empty, refuse
from common.data.turns import check_turns, known_role

CHOSEN = ("chosen", "chosen_response", "chosen_messages")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
SCHEMAS = '{"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "completion": ..., "label": true}'
# The field of an answer that formats knows beside one of a question.
ANSWERS = {"instruction": "output", "prompt": "response", "question": "answer", "query": "answer"}
ANSWERS |= {"problem": "solution", "inputs": "targets", "input": "output"}
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's sets, in which a text is a whole chat


class Compared(list):
    """The chats of a row: one that ends in a better answer and one that ends in a worse, or one alone with its label.

    Only these answers have the weight 1. is_good: the label. notes: as a Chat's.
    """

    def __init__(self, chats: list[Chat], notes: list[str], is_good: bool = True):
        for chat in chats:
            notes += chat.notes
        super().__init__(list(chat) for chat in chats)
        self.notes, self.is_good = tuple(dict.fromkeys(notes)), is_good


def to_compared(row, columns: dict[str, str] | None = None) -> Compared | InvalidRow | SkippedRow:
    """The pair in a row of preferences, or the chat in a labelled one. columns: of `rows.parse_columns`."""
    if not isinstance(row, dict):
        return row if isinstance(row, InvalidRow) else invalid("row", f"must be an object, as {SCHEMAS}", row)
    notes = []
    try:
        fields = rows.lower_keys(row, "row")
        fields = rows.rename(fields, columns or {}, notes) or fields
        if set(fields) >= {*rows.ARENA}:
            return compare_sides(trees.ranked(trees.arena_sides, fields), notes)
        if set(fields) >= {*rows.TREE}:
            return read_tree(fields["prompt"])
        rejected = next((name for name in REJECTED if not rows.is_missing(fields.get(name))), None)
        return read_pair(fields, rejected, notes) if rejected else read_labelled(fields, notes)
    except RowError as error:
        return error.args[0]


def read_labelled(row: dict, notes: list[str]) -> Compared | InvalidRow | SkippedRow:
    name = next((name for name in formats.LABELS if not is_empty(row.get(name))), None)
    if name is None:
        refuse("row", f"no preference; write {SCHEMAS}; the row has", list(row), limit=300)
    is_good = formats.VERDICTS.get(str(row[name]).strip().lower())
    if is_good is None:
        refuse(name, "must be true (a good answer) or false", row[name])
    chat = formats.to_chat({field: value for field, value in row.items() if field not in formats.LABELS})
    if not isinstance(chat, list):
        return chat
    last = max(i for i, turn in enumerate(chat) if turn["role"] in ("assistant", "text"))
    learn_from(chat, last)
    return Compared([chat], notes, bool(is_good))


def read_pair(row: dict, rejected: str, notes: list[str]) -> Compared | InvalidRow | SkippedRow:
    """Without a chosen answer the row's own chat is the better one."""
    rest = {name: value for name, value in row.items() if name not in (*CHOSEN, *REJECTED)}
    chosen, chats = next((name for name in CHOSEN if not rows.is_missing(row.get(name))), None), []
    for name in (chosen, rejected):
        chat = formats.to_chat(side_of(rest, name, row[name]) if name else rest)
        if not isinstance(chat, list):
            return chat
        chats.append(chat)
    return compare(chats, (chosen or "messages", rejected), notes)


def read_tree(root: dict) -> Compared | InvalidRow | SkippedRow:
    """The pair of an OpenAssistant tree."""
    try:
        return compare_sides(trees.ranked(trees.ranked_sides, root), [])
    except RowError as error:
        return error.args[0]


def compare_sides(sides: tuple | SkippedRow, notes: list[str]) -> Compared | SkippedRow:
    """The pair of two lists of turns, the better first. Raises RowError."""
    if isinstance(sides, SkippedRow):
        return sides
    return compare([Chat(check_turns(raw, notes)) for raw in sides], ("the better", "the worse"), notes)


def compare(chats: list[Chat], names: tuple[str, str], notes: list[str]) -> Compared | SkippedRow:
    """The pair of two chats, the better first. Raises RowError."""
    if list(chats[0]) == list(chats[1]):
        return SkippedRow("chosen and rejected are the same")
    asked = shared_turns(*chats)
    if not asked:
        refuse(names[1], f"answers another question than {names[0]}; both must begin alike", chats[1][0])
    for name, chat in zip(names, chats, strict=True):
        if all(turn["role"] != "assistant" for turn in chat[asked:]):
            refuse(name, "no answer of the assistant in it; write one, or remove the row", chat[-1]["content"])
        learn_from(chat, asked)
    return Compared(chats, notes)


def learn_from(chat: list[dict], start: int) -> None:
    """Give the answers from this turn on the weight 1, earlier ones 0."""
    for number, turn in enumerate(chat):
        if turn["role"] in ("assistant", "text"):
            turn["weight"] = int(number >= start)


def shared_turns(one: list[dict], other: list[dict]) -> int:
    """The number of turns that both chats begin with, up to the last before an answer."""
    count = 0
    for number, (turn, same) in enumerate(zip(one, other, strict=False), start=1):
        if turn != same:
            break
        if turn["role"] in ("user", "tool"):
            count = number
    return count


def side_of(rest: dict, name: str, answer) -> dict:
    """The row of an ordinary chat that ends in this answer; rest: the row without both sides."""
    if isinstance(answer, str) and answer.lstrip().startswith(("[{", '{"role"', '{"from"')):  # from a table
        answer = rows.from_json(answer, name, "a turn or a list of turns")
    if isinstance(answer, str) and SPEAKER.match(answer):
        pieces = SPEAKER.split(answer)[1:]
        answer = [{"from": who.lower(), "value": text} for who, text in zip(pieces[::2], pieces[1::2], strict=True)]
        answer = [turn | {"from": "human" if turn["from"] == "human" else "gpt"} for turn in answer]
    turns = [answer] if isinstance(answer, dict) else answer
    earlier = next((field for field in ("prompt", *LISTS) if formats.has_roles(rest.get(field))), None)
    if formats.has_roles(turns):
        is_continuation = known_role(turns[0].get("role", turns[0].get("from"))) in ("assistant", "tool")
        if not is_continuation:  # a whole chat, beside which its question may stand a second time
            others = {field: value for field, value in rest.items() if field not in ("prompt", "instruction", *LISTS)}
            return others | {"messages": turns}
        if earlier is None:
            question = question_in(rest)
            asked = [{"role": "user", "content": rest[question]}]
            others = {field: value for field, value in rest.items() if field != question}
            return others | {"messages": [*asked, *turns]}
    else:
        turns = [{"role": "assistant", "content": answer}]
    if earlier is None:
        question = question_in(rest)
        return {field: value for field, value in rest.items() if field not in ANSWERS.values()} | {
            ANSWERS[question]: answer
        }
    asked = rest[earlier] if isinstance(rest[earlier], list) else [rest[earlier]]
    if known_role(asked[-1].get("role", asked[-1].get("from"))) == "assistant":  # the chosen answer once more
        asked = asked[:-1]
    return {field: value for field, value in rest.items() if field != earlier} | {"messages": [*asked, *turns]}


def question_in(row: dict) -> str:
    """The field of the question."""
    for name in ANSWERS:
        if not is_empty(row.get(name)):
            return name
    refuse("row", f"no question beside chosen and rejected; write {SCHEMAS}; the row has", list(row), limit=300)

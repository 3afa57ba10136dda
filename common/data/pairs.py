"""Pairs: a row of preferences becomes two chats that end in a better and a worse answer; a labelled row one chat."""

import re

from common.data import formats, rows, trees
from common.data.rows import CHOSEN, LISTS, REJECTED, Chat, InvalidRow, RowError, SkippedRow, is_empty, refuse
from common.data.turns import check_turns, known_role

PAIR = '{"prompt": ..., "chosen": ..., "rejected": ...}'
SCHEMAS = f'{PAIR}, or with LOSS=kto {{"prompt": ..., "completion": ..., "label": true}}'
QUESTIONS = tuple(dict.fromkeys(question for question, _ in (*rows.QUESTIONS, rows.COMPLETION)))
SPEAKER = re.compile(r"\n\n(Human|Assistant):[ ]?")  # of Anthropic's sets, in which a text is a whole chat
WRITTEN_TURNS = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|from)["']""")  # in a cell of a table


class Compared(list):
    """The chats of a row: one that ends in a better answer and one that ends in a worse, or one alone with its label.

    Only these answers have the weight 1. is_good: the label. notes: as a Chat's.
    """

    def __init__(self, chats: list[Chat], notes: list[str], is_good: bool = True):
        super().__init__(list(chat) for chat in chats)
        self.notes, self.is_good = tuple(dict.fromkeys(notes)), is_good


def to_compared(row, columns: dict[str, str] | None = None, loss: str = "kto") -> Compared | InvalidRow | SkippedRow:
    """The pair in a row of preferences, or the chat in a labelled one, which only the loss "kto" learns from.

    columns: of `rows.parse_columns`.
    """
    return rows.read_safely(read_row, row, SCHEMAS, columns or {}, loss, [])


def read_row(row: dict, columns: dict[str, str], loss: str, notes: list[str]) -> Compared | SkippedRow:
    fields, names, given = formats.known_fields(row, columns, notes)
    if fields.keys() >= {*rows.ARENA}:
        winner, loser = ("a", "b") if fields["winner"] == "model_a" else ("b", "a")
        sides = trees.ranked(trees.arena_sides, fields)
        return compare_sides(sides, (f"conversation_{winner}", f"conversation_{loser}"), notes)
    if fields.keys() >= {*rows.TREE}:
        return compare_sides(trees.ranked(trees.ranked_sides, fields["prompt"]), ("the better", "the worse"), notes)
    labels = sorted((name for name in formats.LABELS if name in fields), key=lambda name: is_empty(fields[name]))
    sides = [
        next((name for name in side if not rows.is_missing(fields.get(name))), None) for side in (CHOSEN, REJECTED)
    ]
    unlabelled = {name: value for name, value in fields.items() if name not in formats.LABELS}
    if not any(sides) and labels:
        if loss != "kto":
            problem = f"one answer with its label, of which LOSS={loss} learns nothing; set LOSS=kto, or write {PAIR}"
            refuse(names.get(labels[0], labels[0]), problem, fields[labels[0]])
        schema = formats.schema_of(unlabelled, columns, given, row)
        return read_labelled(unlabelled, schema, names, labels[0], fields[labels[0]], notes)
    if not any(sides):
        refuse("row", f"no preference; write {SCHEMAS}; the row has", list(row), limit=300)
    notes += [f"unused: {names.get(name, name)}" for name in labels if not is_empty(fields[name])]
    return read_pair(unlabelled, *sides, names, notes)


def read_labelled(
    fields: dict, schema: tuple, names: dict[str, str], label: str, verdict, notes: list[str]
) -> Compared | SkippedRow:
    is_good = formats.VERDICTS.get(str(verdict).strip().lower())
    if is_good is None:
        refuse(names.get(label, label), "must be true (a good answer) or false", verdict)
    chat = formats.read_fields(fields, schema, names, "answer", notes)
    if isinstance(chat, SkippedRow):
        return chat
    learn_from(chat, max(i for i, turn in enumerate(chat) if turn["role"] in ("assistant", "text")))
    return Compared([chat], [*notes, *chat.notes], bool(is_good))


def read_pair(
    fields: dict, chosen: str | None, rejected: str | None, names: dict[str, str], notes: list[str]
) -> Compared | SkippedRow:
    """Without a chosen answer the row's own chat is the better one."""
    others = [name for name in (*CHOSEN, *REJECTED) if name in fields and name not in (chosen, rejected)]
    notes += [f"unused: {names.get(name, name)}" for name in others if not is_empty(fields[name])]
    rest = {name: value for name, value in fields.items() if name not in (*CHOSEN, *REJECTED)}
    own = formats.schemas_in(tuple(rest))
    if not rejected or not chosen and not own:
        name, other = ("chosen", rejected) if rejected else ("rejected", chosen)
        refuse(names.get(name, name), f"no answer to compare {names.get(other, other)} with; write one", None)
    if chosen:
        better = read_side(rest, chosen, fields[chosen], names, notes)
    else:
        chosen, better = own[0][-1], formats.read_fields(dict(rest), own[0], names, "answer", notes)
        rest = {name: value for name, value in rest.items() if name != chosen or name in LISTS}
    worse = read_side(rest, rejected, fields[rejected], names, notes)
    return compare([better, worse], (names.get(chosen, chosen), names.get(rejected, rejected)), notes)


def read_side(rest: dict, name: str, answer, names: dict[str, str], notes: list[str]) -> Chat:
    """The chat that ends in an answer, which is the field of this name; rest: the row without both sides."""
    if isinstance(answer, str) and any(isinstance(value, str) and SPEAKER.match(value) for value in rest.values()):
        answer = answer.strip() if not SPEAKER.match(answer) else answer  # it begins with the space after "Assistant:"
    rest, answer = {field: read_cell(value, field) for field, value in rest.items()}, read_cell(answer, name)
    earlier = next((field for field in (*QUESTIONS, *LISTS) if formats.has_roles(rest.get(field))), None)
    first = answer[0] if isinstance(answer, list) and answer else answer
    if formats.has_roles(answer) and known_role(first.get("role", first.get("from"))) not in ("assistant", "tool"):
        # A whole chat, beside which its question may stand a second time.
        said = [turn.get("content", turn.get("value")) for turn in answer if isinstance(turn, dict)]
        rest = {field: value for field, value in rest.items() if field not in (earlier, *LISTS) and value not in said}
        return formats.read_fields(rest | {name: answer}, (name,), names, "answer", notes)
    question = earlier or next((field for field in QUESTIONS if not is_empty(rest.get(field))), None)
    if question is None:
        refuse(
            "row", f"no question beside {names.get(name, name)}; write {PAIR}; the row has", [*rest, name], limit=300
        )
    if earlier:
        turns = rest[earlier] if isinstance(rest[earlier], list) else [rest[earlier]]
        is_answered = known_role(turns[-1].get("role", turns[-1].get("from"))) == "assistant"
        rest[earlier] = turns[:-1] if is_answered else turns  # the better answer once more
    return formats.read_fields(rest | {name: answer}, (question, name), names, "answer", notes)


def read_cell(value, field: str):
    """The turns that a text holds as JSON, or as Anthropic's sets have them; other values as they are."""
    if not isinstance(value, str):
        return value
    if WRITTEN_TURNS.match(value):
        return rows.from_json(value, field, "a turn or a list of turns")
    if not SPEAKER.match(value):
        return value
    pieces = SPEAKER.split(value)[1:]
    turns = [{"from": who.lower(), "value": text} for who, text in zip(pieces[::2], pieces[1::2], strict=True)]
    is_question = field not in (*CHOSEN, *REJECTED) and not turns[-1]["value"].strip()
    turns = turns[:-1] if is_question else turns  # after it the answer begins
    return [turn | {"from": "gpt" if turn["from"] == "assistant" else "human"} for turn in turns]


def read_tree(root: dict) -> Compared | InvalidRow | SkippedRow:
    """The pair of an OpenAssistant tree."""
    try:
        return compare_sides(trees.ranked(trees.ranked_sides, root), ("the better", "the worse"), [])
    except RowError as error:
        return error.args[0]


def compare_sides(sides: tuple | SkippedRow, names: tuple[str, str], notes: list[str]) -> Compared | SkippedRow:
    """The pair of two lists of turns, the better first. Raises RowError."""
    if isinstance(sides, SkippedRow):
        return sides
    return compare([Chat(check_turns(raw, notes)) for raw in sides], names, notes)


def compare(chats: list[Chat], names: tuple[str, str], notes: list[str]) -> Compared | SkippedRow:
    """The pair of two chats, the better first. Raises RowError."""
    while all(chat[-1]["role"] in ("user", "tool") for chat in chats):
        notes.append("changed: cut at a question without an answer")
        chats = [Chat(chat[:-1], chat.notes) for chat in chats]
    for name, chat in zip(names, chats, strict=True):
        if chat[-1]["role"] in ("user", "tool"):
            refuse(name, "it ends in a question without an answer; write one, or remove the row", chat[-1]["content"])
    if list(chats[0]) == list(chats[1]):
        return SkippedRow("chosen and rejected are the same")
    asked = shared_turns(*chats)
    if not asked:
        refuse(names[1], f"answers another question than {names[0]}; both must begin alike", chats[1][0]["content"])
    for chat in chats:
        learn_from(chat, asked)
    return Compared(chats, notes + [note for chat in chats for note in chat.notes])


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
        if turn["role"] != "assistant":
            count = number
    return count

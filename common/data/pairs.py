"""Pairs: a row of preferences becomes two chats that end in a better and a worse answer; a labelled row one chat."""

import re

from common.data import formats, rows, sides, trees
from common.data.rows import CHOSEN, LISTS, REJECTED, Chat, InvalidRow, RowError, SkippedRow, is_empty, refuse
from common.data.turns import check_turns

PAIR = '{"prompt": ..., "chosen": ..., "rejected": ...}'
SCHEMAS = f'{PAIR}, or with LOSS=kto {{"prompt": ..., "completion": ..., "label": true}}'
NAMES = 'or name its fields by COLUMNS="yours:chosen, yours:rejected"'
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SCORE, NUMBER = re.compile("score|rating|reward"), re.compile(r"-?\d+(\.\d+)?")


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
        found = trees.ranked(trees.arena_sides, fields)
        return compare_sides(found, (f"conversation_{winner}", f"conversation_{loser}"), notes)
    if fields.keys() >= {*rows.TREE}:
        return compare_sides(trees.ranked(trees.ranked_sides, fields["prompt"]), ("the better", "the worse"), notes)
    if "preferred_output" in fields and isinstance(fields.get("input"), dict):
        fields |= fields.pop("input")  # OpenAI's: messages and tools
    fields = sides.read_cells(fields, names)
    for name in MEDIA:
        if not is_empty(fields.get(name)):
            refuse(names.get(name, name), "only text is supported; remove the field or the row", fields[name])
    chosen, rejected = (
        next((name for name in side if not rows.is_missing(fields.get(name))), None) for side in (CHOSEN, REJECTED)
    )
    labels = [name for name in formats.LABELS if not is_empty(fields.get(name))]
    labels = labels or [name for name in formats.LABELS if name in fields]
    unlabelled = {name: value for name, value in fields.items() if name not in formats.LABELS}
    if not chosen and not rejected and labels:
        if loss != "kto":
            problem = f"one answer with its label, of which LOSS={loss} learns nothing; set LOSS=kto, or write {PAIR}"
            refuse(names.get(labels[0], labels[0]), problem, fields[labels[0]])
        schema = formats.schema_of(unlabelled, columns, given, row)
        return read_labelled(unlabelled, schema, names, {name: fields[name] for name in labels}, notes)
    if not chosen and not rejected:
        refuse("row", f"no preference; write {SCHEMAS}, {NAMES}; the row has", list(row), limit=300)
    notes += [f"unused: {names.get(name, name)}" for name in labels if not is_empty(fields[name])]
    return read_pair(unlabelled, chosen, rejected, names, set(given.values()), notes)


def read_labelled(
    fields: dict, schema: tuple, names: dict[str, str], labels: dict, notes: list[str]
) -> Compared | SkippedRow:
    verdicts = {name: formats.VERDICTS.get(str(label).strip().lower()) for name, label in labels.items()}
    label, verdict = next(iter(labels.items()))
    if len(set(verdicts.values())) > 1:
        refuse("row", f"{' and '.join(labels)} contradict each other; keep one", labels)
    if schema == rows.TEXT and str(verdict).lower() not in ("true", "false"):
        problem = "beside a text a label may be a class, as of a sentiment; write true (a good text) or false"
        refuse(names.get(label, label), problem, verdict)
    if verdicts[label] is None:
        refuse(names.get(label, label), "must be true (a good answer) or false", verdict)
    chat = formats.read_fields(fields, schema, names, "answer", notes)
    if isinstance(chat, SkippedRow):
        return chat
    last = max(i for i, turn in enumerate(chat) if turn["role"] in ("assistant", "text"))
    learn_from(chat, last, names.get(schema[-1], schema[-1]))
    return Compared([chat], [*notes, *chat.notes], bool(verdicts[label]))


def read_pair(
    fields: dict, chosen: str | None, rejected: str | None, names: dict[str, str], given: set[str], notes: list[str]
) -> Compared | SkippedRow:
    """Without a chosen answer the row's own chat is the better one. given: the fields that COLUMNS names."""
    if any(str(fields.get(name)).lower().startswith("tie") for name in ("status", "winner")):
        return SkippedRow("a tie")
    others = [name for name in (*CHOSEN, *REJECTED) if name in fields and name not in (chosen, rejected)]
    others += sides.other_questions(fields, given)
    notes += [f"unused: {names.get(name, name)}" for name in others if not is_empty(fields[name])]
    rest = {name: value for name, value in fields.items() if name not in (*CHOSEN, *REJECTED, *others)}
    notes += contradicting_scores(rest)
    own = formats.schemas_in(tuple(rest))
    if not rejected or not chosen and not own:
        name, other = ("chosen", rejected) if rejected else ("rejected", chosen)
        problem = (
            f'no answer to compare {names.get(other, other)} with; write one, or name it by COLUMNS="yours:{name}"'
        )
        refuse(names.get(name, name), f"{problem}; the row has", [*dict.fromkeys(names.values())], limit=300)
    answer = fields[chosen] if chosen else rest[own[0][-1]]
    if chosen:
        better = sides.read_side(rest, chosen, answer, answer, names, notes)
    else:
        chosen, better = own[0][-1], formats.read_fields(dict(rest), own[0], names, "answer", notes)
        rest = {name: value for name, value in rest.items() if name != chosen or name in LISTS}
    worse = sides.read_side(rest, rejected, fields[rejected], answer, names, notes)
    return compare([better, worse], (names.get(chosen, chosen), names.get(rejected, rejected)), notes)


def contradicting_scores(row: dict) -> list[str]:
    """A note, if a score of the better answer is not above the one of the worse."""
    for name, value in row.items():
        other = row.get(name.replace("chosen", "rejected"))
        is_score = "chosen" in name and SCORE.search(name) and NUMBER.fullmatch(str(value))
        if is_score and NUMBER.fullmatch(str(other)) and float(value) <= float(other):
            return ["changed: pairs whose chosen answer is scored no higher than the rejected one; check them"]
    return []


def read_tree(root: dict) -> Compared | InvalidRow | SkippedRow:
    """The pair of an OpenAssistant tree."""
    try:
        return compare_sides(trees.ranked(trees.ranked_sides, root), ("the better", "the worse"), [])
    except RowError as error:
        return error.args[0]


def compare_sides(found: tuple | SkippedRow, names: tuple[str, str], notes: list[str]) -> Compared | SkippedRow:
    """The pair of two lists of turns, the better first. Raises RowError."""
    if isinstance(found, SkippedRow):
        return found
    return compare([Chat(check_turns(raw, notes)) for raw in found], names, notes)


def compare(chats: list[Chat], names: tuple[str, str], notes: list[str]) -> Compared | SkippedRow:
    """The pair of two chats, the better first. Raises RowError."""
    while all(chat[-1]["role"] in ("user", "tool") for chat in chats):
        notes.append("changed: cut at a question without an answer")
        chats = [Chat(chat[:-1], chat.notes) for chat in chats]
    for name, chat in zip(names, chats, strict=True):
        if chat[-1]["role"] in ("user", "tool"):
            refuse(name, "it ends in a question without an answer; write one, or remove the row", chat[-1]["content"])
    if unweighted(chats[0]) == unweighted(chats[1]):
        return SkippedRow("chosen and rejected are the same")
    asked = shared_turns(*chats)
    if not asked:
        refuse(names[1], f"answers another question than {names[0]}; both must begin alike", chats[1][0]["content"])
    for name, chat in zip(names, chats, strict=True):
        learn_from(chat, asked, name)
    return Compared(chats, notes + [note for chat in chats for note in chat.notes])


def learn_from(chat: list[dict], start: int, name: str) -> None:
    """Give the answers from this turn on the weight 1, unless the row gives them 0, and earlier ones 0."""
    answers = [(number, turn) for number, turn in enumerate(chat) if turn["role"] in ("assistant", "text")]
    for number, turn in answers:
        turn["weight"] = int(number >= start and turn.get("weight") != 0)
    if not any(turn["weight"] for _, turn in answers):
        refuse(name, "the answer has the weight 0, so that nothing is learned; remove the weight, or the row", 0)


def unweighted(chat: list[dict]) -> list[dict]:
    return [turn | {"weight": None} for turn in chat]


def shared_turns(one: list[dict], other: list[dict]) -> int:
    """The number of turns that both chats begin with, up to the last before an answer."""
    count = 0
    for number, (turn, same) in enumerate(zip(unweighted(one), unweighted(other), strict=False), start=1):
        if turn != same:
            break
        if turn["role"] != "assistant":
            count = number
    return count

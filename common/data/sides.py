"""Sides of a pair: an answer and the question that other fields of the row hold become a chat."""

import json
import re

from common.data import formats, rows
from common.data.rows import CHOSEN, LISTS, REASONING, REJECTED, Chat, is_empty, refuse
from common.data.turns import known_role, turns_in

QUESTIONS = tuple(dict.fromkeys(question for question, _ in (*rows.QUESTIONS, rows.COMPLETION)))
ASKED = ("instruction", "prompt", "question", "query", "problem", "input")  # two of them may be two questions
SPEAKER = re.compile(r"\n\n(Human|Assistant):[ ]?")  # of Anthropic's sets, in which a text is a whole chat
BEGINS_WITH_HUMAN = re.compile(r"\A\s*Human:(?=.*\n\nAssistant:)", re.DOTALL)
# Turns that Python or a table wrote without json.dumps, or cut.
LIKE_TURNS = re.compile(
    r"""\s*(?:\[\s*)?\{(?=.*["'](?:role|from)["']\s*:)(?=.*["'](?:content|value|text)["']\s*:)""", re.DOTALL
)


def read_cells(row: dict, names: dict[str, str]) -> dict:
    """The row with the turns that its texts hold, as JSON in a cell of a table or as Anthropic's sets have them."""
    texts = {field: value for field, value in row.items() if isinstance(value, str) and field != "text"}
    texts = {field: BEGINS_WITH_HUMAN.sub("\n\nHuman:", text) for field, text in texts.items()}
    is_spoken = any(map(SPEAKER.match, texts.values()))
    return row | {field: read_cell(text, field, names.get(field, field), is_spoken) for field, text in texts.items()}


def read_cell(text: str, field: str, place: str, is_spoken: bool):
    if text.lstrip().startswith(("[", "{")):
        return written_turns(text, place)
    if not SPEAKER.match(text):
        return text.strip() if is_spoken else text  # an answer begins with the space after "Assistant:"
    pieces = SPEAKER.split(text)[1:]
    turns = [{"from": who.lower(), "value": said} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    if field not in (*CHOSEN, *REJECTED) and not turns[-1]["value"].strip():
        turns.pop()  # after it the answer begins
    for turn in turns:
        if not turn["value"].strip():
            refuse(place, f'no text after "{turn["from"].capitalize()}:"; write one, or remove the row', text[-60:])
    return [turn | {"from": "gpt" if turn["from"] == "assistant" else "human"} for turn in turns]


def written_turns(text: str, place: str):
    """The turns that a text is as JSON; any other text as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if LIKE_TURNS.match(text) and "Extra data" not in str(error):  # turns, and not a text that begins with them
            refuse(place, f"turns that are not JSON; write them by json.dumps, or the table as parquet; {error}", text)
        return text
    items = found if isinstance(found, list) else [found]
    is_said = bool(items) and all(map(is_turn, items)) and any(known_role(role_in(item)) for item in items)
    return found if is_said else text


def is_turn(item) -> bool:
    names = set(rows.lowered(tuple(item))) if isinstance(item, dict) else set()
    return bool(names & {"role", "from"} and names & {"content", "value", "text", "tool_calls", "function_call"})


def role_in(turn: dict):
    turn = rows.lower_keys(turn, "row")
    return turn.get("role") or turn.get("from")


def other_questions(row: dict, given: set[str]) -> list[str]:
    """The questions of a row, if COLUMNS names another; an instruction's input belongs to it."""
    if not (named := given & {*QUESTIONS, *LISTS}):
        return []
    return [
        name for name in ASKED if name in row and name not in given and not {name, *named} <= {"instruction", "input"}
    ]


def read_side(rest: dict, name: str, answer, better, names: dict[str, str], notes: list[str]) -> Chat:
    """The chat that ends in an answer, which is the field of this name.

    rest: the row without both sides. better: the better answer, which a list of turns may end in, too.
    """
    listed = [field for field in (*QUESTIONS, *LISTS) if formats.has_roles(rest.get(field))]
    if is_chat(answer):
        answer = answer if isinstance(answer, list) else [answer]
        listed += [field for field in LISTS if isinstance(rest.get(field), list) and rest[field]]  # pairs in a list
        for field in dict.fromkeys(listed):
            answer = add_earlier(turns_at(rest, field), answer, better, (field, name), names, notes)
        # Its question may stand a second time beside it.
        texts = [turn.get("content", turn.get("value")) for turn in answer if isinstance(turn, dict)]
        rest = {field: value for field, value in rest.items() if field not in listed and value not in texts}
        return formats.read_fields(rest | {name: answer}, (name,), names, "answer", notes)
    question = next((field for field in (*listed, *QUESTIONS) if not is_empty(rest.get(field))), None)
    if question is None:
        form = '{"prompt": ..., "chosen": ..., "rejected": ...}, or name it by COLUMNS="yours:prompt"'
        problem = f"no question beside {names.get(name, name)}; write {form}; the row has"
        refuse("row", problem, [*dict.fromkeys(names.values())], limit=300)
    refuse_unclear(rest, question, names)
    check_answer(answer, names.get(name, name), isinstance(rest[question], list) and not listed)
    if listed:
        rest = rest | {question: before_answer(rest, question, better, name, names)}
    elif isinstance(answer, str) and isinstance(rest[question], str) and answer.startswith(rest[question].strip()):
        notes.append(f"changed: {names.get(name, name)} begins with the whole question, which it should not repeat")
    return formats.read_fields(rest | {name: answer}, (question, name), names, "answer", notes)


def is_chat(answer) -> bool:
    """Whether a side is a whole chat, not only an answer."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    return formats.has_roles(answer) and known_role(role_in(first)) in ("user", "system")


def check_answer(answer, place: str, is_column: bool) -> None:
    """is_column: whether the question is a list of texts, of which its own refusal tells more."""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and not rows.is_missing(answer):
        problem = "a number; if it says which of several answers, write that one; if it is the answer, put it in quotes"
        refuse(place, problem, answer)
    is_list = isinstance(answer, list) and answer and not isinstance(answer[0], dict)
    if not is_column and (is_list or isinstance(answer, dict) and not formats.has_roles(answer)):
        problem = "must be one answer: a text, a turn or a list of turns; write a row for each of several answers"
        refuse(place, problem, answer)


def refuse_unclear(rest: dict, question: str, names: dict[str, str]) -> None:
    """Refuse fields beside an answer whose meaning would be lost, or given to both answers."""
    own = {name: names.get(name, name) for name in (*rest, question)}
    for name in REASONING:
        if not is_empty(rest.get(name)) and rest[name] not in formats.FLAGS:
            problem = 'reasoning of which answer? write that as [{"role": "assistant", "content": ..., '
            refuse(own[name], f'{problem}"reasoning_content": ...}}], or remove the field', rest[name])
    texts, is_text = asked_texts(rest[question], own[question]), not formats.has_roles(rest[question])
    is_joined, context = is_text and question == "instruction", rest.get("context")
    if not is_empty(context) and not is_joined and not any(str(context).strip() in text for text in texts):
        join = f'join them by COLUMNS="{own[question]}:instruction", or ' if is_text else ""
        remedy = f'{join}make it the system message by COLUMNS="{own["context"]}:system", or remove it'
        refuse(own["context"], f"is it part of the question? {remedy}", context)
    for name in (*ASKED, *LISTS):
        is_part = name in LISTS and not formats.has_roles(rest.get(name)) or is_joined and name == "input"
        others = [] if is_part or is_empty(rest.get(name)) else asked_texts(rest[name], own[name])
        if not set(others) <= set(texts):
            system = question if question in ASKED else name
            remedy = f'take one by COLUMNS="{own[question]}:{question}", or make one the system message by COLUMNS='
            refuse(own[name], f'another question than {own[question]}; {remedy}"{own[system]}:system"', rest[name])


def asked_texts(value, place: str) -> list[str]:
    """What the user says in a field, and the system message."""
    if not formats.has_roles(value):
        return [value.strip()] if isinstance(value, str) else []
    return [text for role, text, _ in said(turns_at({place: value}, place)) if role in ("user", "system")]


def turns_at(row: dict, field: str) -> list[dict]:
    """The turns of a field as dicts of role, content and what else they have."""
    value = row[field] if isinstance(row[field], list) else [row[field]]
    return [turn for _, turn in turns_in({field: value}, field)]


def said(turns: list[dict]) -> list[tuple]:
    """Role, text and calls of turns, by which they are compared."""
    return [(known_role(turn["role"]), text_in(turn["content"]), turn.get("tool_calls") or None) for turn in turns]


def text_in(content) -> str:
    """A content, or its parts, as one text."""
    parts = content if isinstance(content, list) else [content or ""]
    return "".join(str(part.get("text") if isinstance(part, dict) else part) for part in parts).strip()


def answer_turns(answer, place: str) -> list[tuple]:
    turns = answer if formats.has_roles(answer) else [{"role": "assistant", "content": answer}]
    return said(turns_at({place: turns}, place))


def add_earlier(
    turns: list[dict], chat: list, better, fields: tuple[str, str], names: dict[str, str], notes: list[str]
) -> list:
    """A whole chat after the turns that another field lists, unless it has them itself. fields: of turns and chat."""
    field, name = (names.get(field, field) for field in fields)
    listed, of_chat, of_better = said(turns), answer_turns(chat, name), answer_turns(better, name)
    repeats = listed[-len(of_better) :] == of_better
    if not repeats and listed[-1][0] == "assistant" and listed[-1] != of_better[-1]:
        notes.append(f"unused: the last answer of {field}")
    count = len(listed) - (len(of_better) if repeats else listed[-1][0] == "assistant")
    listed = listed[:count]
    if any(of_chat[i : i + count] == listed for i in range(len(of_chat))):
        return chat
    for start in range(count + repeats):
        if of_chat[: count - start] == listed[start:]:
            return turns[:start] + chat
    problem = f"its turns are neither part of {name} nor end where it begins; let both sides begin with them"
    refuse(field, f"{problem}, or remove the field", turns)


def before_answer(rest: dict, field: str, better, name: str, names: dict[str, str]) -> list[dict]:
    """Turns that both answers follow, without the better answer at their end."""
    turns = rest[field] if isinstance(rest[field], list) else [rest[field]]
    listed, answer = said(turns_at(rest, field)), answer_turns(better, name)
    answer = answer[-1:] if is_chat(better) else answer
    if listed[-len(answer) :] == answer:
        return turns[: -len(answer)]
    if listed[-1][0] == "assistant":
        refuse(names.get(field, field), "ends in an answer; put it into both sides, or remove it", listed[-1][1])
    return turns

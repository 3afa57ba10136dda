"""Formats: a row of any known schema becomes a chat; rows of each in tests/data/test_sources.py."""

import re
from collections import defaultdict
from collections.abc import Iterator

ALIASES = dict.fromkeys(("gpt", "bot", "chatbot", "model"), "assistant")
ALIASES |= {"human": "user", "prompter": "user"}
FOLLOWS = {
    "system": ("the start",), "user": ("the start", "system", "assistant"), "assistant": ("user",),
    "text": ("the start",),
}  # fmt: skip
LANGUAGE, LANGUAGE_NAME = "en", "English"  # what is kept of OpenAssistant trees and of arena pairs
STRONG_MODELS = re.compile(r"gpt-4|claude", re.IGNORECASE)  # whose arena answers are worth learning
# NUL, halves of surrogate pairs, and the noncharacters by which encoder.py marks answers.
FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdd2]")


class InvalidRow(str):
    """What is wrong with a row: `field: problem: excerpt`."""


class SkippedRow(str):
    """Why a valid row is not used."""


class Chat(list):
    """STUB, until the formats' own."""

    notes = ()


def parse_columns(text: str) -> dict:
    """STUB, until the formats' own."""
    return dict(reversed(pair.strip().split(":")) for pair in text.split(","))


def invalid(field: str, problem: str, value) -> InvalidRow:
    try:
        excerpt = repr(value).encode("utf-8", "backslashreplace").decode()
    except RecursionError:
        excerpt = "nested too deeply to show"
    return InvalidRow(f"{field}: {problem}: {excerpt if len(excerpt) <= 60 else excerpt[:57] + '...'}")


def to_chat(row, columns=None, completion="answer") -> Chat:
    """The chat in a row: an optional system turn, then user and assistant in turn; or one turn `text`."""
    if not isinstance(row, dict):
        return row if isinstance(row, InvalidRow) else invalid("row", "must be an object", row)
    if "message_id" in row and "parent_id" in row:
        return invalid("row", "a message of a tree with wrong ids, or among other rows", row)
    for fields, convert in FORMATS.items():
        if all(field in row for field in fields):
            return check_turns(convert, row)
    known = "; ".join(" and ".join(fields) for fields in FORMATS)
    return invalid("row", f"none of the known sets of fields ({known})", list(row))


def check_turns(convert, row: dict) -> Chat:
    """The chat of the turns (field, role, content, weight) that `convert` finds."""
    try:
        turns = convert(row)
    except ValueError as error:
        return InvalidRow(error)
    except (AttributeError, TypeError, KeyError) as error:
        return invalid("row", f"a field has another type than in its schema ({error})", row)
    if isinstance(turns, SkippedRow):
        return turns
    chat = Chat()
    for field, role, content, weight in turns:
        name = ALIASES.get(role, role) if isinstance(role, str) else None
        if name not in FOLLOWS or name == "text" != field:
            place = field.rpartition(".")[0] or field
            return invalid(place, "the role must be system, user or assistant", role)
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
        if not isinstance(content, str) or not content.strip():
            return invalid(field, "must be a text that is not empty", content)
        if bad := FORBIDDEN.search(content):
            return invalid(field, f"character U+{ord(bad[0]):04X} is not text", content[bad.start() :])
        if weight not in (None, 0, 1):
            return invalid(field, "the weight must be 0 (not in the loss) or 1", weight)
        before = chat[-1]["role"] if chat else "the start"
        if name == before == "user" and len(chat) >= 3:
            break  # the question is left out and counted later
        if before not in FOLLOWS[name]:
            problem = f"turns must alternate, the user first; {name} follows {before}"
            return invalid(field, problem, content)
        turn = {"role": name, "content": content}
        chat.append(turn if weight is None else turn | {"weight": weight})
    if chat[-1]["role"] not in ("assistant", "text") and len(chat) < 3:
        field = turns[0][0].partition("[")[0]
        return invalid(field, "no turn of the assistant, nothing to learn", chat)
    return chat


def turns_in(row: dict, field: str, role: str = "role", content: str = "content") -> list[tuple]:
    items = row[field]
    if not isinstance(items, list) or not items:
        raise ValueError(invalid(field, "must be a list of turns that is not empty", items))
    turns = []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(invalid(f"{field}[{i}]", f"must be an object with {role} and {content}", item))
        turns.append((f"{field}[{i}].{content}", item.get(role), item.get(content), item.get("weight")))
    return turns


def sharegpt(row: dict) -> list[tuple]:
    items = row["conversations"]
    has_roles = isinstance(items, list) and items and isinstance(items[0], dict) and "role" in items[0]
    turns = turns_in(row, "conversations", *(("role", "content") if has_roles else ("from", "value")))
    system = row.get("system") or row.get("system_prompt")
    if system and turns[0][1] != "system":
        turns.insert(0, ("system", "system", system, None))
    return turns


def instruction(row: dict) -> list[tuple]:
    question, more = row["instruction"], row.get("input") or ""
    if not isinstance(more, str):
        raise ValueError(invalid("input", "must be a text", more))
    if more.strip() and isinstance(question, str):
        question = f"{question}\n\n{more}"
    return [("instruction", "user", question, None), ("output", "assistant", row["output"], None)]


def completion(row: dict) -> list[tuple]:
    if isinstance(row["prompt"], str):
        return [("prompt", "user", row["prompt"], None), ("completion", "assistant", row["completion"], None)]
    given = {"assistant": 0}  # weight of the answers in the prompt: not in the loss
    prompt = [(*turn[:3], given.get(ALIASES.get(turn[1], turn[1]))) for turn in turns_in(row, "prompt")]
    return prompt + turns_in(row, "completion")


def summary(row: dict) -> list[tuple]:
    question = row["dialogue"]
    if isinstance(question, str) and question.strip():
        question = "Summarize this dialogue:\n\n" + question.replace("\r\n", "\n")
    return [("dialogue", "user", question, None), ("summary", "assistant", row["summary"], None)]


def arena(row: dict) -> list[tuple] | SkippedRow:
    """The winner's side of a pair."""
    if row["winner"] not in ("model_a", "model_b"):
        return SkippedRow("arena: a tie")
    side = row["winner"][-1]
    if not STRONG_MODELS.search(str(row.get(f"model_{side}"))):
        return SkippedRow("arena: the winner is neither GPT-4 nor Claude")
    if row.get("language", LANGUAGE_NAME) != LANGUAGE_NAME:
        return SkippedRow(f"arena: not {LANGUAGE_NAME}")
    toxic = (row.get("toxic_chat_tag") or {}).values()
    if (row.get("openai_moderation") or {}).get("flagged") or any(tag.get("flagged") for tag in toxic):
        return SkippedRow("arena: flagged by a moderation model")
    return turns_in(row, f"conversation_{side}")


def best_path(root: dict) -> list[tuple] | SkippedRow:
    """The turns of an OpenAssistant tree ranked highest; unranked ones come last."""

    def usable(message: dict) -> bool:
        rejected = message.get("deleted") or message.get("review_result") is False
        return not rejected and message.get("lang", LANGUAGE) == LANGUAGE

    if not usable(root):
        return SkippedRow(f"OpenAssistant: deleted, rejected or not {LANGUAGE_NAME}")
    path = [root]
    while replies := [r for r in path[-1].get("replies") or [] if usable(r) and not any(r is p for p in path)]:
        path.append(min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank"))))
    if len(path) == 1:
        return SkippedRow("OpenAssistant: no answer")
    return [("text", message.get("role"), message.get("text"), None) for message in path]


def is_tree_message(row) -> bool:
    is_message = isinstance(row, dict) and isinstance(row.get("message_id"), str)
    return is_message and isinstance(row.get("parent_id", 0), str | None)


def trees(rows: list[tuple[int, object]]) -> Iterator[tuple[int, Chat]]:
    """A tree's chat for its root; its other messages are skipped."""
    replies = defaultdict(list)
    for _, row in rows:
        if is_tree_message(row):
            replies[row["parent_id"]].append(row)
    found, waiting = set(), list(replies[None])  # found: by id(), as two messages may share a message_id
    while waiting:
        message = waiting.pop()
        if id(message) not in found:
            found.add(id(message))
            message["replies"] = replies[message["message_id"]]
            waiting += message["replies"]
    for number, row in rows:
        if not is_tree_message(row):
            is_invalid = isinstance(row, InvalidRow)
            yield number, row if is_invalid else invalid("row", "no message of a tree", row)
        elif row["parent_id"] is None:
            yield number, check_turns(best_path, row)
        elif id(row) in found:
            yield number, SkippedRow("OpenAssistant: part of the chat of its tree, or of another branch")
        else:
            yield number, SkippedRow("OpenAssistant: the message it answers is missing")


# Fields of a row -> its turns. The first that fits counts: Alpaca's rows also have `text`.
FORMATS = {
    ("messages",): lambda row: turns_in(row, "messages"),
    ("conversations",): sharegpt,
    ("conversation_a", "conversation_b", "winner"): arena,
    ("message_tree_id", "prompt"): lambda row: best_path(row["prompt"]),
    ("instruction", "output"): instruction,
    ("dialogue", "summary"): summary,
    ("prompt", "completion"): completion,
    ("text",): lambda row: [("text", "text", row["text"], None)],
}

"""Trees and pairs: answers that people ranked, as OpenAssistant and Chatbot Arena publish them."""

import re
from collections import defaultdict
from collections.abc import Iterator

from common.data.rows import Chat, InvalidRow, RowError, SkippedRow, invalid, refuse
from common.data.turns import check_turns, known_role, turns_in

LANGUAGE, LANGUAGE_NAME = "en", "English"  # what is kept of OpenAssistant trees and of arena pairs
STRONG_MODELS = re.compile(r"gpt-4|claude", re.IGNORECASE)  # whose arena answers are worth learning
# The fields that the sets' pages document: they need no line in the account.
TREE_FIELDS = set(
    """message_tree_id tree_state prompt message_id parent_id user_id created_date text role lang review_count
    review_result deleted rank synthetic model_name detoxify emojis labels origin replies""".split()
)
ARENA_FIELDS = set(
    """question_id model_a model_b winner judge conversation_a conversation_b turn anony language tstamp
    openai_moderation toxic_chat_tag""".split()
)


def arena(row: dict) -> list[tuple[str, dict]] | SkippedRow:
    """The winner's side of a pair, where a strong model wrote it."""
    side = str(row["winner"])[-1]
    if row["winner"] in ("model_a", "model_b") and not STRONG_MODELS.search(str(row.get(f"model_{side}"))):
        return SkippedRow("arena: the winner is neither GPT-4 nor Claude")
    sides = arena_sides(row)
    return sides if isinstance(sides, SkippedRow) else sides[0]


def arena_sides(row: dict) -> tuple[list[tuple[str, dict]], list[tuple[str, dict]]] | SkippedRow:
    """The winner's side of a pair and the loser's."""
    if row["winner"] not in ("model_a", "model_b"):
        return SkippedRow("arena: a tie")
    if str(row.get("language") or LANGUAGE).lower() not in (LANGUAGE, LANGUAGE_NAME.lower()):
        return SkippedRow(f"arena: not {LANGUAGE_NAME}")
    toxic = (row.get("toxic_chat_tag") or {}).values()
    if (row.get("openai_moderation") or {}).get("flagged") or any(tag.get("flagged") for tag in toxic):
        return SkippedRow("arena: flagged by a moderation model")
    winner, loser = "ab" if row["winner"] == "model_a" else "ba"
    sides = turns_in(row, f"conversation_{winner}"), turns_in(row, f"conversation_{loser}")
    for name in ARENA_FIELDS:
        row.pop(name, None)
    return sides


def tree(row: dict) -> list[tuple[str, dict]] | SkippedRow:
    """The best path of a tree that stands in one row."""
    raw = best_path(row["prompt"])
    for name in TREE_FIELDS:
        row.pop(name, None)
    return raw


def best_path(root: dict) -> list[tuple[str, dict]] | SkippedRow:
    """The turns of an OpenAssistant tree ranked highest; unranked ones come last."""
    path = [root]
    if not is_usable(root):
        return SkippedRow(f"OpenAssistant: deleted, rejected or not {LANGUAGE_NAME}")
    while replies := replies_to(path):
        path.append(replies[0])
    if len(path) == 1:
        return SkippedRow("OpenAssistant: no answer")
    return turns_of(path)


def ranked_sides(root: dict) -> tuple[list[tuple[str, dict]], list[tuple[str, dict]]] | SkippedRow:
    """Two paths through a tree: the best one to its last answer with ranked others, and to the worst of these."""
    if not is_usable(root):
        return SkippedRow(f"OpenAssistant: deleted, rejected or not {LANGUAGE_NAME}")
    path, sides = [root], SkippedRow("OpenAssistant: no two answers with ranks")
    while replies := replies_to(path):
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len(ranked) > 1 and known_role(ranked[0].get("role")) == "assistant":
            sides = turns_of([*path, ranked[0]]), turns_of([*path, ranked[-1]])
        path.append(replies[0])
    return sides


def is_usable(message: dict) -> bool:
    rejected = message.get("deleted") or message.get("review_result") is False
    return not rejected and message.get("lang", LANGUAGE) == LANGUAGE


def replies_to(path: list[dict]) -> list[dict]:
    """The usable replies to the last message of a path, the best first."""
    replies = path[-1].get("replies") or []
    replies = [reply for reply in replies if is_usable(reply) and not any(reply is before for before in path)]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def turns_of(path: list[dict]) -> list[tuple[str, dict]]:
    raw = []
    for message in path:
        others = {name: value for name, value in message.items() if name not in TREE_FIELDS}
        raw.append(("message[].text", others | {"role": message.get("role"), "content": message.get("text")}))
    return raw


def is_tree_message(row) -> bool:
    is_message = isinstance(row, dict) and isinstance(row.get("message_id"), str)
    return is_message and isinstance(row.get("parent_id", 0), str | None)


def trees(rows: list[tuple[int, object]], read=None) -> Iterator[tuple[int, Chat | InvalidRow | SkippedRow]]:
    """A tree's chat for its root; its other messages are skipped. read: what makes it, `chat_of`."""
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
            yield number, row if is_invalid else invalid("row", "no message of a tree; remove it", row)
        elif row["parent_id"] is None:
            yield number, (read or chat_of)(row)
        elif id(row) in found:
            yield number, SkippedRow("OpenAssistant: part of the chat of its tree, or of another branch")
        else:
            yield number, SkippedRow("OpenAssistant: the message it answers is missing")


def chat_of(root: dict) -> Chat | InvalidRow | SkippedRow:
    """The chat of a tree."""
    notes = []
    try:
        raw = ranked(best_path, root)
        return raw if isinstance(raw, SkippedRow) else Chat(check_turns(raw, notes), tuple(dict.fromkeys(notes)))
    except RowError as error:
        return error.args[0]


def ranked(convert, row: dict) -> list[tuple[str, dict]] | SkippedRow:
    """What a function above finds. Raises RowError for fields of other types than in the schema."""
    try:
        return convert(row)
    except (AttributeError, TypeError, KeyError) as error:
        refuse("row", f"a field has another type than in its schema ({error}); remove the row", row)

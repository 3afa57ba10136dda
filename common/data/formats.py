"""Formats: a row of any known schema becomes a chat, a list of {"role", "content"}, or says why it does not.

Schemas: `messages` (OpenAI), `conversations` (ShareGPT), instruction/input/output (Alpaca), prompt/completion,
dialogue/summary (SAMSum), arena pairs (LMSYS), OpenAssistant trees, plain `text`; rows of each in
tests/data/test_sources.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "text": "text",
}  # fmt: skip

FOLLOWS = {
    "system": ("the start",), "user": ("the start", "system", "assistant"), "assistant": ("user",),
    "text": ("the start",),
}  # fmt: skip

LANGUAGE, LANGUAGE_NAME = "en", "English"  # what is kept of OpenAssistant trees and of arena pairs

STRONG_MODELS = re.compile(r"gpt-4|claude", re.IGNORECASE)  # arena answers of other models are not worth learning

# NUL, halves of surrogate pairs, and the noncharacters by which encoder.py marks answers.
FORBIDDEN = re.compile("[\0\ud800-\udfff\ufdd0-\ufdd2]")


class InvalidRow(str):
    """What is wrong with a row: `field: problem: excerpt`."""


class SkippedRow(str):
    """Why a valid row is not used, in words to count by."""


def excerpt(value) -> str:
    try:
        text = repr(value).encode("utf-8", "backslashreplace").decode()
    except RecursionError:
        text = "nested too deeply to show"
    return text if len(text) <= 60 else text[:57] + "..."


def to_chat(row) -> list[dict] | InvalidRow | SkippedRow:
    """The chat in a row, or why it gives none: an optional system turn, then user and assistant in turn.

    The last turn is the user's where a question has no answer; what follows such a question is left out.
    A row of plain text becomes one turn with the role `text`.
    """
    if not isinstance(row, dict):
        return row if isinstance(row, InvalidRow) else InvalidRow(f"row: must be an object: {excerpt(row)}")
    if "message_id" in row and "parent_id" in row:
        return InvalidRow(f"row: a message of a tree with wrong ids, or among other rows: {excerpt(row)}")
    for fields, convert in FORMATS.items():
        if all(field in row for field in fields):
            return check_turns(convert, row)
    known = "; ".join(" and ".join(fields) for fields in FORMATS)
    return InvalidRow(f"row: none of the known sets of fields ({known}): {excerpt(list(row))}")


def check_turns(convert, *arguments) -> list[dict] | InvalidRow | SkippedRow:
    """The chat of the turns (field, role, content, weight) that `convert` finds, or the first thing wrong with it."""
    try:
        turns = convert(*arguments)
    except (AttributeError, TypeError, KeyError) as error:  # an object where the schema has a text, and the like
        return InvalidRow(f"row: a field has another type than in its schema ({error}): {excerpt(arguments[0])}")
    if isinstance(turns, (InvalidRow, SkippedRow)):
        return turns
    chat = []
    for field, role, content, weight in turns:
        name = ROLES.get(role) if isinstance(role, str) else None
        if name is None or name == "text" != field:
            place = field.rpartition(".")[0] or field
            return InvalidRow(f"{place}: the role must be system, user or assistant: {excerpt(role)}")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not content.strip():
            return InvalidRow(f"{field}: must be a text that is not empty: {excerpt(content)}")
        if bad := FORBIDDEN.search(content):
            return InvalidRow(f"{field}: character U+{ord(bad[0]):04X} is not text: {excerpt(content[bad.start() :])}")
        if weight not in (None, 0, 1):
            return InvalidRow(f"{field}: the weight must be 0 (not in the loss) or 1: {excerpt(weight)}")
        before = chat[-1]["role"] if chat else "the start"
        if name == before == "user" and len(chat) >= 3:
            break  # the chat ends at the question without an answer, which is left out and counted later
        if before not in FOLLOWS[name]:
            return InvalidRow(
                f"{field}: turns must alternate, the user first; {name} follows {before}: {excerpt(content)}"
            )
        chat.append({"role": name, "content": content} | ({"weight": weight} if weight is not None else {}))
    if chat[-1]["role"] not in ("assistant", "text") and len(chat) < 3:
        return InvalidRow(
            f"{turns[0][0].partition('[')[0]}: no turn of the assistant, nothing to learn: {excerpt(chat)}"
        )
    return chat


def turns_in(row: dict, field: str, role: str = "role", content: str = "content") -> list[tuple] | InvalidRow:
    """The turns in a list of objects."""
    items = row[field]
    if not isinstance(items, list) or not items:
        return InvalidRow(f"{field}: must be a list of turns that is not empty: {excerpt(items)}")
    turns = []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            return InvalidRow(f"{field}[{i}]: must be an object with {role} and {content}: {excerpt(item)}")
        turns.append((f"{field}[{i}].{content}", item.get(role), item.get(content), item.get("weight")))
    return turns


def sharegpt(row: dict) -> list[tuple] | InvalidRow:
    first = row["conversations"][0] if isinstance(row["conversations"], list) and row["conversations"] else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    turns = turns_in(row, "conversations", *keys)
    system = row.get("system") or row.get("system_prompt")
    if system and isinstance(turns, list) and turns[0][1] != "system":
        turns.insert(0, ("system", "system", system, None))
    return turns


def instruction(row: dict) -> list[tuple] | InvalidRow:
    question, more = row["instruction"], row.get("input") or ""
    if not isinstance(more, str):
        return InvalidRow(f"input: must be a text: {excerpt(more)}")
    if more.strip() and isinstance(question, str):
        question = f"{question}\n\n{more}"
    return [("instruction", "user", question, None), ("output", "assistant", row["output"], None)]


def completion(row: dict) -> list[tuple] | InvalidRow:
    if isinstance(row["prompt"], str):
        return [("prompt", "user", row["prompt"], None), ("completion", "assistant", row["completion"], None)]
    before, after = turns_in(row, "prompt"), turns_in(row, "completion")
    if isinstance(before, InvalidRow) or isinstance(after, InvalidRow):
        return before if isinstance(before, InvalidRow) else after
    asked = [(*turn, 0 if ROLES.get(turn[1]) == "assistant" else None) for *turn, _ in before]  # not to be learned
    return asked + after


def summary(row: dict) -> list[tuple]:
    question = row["dialogue"]
    if isinstance(question, str) and question.strip():
        question = "Summarize this dialogue:\n\n" + question.replace("\r\n", "\n")
    return [("dialogue", "user", question, None), ("summary", "assistant", row["summary"], None)]


def arena(row: dict) -> list[tuple] | InvalidRow | SkippedRow:
    """The winner's side of a pair, where a strong model won it in a clean conversation."""
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


def nested_tree(row: dict) -> list[tuple] | InvalidRow | SkippedRow:
    if not isinstance(row["prompt"], dict):
        return InvalidRow(f"prompt: must be the first message of the tree: {excerpt(row['prompt'])}")
    return best_path(row["prompt"], lambda message: message.get("replies") or [])


def best_path(root: dict, replies_to) -> list[tuple] | SkippedRow:
    """The turns of an OpenAssistant tree that people ranked highest at each step; unranked ones come last."""

    def usable(message: dict) -> bool:
        rejected = message.get("deleted") or message.get("review_result") is False
        return not rejected and message.get("lang", LANGUAGE) == LANGUAGE

    if not usable(root):
        return SkippedRow(f"OpenAssistant: deleted, rejected or not {LANGUAGE_NAME}")
    path = [root]
    while replies := [r for r in replies_to(path[-1]) if usable(r) and not any(r is earlier for earlier in path)]:
        path.append(min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank"))))
    if len(path) == 1:
        return SkippedRow("OpenAssistant: no answer")
    return [("text", message.get("role"), message.get("text"), None) for message in path]


def is_tree_message(row) -> bool:
    """Whether a row is one message of an OpenAssistant tree; its chat takes other rows of the table, too."""
    ids = (row.get("message_id"), row.get("parent_id", 0)) if isinstance(row, dict) else (None, 0)
    return isinstance(ids[0], str) and isinstance(ids[1], str | None)


def trees(rows: list[tuple[int, object]]) -> Iterator[tuple[int, list[dict] | InvalidRow | SkippedRow]]:
    """What becomes of every row of a table of messages: a tree's chat stands for its root, the others are skipped."""
    replies, seen = defaultdict(list), set()  # seen: by id(), as rows on one line share its number
    for number, row in rows:
        if is_tree_message(row):
            replies[row["parent_id"]].append((number, row))
            continue
        seen.add(id(row))
        if not isinstance(row, InvalidRow):
            row = InvalidRow(f"row: no message of a tree: {excerpt(row)}")
        yield number, row
    for number, root in replies[None]:
        seen.add(id(root))
        yield number, check_turns(best_path, root, lambda message: [row for _, row in replies[message["message_id"]]])
        waiting = [root]
        while waiting:
            for number, reply in replies[waiting.pop()["message_id"]]:
                if id(reply) not in seen:
                    seen.add(id(reply))
                    waiting.append(reply)
                    yield number, SkippedRow("OpenAssistant: part of the chat of its tree, or of another branch")
    for number, row in rows:
        if id(row) not in seen:
            yield number, SkippedRow("OpenAssistant: the message it answers is missing")


# Fields of a row -> how to read it. The first that fits counts: Alpaca's rows have `text`, too, UltraChat's `prompt`.
FORMATS = {
    ("messages",): lambda row: turns_in(row, "messages"),
    ("conversations",): sharegpt,
    ("conversation_a", "conversation_b", "winner"): arena,
    ("message_tree_id", "prompt"): nested_tree,
    ("instruction", "output"): instruction,
    ("dialogue", "summary"): summary,
    ("prompt", "completion"): completion,
    ("text",): lambda row: [("text", "text", row["text"], None)],
}

"""Data: rows of `messages`, validated line by line before any model loads, and the tokens learned from them."""

import json
import random
from pathlib import Path

from jinja2 import TemplateError

from common.settings import UserError

IGNORE_INDEX = -100  # label of a token that is not learned
ROLES = ("system", "user", "assistant")
MAX_ERRORS = 20


def read_chats(data: str, setting: str = "DATA") -> list[list[dict]]:
    """Read the conversations of a local .jsonl file or a hub dataset: a list of lists of {"role", "content"}.

    Raises UserError with up to 20 lines `file:line: what is wrong` when any row is not a chat to learn from.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        raise UserError(f"{setting}={data} is a folder; name a .jsonl file in it.")
    if path.is_file():
        rows = read_jsonl(path)
    elif path.suffix in (".jsonl", ".json") or data.count("/") != 1 or path.parent.is_dir():
        raise UserError(f"{setting}={data}: there is no such file. A hub dataset is written org/name.")
    else:
        rows = enumerate(from_hub(data, setting), start=1)
    chats, errors = [], []
    for number, row in rows:
        problem = row if isinstance(row, str) else fault(row)
        if problem:
            errors.append(f"{data}:{number}: {problem}")
        else:
            keys = ("role", "content", "weight")
            chats.append([{key: m[key] for key in keys if m.get(key) is not None} for m in row["messages"]])
    if errors:
        more = [f"... and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
        raise UserError("\n".join(errors[:MAX_ERRORS] + more))
    if not chats:
        raise UserError(f'{setting}={data} is empty: it needs one chat a line, {{"messages": [...]}}.')
    return chats


def read_jsonl(path: Path):
    """Yield (line number, row) of a JSON-lines file; the row is a text saying what is wrong where it is not JSON."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 (byte {error.start})"
            except json.JSONDecodeError as error:
                yield number, f"not valid JSON: {error.msg} at column {error.colno}: {raw[:60]!r}"


def from_hub(name: str, setting: str):
    """The `train` split of a hub dataset."""
    import datasets  # slow import

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{setting}={name} cannot be loaded: is the name right, the network there? ({reason})"
        ) from error


def fault(row) -> str | None:
    """What makes a row no chat to learn from, or None."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'messages: must be a non-empty list of {"role", "content"}'
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{i}]: must be an object with role and content"
        if message.get("role") not in ROLES:
            return f"messages[{i}].role: {message.get('role')!r} is none of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return f"messages[{i}].content: must be a text that is not empty"
        if message.get("weight") not in (None, 0, 1):
            return f"messages[{i}].weight: {message['weight']!r} is neither 0 (not learned) nor 1"
    if not any(m["role"] == "assistant" for m in messages):
        return "messages: no assistant turn, so there is nothing to learn"
    return None


def render(tokenizer, messages: list[dict], **options) -> dict:
    """Tokens of a chat by the tokenizer's template; UserError where the template refuses it (no system role, say)."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"CHAT_TEMPLATE refuses a chat ({roles}): {error}. Change the chat or the template.") from error


def encode(tokenizer, messages: list[dict], train_on: str = "assistant") -> dict:
    """Tokens of a chat and their labels: lists of the same length, labels IGNORE_INDEX where nothing is learned.

    Answers with "weight": 0 (as in OpenAI's format) are not learned.
    """
    rendered = render(tokenizer, messages, return_assistant_tokens_mask=True)
    ids, marks = rendered["input_ids"], rendered["assistant_masks"]
    if train_on == "all":
        return {"input_ids": ids, "labels": list(ids)}
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    starts = [i for i, marked in enumerate(marks) if marked and not (i and marks[i - 1])]
    if len(starts) != len(weights):
        raise UserError(
            f"CHAT_TEMPLATE marks {len(starts)} passages in a chat of {len(weights)} answers; mark each once."
        )
    labels = [token if marked else IGNORE_INDEX for token, marked in zip(ids, marks, strict=True)]
    for start, end, weight in zip(starts, [*starts[1:], len(ids)], weights, strict=True):
        if weight == 0:
            labels[start:end] = [IGNORE_INDEX] * (end - start)
    return {"input_ids": ids, "labels": labels}


def encode_unmarked(tokenizer, messages: list[dict]) -> dict:
    """Like `encode`, for any template: an answer is what follows the generation prompt, up to its last special token.

    Raises UserError when the template changes earlier turns as the chat grows.
    """
    ids = render(tokenizer, messages)["input_ids"]
    labels = [IGNORE_INDEX] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], add_generation_prompt=True)["input_ids"]
            end = len(render(tokenizer, messages[: i + 1])["input_ids"])
            if ids[: len(before)] != before:
                raise UserError("the chat template rewrites earlier turns; the loss on its answers is not defined.")
            while end > len(before) and ids[end - 1] not in tokenizer.all_special_ids:
                end -= 1
            labels[len(before) : end] = ids[len(before) : end]
    return {"input_ids": ids, "labels": labels}


def encode_to_fit(tokenizer, messages: list[dict], max_length: int, train_on: str) -> tuple[dict | None, bool]:
    """`encode`, with turns dropped from the end until the chat fits, and whether any were.

    The row is None when not even the first answer fits.
    """
    turns = list(messages)
    while any(m["role"] == "assistant" for m in turns):
        row = encode(tokenizer, turns, train_on)
        if len(row["input_ids"]) <= max_length:
            return row, len(turns) < len(messages)
        turns.pop()
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
    return None, False


def make_datasets(tokenizer, chats: list[list[dict]], eval_size: float, max_length: int, train_on: str, seed: int):
    """Split the chats, encode them and report what is learned.

    eval_size: number of chats held out, or their share when below 1; 0 holds nothing out.
    Returns (train, evaluation or None, report): datasets with input_ids and labels, and one line for the log.
    """
    from datasets import Dataset  # slow import

    held_out = round(eval_size * len(chats)) if eval_size < 1 else int(eval_size)
    if not 0 <= held_out < len(chats):
        raise UserError(f"EVAL_SIZE={eval_size} holds out {held_out} of {len(chats)} chats; leave some to train on.")
    order = random.Random(seed).sample(range(len(chats)), len(chats))
    rows, cut = zip(*(encode_to_fit(tokenizer, chats[i], max_length, train_on) for i in order), strict=True)
    parts = [[r for r in part if r is not None] for part in (rows[held_out:], rows[:held_out])]
    if not parts[0]:
        raise UserError(f"MAX_LENGTH={max_length}: no chat of DATA fits, not even its first answer. Raise it.")
    tokens = sum(len(r["input_ids"]) for r in parts[0])
    learned = sum(label != IGNORE_INDEX for r in parts[0] for label in r["labels"])
    if not learned:
        raise UserError("DATA: nothing is left to learn, every answer has weight 0.")
    report = (
        f"data: {len(chats)} chats = {len(parts[0])} trained + {len(parts[1])} held out + {rows.count(None)} too long; "
        f"{sum(cut)} cut at a turn; {tokens:,} tokens, {learned:,} learned"
    )
    return Dataset.from_list(parts[0]), Dataset.from_list(parts[1]) if parts[1] else None, report

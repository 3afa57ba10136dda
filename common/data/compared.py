"""Rows of compared answers: two side by side, or for KTO a labelled one and one to another question."""

from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100  # label of a token that is not in the loss


class RowSize(NamedTuple):
    """Tokens of a row."""

    shape: tuple[int, ...]  # shared by its sequences, and those that each has beside them
    in_loss: int


def sequences_of(row: dict) -> list[dict]:
    """The sequences of a row as rows of input_ids and labels."""
    parts, start = [], 0
    for length in row["seq_lengths"]:
        parts.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    return parts


def size_of(row: dict, shares: bool) -> RowSize:
    """shares: whether what the sequences of a pair begin with is computed once.

    That is the prompt but its last token, from which the first token of each answer is predicted.
    """
    ids, in_loss = np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORE_INDEX
    first, shared = int(row["seq_lengths"][0]), 0
    if shares and in_loss.any() and len(row["seq_lengths"]) == 2:
        shorter = min(first, len(ids) - first)
        part, same = slice(shorter), slice(first, first + shorter)
        ends = (ids[part] != ids[same]) | in_loss[part] | in_loss[same]
        shared = max(0, int(ends.argmax()) - 1)
    return RowSize((shared, *(int(length) - shared for length in row["seq_lengths"])), int(in_loss.sum()))


def share_prompts(rows: list[dict]) -> tuple[dict[str, list[int]], list[tuple[int, int, int]]]:
    """Pairs in one row, in which what a pair's sequences share stands once: input_ids, labels and position_ids.

    Returns the shape of each pair, too.
    """
    joined, shapes = {name: [] for name in ("input_ids", "labels", "position_ids")}, []
    for row in rows:
        shared, better, worse = shape = size_of(row, True).shape
        second = shared + better
        for name in ("input_ids", "labels"):
            joined[name] += row[name][:second] + row[name][second + shared :]
        joined["position_ids"] += [*range(second), *range(shared, shared + worse)]
        shapes.append(shape)
    return joined, shapes


def with_mismatched(rows, max_length: int):
    """A dataset of labelled answers, each with `mismatched`: its question with the nearest earlier answer to another.

    rows: a dataset of pairs, whose answers become one good and one bad, or of labelled answers. max_length: tokens at
    which a mismatched row is cut.
    """
    from datasets import Dataset  # slow import

    answers, made = [answer for row in rows for answer in answers_of(row)], []
    for number, (prompt, ids, labels, is_good) in enumerate(answers):
        earlier = (answers[number - back] for back in range(1, len(answers)))
        _, other_ids, other_labels, _ = next((each for each in earlier if each[0] != prompt), answers[number - 1])
        ignored = [IGNORE_INDEX] * len(prompt)
        other = dict(input_ids=[*prompt, *other_ids][:max_length], labels=[*ignored, *other_labels][:max_length])
        row = dict(input_ids=[*prompt, *ids], labels=[*ignored, *labels], is_good=is_good, mismatched=other)
        made.append(row | {"seq_lengths": [len(row["input_ids"])]})
    return Dataset.from_list(made)


def answers_of(row: dict) -> list[tuple[list[int], list[int], list[int], bool]]:
    """(prompt, what follows, its labels, whether it is good) of each sequence of a row."""
    found, is_pair = [], len(row["seq_lengths"]) == 2
    for number, part in enumerate(sequences_of(row)):
        ids, labels = part.values()
        begin = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        found.append((ids[:begin], ids[begin:], labels[begin:], number == 0 if is_pair else row["is_good"]))
    return found

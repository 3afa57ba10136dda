"""Rows of compared answers: two side by side, or for KTO a labelled one and one to another question."""

import itertools

IGNORE_INDEX = -100  # label of a token that is not in the loss


def sequences_of(row: dict) -> list[dict]:
    """The sequences of a row as rows of input_ids and labels."""
    parts, start = [], 0
    for length in row["seq_lengths"]:
        parts.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    return parts


def with_mismatched(rows):
    """A dataset of labelled answers, each with `mismatched`: the answer before it, to this one's question.

    rows: a dataset of pairs, whose answers become one good and one bad, or of labelled answers.
    """
    from datasets import Dataset  # slow import

    answers, made = [answer for row in rows for answer in answers_of(row)], []
    for (_, *before, _), (prompt, ids, labels, is_good) in itertools.pairwise([answers[-1], *answers]):
        ignored = [IGNORE_INDEX] * len(prompt)
        other = dict(input_ids=[*prompt, *before[0]], labels=[*ignored, *before[1]])
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

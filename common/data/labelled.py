"""Labelled answers for KTO: each beside the answer to another question, by which the divergence is estimated."""

import itertools

IGNORE_INDEX = -100


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
    found, start, is_pair = [], 0, len(row["seq_lengths"]) == 2
    for number, length in enumerate(row["seq_lengths"]):
        ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
        begin = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        found.append((ids[:begin], ids[begin:], labels[begin:], number == 0 if is_pair else row["is_good"]))
        start += length
    return found

"""Checks of pairs: what makes a preference contradictory, or one of length."""

from collections.abc import Iterator

from common.data.compared import IGNORE_INDEX, sequences_of

LENGTH_BIAS = 0.7  # share of pairs from which on length alone tells the better answer


def pair_notes(rows: list[dict]) -> Iterator[str]:
    """What to know of pairs, with the number of those that it is true of."""
    pairs = [sequences_of(row) for row in rows if len(row["seq_lengths"]) == 2]
    keys = [tuple(tuple(part["input_ids"]) for part in pair) for pair in pairs]
    answers = [[[label for label in part["labels"] if label != IGNORE_INDEX] for part in pair] for pair in pairs]
    seen, begun = set(keys), 0
    for better, worse in answers:
        short, long = sorted((better[:-1], worse[:-1]), key=len)  # without the end token
        begun += long[: len(short)] == short
    reversed_pairs = sum(key[::-1] in seen for key in keys) // 2
    longer = sum(len(better) > len(worse) for better, worse in answers)
    if reversed_pairs:
        yield f"{reversed_pairs} pairs are there the other way round as well; keep one of each"
    if begun:
        yield f"in {begun} of {len(pairs)} pairs one answer is the beginning of the other: only where to end is learned"
    for count, word, other in ((longer, "longer", "shorter"), (len(pairs) - longer, "shorter", "longer")):
        if count > LENGTH_BIAS * len(pairs) and len(pairs) >= 20:
            share = f"{count / len(pairs):.0%} of the better answers are {word}"
            yield f"{share}: the model may learn length instead; add pairs whose better answer is {other}"

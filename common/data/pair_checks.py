"""Checks of pairs: what makes a preference contradictory, or one of length."""

from collections import defaultdict
from collections.abc import Iterator

from common.data.compared import IGNORE_INDEX, sequences_of

LENGTH_BIAS = 0.7  # share of pairs from which on length alone tells the better answer


def pair_notes(rows: list[dict]) -> Iterator[str]:
    """What to know of pairs, or of labelled answers, with the number of those that it is true of."""
    pairs, verdicts = [sequences_of(row) for row in rows if len(row["seq_lengths"]) == 2], defaultdict(set)
    for row in rows:
        if len(row["seq_lengths"]) == 1:
            verdicts[tuple(row["input_ids"])].add(row["is_good"])
    if both := sum(len(found) == 2 for found in verdicts.values()):
        yield f"{both} {'answer is' if both == 1 else 'answers are'} labelled good and bad; keep one of each"
    keys = {tuple(tuple(part["input_ids"]) for part in pair) for pair in pairs}
    if both := sum(key[::-1] in keys for key in keys) // 2:
        yield f"{both} {'pair is' if both == 1 else 'pairs are'} there the other way round as well; keep one of each"
    answers = [[[label for label in part["labels"] if label != IGNORE_INDEX] for part in pair] for pair in pairs]
    begun = 0
    for answer in answers:
        short, long = sorted((side[:-1] for side in answer), key=len)  # without the end token
        begun += long[: len(short)] == short
    if begun:
        yield f"in {begun} of {len(pairs)} pairs one answer is the beginning of the other: only where to end is learned"
    longer = sum(len(better) > len(worse) for better, worse in answers)
    shorter = sum(len(better) < len(worse) for better, worse in answers)
    for count, word, other in ((longer, "longer", "shorter"), (shorter, "shorter", "longer")):
        if count > LENGTH_BIAS * len(pairs) and len(pairs) >= 20:
            share = f"{count / len(pairs):.0%} of the better answers are {word}"
            yield f"{share}: the model may learn length instead; add pairs whose better answer is {other}"

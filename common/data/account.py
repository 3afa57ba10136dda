"""The account of prepared data: what became of every row, and why."""

from collections import Counter

import numpy as np

MAX_EXAMPLES = 3  # rows shown of those that DROP_PATTERN matches


class Reasons:
    """Rows counted by reason, with the place of the first of each, and examples.

    A reason begins with its kind: "dropped: duplicate", "changed: ...", "unused: field".
    """

    def __init__(self):
        self.counts, self.first, self.examples = Counter(), {}, []

    def add(self, reason: str, place: str | None = None) -> None:
        self.counts[reason] += 1
        if place:
            self.first.setdefault(reason, place)

    def add_example(self, text: str) -> None:
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(text)

    def update(self, other: "Reasons") -> None:
        """Add those of later rows."""
        self.counts.update(other.counts)
        self.first = other.first | self.first
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Number of rows by kind and reason."""
        kinds = {"dropped": {}, "changed": {}, "unused": {}}
        for reason, count in sorted(self.counts.items()):
            kind, _, what = reason.partition(": ")
            if what:
                first = f", first at {self.first[reason]}" if reason in self.first else ""
                kinds[kind][what + first] = count
        return kinds


def account_for(reasons: Reasons, times: np.ndarray, in_loss: np.ndarray, sequences: list, max_length: int) -> dict:
    """What became of every row: rows = trained + held_out + all dropped.

    times, in_loss: (chats,), repetitions and tokens in the loss. sequences: of each chat, the lengths of its sequences.
    """
    tokens, held = np.array([lengths.sum() for lengths in sequences]), times == 0
    lengths = np.concatenate([np.tile(of_chat, n) for of_chat, n in zip(sequences, times, strict=True)])
    return dict(
        rows=reasons.counts["rows"],
        trained=int((times > 0).sum()),
        held_out=int(held.sum()),
        **reasons.by_kind(),
        examples=reasons.examples,
        sequences=len(lengths),
        tokens=int(np.repeat(tokens, times).sum()),
        tokens_in_loss=int(np.repeat(in_loss, times).sum()),
        held_out_tokens=int(tokens[held].sum()),
        length_histogram=np.histogram(lengths, bins=50, range=(0, max_length))[0].tolist(),
        length_percentiles={str(p): int(np.percentile(lengths, p)) for p in (0, 25, 50, 75, 95, 100)},
    )


def describe(account: dict) -> str:
    rows = "data: {rows:,} rows = {trained:,} trained + {held_out:,} held out + {:,} dropped"
    lines = [rows.format(sum(account["dropped"].values()), **account)]
    for kind in ("dropped", "changed"):
        lines += [f"  {kind} {n:,}: {reason}" for reason, n in account[kind].items()]
    lines += [f"    {example}" for example in account["examples"]]
    unused = [f"{name} (in {n:,} rows)" for name, n in account["unused"].items()]
    lines += [f"  fields that are not used: {', '.join(unused)}"] if unused else []
    repeated = "{sequences:,} sequences; " if account["sequences"] > account["trained"] else ""
    tokens = "{tokens:,} tokens, {tokens_in_loss:,} in the loss; {held_out_tokens:,} held out"
    lines.append("  " + (repeated + tokens).format(**account))
    shortest, median, longest = (account["length_percentiles"][p] for p in ("0", "50", "100"))
    lines.append(f"  a chat has {shortest:,} to {longest:,} tokens, median {median:,}")
    return "\n".join(lines)

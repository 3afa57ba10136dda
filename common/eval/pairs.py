"""Pairs: how often a model finds the better of two answers likelier, and how often training made it more so.

The second goes by DPO's implicit reward (arXiv 2305.18290, section 4): log-probabilities over the first model's.
"""

import math
import statistics

import torch

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.data.pipeline import mark_last
from common.eval import suites
from common.eval.statistics import mean_interval, put, put_share, verdict

NONE_LEFT = "PAIRS: no pair is left within MAX_LENGTH. Raise it."
# Of a pair: log-probability (nats) and tokens of the better answer, then of the worse; None where it was left out.
LogProbs = tuple[float, int, float, int] | None


def refuse_labelled(pairs: list, source: str) -> None:
    """Raise UserError for labelled answers: alone, how likely one is says little about how good."""
    if any(len(pair) < 2 for pair in pairs):
        problem = "labelled answers have no other beside them to be compared with"
        raise UserError(f"PAIRS={source}: {problem}. Name rows with two answers (chosen and rejected).")


def score_pairs(result: dict, model, tokenizer, pairs: dict[str, list], max_length: int) -> None:
    """The share of pairs whose better answer is likelier a token, for each source; ties count half."""
    for source, rows in pairs.items():
        found = [pair_log_probs(model, tokenizer, pair, max_length) for pair in rows]
        result.setdefault("pairs", {})[source] = found
        put_accuracy(result, name_score("pair accuracy", source, pairs), likelier(found), "pairs")
        if left_out := found.count(None):
            print(f"    {left_out} of {len(rows)} pairs are longer than MAX_LENGTH={max_length} and left out")


@torch.no_grad()
def pair_log_probs(model, tokenizer, pair: list[list[dict]], max_length: int) -> LogProbs:
    encoder, found = ChatEncoder(tokenizer), []
    rows = encoder.encode_marked([mark_last(encoder, chat, "assistant") for chat in pair], "assistant")
    if max(len(row.ids) for row in rows) > max_length:  # an answer is never cut
        return None
    for row in rows:
        nats, tokens = suites.sequence_loss(model, row.ids, row.learned)
        if not math.isfinite(nats):
            raise UserError("MODEL: its loss is not finite. Its weights are damaged, or DTYPE=float32 is needed.", 4)
        found += [-nats, tokens]
    return tuple(found)


def likelier(found: list[LogProbs]) -> list[float]:
    """By how much more likely a token the better answer of each pair is."""
    return [pair[0] / pair[1] - pair[2] / pair[3] for pair in found if pair]


def put_accuracy(result: dict, name: str, margins: list[float], what: str) -> None:
    if not margins:
        raise UserError(NONE_LEFT)
    put_share(result, name, sum(map(is_right, margins)), len(margins))
    if ties := margins.count(0):
        print(f"    {ties} of these {what} are ties, which count half")


def is_right(margin: float) -> float:
    return (margin > 0) + (margin == 0) / 2


def compare(first: str, name: str, results: dict) -> None:
    """Print whether a model is right about more pairs than the first, and whether it moved towards better answers."""
    before, after = results[first].get("pairs", {}), results[name].get("pairs", {})
    for source, found in after.items():
        both = [(one, other) for one, other in zip(before[source], found, strict=True) if one and other]
        if not both:
            raise UserError(NONE_LEFT)
        earlier, later = (likelier(side) for side in zip(*both, strict=True))
        changes = [is_right(new) - is_right(old) for old, new in zip(earlier, later, strict=True)]
        # Summed, as in the losses: log-probabilities over the first model's, of the better answer less the worse.
        margins = [(other[0] - one[0]) - (other[2] - one[2]) for one, other in both]
        interval = mean_interval(changes)
        print(f"\n{name} against {first}: {verdict(interval)}")
        change = name_score("change of pair accuracy", source, after)
        put(results[name], change, statistics.fmean(changes), interval, "+.1%", " of all pairs")
        reward = name_score("reward accuracy", source, after)
        put_accuracy(results[name], reward, margins, "rewards")
        print(f"    against the 50% of no change: {verdict(results[name]['intervals'][reward], 0.5)}")


def name_score(name: str, source: str, sources_scored: dict) -> str:
    return name if len(sources_scored) == 1 else f"{name} on {source}"

"""What a step's loss and norm say: not finite, or a spike."""

import itertools
import statistics

MAX_BAD_STEPS = 3  # not finite, in a row

# A spike is a loss so many standard deviations above the mean of the last steps; OLMo-core's SkipStepOptimizer's rule.
SPIKE_DEVIATIONS, SPIKE_WINDOW, SPIKE_WINDOW_MIN = 6, 128, 20

SPIKE_DEVIATION_MIN = 0.05  # as a share of the mean: a loss that hardly varies has no spikes of a hundredth


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a step's loss stands out from those of the steps before."""
    if len(recent) < SPIKE_WINDOW_MIN:
        return False
    mean = statistics.fmean(recent)
    return loss > mean + SPIKE_DEVIATIONS * max(statistics.pstdev(recent), SPIKE_DEVIATION_MIN * max(mean, 0.1))


def chats_of(inputs: dict):
    """(input_ids, labels) of each chat in a batch, packed or padded; (1, T) each."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "attention_mask" in inputs:
        for row, present in enumerate(inputs["attention_mask"].bool()):
            yield ids[row, present][None], labels[row, present][None]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, ids.shape[1]]):
            yield ids[:, start:end], labels[:, start:end]

"""The guard of steps: whether a step's loss and gradient are finite, a spike, or a reason to stop."""

import math
import statistics
from dataclasses import dataclass, field

MAX_BAD_STEPS = 3  # in a row, with a loss or gradient that is not finite
# A spike is a loss so many standard deviations above the mean of the last steps (OLMo-core's SkipStepOptimizer).
SPIKE_DEVIATIONS, SPIKE_WINDOW, SPIKE_WINDOW_MIN = 6, 128, 20
SPIKE_DEVIATION_MIN = 0.05  # as a share of the mean: a loss that hardly varies has no spikes of a hundredth


@dataclass
class StepGuard:
    """Judges steps by their loss and gradient norm; its fields go into checkpoints."""

    bad_steps: int = 0
    bad_in_a_row: int = 0
    spikes: int = 0
    recent_losses: list[float] = field(default_factory=list)

    def judge(self, loss: float, norm: float | None) -> str:
        """ "bad" for a step that is not finite, "spike", or "good". norm: None where the optimizer checks gradients."""
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            self.bad_steps += 1
            self.bad_in_a_row += 1
            return "bad"
        self.bad_in_a_row = 0
        spike = is_spike(loss, self.recent_losses)
        self.spikes += spike
        self.recent_losses = [*self.recent_losses, loss][-SPIKE_WINDOW:]
        return "spike" if spike else "good"

    def is_hopeless(self, max_steps: int) -> bool:
        """Whether too many steps were bad to go on: three in a row, or 1 % of all (and at least three)."""
        return self.bad_in_a_row >= MAX_BAD_STEPS or self.bad_steps >= max(MAX_BAD_STEPS, max_steps / 100)


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a step's loss stands out from those of the steps before."""
    if len(recent) < SPIKE_WINDOW_MIN:
        return False
    mean = statistics.fmean(recent)
    return loss > mean + SPIKE_DEVIATIONS * max(statistics.pstdev(recent), SPIKE_DEVIATION_MIN * max(mean, 0.1))

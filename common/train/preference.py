"""Preference losses: by how much more the model prefers the better answer than the reference does.

Log-probabilities are sums over an answer's tokens, in nats. `ours` and `theirs`, of the reference: (pairs, 2), the
better answer first.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

# What a batch of pairs has beside the model's inputs.
OF_PAIRS = ("reference", "is_good", "length", "tokens", "answers", "mismatched")
FREE = ("simpo", "orpo")  # losses without a reference
SMOOTHED = ("dpo", "simpo")  # losses with LABEL_SMOOTHING
# What is logged of the pairs: shares, rewards (arXiv 2305.18290), nats a token, and by how many nats a token an answer
# became more or less likely than it is to the reference, on average.
PAIR_METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "logp_change")
# Above this margin and below this reward the demonstration's model gave broken answers at an accuracy of 1 (docs).
MOST_MARGIN, LEAST_REWARD, ACCURATE = 5.0, -0.5, 0.95
MOST_FALL = 0.5  # nats a token that the better answers may become less likely, where there is no reference


@dataclass(frozen=True)
class Preference:
    """The loss and its constants, by the names of the settings."""

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.5

    @classmethod
    def of(cls, settings: dict) -> "Preference":
        """As the settings say."""
        loss, weight = settings["LOSS"], settings["SFT_WEIGHT"]
        if weight is None:
            weight = 0.0 if loss == "orpo" else 1.0
        return cls(loss, settings["BETA"], settings["LABEL_SMOOTHING"], weight, settings["GAMMA"])

    @property
    def is_paired(self) -> bool:
        """Whether answers are learned from two by two."""
        return self.loss != "kto"

    @property
    def metrics(self) -> tuple[str, ...]:
        return PAIR_METRICS if self.needs_reference else PAIR_METRICS[:-1]

    @property
    def needs_reference(self) -> bool:
        return self.loss not in FREE

    def losses(self, ours, theirs, lengths: torch.Tensor, usual: float) -> torch.Tensor:
        """The loss of each pair, (pairs,).

        lengths: tokens of the answers, (pairs, 2). usual: mean tokens of the better answers of the step, by which the
        loss on them is a mean over tokens, as in ordinary training.
        """
        means, margins = ours / lengths, compare(ours - theirs)
        sft_loss = -ours[:, 0] / usual
        match self.loss:
            case "dpo":  # arXiv 2305.18290, equation 7; label smoothing: Mitchell's cDPO (ericmitchell.ai/cdpo.pdf)
                losses = self.smoothed(self.beta * margins)
            case "ipo":  # arXiv 2310.12036, equation 17, by token as its authors have it (TRL's IPO)
                losses = (compare((ours - theirs) / lengths) - 1 / (2 * self.beta)) ** 2
            case "simpo":  # arXiv 2405.14734, equation 6
                losses = self.smoothed(self.beta * compare(means) - self.gamma)
            case "orpo":  # arXiv 2403.07691, equations 6 and 7: odds are p / (1 - p)
                means = means.clamp(max=-1e-7)  # of a certain answer, and of a blank row, the odds are infinite
                log_odds = compare(means) - compare(torch.log(-torch.expm1(means)))
                losses = sft_loss - self.beta * logsigmoid(log_odds)
        return losses + self.sft_weight * sft_loss  # arXiv 2404.19733, equation 1, with a mean over all tokens

    def rewards(self, ours: torch.Tensor, theirs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the model makes of each answer, (pairs, 2): BETA times its log-probability over the reference's."""
        return self.beta * ((ours - theirs) if self.needs_reference else ours / lengths)

    def measure(self, ours, theirs, lengths, is_good: torch.Tensor, share_good: float) -> dict[str, torch.Tensor]:
        """`metrics` of each pair, (pairs,), so that their means are those of the step.

        Of labelled answers, the good ones stand for the chosen; share_good: of the answers of the step.
        """
        rewards, chosen_logp = self.rewards(ours, theirs, lengths), ours[:, 0] / lengths[:, 0]  # rewards: (pairs, 2)
        if not self.is_paired:  # an answer alone: against none
            right = torch.where(is_good, rewards[:, 0], -rewards[:, 0])
            good, bad = is_good / max(share_good, 1e-6), ~is_good / max(1 - share_good, 1e-6)
            rewards, chosen_logp = torch.stack([rewards[:, 0] * good, rewards[:, 0] * bad], 1), chosen_logp * good
            margins = compare(rewards)
        else:
            right = margins = compare(rewards)
        right = (right > 0) + (right == 0) / 2
        change = ((ours - theirs) / lengths).abs().mean(1)
        values = right, margins, *rewards.unbind(1), chosen_logp, change
        return dict(zip(self.metrics, values, strict=False))

    def find_collapse(self, figures: dict[str, float], first_logp: float) -> str | None:
        """What is wrong where pairs are told apart while the better answers become unlikely; None where nothing is.

        figures: of `metrics`. first_logp: chosen_logp as it was first logged.
        """
        margin, reward, fall = figures["margin"], figures["chosen_reward"], first_logp - figures["chosen_logp"]
        if figures["accuracy"] < ACCURATE:
            return None
        problem = f"the margin is {margin:.1f}" if margin > MOST_MARGIN else None
        if reward < LEAST_REWARD if self.needs_reference else fall > MOST_FALL:
            by = f"reward {reward:.2f}" if self.needs_reference else f"by {fall:.2f} nats a token"
            problem = f"the chosen answers have become less likely ({by})"
        return problem

    def smoothed(self, logits: torch.Tensor) -> torch.Tensor:
        """-log sigmoid, where a share of the pairs may be labelled the wrong way round."""
        return -(1 - self.label_smoothing) * logsigmoid(logits) - self.label_smoothing * logsigmoid(-logits)

    def labelled_losses(self, ours, theirs, divergence: float, is_good: torch.Tensor, usual: float) -> torch.Tensor:
        """KTO's loss of each labelled answer, (answers,), as ours and theirs are; arXiv 2402.01306, equation 8.

        divergence: of the model from the reference, in nats: by how much more than the reference it expects answers to
        other questions, at least 0. usual: mean tokens of the good answers of the step.
        """
        gains = self.beta * (ours - theirs - divergence)
        losses = 1 - torch.sigmoid(torch.where(is_good, gains, -gains))
        return losses - self.sft_weight * is_good * ours / usual


def compare(values: torch.Tensor) -> torch.Tensor:
    """Those of the better answer less those of the worse; values: (pairs, 2)."""
    return values[:, 0] - values[:, 1]


def sum_by_sequence(losses: torch.Tensor, numbers: torch.Tensor, sequences: int):
    """Log-probabilities and numbers of tokens in the loss of each sequence, (sequences,) both.

    losses, numbers: (N,), of the tokens in the loss, row by row, and of the sequence that each is of.
    """
    sums = losses.new_zeros(sequences).index_add(0, numbers, -losses)
    return sums, losses.new_zeros(sequences).index_add(0, numbers, torch.ones_like(losses))

"""The training loss: an ordinary cross-entropy over the learned positions, in checkpointed chunks.

TRL's fused head also computes entropy and accuracy over every position with a Triton kernel that does not exist on the
CPU. Here only positions with a label meet the head, 256 at a time, and their logits (256 x vocabulary, in float32) are
computed again in the backward pass instead of being kept.
"""

import functools

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # positions whose logits exist at the same time
# Config entries by which a model changes its logits after the head; such models keep TRL's loss, which knows them.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling",
                 "num_experts", "num_local_experts")  # fmt: skip


def supports_chunked_loss(config) -> bool:
    """Whether a model's logits are just its output layer (no scaling, soft-capping or router loss)."""
    return all(getattr(config.get_text_config(), name, None) is None for name in LOGIT_CHANGES)


def add_chunked_loss(model) -> None:
    """Let a causal language model be called with `learn=labels`; it then returns the summed loss, a scalar tensor.

    labels: (B, T), -100 where nothing is learned; position t is learned from the hidden state at t - 1. The head is
    called inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see it.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(*args, learn=None, **kwargs):
        if learn is None:
            return original(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (B, T - 1, hidden)
        targets = learn[:, 1:]
        learned = targets != -100
        hidden, targets = hidden[learned], targets[learned]  # (N, hidden), (N,)
        head = model.get_output_embeddings()
        if not len(targets):  # a device batch without a learned position still takes part in the backward pass
            return hidden.sum()
        return sum(
            checkpoint(head_loss, head, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        )

    model.forward = forward


def head_loss(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of a chunk: hidden (N, hidden), targets (N,)."""
    return cross_entropy(head(hidden).float(), targets, reduction="sum")

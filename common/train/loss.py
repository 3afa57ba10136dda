"""The training loss: an ordinary cross-entropy over the learned positions, in checkpointed chunks; and, against
forgetting, the divergence from what the frozen base predicts.

TRL's fused head also computes entropy and accuracy over every position with a Triton kernel that does not exist on the
CPU. Here only positions with a label meet the head, 256 at a time, and their logits (256 x vocabulary, in float32) are
computed again in the backward pass instead of being kept.
"""

import contextlib
import functools

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from common import distributed

CHUNK = 256  # positions whose logits exist at the same time

# Config entries by which a model changes its logits after the head, or adds a router loss; such models keep TRL's loss.
LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "num_experts",
    "num_local_experts",
)


def supports_chunked_loss(config) -> bool:
    """Whether a model's logits are just its output layer (no scaling, soft-capping or router loss)."""
    return all(getattr(config.get_text_config(), name, None) is None for name in LOGIT_CHANGES)


def add_chunked_loss(model, without_adapter=None, base=None) -> None:
    """Let a causal language model be called with `learn=labels`; it then returns (loss, divergence), both scalars.

    labels: (B, T), -100 where nothing is learned; position t is learned from the hidden state at t - 1.
    loss: summed cross-entropy in nats. divergence: mean KL(base || model) in nats over up to CHUNK random positions
    that are not learned, where the base is the model inside `with without_adapter():`, or the frozen model `base`; 0
    where both are None.
    All happens inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see it.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(*args, learn=None, **kwargs):
        if learn is None:
            return original(*args, **kwargs)
        head = model.get_output_embeddings()
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (B, T - 1, hidden)
        learned = learn[:, 1:] != -100
        positions = learned.nonzero().unbind(1)
        chosen, targets = hidden[positions], learn[:, 1:][positions]
        chunks = list(zip(chosen.split(CHUNK), targets.split(CHUNK), strict=True))
        if distributed.holds_parts():  # of the head, which all have to put together equally often
            chunks += [(chosen[:0], targets[:0])] * (max(distributed.gather(len(chunks))) - len(chunks))
        # The empty sum lets a device batch without a learned position take part in the backward pass.
        loss = chosen.sum() * 0 + sum(checkpoint(head_loss, head, h, t, use_reentrant=False) for h, t in chunks)
        if without_adapter is base is None or not model.training:
            return loss, loss.new_zeros(())
        with torch.no_grad(), without_adapter() if base is None else contextlib.nullcontext():
            held_model = base or model
            held_model.base_model.eval()  # no dropout, no NEFTune noise
            reference = held_model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
            model.base_model.train()
        held = ~learned
        if kwargs.get("attention_mask") is not None:
            held &= kwargs["attention_mask"][:, 1:].bool()
        held = held.nonzero()
        sample = held[torch.randperm(len(held))[:CHUNK].to(held.device)].unbind(1)
        heads = head, (base or model).get_output_embeddings()
        return loss, checkpoint(head_kl, *heads, hidden[sample], reference[sample], use_reentrant=False)

    model.forward = forward


def head_loss(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of a chunk: hidden (N, hidden), targets (N,)."""
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def head_kl(head, base_head, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean KL(reference || model) over positions, in nats: hidden and reference (N, hidden)."""
    ours, base = (log_softmax(h(x).float(), dim=-1) for h, x in ((head, hidden), (base_head, reference)))
    return kl_div(ours, base, reduction="sum", log_target=True) / max(1, len(hidden))

"""The training loss: an ordinary cross-entropy over the tokens in the loss, in checkpointed chunks; and, against
forgetting, the divergence from what the frozen base predicts.

TRL's fused head also computes entropy and accuracy over every position with a Triton kernel that does not exist on the
CPU. Here only positions with a label meet the head, 256 at a time, and their logits (256 x vocabulary, in float32) are
computed again in the backward pass instead of being kept.
"""

import contextlib
import functools

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from common import distributed

CHUNK = 256  # positions whose logits exist at the same time
# Config entries by which a model changes its logits after the head, or adds a router loss; such models keep TRL's loss.
LOGIT_CHANGES = """final_logit_softcapping logit_scale output_multiplier lm_head_multiplier logits_scaling num_experts
num_local_experts""".split()


def supports_chunked_loss(config) -> bool:
    """Whether a model's logits are just its output layer (no scaling, soft-capping or router loss)."""
    config = config.get_text_config().to_dict()
    return all(config.get(name) is None for name in LOGIT_CHANGES)


def prepare_model(model, kl_weight: float, base_model=None, sharded: bool = False) -> bool:
    """Give a model our loss, and its adapter weights in float32; returns whether its logits allow that loss.

    base_model: the frozen model that KL_WEIGHT compares with; None: the model without its adapter.
    sharded: see `add_chunked_loss`.
    """
    is_adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapted else model
    chunked = supports_chunked_loss(base.config)
    if chunked:
        without_adapter = model.disable_adapter if kl_weight and base_model is None else None
        add_chunked_loss(base, without_adapter, base_model, sharded)
    for module in model.modules():
        # Autocast casts activations anyway; PEFT's own cast to the adapter's float32 first doubles that traffic.
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        # TRL makes QLoRA adapters bf16, in which small updates round to nothing; they stay in float32.
        if parameter.requires_grad and is_adapted:
            parameter.data = parameter.data.float()
    return chunked


def add_chunked_loss(model, without_adapter=None, base=None, sharded: bool = False) -> None:
    """Let a causal language model be called with `learn=labels`; it then returns (loss, divergence), both scalars.

    labels: (B, T), -100 outside of the loss; position t is predicted from the hidden state at t - 1.
    loss: summed cross-entropy in nats. divergence: mean KL(base || model) in nats over up to CHUNK random positions
    outside of the loss, where the base is the model inside `with without_adapter():`, or the frozen model `base`; 0
    where both are None. sharded: the head's weights are gathered by all processes together, so all need as many chunks.
    All happens inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see it.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(*args, learn=None, **kwargs):
        if learn is None:
            return original(*args, **kwargs)
        head = model.get_output_embeddings()
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # (B, T - 1, hidden)
        in_loss = learn[:, 1:] != -100
        positions = in_loss.nonzero().unbind(1)
        loss = chunked_loss(head, hidden[positions], learn[:, 1:][positions], sharded)
        if without_adapter is base is None or not model.training:
            return loss, loss.new_zeros(())
        with torch.no_grad(), without_adapter() if base is None else contextlib.nullcontext():
            reference_model = base or model
            reference_model.base_model.eval()  # no dropout, no NEFTune noise
            reference = reference_model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
            model.base_model.train()
        outside = ~in_loss
        if kwargs.get("attention_mask") is not None:
            outside &= kwargs["attention_mask"][:, 1:].bool()
        outside = outside.nonzero()
        sample = outside[torch.randperm(len(outside))[:CHUNK].to(outside.device)].unbind(1)
        heads = head, reference_model.get_output_embeddings()
        return loss, checkpoint(head_kl, *heads, hidden[sample], reference[sample], use_reentrant=False)

    model.forward = forward


def chunked_loss(head, hidden: torch.Tensor, targets: torch.Tensor, sharded: bool) -> torch.Tensor:
    """Summed cross-entropy in nats of hidden states (N, hidden) with targets (N,), a chunk of logits at a time."""

    def head_loss(hidden, targets):
        return cross_entropy(head(hidden).float(), targets, reduction="sum")

    chunks = list(zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True))
    if sharded:
        chunks += [(hidden[:0], targets[:0])] * (max(distributed.gather(len(chunks))) - len(chunks))
    # The empty sum lets a device batch without a token in the loss take part in the backward pass.
    return hidden.sum() * 0 + sum(checkpoint(head_loss, h, t, use_reentrant=False) for h, t in chunks)


def head_kl(head, base_head, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean KL(reference || model) over positions, in nats: hidden and reference (N, hidden)."""
    ours, base = (log_softmax(h(x).float(), dim=-1) for h, x in ((head, hidden), (base_head, reference)))
    return kl_div(ours, base, reduction="sum", log_target=True) / max(1, len(hidden))

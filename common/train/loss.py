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


def router_loss_weight(config) -> float:
    """The weight of the loss that balances a mixture's experts, as its config has it; 0 for other models."""
    values = config.get_text_config().to_dict()
    return (values.get("router_aux_loss_coef") or 0.0) if "output_router_logits" in values else 0.0


def prepare_model(model, kl_weight: float, base_model=None, sharded: bool = False) -> None:
    """Give a model our loss, and its adapter weights in float32.

    base_model: the frozen model that KL_WEIGHT compares with; None: the model without its adapter.
    sharded: see `add_chunked_loss`.
    """
    is_adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapted else model
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


def add_chunked_loss(model, without_adapter=None, base=None, sharded: bool = False) -> None:
    """Let a causal language model be called with `learn=labels`; it then returns (losses, divergence, router loss).

    labels: (B, T), -100 outside of the loss; position t is predicted from the hidden state at t - 1.
    losses: cross-entropy in nats of the N tokens in the loss, (N,), row by row. divergence: mean KL(base || model) in
    nats over up to CHUNK random positions outside of the loss, where the base is the model inside
    `with without_adapter():`, or the frozen model `base`; 0 where both are None. router loss: of a mixture of experts
    in training, not yet weighted; else 0. sharded: the head's weights are gathered by all processes together, so all
    need as many chunks. All happens inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see it.
    """
    original, balances = model.forward, bool(router_loss_weight(model.config))
    model.config.get_text_config().output_router_logits = False  # TRL sets it; only training needs them

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(*args, learn=None, **kwargs):
        if learn is None:
            return original(*args, **kwargs)
        routing = {"output_router_logits": True} if balances and model.training else {}
        output = decoder_of(model)(*args, **kwargs, **routing)
        hidden = output.last_hidden_state[:, :-1]  # (B, T - 1, hidden)
        in_loss = learn[:, 1:] != -100
        positions = in_loss.nonzero().unbind(1)
        head = functools.partial(head_logits, model, original, type(output))
        losses = chunked_losses(head, hidden[positions], learn[:, 1:][positions], sharded)
        router_loss = losses.new_zeros(())
        if routing:
            mask = kwargs.get("attention_mask")
            router_loss = call_head(model, original, output, attention_mask=mask, logits_to_keep=1, **routing).aux_loss
        if without_adapter is base is None or not model.training:
            return losses, losses.new_zeros(()), router_loss
        reference_model, context = base or model, contextlib.nullcontext if base else without_adapter
        with torch.no_grad(), context():
            reference_decoder = decoder_of(reference_model)
            reference_decoder.eval()  # no dropout, no NEFTune noise
            reference = reference_decoder(*args, **kwargs).last_hidden_state[:, :-1]
            decoder_of(model).train()
        outside = ~in_loss
        if kwargs.get("attention_mask") is not None:
            outside &= kwargs["attention_mask"][:, 1:].bool()
        outside = outside.nonzero()
        sample = outside[torch.randperm(len(outside))[:CHUNK].to(outside.device)].unbind(1)

        def divergence(hidden, reference):
            with torch.no_grad(), context():
                expected = head_logits(reference_model, base.forward if base else original, type(output), reference)
            return mean_kl(expected, head(hidden))

        return losses, checkpoint(divergence, hidden[sample], reference[sample], use_reentrant=False), router_loss

    model.forward = forward


def decoder_of(model):
    """The part of a causal language model below its head."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4's text model has another prefix


@torch.compiler.disable  # it changes the model while it is called
def call_head(model, forward, output, **kwargs):
    """What a model's own forward makes of its decoder's output: logits, scaled or capped as it does, and aux_loss."""
    decoder, ids = decoder_of(model), output.last_hidden_state.new_zeros((1, 1), dtype=torch.int64)
    instance = "forward" in vars(decoder), decoder.forward
    decoder.forward = lambda *args, **kwargs: output
    try:
        return forward(input_ids=ids, use_cache=False, return_dict=True, **kwargs)
    finally:
        decoder.forward = instance[1]
        if not instance[0]:
            del decoder.forward


def head_logits(model, forward, output_type, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, vocabulary) in float32 of hidden states (N, hidden). output_type: what the decoder returns."""
    return call_head(model, forward, output_type(last_hidden_state=hidden[None])).logits[0].float()


def chunked_losses(head, hidden: torch.Tensor, targets: torch.Tensor, sharded: bool) -> torch.Tensor:
    """Cross-entropy in nats (N,) of hidden states (N, hidden) with targets (N,), a chunk of logits at a time."""

    def head_losses(hidden, targets):
        return cross_entropy(head(hidden), targets, reduction="none")

    # Without a token in the loss there is one empty chunk, by which the batch takes part in the backward pass.
    chunks = list(zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True))
    if sharded:
        chunks += [(hidden[:0], targets[:0])] * (max(distributed.gather(len(chunks))) - len(chunks))
    return torch.cat([checkpoint(head_losses, h, t, use_reentrant=False) for h, t in chunks])


def mean_kl(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean KL(expected || logits) over positions, in nats: both (N, vocabulary)."""
    ours, base = log_softmax(logits, dim=-1), log_softmax(expected, dim=-1)
    return kl_div(ours, base, reduction="sum", log_target=True) / max(1, len(logits))

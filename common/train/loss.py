"""The training loss: an ordinary cross-entropy over the tokens in the loss, in chunks; and, against forgetting, the
divergence from what the frozen base predicts.

TRL's fused head also computes entropy and accuracy over every position with a Triton kernel that does not exist on the
CPU. Here only positions with a label meet the head, a chunk at a time, and their logits (chunk x vocabulary, in
float32) are not kept: the gradient of the hidden states is computed at once, or with a trained head the logits are once
more.
"""

import contextlib
import functools
import inspect
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from common import distributed
from common.model.adapters import add_in_one_pass
from common.model.attention import model_class
from common.train.collator import predicts, predicts_outside
from common.train.shared_layers import SharedLayers

# What autocast for CUDA computes, and returns, in float32.
FLOAT32_UNDER_AUTOCAST = (torch.nn.LayerNorm, NewGELUActivation)
CHUNK = 256  # positions whose logits exist at the same time, at the least


def chunk_size(vocabulary: int, device: str) -> int:
    """Positions whose logits exist at the same time: on CUDA up to 2,048, as long as they take 256 MiB in float32."""
    most = 2**28 // 4 // vocabulary // 128 * 128  # whole tiles of a matrix product
    return min(max(CHUNK, most), 2048) if device == "cuda" else CHUNK


def router_loss_weight(config) -> float:
    """The weight of the loss that balances a mixture's experts, as its config has it; 0 for other models."""
    # Some configs (Llama 4's) have a weight of a loss that their model does not compute.
    computes = "output_router_logits" in inspect.signature(model_class(config).forward).parameters
    return (config.get_text_config().to_dict().get("router_aux_loss_coef") or 0.0) if computes else 0.0


def prepare_model(model, kl_weight: float, base_model=None, sharded: bool = False, device: str = "cpu") -> None:
    """Give a model our loss, its adapter weights in float32, and hidden states that stay in their dtype.

    base_model: the frozen model that KL_WEIGHT compares with; None: the model without its adapter.
    sharded: see `add_chunked_loss`. device: the type of the one that trains.
    """
    is_adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapted else model
    without_adapter = model.disable_adapter if kl_weight and base_model is None else None
    chunk = chunk_size(base.config.get_text_config().vocab_size, device)
    add_chunked_loss(base, without_adapter, base_model, sharded, chunk)
    if not distributed.holds_parts():  # whose weights are whole only in the forward of the module that has them
        add_in_one_pass(model)
    for module in model.modules():
        # Autocast casts activations anyway; PEFT's own cast to the adapter's float32 first doubles that traffic.
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
        elif isinstance(module, FLOAT32_UNDER_AUTOCAST):
            module.register_forward_hook(keep_dtype)
    for parameter in model.parameters():
        # In 16 bits small updates round to nothing.
        if parameter.requires_grad and is_adapted:
            parameter.data = parameter.data.float()


def keep_dtype(module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """The output in the dtype of the input. NF4 layers would hand float32 on, GaLore's would leave it to autograd."""
    return output.to(inputs[0].dtype)


class SplitForward:
    """A causal language model's own forward in two parts: its decoder, and what it makes of the hidden states.

    For the second part the decoder stands aside, so that logits are scaled and capped, and the balance of a router
    measured, as the model does it.
    """

    def __init__(self, model):
        self.forward, self.decoder = model.forward, model.get_decoder()
        if self.decoder is model:  # Llama 4's text model has another prefix
            self.decoder = model.model

    def decode(self, *args, **kwargs):
        """The decoder's output, with last_hidden_state (B, T, hidden)."""
        output = self.decoder(*args, **kwargs)
        self.output_type = type(output)
        return output

    @torch.compiler.disable  # it changes the model while it is called
    def finish(self, output, **kwargs):
        """The model's output (logits, aux_loss) for its decoder's."""
        ids = output.last_hidden_state.new_zeros((1, 1), dtype=torch.int64)
        with mock.patch.object(self.decoder, "forward", lambda *args, **kwargs: output):
            return self.forward(input_ids=ids, use_cache=False, return_dict=True, **kwargs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, vocabulary) in float32 of hidden states (N, hidden)."""
        return self.finish(self.output_type(last_hidden_state=hidden[None])).logits[0].float()


def add_chunked_loss(model, without_adapter=None, base=None, sharded: bool = False, chunk: int | None = None) -> None:
    """Let a causal language model be called with `learn=labels`; it then returns (losses, divergence, router loss).

    labels: (B, T), -100 outside of the loss; position t is predicted from the hidden state at t - 1. What
    collator.CountingCollator adds to a batch may come with them, so that nobody waits for a GPU to find positions.
    losses: cross-entropy in nats of the N tokens in the loss, (N,), row by row. divergence: see `base_divergence`; the
    base is the model inside `with without_adapter():`, or the frozen model `base`; 0 where both are None. router loss:
    of a mixture of experts in training, not yet weighted; else 0. sharded: the head's weights are gathered by all
    processes together, so all need as many chunks. chunk: see `chunk_size`; None: CHUNK.
    All happens inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) see it.
    """
    own, has_router_loss = SplitForward(model), bool(router_loss_weight(model.config))
    reference = SplitForward(base) if base else own
    context = contextlib.nullcontext if base else without_adapter
    shared = SharedLayers(model) if context and base is None else None
    model.config.get_text_config().output_router_logits = False  # TRL sets it; only training needs them

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(*args, learn=None, in_loss=None, outside=None, tokens=None, **kwargs):
        if learn is None:
            return own.forward(*args, **kwargs)
        routing = {"output_router_logits": True} if has_router_loss and model.training else {}
        with shared.kept() if shared and model.training else contextlib.nullcontext():
            output = own.decode(*args, **kwargs, **routing)
        hidden, mask = output.last_hidden_state[:, :-1], kwargs.get("attention_mask")  # (B, T - 1, hidden)
        positions = tuple(predicts(learn).nonzero().T if in_loss is None else in_loss)
        losses = chunked_losses(own.logits, hidden[positions], learn[:, 1:][positions], sharded, chunk or CHUNK)
        divergence = router_loss = losses.new_zeros(())
        if routing:
            router_loss = own.finish(output, attention_mask=mask, logits_to_keep=1, **routing).aux_loss
        if context and model.training:
            outside = predicts_outside(learn, mask).nonzero().T if outside is None else outside
            with torch.no_grad(), context(), shared.replayed() if shared else contextlib.nullcontext():
                reference.decoder.eval()  # no dropout, no NEFTune noise
                expected = reference.decode(*args, **kwargs).last_hidden_state[:, :-1]
                own.decoder.train()
            divergence = base_divergence(own, reference, context, hidden, expected, outside, sharded)
        return losses, divergence, router_loss

    model.forward = forward


def base_divergence(
    own: SplitForward, reference: SplitForward, context, hidden, expected, outside, sharded: bool
) -> torch.Tensor:
    """Mean KL(base || model) in nats over up to CHUNK random positions outside of the loss.

    hidden, expected: hidden states (B, T - 1, hidden) of the model and of the base, whose logits `reference` gives
    inside `with context():`. outside: (2, positions), row and column of each.
    """
    sample = tuple(outside[:, torch.randperm(outside.shape[1])[:CHUNK].to(outside.device)])

    def divergences(hidden, expected):
        with torch.no_grad(), context():
            base = log_softmax(reference.logits(expected), dim=-1)  # (N, vocabulary)
        ours = log_softmax(own.logits(hidden), dim=-1)
        return kl_div(ours, base, reduction="none", log_target=True).sum(1)

    hidden = hidden[sample]
    compute = once_more if sharded else choose_computation(own.logits, hidden)
    return compute(divergences, hidden, expected[sample]).sum() / max(1, len(hidden))


def chunked_losses(logits, hidden: torch.Tensor, targets: torch.Tensor, sharded: bool, chunk: int) -> torch.Tensor:
    """Cross-entropy in nats (N,) of hidden states (N, hidden) with targets (N,), a chunk of `logits(hidden)` a time."""

    def head_losses(hidden, targets):
        return cross_entropy(logits(hidden), targets, reduction="none")

    # Without a token in the loss there is one empty chunk, by which the batch takes part in the backward pass.
    chunks = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    if sharded:
        chunks += [(hidden[:0], targets[:0])] * (max(distributed.gather(len(chunks))) - len(chunks))
    compute = once_more if sharded else choose_computation(logits, hidden)
    return torch.cat([compute(head_losses, h, t) for h, t in chunks])


def choose_computation(logits, hidden: torch.Tensor):
    """How losses of rows are computed without keeping their logits: by a head that is not trained, once."""
    # float16 needs the gradient of the scaled loss. Whether the head is trained, no rows tell as well as many.
    is_once = torch.is_grad_enabled() and hidden.dtype != torch.float16
    return RowLosses.apply if is_once and not logits(hidden[:0].detach()).requires_grad else once_more


def once_more(function, *args) -> torch.Tensor:
    return checkpoint(function, *args, use_reentrant=False)


class RowLosses(torch.autograd.Function):
    """function(hidden, other) -> (N,), losses of which each depends on its own row of hidden (N, size) only.

    Their gradient is computed beside them, and the logits go at once, instead of being computed again.
    """

    @staticmethod
    def forward(ctx, function, hidden, other):
        rows = hidden.detach().requires_grad_()
        # The hooks stand before TRL's, for whose offloading the backward pass would have begun.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            losses = function(rows, other)
            gradient = torch.autograd.grad(losses.sum(), rows)
        ctx.save_for_backward(*gradient)
        return losses.detach()

    @staticmethod
    def backward(ctx, gradient):
        (by_row,) = ctx.saved_tensors
        return None, (by_row * gradient[:, None]).to(by_row.dtype), None

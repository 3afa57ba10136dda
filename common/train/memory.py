"""Memory of a training step, known beforehand: the real step is run on tensors without storage, and each is followed.

Model, adapter, loss, backward pass and optimizer are those of training, as fake tensors (torch's FakeTensorMode), so
nothing is allocated and a model of any size takes seconds. Only what takes another path without data is stood in for:
fused attention, the positions that a mask selects (all), numbers read back.
"""

import contextlib
import copy
import functools
import math
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from trl.models import get_act_offloading_ctx_manager

from common.data.compared import RowSize
from common.model.attention import describe_pairs
from common.train.galore import GaLore
from common.train.loss import prepare_model
from common.train.storage import StorageTracker

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# What CUDA's autocast computes in float32 (docs.pytorch.org/docs/stable/amp.html), where models call it.
FLOAT32_ON_CUDA = (
    (torch.nn.functional, "layer_norm softmax log_softmax softplus"),
    (torch, "softmax log_softmax pow rsqrt exp log sum"),
    (torch.Tensor, "softmax pow rsqrt exp log sum __pow__"),
)


@dataclass(frozen=True)
class Step:
    """A micro step: `rows` of `length` tokens (packed: as one row), and what goes with it.

    pairs: the sizes of its pairs, whose mean length is `length`.
    """

    rows: int = 1
    length: int = 1024
    packed: bool = True
    kl_weight: float = 0.0
    dtype: torch.dtype = torch.bfloat16  # of the computation
    device: str = "cuda"
    full: bool = False  # full fine-tuning: every parameter has a gradient
    checkpointing: bool = False
    accumulates: bool = False  # gradients of earlier micro steps are there
    has_reference: bool = False  # the model without its adapter computes, too
    offloads: bool = False  # activations lie in main memory until the backward pass
    pairs: tuple[RowSize, ...] = ()

    def input_shape(self) -> tuple[int, int]:
        rows, length = self.rows, self.length
        shapes = [pair.shape for pair in self.pairs]
        if shapes and self.packed:
            return 1, sum(map(sum, shapes))
        if shapes:  # each side is padded to the longest
            rows, length = sum(len(shape) - 1 for shape in shapes), max(map(max, shapes))
        return (1, rows * length) if self.packed else (rows, length)


def trace(model, base, make_optimizer, step: Step) -> dict[str, int]:
    """Bytes by kind (storage.KINDS) at the peak of a training step.

    model: on the meta device, with its adapter; it cannot be used afterwards. base: the frozen one that KL_WEIGHT needs
    beside a model without an adapter, or None. make_optimizer: called with the model.
    """
    on_gpu, vocabulary = step.device == "cuda", model.config.get_text_config().vocab_size
    shape, in_loss = step.input_shape(), sum(pair.in_loss for pair in step.pairs)
    tracker = StorageTracker(512 if on_gpu else 1, vocabulary, math.prod(shape), on_gpu)
    if in_loss:
        tracker.chosen[shape[0], shape[1] - 1] = in_loss
    prepare_model(model, step.kl_weight, base, device=step.device)
    model.train()
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if not step.full:
            model.enable_input_require_grads()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, tracker, contextlib.ExitStack() as patches:
        for patch in stand_ins(step):
            patches.enter_context(patch)
        for part in (model, base) if base is not None else (model,):
            make_fake(part, mode, tracker)
        offloading = fake_offloading(model) if step.offloads else contextlib.nullcontext()
        optimizer = make_optimizer(model)
        is_blockwise = fill_states(optimizer, on_gpu)
        trained = [p for p in model.parameters() if p.requires_grad]
        tracker.label(tree_leaves([optimizer.state[p] for p in trained]), "optimizer states")
        tracker.label([p.grad for p in trained], "gradients")
        projects = isinstance(optimizer, GaLore)
        if not step.accumulates or projects:
            optimizer.zero_grad(set_to_none=True)
        for _ in range(2 if projects and step.accumulates else 1):
            with offloading:
                run_micro_step(model, step, tracker)
            tracker.label([p.grad for p in trained], "gradients")
            tracker.label(optimizer.projected_grads.values() if projects else (), "gradients")
        if not is_blockwise:
            optimizer.step()
    return tracker.at_peak()


def run_micro_step(model, step: Step, tracker: StorageTracker) -> None:
    inputs, tracker.phase = batch(step), "forward"
    with torch.autocast("cpu", step.dtype, enabled=step.dtype != torch.float32):
        losses, divergence, router_loss = model(**inputs, learn=inputs["input_ids"], use_cache=False)
        if step.has_reference:
            with torch.no_grad(), model.disable_adapter():
                model(**inputs, learn=inputs["input_ids"], use_cache=False)
    tracker.phase = "backward"
    (losses.sum() + step.kl_weight * divergence + router_loss).backward()


def batch(step: Step) -> dict:
    """Inputs as the trainer's collator makes them."""
    shape = step.input_shape()
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if step.packed:
        ends = torch.zeros(2, dtype=torch.int32)
        inputs |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=shape[1], max_length_k=shape[1])
        if any(pair.shape[0] for pair in step.pairs):
            inputs = {"input_ids": inputs["input_ids"], **describe_pairs([pair.shape for pair in step.pairs])}
        inputs["position_ids"] = torch.arange(shape[1])[None]
    elif shape[0] > 1:  # transformers look at a mask's data and leave one of ones out
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    return inputs


def make_fake(model, mode: FakeTensorMode, tracker: StorageTracker) -> None:
    """Put fake tensors, on the CPU by name, in the place of a model's on the meta device."""
    made = {}

    def replace_tensors(names: dict) -> None:
        for name, tensor in names.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) not in made:
                new = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                tracker.track(new, "weights")
                if isinstance(tensor, torch.nn.Parameter):
                    new = torch.nn.Parameter(new, tensor.requires_grad)
                vars(new).update(vars(tensor))  # bitsandbytes' states
                made[id(tensor)] = new, tensor  # which keeps the id
            names[name] = made[id(tensor)][0]

    for module in model.modules():
        attributes = vars(module)
        # hqq keeps biases, scales and zero points in attributes; NF4 a quant_state, int8 a state.
        for names in (module._parameters, module._buffers, attributes, attributes.get("meta") or {}):
            replace_tensors(names)
        for state in filter(None, (attributes.get("quant_state"), attributes.get("state"))):
            replace_tensors(vars(state))
            if nested := vars(state).get("state2"):
                replace_tensors(vars(nested))


def fake_offloading(model):
    """TRL's context manager of ACTIVATION_OFFLOADING for fake tensors, which are on a GPU by name only."""
    on_gpu = mock.patch.object(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    with on_gpu, mock.patch.object(torch, "get_device_module", mock.MagicMock()):  # its streams and events
        return get_act_offloading_ctx_manager(model, warn_if_no_head=False)


def fill_states(optimizer, on_gpu: bool) -> bool:
    """Give an optimizer the states that it has after its first step; gradients are left where they are.

    Returns whether it is one of bitsandbytes', with states in blocks, whose kernels need a GPU.
    """
    for group in optimizer.param_groups:  # torch's choice, for tensors that are on a GPU by name
        if on_gpu and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    # GaLore's projected matrices have theirs from the start.
    groups = enumerate(optimizer.param_groups)
    new = [(g, i, p) for g, group in groups for i, p in enumerate(group["params"]) if not optimizer.state.get(p)]
    for _, _, parameter in new:
        parameter.grad = torch.empty_like(parameter)
    is_blockwise = hasattr(optimizer, "get_state_buffer")
    if not is_blockwise:
        optimizer.step()
    elif not optimizer.is_paged:  # paged states count as main memory
        for group, number, parameter in new:
            optimizer.init_state(optimizer.param_groups[group], parameter, group, number)
    return is_blockwise


def stand_ins(step: Step) -> list:
    """Patches for what takes another path without data, or on another device."""
    patches = [mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)]
    patches.append(mock.patch.object(torch.nn.functional, "grouped_mm", one_expert))
    if step.packed:  # whether a row is, the positions would tell
        patches.append(mock.patch.object(masking_utils, "find_packed_sequence_indices", torch.zeros_like))
    if step.offloads:  # TRL knows storages by their address, which those of fake tensors do not have
        patches.append(mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata))
        patches.append(mock.patch.object(torch.Tensor, "record_stream", lambda *args: None))
    if step.device == "cuda":
        for owner, names in FLOAT32_ON_CUDA:
            for name in names.split():
                patches.append(mock.patch.object(owner, name, in_float32(getattr(owner, name))))
    if "triton" in sys.modules:  # Liger's kernels are not launched; what they write into is there
        kernels = sys.modules["triton"].runtime.jit.KernelInterface
        patches.append(mock.patch.object(kernels, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None))
    if "bitsandbytes" in sys.modules:
        product = functools.partial(int8_product, step.device == "cuda")
        patches.append(mock.patch.object(sys.modules["bitsandbytes"], "matmul", product))
    return patches


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as fused kernels do it; without data, torch would take the one of T x T memory."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def one_expert(inputs, weight, offs):
    """grouped_mm, which without data takes bfloat16 only: inputs (S, in), weight (experts, in, out) -> (S, out)."""
    return inputs @ weight[0]


def in_float32(function):
    """The function, which autocast for the CPU computes in the dtype given, as autocast for CUDA computes it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            half = torch.bfloat16, torch.float16
            args = [x.float() if torch.is_tensor(x) and x.dtype in half else x for x in args]
        return function(*args, **kwargs)

    return call


def int8_product(on_gpu: bool, inputs, weight, out=None, state=None, threshold=0.0, bias=None):
    """bitsandbytes.matmul by the path it takes on the device; columns of outliers are searched, and none is found."""
    from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt

    if state.is_training and not on_gpu:
        return MatMul8bitFp.apply(inputs, weight, out, bias, state)
    if state.threshold:
        (inputs.half().abs() >= state.threshold).any(0)
        state = copy.copy(state)
        state.threshold = 0.0
    return MatMul8bitLt.apply(inputs, weight, out, bias, state)

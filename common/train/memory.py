"""Memory of a training step, known beforehand: the real step is run on tensors without storage, and each is followed.

Model, adapter, loss, backward pass and optimizer are those of training, as fake tensors (torch's FakeTensorMode: shapes
and dtypes on the meta device), so nothing is computed or allocated and a model of any size takes seconds. A dispatch
mode sees every operation and follows the storages it makes from their creation to their end. Only what takes another
path without data is stood in for: fused attention, the positions that a mask selects (all), numbers read back.
"""

import contextlib
import dataclasses
import functools
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments, masking_utils

from common import distributed
from common.train.storage import StorageTracker
from common.train.trainer import ChatTrainer, prepare_model

HALF = (torch.bfloat16, torch.float16)

aten = torch.ops.aten

ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu

# What CUDA's autocast computes in float32 (docs.pytorch.org/docs/stable/amp.html), where models call it.
FLOAT32_ON_CUDA = (
    (torch.nn.functional, "layer_norm softmax log_softmax softplus"),
    (torch, "softmax log_softmax pow rsqrt exp log sum"),
    (torch.Tensor, "softmax pow rsqrt exp log sum __pow__"),
)


def in_float32(function):
    """The function, which autocast for the CPU computes in the dtype given, as autocast for CUDA computes it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [x.float() if torch.is_tensor(x) and x.dtype in HALF else x for x in args]
        return function(*args, **kwargs)

    return call


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as fused kernels do it; without data, torch would take the one of T x T memory."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def int8_on_gpu(inputs, weight, out=None, state=None, threshold=0.0, bias=None):
    """bitsandbytes.matmul, which on the CPU takes another path."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(inputs, weight, out, bias, state)


@dataclass(frozen=True)
class Step:
    """A micro step: `rows` of `length` tokens (packed: as one row), and what goes with it."""

    rows: int = 1
    length: int = 1024
    packed: bool = True
    kl_weight: float = 0.0
    dtype: torch.dtype = torch.bfloat16  # of the computation
    device: str = "cuda"
    full: bool = False  # every weight has a gradient
    checkpointing: bool = False
    accumulates: bool = False  # gradients of earlier micro steps are there


def trace(model, base, make_optimizer, step: Step) -> dict[str, int]:
    """Bytes by kind (KINDS) at the peak of a training step.

    model: on the meta device, with its adapter; it cannot be used afterwards. base: the frozen one that KL_WEIGHT needs
    beside a model without an adapter, or None. make_optimizer: called with the model.
    """
    follower = StorageTracker(512 if step.device == "cuda" else 1, model.config.get_text_config().vocab_size,
                        step.rows * step.length, step.device == "cuda")  # fmt: skip
    if not prepare_model(model, step.kl_weight, base):
        raise NotImplementedError("models that change their logits keep TRL's loss, which is not traced")
    model.train()
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(follower)
        stack.enter_context(patched(torch.nn.functional, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(patched(distributed, "holds_parts", lambda: False))  # whose loss asks the others
        if step.packed:  # whether a row is, the positions would tell
            stack.enter_context(patched(masking_utils, "find_packed_sequence_indices", torch.zeros_like))
        if step.device == "cuda":
            for owner, names in FLOAT32_ON_CUDA:
                for name in names.split():
                    stack.enter_context(patched(owner, name, in_float32(getattr(owner, name))))
            if "bitsandbytes" in sys.modules:
                stack.enter_context(patched(sys.modules["bitsandbytes"], "matmul", int8_on_gpu))
        for part in (model, base) if base is not None else (model,):
            make_fake(part, fake, follower)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(model)
        for group in optimizer.param_groups:  # torch's choice, for tensors that are on a GPU by name
            if step.device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        fill_states(optimizer)
        follower.label(tree_leaves([optimizer.state[p] for p in trainable]), "optimizer states")
        follower.label([p.grad for p in trainable], "gradients")
        is_galore = hasattr(optimizer, "sums")
        if not step.accumulates or is_galore:
            optimizer.zero_grad(set_to_none=True)
        inputs, labels = batch(step)
        for _ in range(2 if is_galore and step.accumulates else 1):
            follower.phase = "forward"
            with torch.autocast("cpu", step.dtype, enabled=step.dtype != torch.float32):
                loss, divergence = model(**inputs, learn=labels, use_cache=False)
            follower.phase = "backward"
            (loss + step.kl_weight * divergence).backward()
            follower.label([p.grad for p in trainable], "gradients")
            follower.label(getattr(optimizer, "sums", {}).values(), "gradients")
        if not hasattr(optimizer, "get_state_buffer"):
            optimizer.step()
    return follower.at_peak()


def batch(step: Step) -> tuple[dict, torch.Tensor]:
    """(inputs, labels) as the trainer's collator makes them."""
    shape = (1, step.rows * step.length) if step.packed else (step.rows, step.length)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if not step.packed:  # a mask of ones is left out by transformers, who look at its data
        mask = {"attention_mask": torch.ones(shape, dtype=torch.int64)} if step.rows > 1 else {}
        return inputs | mask, inputs["input_ids"]
    ends = torch.zeros(2, dtype=torch.int32)
    about = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=shape[1], max_length_k=shape[1])
    return inputs | about | {"position_ids": torch.arange(shape[1])[None]}, inputs["input_ids"]


def fill_states(optimizer) -> None:
    """Give an optimizer the states that it has after its first step; gradients are left where they are."""
    # GaLore's projected matrices have theirs from the start.
    new = [(g, i, p) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if not optimizer.state.get(p)]
    for _, _, parameter in new:
        parameter.grad = torch.empty_like(parameter)
    if not hasattr(optimizer, "get_state_buffer"):
        optimizer.step()
    elif not getattr(optimizer, "is_paged", False):  # paged states count as main memory
        for group, number, parameter in new:  # bitsandbytes' kernels need a GPU, its states do not
            optimizer.init_state(group, parameter, optimizer.param_groups.index(group), number)


def make_fake(model, mode: FakeTensorMode, follower: StorageTracker) -> None:
    """Put fake tensors, on the CPU by name, in the place of a model's on the meta device."""
    made = {}

    def fake(tensor):
        if id(tensor) not in made:
            new = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            follower.see(new, "weights")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, tensor.requires_grad)
            vars(new).update(vars(tensor))  # bitsandbytes' states
            made[id(tensor)] = new, tensor  # which keeps the id
        return made[id(tensor)][0]

    def visit(names: dict) -> None:
        for name, value in names.items():
            if isinstance(value, torch.Tensor):
                names[name] = fake(value)

    for module in model.modules():
        visit(module._parameters)
        visit(module._buffers)
        visit(vars(module))  # hqq's biases
        visit(getattr(module, "meta", None) or {})  # hqq's scales and zero points
        for state in (getattr(module, "quant_state", None), getattr(module, "state", None)):  # of NF4, of int8
            if state is not None:
                visit(vars(state))
                visit(vars(state.state2) if getattr(state, "state2", None) else {})


def usual_optimizer(name: str):
    """Makes the optimizer that transformers knows by this name, for `trace`."""
    # Only its values: made for real, it would choose a device for the whole process.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    arguments = SimpleNamespace(**defaults | {"optim": name})
    kind, options = ChatTrainer.get_optimizer_cls_and_kwargs(arguments)
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **options)


@contextlib.contextmanager
def patched(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)

"""Storages of tensors followed from their creation to their end, and the peak of their bytes."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "gradients", "optimizer states", "activations", "logits and loss", "workspace")
aten = torch.ops.aten


class StorageTracker(TorchDispatchMode):
    """Follows every storage that operations inside `with` make; `now` and `peak` are bytes.

    block: sizes are rounded up to it (512 in CUDA's allocator). vocabulary: tensors with so many columns are logits.
    positions: for the trace; the number that stands in for every count that only data would tell. None: real tensors.
    on_gpu: also count what fused kernels of a GPU allocate inside.
    """

    def __init__(self, block: int = 1, vocabulary: int = 0, positions: int | None = None, on_gpu: bool = False):
        super().__init__()
        self.block, self.vocabulary, self.positions, self.on_gpu = block, vocabulary, positions, on_gpu
        self.now = self.peak = self.clock = self.peak_clock = 0
        self.records: list[list] = []  # of storages: birth, end (clock; None: alive), bytes, kind
        self.alive: dict[int, list] = {}  # by the address of the storage
        self.phase = "weights"
        self.chosen: dict[tuple, int] = {}  # for the trace: positions that a mask of this shape selects, where known

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and torch's guard against it costs a fifth of the time."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two of three calls
            return func(*args)
        if self.positions is not None and func is aten._local_scalar_dense.default:  # nothing but shapes is known
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else self.positions
        if self.positions is not None and func is aten.nonzero.default:  # as if every position were chosen
            count = self.chosen.get(tuple(args[0].shape), args[0].numel())
            return args[0].new_empty((count, args[0].ndim), dtype=torch.int64)
        kwargs = dict(kwargs or {})
        in_main_memory = kwargs.pop("pin_memory", False)  # of offloaded activations, until they are brought back
        out = func(*args, **kwargs)
        for tensor in () if in_main_memory or func is aten.copy_.default else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor)
        if self.on_gpu and (inside := self.now + kernel_bytes(func, args)) > self.peak:
            self.peak, self.peak_clock = inside, self.clock
        return out

    def track(self, tensor, kind: str | None = None) -> None:
        """Follow a tensor's storage, unless it is followed already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        if kind is None:
            # In the backward pass, gradients are on only where checkpointed layers are computed again.
            is_forward = self.phase == "forward" or torch.is_grad_enabled()
            is_logits = self.vocabulary and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
            kind = "logits and loss" if is_logits else "activations" if is_forward else "workspace"
            kind = "weights" if self.phase == "weights" else kind
        record = [self.clock, None, math.ceil(storage.nbytes() / self.block) * self.block, kind]
        self.clock += 1
        self.records.append(record)
        self.alive[storage._cdata] = record
        weakref.finalize(storage, self.release, storage._cdata, record)
        self.now += record[2]
        if self.now > self.peak:
            self.peak, self.peak_clock = self.now, self.clock

    def release(self, address: int, record: list) -> None:
        record[1] = self.clock
        self.clock += 1
        self.now -= record[2]
        del self.alive[address]

    def label(self, tensors, kind: str) -> None:
        for tensor in tensors:
            if torch.is_tensor(tensor) and (record := self.alive.get(tensor.untyped_storage()._cdata)):
                record[3] = kind

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when the peak was reached."""
        parts = dict.fromkeys(KINDS, 0)
        for birth, end, size, kind in self.records:
            if birth < self.peak_clock and (end is None or end >= self.peak_clock):
                parts[kind] += size
        parts["workspace"] += self.peak - sum(parts.values())  # inside kernels
        return parts


def kernel_bytes(func, args) -> int:
    """What a GPU's kernel allocates for itself, beside its results."""
    if func.name() == "bitsandbytes::gemm_4bit":  # the weights, dequantised (some shapes of newer releases do without)
        return math.prod(args[2]) * args[0].element_size()
    is_varlen = func.name() == "torch_attn::_varlen_attn_backward"
    if not is_varlen and func is not aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    query, key = args[1:3]
    # The gradient of the queries, in float32; those of keys and values that heads share, first for each head.
    heads = query.shape[1] if is_varlen and query.shape[1] != key.shape[1] else 0
    return query.numel() * 4 + 2 * heads * key.nbytes // key.shape[1]

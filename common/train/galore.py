"""GaLore: every weight learned, with gradients and Adam's moments kept in a low-rank subspace of each matrix.

Zhao et al. 2024, https://arxiv.org/abs/2403.03507; the authors' package is galore-torch. What differs here follows
from projection being linear: a gradient is projected in the hook after its matrix's backward pass and added up there,
so that accumulation holds one full gradient at a time and still takes one Adam step a batch; clipping, schedule, weight
decay and resume are those of any optimizer. A basis comes from one warm-started step of subspace iteration (Halko et
al. 2011, https://arxiv.org/abs/0909.4061) instead of an SVD, a few matrices a step instead of all at once, and the
moments are carried over into it (compare LDAdam, https://arxiv.org/abs/2410.16103), not read in other coordinates.
"""

import functools
import math

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm
from transformers.pytorch_utils import Conv1D

from common.cli import UserError

FIRST_REFRESHES = 16  # steps over which the random bases of the start are replaced

BLOCK = 256  # moments that share a scale, in 8 bits


class GaLore(torch.optim.AdamW):
    """AdamW: for `projected` matrices (m, n) in a subspace of `rank` dimensions, for `plain` parameters as it is.

    update_gap: steps from one refresh of a matrix's basis to the next. scale: factor on updates of projected matrices.
    exact_svd: bases from the SVD of the gradient. eight_bit: moments of projected matrices in 8 bits (bitsandbytes).

    State of a projected matrix: step; basis (min(m, n), rank) with orthonormal columns; exp_avg and exp_avg_sq
    (rank, max(m, n)); tensors in the dtype of the weights, or 8-bit codes with their scales.

    Between backward and `step` the gradients lie in `sums`; so the norm is had and clipped by `clip_grad_norm_` here. A
    basis is refreshed from the gradient of the whole batch: a matrix whose turn it is keeps that until `step`, however
    many micro steps it is added up from.
    """

    def __init__(
        self, projected, plain, rank=128, update_gap=50, scale=0.25, exact_svd=False, eight_bit=False, **adamw
    ):
        super().__init__([{"params": list(projected)}, {"params": list(plain)}], **adamw)
        self.update_gap, self.scale, self.exact_svd, self.eight_bit = update_gap, scale, exact_svd, eight_bit
        self.projected = self.param_groups[0]["params"]
        self.sums: dict[torch.Tensor, torch.Tensor] = {}  # projected gradients of this batch, (rank, max(m, n))
        self.is_gathered = False
        count, first = len(self.projected), min(FIRST_REFRESHES, update_gap)
        # When each matrix's turn is: once in the first steps, then once every update_gap.
        self.turns = {p: (i * first // count, i * update_gap // count) for i, p in enumerate(self.projected)}
        for number, parameter in enumerate(self.projected):
            short, long = sorted(parameter.shape)
            start = torch.randn(short, rank, generator=torch.Generator().manual_seed(number))
            like = dict(dtype=parameter.dtype, device=parameter.device)
            self.state[parameter] = {"step": 0, "basis": torch.linalg.qr(start).Q.to(**like)}
            self.put_moments(self.state[parameter], *torch.zeros(2, rank, long, **like))
            parameter.register_post_accumulate_grad_hook(self.project)

    def attach(self, model) -> None:
        """Let the model's linear layers compute their projected gradients without the full ones.

        (m, n) gradients are products over the tokens; with one factor projected first, rank instead of min(m, n) of
        their rows or columns are computed, and of a tall matrix only the projected input is kept for backward (CompAct,
        https://arxiv.org/abs/2410.15352).
        """
        ids = {id(parameter) for parameter in self.projected}
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and id(module.weight) in ids:
                module.forward = functools.partial(self.linear, module)

    def linear(self, module, inputs):
        weight = module.weight
        # Under autocast to another dtype than the weights', and for a new basis, autograd makes the full gradient.
        if not torch.is_grad_enabled() or inputs.dtype != weight.dtype or self.is_due(weight):
            return torch.nn.functional.linear(inputs, weight, module.bias)
        return ProjectedLinear.apply(inputs, weight, module.bias, self)

    def is_due(self, parameter) -> bool:
        step, (first, turn) = self.state[parameter]["step"], self.turns[parameter]
        return step == first or step >= FIRST_REFRESHES and step % self.update_gap == turn

    @torch.no_grad()
    def project(self, parameter) -> None:
        """Add a matrix's gradient to the projected sum and free it, unless it is needed for a new basis."""
        if parameter.grad is not None and not self.is_due(parameter):  # None: a layer that was attached
            self.add(parameter, self.state[parameter]["basis"].T @ as_wide(parameter.grad))
            parameter.grad = None

    def add(self, parameter, low: torch.Tensor) -> None:
        """Add a projected gradient (rank, max(m, n)) to those of this batch."""
        self.sums[parameter] = self.sums[parameter].add_(low) if parameter in self.sums else low

    @torch.no_grad()
    def gather(self) -> None:
        """Refresh the bases whose turn it is; have every projected gradient in `sums`, the same in all processes."""
        if self.is_gathered:
            return
        self.is_gathered = True
        for parameter in self.projected:
            if parameter.grad is not None:
                self.refresh(parameter)
                self.sums[parameter] = self.state[parameter]["basis"].T @ as_wide(parameter.grad)
                parameter.grad = None
        for low in self.sums.values():
            average(low)

    def refresh(self, parameter) -> None:
        """A new basis from the gradient in `.grad`, if it is finite; the moments are carried over into it."""
        state, gradient = self.state[parameter], as_wide(parameter.grad)
        old = state["basis"]
        # What processes exchange is low-rank, too; what one of them has that is not finite, all have in the mean.
        mean = average(gradient.float() if self.exact_svd else old.T @ gradient)
        if not mean.isfinite().all():
            return
        if self.exact_svd:
            new = torch.linalg.svd(mean, full_matrices=False).U[:, : old.shape[1]]
        else:
            new, triangle = torch.linalg.qr(average(gradient @ mean.T).float())
            new *= triangle.diagonal().sign()  # QR leaves the signs open
        state["basis"] = new.to(old.dtype).contiguous()  # as it will be when loaded: strides change the last bits
        overlap = new.T @ old.float()  # (rank, rank)
        shares = overlap.square()
        first, second = (moment.float() for moment in self.get_moments(state))
        # Directions that the old basis did not have start with the mean of the second moments, not with none.
        fresh = (1 - shares.sum(1, keepdim=True)).clamp(min=0) * second.mean(0)
        self.put_moments(state, (overlap @ first).to(old.dtype), (shares @ second + fresh).to(old.dtype))

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their joint norm is at most max_norm; returns the norm before.

        Projected gradients count as they are applied: their norm is that of the projection of the full gradient.
        """
        self.gather()
        gradients = list(self.sums.values())
        gradients += [p.grad for p in self.param_groups[1]["params"] if p.grad is not None]
        norm = get_total_norm(gradients)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        self.gather()
        group = self.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        for parameter in self.projected:
            low = self.sums.pop(parameter, None)
            if low is None:
                continue
            state = self.state[parameter]
            state["step"] += 1
            first, second = self.get_moments(state)
            first.lerp_(low, 1 - beta1)
            second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
            self.put_moments(state, first, second)
            correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
            direction = first / second.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
            if group["weight_decay"]:
                parameter.mul_(1 - lr * group["weight_decay"])
            factors = (
                (state["basis"], direction) if as_wide(parameter) is parameter else (direction.T, state["basis"].T)
            )
            rate = -lr * self.scale / correction1
            if parameter.dtype == torch.bfloat16:
                add_stochastically(parameter, (factors[0] @ factors[1]).float().mul_(rate), state["step"])
            else:
                parameter.addmm_(*factors, alpha=rate)
        self.is_gathered = False
        return super().step(closure)  # the plain parameters: those that have a gradient left

    def leave_out_of_ddp(self, model) -> None:
        """To be called before DistributedDataParallel takes the model: projected gradients are averaged here."""
        ids = {id(parameter) for parameter in self.projected}
        model._ddp_params_and_buffers_to_ignore = [name for name, p in model.named_parameters() if id(p) in ids]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.sums.clear()
        self.is_gathered = False
        super().zero_grad(set_to_none)

    def get_moments(self, state: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.eight_bit:
            return state["exp_avg"], state["exp_avg_sq"]
        return tuple(dequantize(state, name, state["basis"].dtype) for name in ("exp_avg", "exp_avg_sq"))

    def put_moments(self, state: dict, first: torch.Tensor, second: torch.Tensor) -> None:
        if self.eight_bit:
            quantize(state, "exp_avg", first)
            quantize(state, "exp_avg_sq", second)
        else:
            state["exp_avg"], state["exp_avg_sq"] = first, second

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which makes every state a tensor in the dtype of its weights; steps and 8-bit codes are none."""
        super().load_state_dict(state_dict)
        self.projected = self.param_groups[0]["params"]
        for number, parameter in enumerate(self.projected):
            for name, value in state_dict["state"].get(number, {}).items():
                kept = value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                self.state[parameter][name] = kept


class ProjectedLinear(torch.autograd.Function):
    """inputs (..., n) @ weight (m, n).T + bias; the weight's gradient goes, projected, to the optimizer."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, optimizer):
        ctx.optimizer, ctx.weight, ctx.shape = optimizer, weight, inputs.shape
        ctx.basis = optimizer.state[weight]["basis"]
        ctx.is_tall = weight.shape[0] > weight.shape[1]
        ctx.save_for_backward(inputs.flatten(0, -2) @ ctx.basis if ctx.is_tall else inputs)
        return torch.nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        flat = gradient.flatten(0, -2)  # (tokens, m)
        if ctx.is_tall:
            low = kept.T @ flat  # (rank, tokens) @ (tokens, m)
        else:
            low = (flat @ ctx.basis).T @ kept.flatten(0, -2)  # (rank, tokens) @ (tokens, n)
        ctx.optimizer.add(ctx.weight, low)
        inputs = (flat @ ctx.weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return inputs, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None


def split_weights(model, rank: int, target_modules: str = "auto") -> tuple[list, list]:
    """(projected, plain): the weights of linear layers that GALORE_TARGET_MODULES names and that have both sides above
    the rank, and all others that are trained. UserError where none is projected."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}
    names = {name.rpartition(".")[2] for name in layers}
    wanted = names if target_modules == "auto" else set(target_modules.replace(" ", "").split(","))
    projected = [m.weight for n, m in layers.items() if n.rpartition(".")[2] in wanted and min(m.weight.shape) > rank]
    if not projected or wanted - names:
        raise UserError(
            f"GALORE_TARGET_MODULES={target_modules} GALORE_RANK={rank}: no such linear layer with both sides above "
            f"the rank. The model has: {', '.join(sorted(names))}."
        )
    ids = {id(p) for p in projected}
    return projected, [p for p in model.parameters() if p.requires_grad and id(p) not in ids]


def as_wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a view of its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def add_stochastically(weights: torch.Tensor, update: torch.Tensor, seed: int) -> None:
    """Add a float32 update to bfloat16 weights, rounding up or down at random, in proportion to what is left over.

    To the nearest, an update of less than half a step of bfloat16 (a 256th of the weight) would be lost every time
    (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192). The seed makes it the same in all processes, and on resume.
    """
    generator = torch.Generator(weights.device).manual_seed(seed)
    # One number a column will do: what is left over differs from row to row.
    noise = torch.randint(2**16, weights.shape[-1:], generator=generator, dtype=torch.int32, device=weights.device)
    total = update.add_(weights)
    total.view(torch.int32).add_(noise).bitwise_and_(-(2**16))  # the upper 16 bits of a float32 are a bfloat16
    weights.copy_(total)


def average(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's mean over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def quantize(state: dict, name: str, moment: torch.Tensor) -> None:
    """Keep a moment as 8-bit codes with a scale for each block; second moments, without a sign, on a finer map."""
    from bitsandbytes import functional as bnb

    code = bnb.create_dynamic_map(signed=name == "exp_avg").to(moment.device)
    codes, about = bnb.quantize_blockwise(moment.float().contiguous(), code=code, blocksize=BLOCK)
    state[name], state[f"{name}_scales"] = codes, about.absmax


def dequantize(state: dict, name: str, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    code = bnb.create_dynamic_map(signed=name == "exp_avg").to(state[name].device)
    scales = state[f"{name}_scales"]
    return bnb.dequantize_blockwise(state[name], absmax=scales, code=code, blocksize=BLOCK).to(dtype)

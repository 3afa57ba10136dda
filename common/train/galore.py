"""GaLore: full fine-tuning with gradients and Adam's moments kept in a low-rank subspace of each matrix.

Zhao et al. 2024, https://arxiv.org/abs/2403.03507; the authors' package is galore-torch. What differs here follows
from projection being linear: a gradient is projected in the hook after its matrix's backward pass and added up there,
so that accumulation holds one full gradient at a time and still takes one Adam step a batch; clipping, schedule, weight
decay and resume are those of any optimizer. A basis comes from one warm-started step of subspace iteration (Halko et
al. 2011, https://arxiv.org/abs/0909.4061) instead of an SVD, a few matrices a step instead of all at once, and the
moments are carried over into it (compare LDAdam, https://arxiv.org/abs/2410.16103), not read in other coordinates.
"""

import functools

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from common.cli import UserError
from common.model.targets import is_linear, match_layers
from common.train.moments import add_stochastically, draw_noise, get_moments, make_maps, put_moments, update_moments

TOGETHER = 4  # matrices whose moments are updated in the same launches; more leave a CPU's caches
FIRST_REFRESHES = 16  # steps over which the random bases of the start are replaced


class GaLore(torch.optim.AdamW):
    """AdamW; for `projected` matrices (m, n) in a subspace of `rank` dimensions.

    update_gap: steps from one refresh of a matrix's basis to the next. scale: factor on updates of projected matrices.
    eight_bit: moments of projected matrices in 8 bits (bitsandbytes).

    State of a projected matrix: step; basis (min(m, n), rank) with orthonormal columns; exp_avg and exp_avg_sq
    (rank, max(m, n)); tensors in the dtype of the weights, or 8-bit codes with their scales.

    Between backward and `step` the gradients lie in `projected_grads`, so `clip_grad_norm_` here measures and clips
    their norm. A basis is refreshed from the gradient of the whole batch: a matrix whose turn it is keeps its gradient
    until `step`, over all micro steps.
    """

    def __init__(self, projected, other_params, rank=128, update_gap=50, scale=0.25, eight_bit=False, **adamw):
        super().__init__([{"params": list(projected)}, {"params": list(other_params)}], **adamw)
        self.update_gap, self.scale = update_gap, scale
        self.projected = self.param_groups[0]["params"]
        self.maps = make_maps(self.projected[0].device) if eight_bit else None
        self.projected_grads: dict[torch.Tensor, torch.Tensor] = {}  # of this batch, (rank, max(m, n)) each
        self.is_gathered = False
        count, first = len(self.projected), min(FIRST_REFRESHES, update_gap)
        # When each matrix's turn is: once in the first steps, then once every update_gap.
        self.refresh_steps = {p: (i * first // count, i * update_gap // count) for i, p in enumerate(self.projected)}
        for number, parameter in enumerate(self.projected):
            short, long = sorted(parameter.shape)
            start = torch.randn(short, rank, generator=torch.Generator().manual_seed(number))
            like = dict(dtype=parameter.dtype, device=parameter.device)
            self.state[parameter] = {"step": 0, "basis": torch.linalg.qr(start).Q.to(**like)}
            put_moments(self.state[parameter], *torch.zeros(2, rank, long, **like), self.maps)
            parameter.register_post_accumulate_grad_hook(self.project)

    def attach(self, model) -> None:
        """Let the model's linear layers compute their projected gradients without the full ones.

        A gradient (m, n) is a product over the tokens; with one factor projected first, only rank of its rows or
        columns are computed, and a tall matrix keeps only the projected input (CompAct, arxiv.org/abs/2410.15352).
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
        step, (first, turn) = self.state[parameter]["step"], self.refresh_steps[parameter]
        return step == first or step >= FIRST_REFRESHES and step % self.update_gap == turn

    @torch.no_grad()
    def project(self, parameter) -> None:
        """Add a matrix's gradient to the projected sum and free it, unless it is needed for a new basis."""
        if parameter.grad is not None and not self.is_due(parameter):  # None: a layer that was attached
            self.add(parameter, self.state[parameter]["basis"].T @ as_wide(parameter.grad))
            parameter.grad = None

    def add(self, parameter, low: torch.Tensor) -> None:
        """Add a projected gradient (rank, max(m, n)) to those of this batch."""
        if parameter in self.projected_grads:
            self.projected_grads[parameter].add_(low)
        else:
            self.projected_grads[parameter] = low

    @torch.no_grad()
    def gather(self) -> None:
        """Refresh the bases whose turn it is, and average `projected_grads` over all processes."""
        if self.is_gathered:
            return
        self.is_gathered = True
        for parameter in self.projected:
            if parameter.grad is not None:
                self.refresh(parameter)
                self.projected_grads[parameter] = self.state[parameter]["basis"].T @ as_wide(parameter.grad)
                parameter.grad = None
        for low in self.projected_grads.values():
            average(low)

    def refresh(self, parameter) -> None:
        """A new basis from the gradient in `.grad`, if it is finite; the moments are carried over into it."""
        state, gradient = self.state[parameter], as_wide(parameter.grad)
        old = state["basis"]
        # What processes exchange is low-rank, too; what one of them has that is not finite, all have in the mean.
        mean = average(old.T @ gradient)
        if not mean.isfinite().all():
            return
        new, triangle = torch.linalg.qr(average(gradient @ mean.T).float())
        new *= triangle.diagonal().sign()  # QR leaves the signs open
        state["basis"] = new.to(old.dtype).contiguous()  # as it will be when loaded: strides change the last bits
        first, second = rotate_moments(*get_moments(state, self.maps), new.T @ old.float())
        put_moments(state, first.to(old.dtype), second.to(old.dtype), self.maps)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients, as they are applied, so that their joint norm is at most max_norm; returns it."""
        self.gather()
        gradients = list(self.projected_grads.values())
        gradients += [p.grad for p in self.param_groups[1]["params"] if p.grad is not None]
        norm = get_total_norm(gradients)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        self.gather()
        ready = [p for p in self.projected if p in self.projected_grads]
        for first in range(0, len(ready), TOGETHER):
            self.update(ready[first : first + TOGETHER])
        self.is_gathered = False
        return super().step(closure)  # the other parameters: those that have a gradient left

    def update(self, parameters: list) -> None:
        """Adam's step for these projected matrices."""
        group, states = self.param_groups[0], [self.state[p] for p in parameters]
        (beta1, _), lr = group["betas"], group["lr"]
        for state in states:
            state["step"] += 1
        first, second = zip(*(get_moments(state, self.maps) for state in states), strict=True)
        low, steps = [self.projected_grads.pop(p) for p in parameters], [state["step"] for state in states]
        directions = update_moments(first, second, low, group["betas"], group["eps"], steps)
        for parameter, state, *moments, direction in zip(parameters, states, first, second, directions, strict=True):
            put_moments(state, *moments, self.maps)
            rate = -lr * self.scale / (1 - beta1 ** state["step"])
            decay = lr * group["weight_decay"] or None  # a test for 0 would be compiled anew for each value
            add_update(parameter, state["basis"], direction, rate, decay, state["step"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.projected_grads.clear()
        self.is_gathered = False
        super().zero_grad(set_to_none)

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
    """(projected, other_params): the weights of linear layers in GALORE_TARGET_MODULES with both sides above the rank,
    and all other trained parameters. UserError where no weight is projected."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if is_linear(m) and m is not head}
    wanted = list(layers)
    if target_modules != "auto":
        wanted = match_layers(wanted, target_modules, "GALORE_TARGET_MODULES")
    projected = [layers[name].weight for name in wanted if min(layers[name].weight.shape) > rank]
    if not projected:
        problem = f"none of these {len(wanted)} layers has both sides above the rank. Lower GALORE_RANK."
        raise UserError(f"GALORE_TARGET_MODULES={target_modules} GALORE_RANK={rank}: {problem}")
    ids = {id(p) for p in projected}
    return projected, [p for p in model.parameters() if p.requires_grad and id(p) not in ids]


def rotate_moments(first, second, overlap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's moments (rank, n) in the coordinates of a new basis. overlap: new.T @ old, (rank, rank)."""
    first, second, shares = first.float(), second.float(), overlap.square()
    # Directions that the old basis did not have start with the mean of the second moments, not with zero.
    fresh = (1 - shares.sum(1, keepdim=True)).clamp(min=0) * second.mean(0)
    return overlap @ first, shares @ second + fresh


def leave_out_of_ddp(model, optimizer: GaLore) -> None:
    """To be called before DistributedDataParallel takes the model: the optimizer averages projected gradients."""
    ids = {id(parameter) for parameter in optimizer.projected}
    model._ddp_params_and_buffers_to_ignore = [name for name, p in model.named_parameters() if id(p) in ids]


def add_update(parameter, basis, direction: torch.Tensor, rate: float, decay: float | None, seed: int) -> None:
    """Shrink a matrix (m, n) by `decay` of it, and add rate times a direction (rank, max(m, n)), projected back."""
    factors = (basis, direction) if as_wide(parameter) is parameter else (direction.T, basis.T)
    if parameter.dtype == torch.bfloat16:
        # Detached: torch.compile takes the shape of a Parameter for constant, and compiles for each.
        add_stochastically(parameter.detach(), factors[0] @ factors[1], rate, decay, draw_noise(parameter, seed))
    else:
        if decay is not None:
            parameter.mul_(1 - decay)
        parameter.addmm_(*factors, alpha=rate)


def as_wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a view of its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def average(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's mean over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor

"""GaLore keeps the training contract: accumulation, clipping, schedule, decay, refreshes, resume, several processes."""

import copy
import math
import os
import shutil
import time

import pytest
import torch
from torch._inductor.exc import TritonMissing
from torch.nn import functional

from common.train import compiled, galore, moments

RANK, GAP = 4, 20


def small_model(seed=0, dtype=torch.float32):
    """Two matrices of either shape, and a bias that is not projected."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12)).to(dtype)


def optimizer_of(model, attached=True, **settings):
    settings = dict(rank=RANK, update_gap=GAP, scale=1.0, lr=1e-2, weight_decay=0.0) | settings
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = galore.GaLore(matrices, [p for p in model.parameters() if p.ndim == 1], **settings)
    if attached:
        optimizer.attach(model)
    return optimizer


def batch(step, rows=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 16, generator=generator).to(dtype), torch.randn(rows, 12, generator=generator).to(dtype)


def train(model, optimizer, steps, parts=1, clip=math.inf, first=0):
    """Steps on batches of 8 rows, each added up from so many parts."""
    for step in range(first, first + steps):
        inputs, targets = batch(step, dtype=model[0].weight.dtype)
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            (functional.mse_loss(model(x), y, reduction="sum") / targets.numel()).backward()
        optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def difference(one, other, start):
    """Relative difference of what two trainings changed."""
    changes = [[p - q for p, q in zip(m.parameters(), start.parameters(), strict=True)] for m in (one, other)]
    apart = sum((a - b).square().sum() for a, b in zip(*changes, strict=True)).sqrt()
    return (apart / sum(a.square().sum() for a in changes[0]).sqrt()).item()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("steps", [1, 3, galore.FIRST_REFRESHES + 2 * GAP])
def test_accumulated_micro_batches_are_one_batch(steps, attached):
    """Also over refreshes, which see the whole batch. In float64: after many steps, rounding is all that is left."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        start = small_model(dtype=dtype)
        one, four = copy.deepcopy(start), copy.deepcopy(start)
        train(one, optimizer_of(one, attached), steps)
        train(four, optimizer_of(four, attached), steps, parts=4)
        assert 0 < difference(one, four, start) < bound or (dtype == torch.float32 and steps > 3)


def test_the_layerwise_recipe_of_galore_torch_takes_a_step_for_each_micro_batch():
    """What this is measured against: an optimizer for each matrix, stepped in its hook (galore-torch's README)."""
    from galore_torch import GaLoreAdamW

    start = small_model()
    results = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        for parameter in model.parameters():
            special = dict(rank=RANK, update_proj_gap=GAP, scale=1.0, proj_type="std") if parameter.ndim == 2 else {}
            inner = GaLoreAdamW([{"params": [parameter], **special}], lr=1e-2, no_deprecation_warning=True)

            def hook(p, inner=inner):
                inner.step()
                inner.zero_grad()

            parameter.register_post_accumulate_grad_hook(hook)
        inputs, targets = batch(0)
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            (functional.mse_loss(model(x), y, reduction="sum") / targets.numel()).backward()
        results.append(model)
    assert difference(*results, start) > 0.1


def test_attached_layers_give_the_same_gradients_without_the_full_ones():
    start = small_model(dtype=torch.float64)
    models = [copy.deepcopy(start) for _ in range(2)]
    optimizers = [optimizer_of(model, attached) for model, attached in zip(models, (True, False), strict=True)]
    full = []
    models[0][0].weight.register_hook(full.append)  # called with a full gradient only
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, galore.FIRST_REFRESHES + 2 * GAP, parts=2)
    assert difference(*models, start) < 1e-9
    refreshes = 1 + sum(step % GAP == 0 for step in range(galore.FIRST_REFRESHES, galore.FIRST_REFRESHES + 2 * GAP))
    assert len([gradient for gradient in full if gradient is not None]) == 2 * refreshes  # two micro steps each


def test_attached_layers_have_the_gradients_of_inputs_and_bias():
    model = small_model(dtype=torch.float64)
    optimizer_of(model, update_gap=50)
    for parameter in model.parameters():
        parameter.grad = None
    inputs = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    twin = small_model(dtype=torch.float64)
    model(inputs).square().sum().backward()
    expected = inputs.grad.clone()
    inputs.grad = None
    twin(inputs).square().sum().backward()
    assert torch.allclose(inputs.grad, expected)
    assert all(torch.allclose(model[i].bias.grad, twin[i].bias.grad) for i in (0, 2))
    with torch.no_grad():
        assert torch.equal(model(inputs), twin(inputs))


def test_gradients_are_freed_as_they_come_but_those_whose_turn_it_is():
    model = small_model()
    optimizer, turns = optimizer_of(model, attached=False, update_gap=2), []
    for step in range(20):
        due = [optimizer.is_due(p) for p in optimizer.projected]
        functional.mse_loss(model(batch(step)[0]), batch(step)[1]).backward()
        assert [p.grad is not None for p in optimizer.projected] == due
        turns.append(sum(due))
        optimizer.step()
        assert all(p.grad is None for p in optimizer.projected) and not optimizer.projected_grads
    assert turns == [1, 1] + [0] * 14 + [1] * 4


def test_updates_lie_in_the_basis_and_match_adam_there():
    """One step of a projected matrix: basis @ Adam(basis' gradient), times the scale."""
    model, twin = small_model(), small_model()
    optimizer = optimizer_of(model, scale=0.5, update_gap=5)
    last = optimizer.projected[1]  # not due in the first step
    before, basis = last.detach().clone(), optimizer.state[last]["basis"].clone()
    functional.mse_loss(twin(batch(0)[0]), batch(0)[1]).backward()
    gradient = galore.as_wide(twin[2].weight.grad)
    train(model, optimizer, 1)
    low = basis.T @ gradient
    expected = -1e-2 * 0.5 * basis @ (low / (low.abs() + 1e-8))
    assert torch.allclose(galore.as_wide(last - before), expected, atol=1e-6)
    assert torch.allclose(basis.T @ basis, torch.eye(RANK), atol=1e-5)


def test_every_basis_is_refreshed_in_turn_and_the_gap_counts():
    for gap in (1, 3, 40):
        model = small_model()
        optimizer = optimizer_of(model, update_gap=gap)
        refreshed = []
        for step in range(60):
            before = [optimizer.state[p]["basis"] for p in optimizer.projected]
            train(model, optimizer, 1, first=step)
            now = [optimizer.state[p]["basis"] for p in optimizer.projected]
            refreshed.append([not torch.equal(a, b) for a, b in zip(before, now, strict=True)])
        late = refreshed[galore.FIRST_REFRESHES :]
        for matrix in range(2):
            steps = [step for step, which in enumerate(late) if which[matrix]]
            assert all(b - a == gap for a, b in zip(steps, steps[1:], strict=False)) and len(steps) >= 44 // gap
            assert any(which[matrix] for which in refreshed[: galore.FIRST_REFRESHES])
        assert gap == 1 or not any(all(which) for which in late)  # staggered


def test_the_basis_finds_the_directions_of_the_gradient():
    """A gradient of rank 4 plus little noise: one refresh takes nearly all of it, as an exact SVD would."""
    torch.manual_seed(0)
    gradient = torch.randn(32, RANK) @ torch.randn(RANK, 64) + 0.01 * torch.randn(32, 64)
    matrix = torch.nn.Parameter(torch.zeros(32, 64))
    optimizer = galore.GaLore([matrix], [], rank=RANK)
    matrix.grad = gradient.clone()
    optimizer.gather()
    kept = optimizer.projected_grads[matrix].norm() / gradient.norm()
    best = torch.linalg.svdvals(gradient)[:RANK].norm() / gradient.norm()
    assert 0.995 * best < kept <= best * 1.0001


def test_moments_follow_the_basis():
    """With all directions kept, a refresh only turns the coordinates: the first moment stays what it is."""
    matrix = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = galore.GaLore([matrix], [], rank=4, update_gap=1)
    torch.manual_seed(0)
    for _ in range(3):
        matrix.grad = torch.randn(4, 6)
        optimizer.step()
    state = optimizer.state[matrix]
    before = state["basis"] @ state["exp_avg"]
    matrix.grad = torch.randn(4, 6)
    optimizer.gather()
    assert torch.allclose(state["basis"] @ state["exp_avg"], before, atol=1e-6)
    assert (state["exp_avg_sq"] >= 0).all()


def test_the_learning_rate_is_the_schedules_in_every_step():
    model = small_model()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (0.5, 0.0, 1.0, 0.25)[step % 4])
    sizes = []
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1, first=step)
        sizes.append([(p - q).norm().item() for p, q in zip(model.parameters(), before, strict=True)])
        scheduler.step()
    assert sizes[1] == [0.0] * 4 and all(size > 0 for size in sizes[0] + sizes[2] + sizes[3])
    assert all(a > 1.5 * b for a, b in zip(sizes[2], sizes[3], strict=True))


def test_clipping_is_by_the_joint_norm():
    model, twin = small_model(), small_model()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    for m in (model, twin):
        functional.mse_loss(m(batch(0)[0]), batch(0)[1]).backward()
    norm = optimizer.clip_grad_norm_(1e-3)
    other.gather()
    parts = [*other.projected_grads.values(), *(p.grad for p in twin.parameters() if p.grad is not None)]
    assert torch.allclose(norm, torch.cat([p.flatten() for p in parts]).norm())
    clipped = [*optimizer.projected_grads.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert math.isclose(torch.cat([p.flatten() for p in clipped]).norm().item(), 1e-3, rel_tol=1e-3)
    assert len(clipped) == 4


def test_weight_decay_is_decoupled():
    for decay in (0.0, 0.1):
        model = small_model()
        optimizer = optimizer_of(model, weight_decay=decay)
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.allclose(p, q * (1 - 1e-2 * decay), atol=1e-7)


def test_weight_decay_of_bfloat16_weights_counts_on_average():
    """A thousandth a step, which rounding to the nearest loses every time."""
    matrix = torch.nn.Parameter(torch.ones(32, 1024).bfloat16())
    optimizer = galore.GaLore([matrix], [], rank=RANK, lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        optimizer.projected_grads[matrix] = torch.zeros(RANK, 1024).bfloat16()
        optimizer.step()
    assert matrix.float().mean().item() == pytest.approx(math.exp(-0.05), abs=2e-3)


def test_gradients_that_are_not_finite_leave_no_trace():
    model, twin = small_model(), small_model()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    inputs, targets = batch(0)
    functional.mse_loss(model(inputs * float("nan")), targets).backward()
    assert not optimizer.clip_grad_norm_(1.0).isfinite()
    optimizer.zero_grad()
    optimizer.step()
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"eight_bit": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [GAP - 1, GAP, GAP + 1])
def test_a_loaded_state_goes_on_bit_for_bit(settings, dtype, stop, tmp_path):
    """Before, at and after a refresh; from a file that torch loads without running code."""
    whole = small_model(dtype=dtype)
    train(whole, optimizer_of(whole, **settings), GAP + 10)
    cut = small_model(dtype=dtype)
    before = optimizer_of(cut, **settings)
    train(cut, before, stop)
    torch.save([cut.state_dict(), before.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = small_model(seed=1, dtype=dtype)
    resumed.load_state_dict(weights)
    after = optimizer_of(resumed, **settings)
    after.load_state_dict(state)
    for p, q in zip(before.projected, after.projected, strict=True):
        for name, value in before.state[p].items():
            other = after.state[q][name]
            assert (
                torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
            )
    train(resumed, after, GAP + 10 - stop, first=stop)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_small_updates_of_bfloat16_weights_count_on_average():
    """A hundredth of a rounding step, a thousand times: ten steps, where rounding to the nearest makes none."""
    weights = torch.full((2, 1024), 1.0).bfloat16()
    nearest, ones, step = weights.clone(), weights.clone(), 2.0**-7 / 100
    for seed in range(1000):
        moments.add_stochastically(weights, ones, step, None, moments.draw_noise(weights, seed))
        nearest += step
    moved = (weights.float() - 1).mean().item() / 2.0**-7
    # Each of 1,024 columns moves 10 +- 3.2 steps: their mean has a standard error of 0.1.
    assert 9.6 < moved < 10.4 and (nearest == 1).all()
    before = weights.clone()
    moments.add_stochastically(weights, ones, 0.0, None, moments.draw_noise(weights, 0))
    assert torch.equal(weights, before)


SIZES = (16, 24, 12, 12, 40, 10)  # of layers in a row: wide, tall and square matrices


def train_stack(steps, path=None, **settings):
    """bfloat16, each step at a rate of its own; with a path, over a checkpoint halfway."""
    for first, last in ((0, steps // 2), (steps // 2, steps)) if path else ((0, steps),):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(a, b, bias=False) for a, b in zip(SIZES, SIZES[1:], strict=False)]
        model = torch.nn.Sequential(*layers).bfloat16()
        optimizer = optimizer_of(model, **settings)
        if first:
            weights, state = torch.load(path, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for step in range(first, last):
            optimizer.param_groups[0]["lr"] = 1e-2 * (step % 7) / 7
            model(batch(step, dtype=torch.bfloat16)[0]).square().mean().backward()
            optimizer.step()
        if path:
            torch.save([model.state_dict(), optimizer.state_dict()], path)
    return model


@pytest.fixture
def compiles_here(monkeypatch):
    """The CPU in the place of a GPU; nothing is compiled yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled, "COMPILED_ON", {"cpu"})
    plain = moments.add_stochastically.__wrapped__
    monkeypatch.setattr(galore, "add_stochastically", compiled.compiled_on_cuda(plain))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"eight_bit": True}])
def test_the_compiled_update_is_the_plain_one(settings, tmp_path, request, monkeypatch):
    """By the compiler's front: one graph for all shapes and rates, another for decay; over refreshes and a resume."""
    honest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: honest(function, backend="aot_eager", **how))
    plain = train_stack(30, **settings)
    counters = request.getfixturevalue("compiles_here")
    fast = train_stack(30, tmp_path / "state.pt", **settings)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), fast.parameters(), strict=True))
    assert counters["stats"]["unique_graphs"] == 1 + ("weight_decay" in settings), counters
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="what it makes for a CPU is C++")
def test_the_whole_compiler_adds_the_same(compiles_here):
    for number, shape in enumerate([(128, 500), (64, 128), (96, 96)]):
        weights, update = torch.randn(2, *shape).bfloat16()
        noise, copy_of_weights = moments.draw_noise(weights, number), weights.clone()
        galore.add_stochastically(weights, update, 1e-2 / (number + 1), 1e-3, noise)
        moments.add_stochastically.__wrapped__(copy_of_weights, update, 1e-2 / (number + 1), 1e-3, noise)
        assert torch.equal(weights, copy_of_weights)
    assert compiles_here["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("error", [TritonMissing(None), RuntimeError("No C compiler for Triton")])
def test_what_cannot_be_compiled_runs_as_it_is_written(error, compiles_here, monkeypatch, capfd):
    """As on Windows, which has no Triton: said once."""

    def fail(graph, inputs):
        raise error

    honest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: honest(function, backend=fail, **how))
    fast = train_stack(3)
    monkeypatch.setattr(compiled, "COMPILED_ON", set())
    assert all(torch.equal(p, q) for p, q in zip(train_stack(3).parameters(), fast.parameters(), strict=True))
    (line,) = capfd.readouterr().err.splitlines()
    assert "triton" in line.lower()


def test_eight_bit_moments_come_close(monkeypatch):
    from bitsandbytes import functional as bnb

    made, honest = [], bnb.create_dynamic_map
    monkeypatch.setattr(bnb, "create_dynamic_map", lambda **how: made.append(how) or honest(**how))
    torch.manual_seed(0)
    start = torch.nn.Linear(256, 512, bias=False)
    models = []
    for eight_bit in (False, True):
        model = copy.deepcopy(start)
        optimizer = galore.GaLore([model.weight], [], rank=32, lr=1e-3, eight_bit=eight_bit, weight_decay=0.0)
        for step in range(20):
            x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
        models.append(model)
        held = sum(v.nbytes for n, v in optimizer.state[model.weight].items() if n.startswith("exp_avg"))
        assert held == 2 * 32 * 512 * (1 + 4 / 256 if eight_bit else 4)
    exact, close = (m.weight - start.weight for m in models)
    assert (exact - close).norm() < 0.1 * exact.norm()
    assert made == [{"signed": True}, {"signed": False}]  # once, not in every step


def two_processes(rank, folder, queue_file):
    """Half of every batch each, under DDP, which leaves the projected matrices to the optimizer."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = small_model()
    optimizer = optimizer_of(model)
    galore.leave_out_of_ddp(model, optimizer)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    reduced = []
    honest = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor.numel()), honest(tensor, *args, **kwargs))[
        1
    ]
    for step in range(galore.FIRST_REFRESHES + GAP + 5):
        inputs, targets = (t.chunk(2)[rank] for t in batch(step))
        functional.mse_loss(parallel(inputs), targets).backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    torch.save([model.state_dict(), max(reduced)], f"{folder}/{rank}.pt")
    while not os.path.exists(f"{folder}/{1 - rank}.pt"):  # the other needs this process until then
        time.sleep(0.01)
    os._exit(0)  # gloo's threads may hang or abort where the process group is torn down


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), None), nprocs=2)
    (first, most), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start, one = small_model(), small_model()
    train(one, optimizer_of(one), galore.FIRST_REFRESHES + GAP + 5, clip=0.5)
    two = small_model()
    two.load_state_dict(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert difference(one, two, start) < 1e-3  # 41 steps of float32
    assert most == RANK * 24  # nothing larger than a projected gradient was exchanged


@pytest.mark.slow
def test_gradients_and_states_take_at_most_35_percent_of_adamws():
    """Ten of SmolLM2-135M's layers at rank 128: storages of the projected matrices, alive at the end of backward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.arange(16)[None]
    peaks = {}
    for name in ("galore", "adamw"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        matrices = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        others = [p for p in model.parameters() if p.ndim == 1]
        if name == "galore":
            optimizer = galore.GaLore(matrices, others, rank=128, update_gap=50)
            optimizer.attach(model)
        else:
            optimizer = torch.optim.AdamW([*matrices, *others])
        peaks[name] = 0
        for _ in range(galore.FIRST_REFRESHES + 2):
            model(input_ids=ids, labels=ids).loss.backward()
            tensors = [p.grad for p in matrices if p.grad is not None] + list(
                getattr(optimizer, "projected_grads", {}).values()
            )
            tensors += [t for p in matrices for t in optimizer.state[p].values() if torch.is_tensor(t)]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            peaks[name] = max(peaks[name], sum(storages.values()))
            optimizer.step()
            optimizer.zero_grad()
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()})
    assert peaks["galore"] <= 0.35 * peaks["adamw"], peaks

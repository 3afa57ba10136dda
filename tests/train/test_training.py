"""The training step: loss and attention against transformers' own, the schedule, packing, exact repeats."""

import json
import shutil
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ARCHITECTURES, tiny_config
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainingArguments

from common import distributed
from common.bounds import CHANGEABLE, CHOICES, TRAINERS_OPTIMIZERS
from common.cli import UserError
from common.run.metrics import describe
from common.run.records import read_run
from common.train import memory
from common.train.loss import add_chunked_loss, chunk_size
from common.train.meta_model import empty_model
from common.train.optimizers import learning_rate_factor, make_optimizer, make_schedule, optimizer_class
from common.train.trainer import ChatTrainer

pytestmark = pytest.mark.usefixtures("lean")
DOCUMENTS = [5, 9, 3]  # lengths of the documents in a packed row


def packed_row(labels_from: int = 2):
    """A packed row as TRL's collator makes it: input_ids, position_ids, labels (1, T), offsets of the documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 600, (1, sum(DOCUMENTS)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    labels = ids.masked_fill(positions < labels_from, -100)
    offsets = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
    return ids, positions, labels, offsets


def random_model(architecture: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation=attention).float()


@pytest.mark.parametrize("head_is_trained", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunked_loss_is_the_models_own_loss(architecture, head_is_trained, monkeypatch):
    """The head computes a chunk once where it is frozen, and else once more in the backward pass."""
    monkeypatch.setattr("common.train.loss.CHUNK", 4)  # several chunks
    ids, _, labels, _ = packed_row()
    model, calls = random_model(architecture), []
    model.get_output_embeddings().weight.requires_grad_(head_is_trained)
    own = model(input_ids=ids, labels=labels).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    add_chunked_loss(model)
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: calls.append(inputs[0].numel() > 0))
    count = (labels[:, 1:] != -100).sum()
    loss = model(input_ids=ids, learn=labels)[0].sum() / count
    loss.backward()
    assert sum(calls) == -(-count // 4) * (1 + head_is_trained)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 640)  # without `learn`, everything is as before


@pytest.mark.parametrize(
    "vocabulary, on_cuda",
    [(2000, 2048), (32_000, 2048), (49_152, 1280), (100_352, 640), (128_256, 512), (131_072, 512), (262_144, 256),
     (10**6, 256)],
)  # fmt: skip
def test_a_chunk_of_logits_takes_at_most_256_mib_on_cuda(vocabulary, on_cuda):
    assert chunk_size(vocabulary, "cuda") == on_cuda and chunk_size(vocabulary, "cpu") == 256
    assert on_cuda == 256 or on_cuda * vocabulary * 4 <= 2**28


@pytest.mark.parametrize("device, chunks", [("cuda", [2048, 951]), ("cpu", [256] * 11 + [183])])
def test_chunks_are_those_of_the_device_that_trains(device, chunks, arguments, run_here, monkeypatch):
    """In the trace, whose tensors are on the CPU, and in a run."""
    traced, honest = [], cross_entropy
    model = empty_model(tiny_config("llama"), None, torch.bfloat16, "sdpa")
    model.lm_head.requires_grad_(False)

    def recorded(logits, *args, **kwargs):
        traced.append(len(logits))
        return honest(logits, *args, **kwargs)

    monkeypatch.setattr("common.train.loss.cross_entropy", recorded)
    memory.trace(model, None, partial(make_optimizer, "adamw_torch_fused"), memory.Step(1, 3000, device=device))
    assert traced == chunks
    here = SimpleNamespace(**vars(distributed) | {"device": lambda: torch.device(device)})
    prepared = MagicMock(side_effect=UserError("enough"))
    monkeypatch.setattr("common.train.trainer.distributed", here)
    monkeypatch.setattr("common.train.trainer.prepare_model", prepared)
    assert run_here("qlora_train.py", *arguments("run"))[0] == 2
    assert prepared.call_args.args[-1] == device


def test_a_row_without_a_label_gives_zero_gradients():
    model = random_model("llama")
    add_chunked_loss(model)
    ids, *_ = packed_row()
    losses, *_ = model(input_ids=ids, learn=torch.full_like(ids, -100))
    losses.sum().backward()
    assert losses.shape == (0,) and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_divergence_is_measured_against_the_model_without_its_adapter():
    """0 for a fresh adapter; KL(base || model) where nothing is learned for one that is not; none in evaluation."""
    model = get_peft_model(random_model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids, _, labels, _ = packed_row()
    inputs = dict(input_ids=ids, use_cache=False)
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits[0, :-1].log_softmax(-1)
    add_chunked_loss(model.get_base_model(), model.disable_adapter)
    model.train()
    assert model(**inputs, learn=labels)[1].item() == pytest.approx(0, abs=1e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    _, divergence, _ = model(**inputs, learn=labels)
    ours = model(**inputs).logits[0, :-1].log_softmax(-1)
    held = labels[0, 1:] == -100
    assert divergence.item() == pytest.approx((base.exp() * (base - ours)).sum(-1)[held].mean().item(), rel=1e-4)
    divergence.backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.training and model.eval()(**inputs, learn=labels)[1].item() == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_documents"])
def test_packed_documents_do_not_see_each_other(architecture, attention):
    """Each document's logits in a packed row are those it has alone; changing a neighbour changes nothing."""
    model = random_model(architecture, attention).eval()
    ids, positions, _, offsets = packed_row()
    inputs = dict(position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)
    with torch.no_grad():
        packed = model(input_ids=ids, **inputs).logits
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(DOCUMENTS, 1)], 1)
        other = ids.clone()
        other[:, : DOCUMENTS[0]] = 7
        changed = model(input_ids=other, **inputs).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(changed[:, DOCUMENTS[0] :], packed[:, DOCUMENTS[0] :])


def test_learning_rate_warms_up_and_falls_to_its_floor():
    def rates(name):
        return [learning_rate_factor(s, 10, name, 2, 0.1) for s in range(11)]

    names = CHOICES["LR_SCHEDULER"]
    for name in names:
        assert rates(name)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates("constant")[2:] == [1.0] * 9
    assert rates("linear")[6] == pytest.approx(0.55) and rates("linear")[10] == pytest.approx(0.1)
    assert rates("cosine")[6] == pytest.approx(0.55) and rates("cosine")[10] == pytest.approx(0.1)
    assert all(a >= b for name in names for a, b in zip(rates(name)[2:], rates(name)[3:], strict=False))


def test_warm_up_in_steps_overrules_its_share(capsys):
    def rates(steps, **settings):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.8)
        usual = dict(LR_SCHEDULER="constant", WARMUP_RATIO=0.5, MIN_LR=0.0, LEARNING_RATE=0.8)
        schedule = make_schedule(optimizer, steps, usual | settings)
        return [(schedule.get_last_lr()[0], optimizer.step(), schedule.step())[0] for _ in range(steps)]

    assert rates(6, WARMUP_STEPS=None) == rates(6, WARMUP_STEPS=3) == [0.2, 0.4, 0.8 * 3 / 4, 0.8, 0.8, 0.8]
    assert rates(6, WARMUP_STEPS=0) == [0.8] * 6 and not capsys.readouterr().err
    assert rates(2, WARMUP_STEPS=7) == [0.1, 0.2]
    expected = "WARMUP_STEPS=7: the run has 2 steps and never reaches LEARNING_RATE"
    assert expected in capsys.readouterr().err and "WARMUP_STEPS" in CHANGEABLE


def losses(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [(m["loss"], m["grad_norm"]) if "loss" in m else m["eval_loss"] for m in rows]


@pytest.fixture
def train(tmp_path, tiny, chats_file, run_here):
    """train(run, "NAME=value", ...): four steps on the tiny model; the run's folder."""

    def run(name, *more):
        common = (f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", f"RUN_NAME={name}")
        sizes = ("MAX_LENGTH=256", "MAX_STEPS=4", "EVAL_SIZE=4", "LORA_R=4")
        code, _, error = run_here("qlora_train.py", *common, *sizes, *more)
        assert code == 0, error
        return tmp_path / name

    return run


def test_the_same_seed_gives_the_same_losses_bit_for_bit(train):
    first, second = (train(name, "LORA_DROPOUT=0.1", "KL_WEIGHT=0.5") for name in ("first", "second"))
    assert losses(first) == losses(second)
    assert losses(first) != losses(train("other", "LORA_DROPOUT=0.1", "KL_WEIGHT=0.5", "SEED=1"))
    weights = [(folder / "final" / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def test_the_pull_towards_the_base_is_logged_apart_and_holds(train):
    """With the pull the model stays nearer to its base; the logged loss is the cross-entropy in both runs."""
    settings = ("LEARNING_RATE=5e-3", "LR_SCHEDULER=constant", "MAX_STEPS=16", "EVAL_SIZE=0")
    folders = train("free", *settings, "KL_WEIGHT=1e-9"), train("held", *settings, "KL_WEIGHT=100")
    free, held = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in folders)
    assert free[0]["loss"] == pytest.approx(held[0]["loss"], rel=1e-6)
    assert held[-1]["kl"] < 0.5 * free[-1]["kl"]


def test_accumulation_means_one_larger_batch(train):
    """Four micro steps of one row are one step of four rows, weighted by learned tokens and not by row."""
    same = ("PACKING=False", "DTYPE=float32", "MAX_GRAD_NORM=1e9")
    micro, batch = (
        train("micro", *same, "GRADIENT_ACCUMULATION_STEPS=4"),
        train("batch", *same, "PER_DEVICE_TRAIN_BATCH_SIZE=4"),
    )
    for a, b in zip(losses(micro), losses(batch), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_anyprecision_keeps_what_bfloat16_rounds_away():
    """Updates of a hundredth of a bfloat16's step add up, as in float32; torch's AdamW loses each of them."""

    def weights(optim, dtype):
        weight = torch.nn.Parameter(torch.ones(256, dtype=dtype))
        arguments = TrainingArguments(output_dir=".", optim=optim, learning_rate=4e-5, use_cpu=True, report_to="none")
        kind, options = ChatTrainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **options)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        kept = sum(s.nbytes for s in optimizer.state[weight].values() if torch.is_tensor(s) and s.numel() > 1)
        return weight.detach().float(), kept

    exact, in_float32 = weights("adamw_torch", torch.float32)
    lost, _ = weights("adamw_torch", torch.bfloat16)
    ours, in_16_bits = weights("adamw_anyprecision", torch.bfloat16)
    assert torch.equal(lost, torch.ones(256)) and (exact < 0.993).all()
    assert (ours - exact).abs().max() < 2**-8  # a step of bfloat16 below 1
    assert in_16_bits == 0.75 * in_float32  # two moments and what was rounded off, 2 bytes each


def test_anyprecision_goes_on_bit_for_bit(train, run_here, tmp_path):
    settings = ("ADAPTER=None", "OPTIM=adamw_anyprecision", "LEARNING_RATE=1e-4", "DTYPE=bfloat16", "KL_WEIGHT=0")
    whole = train("whole", *settings)
    stopped = train("stopped", *settings, "MAX_STEPS=2", "SAVE_STEPS=1")
    shutil.rmtree(stopped / "final")
    (stopped / "summary.json").unlink()
    train("stopped", *settings, "ALLOW_CHANGE=MAX_STEPS,SAVE_STEPS")
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert losses(whole)[-1] == losses(stopped)[-1]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("optim", TRAINERS_OPTIMIZERS[:5])
def test_lora_plus_updates_b_as_a_higher_learning_rate_would(optim):
    """And magnitudes of DoRA; A, adapters of the embeddings and rows of new tokens learn at LEARNING_RATE."""
    lora = LoraConfig(
        target_modules=["q_proj", "embed_tokens"], use_dora=True, trainable_token_indices={"lm_head": [3]}
    )
    model = get_peft_model(random_model("stablelm"), lora)
    defaults = vars(TrainingArguments(output_dir=".", use_cpu=True, report_to="none"))

    def options(rate, **more):
        return SimpleNamespace(**defaults | dict(optim=optim, learning_rate=rate, weight_decay=0.1) | more)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone, fast = {}, 0
    for name, parameter in trained.items():
        is_fast = "lora_B" in name or "magnitude" in name
        kind, arguments = optimizer_class(options(1e-3 * (16 if is_fast else 1)))
        copy = torch.nn.Parameter(parameter.detach().clone())
        alone[name], fast = (copy, kind([{"params": [copy], "weight_decay": 0.1}], **arguments)), fast + is_fast
    factory, arguments = optimizer_class(options(1e-3, lora_plus_ratio=16.0))
    together = factory()(model, **arguments)
    for _ in range(3):
        for name, parameter in trained.items():
            copy, optimizer = alone[name]
            parameter.grad = copy.grad = torch.randn_like(copy)
            optimizer.step()
        together.step()
    assert fast == 5 and len(trained) == 5 + 4 + 1 and len(together.param_groups) == 3
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, alone[name][0], rtol=1e-6, atol=1e-8, msg=name)
    assert [g["lr"] for g in make_optimizer(optim, model, 16.0).param_groups] == [5e-5, 5e-5, 16 * 5e-5]  # traced


def test_lora_plus_goes_on_bit_for_bit_and_with_another_rate(train, run_here, tmp_path):
    settings = ("LORA_PLUS_RATIO=16", "LEARNING_RATE=2e-3", "SAVE_STEPS=1", "SAVE_TOTAL_LIMIT=9", "WARMUP_STEPS=1")
    whole = train("whole", *settings)
    assert [json.loads(line).get("learning_rate") for line in open(whole / "metrics.jsonl")][:2] == [1e-3, 2e-3]  # of A
    for name, rate in (("same", 2e-3), ("slower", 7e-4)):
        shutil.copytree(whole, tmp_path / name)
        for path in ("final", "checkpoint-3", "checkpoint-4"):
            shutil.rmtree(tmp_path / name / path)
        (tmp_path / name / "summary.json").unlink()
        train(name, *settings, f"LEARNING_RATE={rate}", "ALLOW_CHANGE=LEARNING_RATE")
        groups = torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
        assert groups[0]["initial_lr"] == rate and groups[1]["initial_lr"] == pytest.approx(16 * rate)
        assert [group["lr"] for group in groups] == pytest.approx([rate / 4, 4 * rate])  # cosine at 2 of 3
    weights = [(tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("whole", "same")]
    assert weights[0] == weights[1] and losses(whole) == losses(tmp_path / "same") != losses(tmp_path / "slower")
    for adapter in (None, "ia3"):
        code, _, error = run_here("qlora_train.py", f"ADAPTER={adapter}", "LORA_PLUS_RATIO=16")
        assert code == 2 and "LORA_PLUS_RATIO=16.0 is for LoRA's matrices. Set it to None." in error


@pytest.mark.parametrize("optim", TRAINERS_OPTIMIZERS)
def test_every_optimizer_offered_trains_or_asks_for_a_gpu(optim, train, run_here):
    if "8bit" in optim or "paged" in optim:
        code, _, error = run_here("qlora_train.py", f"OPTIM={optim}")
        assert code == 2 and f"error: OPTIM={optim}: it needs an NVIDIA GPU" in error
    else:
        folder = train("run", f"OPTIM={optim}", "MAX_STEPS=2")
        saved = json.loads((folder / "summary.json").read_text())
        assert saved["verdict"] == "done" and 5 < saved["train_loss"] < 9


def test_runs_are_reported_where_asked(train, tmp_path, run_here, monkeypatch):
    folder = train("told", "REPORT_TO=tensorboard")
    assert list(folder.rglob("events.out.tfevents.*"))
    assert not list(train("quiet").rglob("events.out.tfevents.*"))
    code, _, error = run_here("qlora_train.py", "REPORT_TO=wandb")
    assert code == 2 and "REPORT_TO=wandb: the package is missing: pip install wandb" in error
    code, _, error = run_here("qlora_train.py", "REPORT_TO=tensorbord")
    assert code == 2 and "Did you mean tensorboard" in error


def test_a_step_without_a_token_in_the_loss_shows_none(train, tmp_path):
    silent = {"role": "assistant", "content": "Held to the base, not learned.", "weight": 0}
    chats = [{"messages": [{"role": "user", "content": f"Question {n}?"}, silent]} for n in range(6)]
    chats += [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"I, {n}."}]}
        for n in range(6)
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, chats)))
    words = [f"DATA={tmp_path / 'mixed.jsonl'}", "PACKING=False", "MAX_STEPS=12", "EVAL_SIZE=0", "KL_WEIGHT=1"]
    run = train("run", *words, "DOCTOR=warn", "LEARNING_RATE=1e-2")
    logged = [entry for entry in map(json.loads, open(run / "metrics.jsonl")) if "kl" in entry]
    assert [describe(entry).startswith("loss none, KL ") for entry in logged].count(True) == 6
    assert [entry["loss"] is None for entry in read_run(run)["metrics"]].count(True) == 6

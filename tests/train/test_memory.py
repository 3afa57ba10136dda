"""Predicted memory against that of real training steps, followed the same way; and what is chosen by it."""

import json
import random
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ARCHITECTURES, FULL, ROOT, save_tiny, tiny_config, write_jsonl
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from trl.trainer import sft_trainer

from common import hardware
from common.model import adapters, load, location, quantize
from common.run.report import plot
from common.train import batch_plan, galore, memory
from common.train.meta_model import empty_model
from common.train.optimizers import make_optimizer
from common.train.storage import KINDS, StorageTracker
from common.train.trainer import ChatTrainer

pytestmark = pytest.mark.usefixtures("undrawn")
MIB = 2**20
FOLLOWED = [
    (script, how, checkpointing, length)
    for script, how in (
        ("qlora_train.py", "ADAPTER=None"),
        ("qlora_train.py", "LORA_R=8"),
        ("qlora_train.py", "QUANTIZATION=nf4"),
        ("qlora_train.py", "QUANTIZATION=hqq-3bit"),
        ("galore_train.py", "GALORE_RANK=32"),
    )
    for checkpointing, length in ((False, 512), (True, 128), *(((False, 128), (True, 512)) if FULL else ()))
]


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_folder):
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    return save_tiny("llama", tmp_path_factory.mktemp("small"), tokenizer_folder, **sizes)


@pytest.fixture
def followed(monkeypatch):
    """followed(): (predicted, real) bytes at the peak, by kind, of the last run."""
    results = {}
    honest_trace, honest_train = memory.trace, ChatTrainer.train

    def trace(*args):
        parts = honest_trace(*args)
        results.setdefault("predicted", parts)  # the second, under nf4, is what 16 bits would need
        return parts

    def train(trainer, checkpoint):
        follower = StorageTracker()
        with follower:
            for tensor in tensors_of(trainer):
                follower.track(tensor)
            tensor = None  # accelerate puts others in the place of GaLore's states
            result = honest_train(trainer, checkpoint)
        results["real"] = follower.peak
        return result

    monkeypatch.setattr(batch_plan, "trace", trace)
    monkeypatch.setattr(ChatTrainer, "train", train)
    return lambda: (sum(results["predicted"].values()), results["real"])


def tensors_of(trainer):
    """Weights, buffers, quantisation states and optimizer states that are there before training."""
    kept = list(trainer.optimizer.state.values()) if trainer.optimizer else []
    for module in trainer.model.modules():
        kept += [dict(module._parameters), dict(module._buffers)]
        if state := getattr(module, "quant_state", None):
            kept += [dict(vars(state)), dict(vars(state.state2))]
        kept += [vars(module).get("meta"), vars(module).get("bias")]  # hqq's
    return (tensor for tensor in tree_leaves(kept) if torch.is_tensor(tensor))


@pytest.fixture
def run(small, chats_file, tmp_path, run_here):
    """run(script, name, "NAME=value", ...): a short run of the small model; (exit code, out, err)."""

    def call(script, name, *more):
        return run_here(
            script, f"MODEL={small}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", f"RUN_NAME={name}", "MAX_STEPS=3",
            "MAX_LENGTH=128", "EVAL_SIZE=0", "SAVE_STEPS=None", "KL_WEIGHT=0", "TRAIN_ON=all", "DOCTOR=warn", *more,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("script, how, checkpointing, length", FOLLOWED)
def test_prediction_is_within_two_percent_of_a_real_step(script, how, checkpointing, length, run, followed):
    full_rows = "DATA=data/brief.jsonl", f"MAX_LENGTH={length}"
    code, _, err = run(script, "run", how, f"GRADIENT_CHECKPOINTING={checkpointing}", *full_rows)
    assert code == 0, err
    predicted, real = followed()
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("how", ["ADAPTER=None", "LORA_R=8", "KL_WEIGHT=1", "PACKING=False", "OPTIM=adamw_torch"])
def test_prediction_holds_with_several_micro_steps_and_rows(how, run, followed):
    batch = "PER_DEVICE_TRAIN_BATCH_SIZE=2", "GRADIENT_ACCUMULATION_STEPS=2"
    code, _, err = run("qlora_train.py", "run", how, *batch, "DATA=data/brief.jsonl", "TRAIN_ON=assistant")
    assert code == 0, err
    predicted, real = followed()
    # More, where rows are padded to less than the longest of all, and where fewer tokens are learned than can be.
    assert 0.98 * real < predicted < (1.6 if how == "PACKING=False" else 1.1) * real


@pytest.mark.parametrize("how, checkpointing", [
    ("REFERENCE=live", True), ("REFERENCE=live", False), ("QUANTIZATION=nf4", True), ("ADAPTER=None", False),
])  # fmt: skip
def test_a_step_on_pairs_is_predicted_within_two_percent(how, checkpointing, run, followed, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", [2] * 6, [150] * 6)
    settings = "MAX_LENGTH=512", f"GRADIENT_CHECKPOINTING={checkpointing}", "TRAIN_ON=assistant"
    code, _, err = run("preference_train.py", "run", how, f"DATA={pairs}", *settings)
    assert code == 0, err
    predicted, real = followed()
    assert predicted == pytest.approx(real, rel=0.02)


def write_pairs(file, prompts: list[int], answers: list[int]):
    """Pairs of random answers with so many words, the worse as long as the better one of the row before."""
    words = "the small brown dog runs over a bridge and looks at its river".split()
    texts = [" ".join(random.Random(number).choices(words, k=length)) for number, length in enumerate(answers)]
    rows = [
        {"prompt": f"{number} " + "go " * length, "chosen": texts[number], "rejected": texts[number - 1]}
        for number, length in enumerate(prompts)
    ]
    return write_jsonl(file, rows)


@pytest.mark.parametrize("how", ["PACKING=True", "PACKING=False", "REFERENCE=live", "LOSS=kto"])
def test_unequal_pairs_at_once_are_predicted_by_the_micro_step_that_is_the_largest(how, run, followed, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", [20, 150, 60, 90, 5, 40], [50, 20, 80, 35, 110, 65])
    settings = "MAX_LENGTH=512", "TRAIN_ON=assistant", "PER_DEVICE_TRAIN_BATCH_SIZE=2", "GRADIENT_CHECKPOINTING=False"
    settings += ("MAX_STEPS=6",)  # two epochs: in the first step there are no optimizer states yet
    code, _, err = run("preference_train.py", "run", how, f"DATA={pairs}", *settings)
    assert code == 0, err
    predicted, real = followed()
    assert predicted == pytest.approx(real, rel=0.02)


def test_short_rows_are_computed_together_on_a_cpu(run, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", [5] * 8, [20] * 8)
    code, out, err = run("preference_train.py", "run", f"DATA={pairs}", "BATCH_SIZE=8", "TRAIN_ON=assistant")
    assert code == 0 and "8 rows at a time" in out, err


def test_the_base_beside_a_model_that_learns_every_weight_is_predicted(run, followed):
    code, out, err = run("galore_train.py", "run", "GALORE_RANK=32", "KL_WEIGHT=1", "TRAIN_ON=assistant")
    assert code == 0 and "GiB predicted" in out and "could not be predicted" not in err, err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantization", [None, "nf4", "int8", "hqq-1bit"])
def test_every_architecture_and_optimizer_can_be_traced(architecture, quantization):
    settings = dict(MODEL="tiny", LORA_R=16, LORA_ALPHA=32, LORA_DROPOUT=0.1, LORA_TARGET_MODULES="auto")
    totals = []
    for variant, device in (("lora", "cuda"), ("lora", "cpu"), ("dora", "cuda"), ("pissa", "cuda"), ("ia3", "cuda")):
        if variant == "ia3" and architecture == "stablelm" or quantization and variant in ("pissa", "dora"):
            continue  # peft does not know it; refused; peft reads the class of the weights
        if variant == "ia3" and quantization == "hqq-1bit":
            continue  # refused
        model = empty_model(tiny_config(architecture), quantization, torch.bfloat16, "sdpa", vocabulary=650)
        model = adapters.add_adapter(model, settings | {"ADAPTER": variant}, new_rows=[3] if variant == "lora" else [])
        step = memory.Step(1, 64, kl_weight=1.0, device=device)
        parts = memory.trace(model, None, partial(make_optimizer, "adamw_torch_fused"), step)
        assert parts["weights"] > 100_000 and parts["activations"] + parts["workspace"] > 0
        totals.append(sum(parts.values()))
    assert max(totals) < 20 * MIB


def test_outliers_of_int8_are_searched_where_the_loaded_layers_search_them(tiny):
    source = location.locate(str(tiny()))
    loaded = load.load_model(source, "int8", torch.bfloat16, "sdpa")
    empty = empty_model(load.load_config(source), "int8", torch.bfloat16, "sdpa")
    states = [model.get_submodule("model.layers.0.mlp.down_proj").state for model in (loaded, empty)]
    assert [state.threshold for state in states] == [quantize.INT8_THRESHOLD] * 2
    peaks, state = [], states[1]
    for threshold in (0.0, quantize.INT8_THRESHOLD):
        state.threshold = threshold
        with StorageTracker() as tracker:
            memory.int8_product(True, torch.empty(1000, 128, dtype=torch.bfloat16, device="meta"), None, state=state)
        peaks.append(tracker.peak)
    assert peaks[1] > peaks[0] and state.threshold == quantize.INT8_THRESHOLD


def test_optimizers_differ_by_their_states():
    settings = dict(MODEL="t", ADAPTER="lora", LORA_R=64, LORA_ALPHA=1, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
    states = {}
    for name in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"):
        model = empty_model(tiny_config("llama", hidden_size=256), None, torch.bfloat16, "sdpa")
        model = adapters.add_adapter(model, settings)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = memory.trace(model, None, partial(make_optimizer, name), memory.Step(1, 64))
        states[name] = parts["optimizer states"] / count
    assert states["adamw_torch_fused"] == pytest.approx(8, rel=0.02)  # two float32
    assert 2 < states["adamw_bnb_8bit"] < 2.5 and states["paged_adamw_8bit"] == states["sgd"] == 0
    assert states["adafactor"] < 0.2


def test_lora_plus_needs_what_its_optimizer_needs():
    settings = dict(MODEL="t", ADAPTER="lora", LORA_R=8, LORA_ALPHA=1, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
    for name in ("adamw_torch_fused", "adamw_anyprecision", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor"):
        plain, plus = (
            memory.trace(
                adapters.add_adapter(empty_model(tiny_config("llama"), None, torch.bfloat16, "sdpa"), settings),
                None, partial(make_optimizer, name, lora_plus_ratio=ratio), memory.Step(1, 64),
            )
            for ratio in (None, 16.0)
        )  # fmt: skip
        assert plus == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize(
    "method, checkpointing", [("lora", False), ("lora", True), ("nf4", False), ("full", False), ("galore", False)]
)
def test_offloaded_activations_are_not_on_the_gpu(method, checkpointing):
    """What stays are those that are on their way, and those that TRL leaves there because they are saved twice."""
    settings = dict(MODEL="t", ADAPTER="lora", LORA_R=8, LORA_ALPHA=1, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
    settings |= dict(full=method in ("full", "galore"), checkpointing=checkpointing)
    sizes, parts = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6), []

    def optimizer(model):
        if method != "galore":
            return make_optimizer("adamw_torch_fused", model)
        made = galore.GaLore(*galore.split_weights(model, 32), 32)
        made.attach(model)
        return made

    for offloads in (False, True):
        quantization = "nf4" if method == "nf4" else None
        model = empty_model(tiny_config("llama", **sizes), quantization, torch.bfloat16, "sdpa_documents")
        if not settings["full"]:
            model = adapters.add_adapter(model, settings)
        step = memory.Step(1, 512, full=settings["full"], checkpointing=checkpointing, offloads=offloads)
        parts.append(memory.trace(model, None, optimizer, step))
    for kind in ("weights", "optimizer states"):
        assert parts[0][kind] == parts[1][kind]
    most = 0.95 if checkpointing else 0.5
    assert parts[1]["activations"] + parts[1]["workspace"] < most * (parts[0]["activations"] + parts[0]["workspace"])


@pytest.mark.parametrize(
    "script, how, checkpointing",
    [("qlora_train.py", "QUANTIZATION=nf4", True), ("galore_train.py", "GALORE_RANK=32", False)],
)
def test_offloading_changes_no_loss_and_no_weight(script, how, checkpointing, run, tmp_path, gpu_with, monkeypatch):
    """TRL's context manager in a run, with the CPU in the GPU's place."""
    same = "BATCH_SIZE=2", "SAVE_STEPS=None", f"GRADIENT_CHECKPOINTING={checkpointing}", how
    made, honest = [], sft_trainer.get_act_offloading_ctx_manager
    code, _, err = run(script, "off", *same, "ACTIVATION_OFFLOADING=True")
    assert code == 2 and "error: ACTIVATION_OFFLOADING=True: it moves activations from a GPU" in err
    gpu_with(2**40)
    code, _, err = run(script, "plain", *same)
    assert code == 0, err
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *args: None)
    make = partial(honest, use_pin_memory=False)
    monkeypatch.setattr(
        sft_trainer, "get_act_offloading_ctx_manager", lambda **how: made.append(make(**how)) or made[0]
    )
    code, _, err = run(script, "off", *same, "ACTIVATION_OFFLOADING=True")
    assert code == 0 and "could not be predicted" not in err, err
    assert made[-1].tensor_id > 10 and not made[-1].tracker  # of the last micro step; each came back
    assert losses(tmp_path / "off") == losses(tmp_path / "plain")
    for file in (tmp_path / "plain" / "final").glob("*.safetensors"):
        other = load_file(tmp_path / "off" / "final" / file.name)
        assert all(torch.equal(weight, other[key]) for key, weight in load_file(file).items())


def test_on_a_gpu_foreach_optimizers_hold_a_copy_of_the_weights():
    def peak(name):
        model = empty_model(tiny_config("llama", hidden_size=256), None, torch.float32, "sdpa")
        step = memory.Step(1, 8, dtype=torch.float32, full=True)
        weights = sum(p.nbytes for p in model.parameters())
        return sum(memory.trace(model, None, partial(make_optimizer, name), step).values()) / weights

    assert 0.5 < peak("adamw_torch") - peak("adamw_torch_fused") < 1.2  # the peaks lie at different places


def test_galore_torch_keeps_full_states_of_embeddings_and_head(small, run, tmp_path, monkeypatch):
    parts = []
    honest = memory.trace
    monkeypatch.setattr(batch_plan, "trace", lambda *step: parts.append(honest(*step)) or parts[-1])
    assert run("galore_train.py", "run", "OPTIM=galore_torch", "GALORE_RANK=32")[0] == 0
    assert parts[0]["optimizer states"] > 2 * 640 * 128 * 2  # of the embeddings, in bfloat16; the head is tied to them


def test_storages_are_followed_to_their_end():
    follower = StorageTracker(block=512)
    with follower:
        a = torch.zeros(1000)  # 4,000 bytes: 8 blocks of 512
        b = a.view(10, 100).T  # the same storage
        c = a + 1
        assert follower.now == 2 * 4096
        del a, c
        assert follower.now == 4096  # b holds a's
        del b
    assert follower.now == 0 and follower.peak == 8192 and follower.at_peak()["weights"] == 8192


def test_quadratic_masks_of_packed_rows_are_seen_and_attention_is_not_quadratic():
    def peak(tokens, attention):
        model = empty_model(tiny_config("llama", max_position_embeddings=8192), None, torch.bfloat16, attention)
        return sum(
            memory.trace(model, None, partial(make_optimizer, "sgd"), memory.Step(1, tokens, full=True)).values()
        )

    grows = {a: (peak(4096, a) - peak(2048, a)) / (peak(2048, a) - peak(1024, a)) for a in ("sdpa", "sdpa_documents")}
    assert 2.2 < grows["sdpa"] and grows["sdpa_documents"] < grows["sdpa"]
    # 4 heads x 4,096 x 4,096 attention weights in bfloat16 would be 128 MiB.
    assert peak(4096, "sdpa") < 160 * MIB


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def plan_of(folder):
    return json.loads((folder / "settings.json").read_text())["plan"]


@pytest.fixture
def gpu_with(monkeypatch):
    """gpu_with(bytes): choices are made as on a GPU with so much memory."""

    def make(size):
        monkeypatch.setattr(hardware, "device_type", lambda: "cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (size, size))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
        return shares

    shares = []
    return make


def test_half_the_memory_gives_the_same_losses(run, tmp_path, gpu_with, followed, monkeypatch):
    shares = gpu_with(2**40)
    monkeypatch.setattr(batch_plan, "CUBLAS_WORKSPACE", 0)
    same = "BATCH_SIZE=4", "DTYPE=float32", "NUM_TRAIN_EPOCHS=2", "MAX_STEPS=None", "EVAL_SIZE=4"
    assert run("qlora_train.py", "free", *same)[0] == 0
    assert plan_of(tmp_path / "free") == batch_plan.BatchPlan(4, 1, False).settings()
    _, real = followed()
    limit = real / 2
    code, out, err = run("qlora_train.py", "half", *same, f"MEMORY_LIMIT={limit / MIB:.3f}MiB")
    assert code == 0, err
    chosen = plan_of(tmp_path / "half")
    assert chosen["PER_DEVICE_TRAIN_BATCH_SIZE"] * chosen["GRADIENT_ACCUMULATION_STEPS"] == 4
    assert chosen != plan_of(tmp_path / "free") and followed()[1] <= limit
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "free"), abs=1e-3)
    evaluated = [json.loads((tmp_path / name / "summary.json").read_text())["eval_loss"] for name in ("free", "half")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-3)
    assert shares == [1.0, pytest.approx(limit / 2**40, rel=1e-3)] and "memory: " in out


def test_what_does_not_fit_is_refused_before_the_model_loads(run, gpu_with, monkeypatch):
    gpu_with(66 * MIB)  # of which cuBLAS takes 64
    monkeypatch.setattr(load, "load_model", None)
    code, _, err = run("qlora_train.py", "run")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "MAX_LENGTH=128" in errors[0] and "Traceback" not in err


def test_what_is_wished_is_tried_all_the_same(run, tmp_path, gpu_with):
    gpu_with(66 * MIB)
    code, _, err = run("qlora_train.py", "run", "PER_DEVICE_TRAIN_BATCH_SIZE=1", "GRADIENT_CHECKPOINTING=False")
    assert code == 0 and plan_of(tmp_path / "run") == batch_plan.BatchPlan(1, 1, False).settings()


@pytest.mark.parametrize("limit", ["lots", "1.5", "0", "-1GiB", "8GB"])
def test_limits_that_are_none(run, limit):
    code, _, err = run("qlora_train.py", "run", f"MEMORY_LIMIT={limit}")
    assert code == 2 and f"MEMORY_LIMIT={limit}" in err and "7500MiB" in err


def test_limits_are_shares_or_sizes(monkeypatch):
    memory_of = SimpleNamespace(available=6 * 2**30, total=10 * 2**30)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory_of)
    monkeypatch.setattr(hardware, "rss_gib", lambda: 1.0)
    limits = {None: 7, "0.5": 5, "0.9": 7, "2048MiB": 2, "1.5 GiB": 1.5, ".1": 1}
    assert {text: hardware.memory_limit(text, "cpu") / 2**30 for text in limits} == pytest.approx(limits)


@pytest.mark.parametrize("sixteen, told", [(4.0, True), (6.0, False)])
def test_four_bits_that_need_more_than_sixteen_are_told(sixteen, told, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "memory_limit", lambda *a: 80 * 2**30)
    needs = {"nf4": 5 * 2**30, None: sixteen * 2**30}
    monkeypatch.setattr(batch_plan, "trace", lambda model, quantization, *rest: {"activations": needs[quantization]})
    usual = dict(
        MODEL="m",
        MAX_LENGTH=64,
        MEMORY_LIMIT=None,
        BATCH_SIZE=None,
        GRADIENT_ACCUMULATION_STEPS=None,
        QUANTIZATION="nf4",
    )
    usual |= dict(PER_DEVICE_TRAIN_BATCH_SIZE=None, GRADIENT_CHECKPOINTING=None)
    batch_plan.plan_batch(usual, lambda quantization: (torch.nn.Linear(2, 2), quantization), None, memory.Step())
    assert ("QUANTIZATION=None would need less, 4.0" in capsys.readouterr().err) == told


def test_the_fastest_that_fits_is_chosen(monkeypatch):
    """On a GPU: most rows without checkpointing, unless checkpointing pays by more rows; up to what is useful."""
    needs = {(rows, again): (1 if again else 6) * rows * 2**30 for rows in range(1, 65) for again in (False, True)}
    asked = []

    def trace(model, base, optimizer, step):
        asked.append((step.rows, step.checkpointing))
        return {"activations": needs[asked[-1]]}

    def choose(gib, length=1024, **settings):
        asked.clear()
        monkeypatch.setattr(hardware, "memory_limit", lambda *a: gib * 2**30)
        usual = dict(MODEL="m", MAX_LENGTH=length, MEMORY_LIMIT=None, BATCH_SIZE=64, GRADIENT_ACCUMULATION_STEPS=None)
        usual |= dict(PER_DEVICE_TRAIN_BATCH_SIZE=None, GRADIENT_CHECKPOINTING=None) | settings
        fit = batch_plan.plan_batch(usual, lambda q: (None, None), None, memory.Step(1, length))
        assert fit.rows * fit.accumulation == 64 * (settings.get("PER_DEVICE_TRAIN_BATCH_SIZE") or 1)
        assert len(asked) == len(set(asked)) <= 6
        return fit.rows, fit.checkpointing

    monkeypatch.setattr(batch_plan, "trace", trace)
    assert choose(80) == (4, False) and (4, True) not in asked  # 4,096 tokens are enough
    assert choose(15) == (2, False)
    assert choose(7) == (1, False)
    assert choose(5) == (4, True)
    assert choose(1.2) == (1, True)
    assert choose(30, length=256) == (4, False)  # 4 rows without: (1 + 274 / 1,024); 16 with: 1.5 (1 + 274 / 4,096)
    assert choose(7, length=128) == (4, True)  # 3.1 against 2.3
    assert choose(80, GRADIENT_CHECKPOINTING=True) == (4, True)
    assert choose(80, PER_DEVICE_TRAIN_BATCH_SIZE=2, GRADIENT_ACCUMULATION_STEPS=64, BATCH_SIZE=None) == (2, False)


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize("saved", ["SAVE_STEPS=None", "SAVE_STEPS=1"])
def test_out_of_memory_in_step_3_ends_as_if_begun_small(saved, run, tmp_path, at_step):
    def fail():
        del actions[3]
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    actions = {3: fail}
    at_step(actions)
    same = "MAX_STEPS=4", "DTYPE=float32", "LORA_DROPOUT=0", saved
    code, out, err = run("qlora_train.py", "run", *same, "PER_DEVICE_TRAIN_BATCH_SIZE=4")
    assert code == 0 and err.count("out of memory") == 1 and not actions, err
    assert ("resuming from checkpoint-2" in out) == (saved == "SAVE_STEPS=1")
    assert plan_of(tmp_path / "run") == batch_plan.BatchPlan(2, 2, False).settings()
    small = "PER_DEVICE_TRAIN_BATCH_SIZE=2", "GRADIENT_ACCUMULATION_STEPS=2"
    assert run("qlora_train.py", "small", *same, *small)[0] == 0
    ours, theirs = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("run", "small"))
    for name in theirs:
        if saved == "SAVE_STEPS=None":  # began anew: the same computation
            assert torch.equal(ours[name], theirs[name]), name
        else:  # went on from step 2, which four rows at once had made
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert len(losses(tmp_path / "run")) == 4


def test_out_of_memory_for_good_ends_after_three_restarts(run, monkeypatch):
    attempts = []

    def fail(trainer, *args, **kwargs):
        attempts.append((trainer.args.per_device_train_batch_size, trainer.args.gradient_checkpointing))
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(ChatTrainer, "compute_loss", fail)
    batch = "PER_DEVICE_TRAIN_BATCH_SIZE=4", "GRADIENT_ACCUMULATION_STEPS=1"
    code, _, err = run("qlora_train.py", "run", *batch)
    assert code == 2 and "MAX_LENGTH=128" in err.splitlines()[-1] and "Traceback" not in err
    assert attempts == [(4, False), (2, False), (1, False), (1, True)]
    attempts.clear()
    assert run("qlora_train.py", "wished", *batch, "GRADIENT_CHECKPOINTING=False")[0] == 2
    assert attempts == [(4, False), (2, False), (1, False)]


def test_smaller_micro_batches_keep_the_batch():
    fit, seen = batch_plan.BatchPlan(15, 2, False), []
    while fit:
        seen.append((fit.rows, fit.accumulation, fit.checkpointing))
        fit = fit.smaller(may_checkpoint=True)
    assert seen == [(15, 2, False), (5, 6, False), (1, 30, False), (1, 30, True)]


def test_out_of_memory_in_the_last_evaluation_trains_nothing_again(run, monkeypatch, tmp_path):
    honest, sizes, trained = ChatTrainer.evaluate, [], []

    def evaluate(trainer, *args, **kwargs):
        sizes.append(trainer.args.per_device_eval_batch_size)
        if len(sizes) == 1:
            raise RuntimeError("CUDA error: out of memory")
        return honest(trainer, *args, **kwargs)

    monkeypatch.setattr(ChatTrainer, "evaluate", evaluate)
    monkeypatch.setattr(ChatTrainer, "train", lambda *a, h=ChatTrainer.train: trained.append(1) or h(*a))
    code, _, err = run("qlora_train.py", "run", "PER_DEVICE_TRAIN_BATCH_SIZE=2", "EVAL_SIZE=4")
    assert code == 0 and sizes == [2, 1] and len(trained) == 1, err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"] > 0


def test_a_run_that_logs_nothing_is_finished_all_the_same(run, tmp_path):
    assert run("qlora_train.py", "run", "LOGGING_STEPS=100")[0] == 0
    plot(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "plot.png").exists()


@pytest.mark.parametrize("architecture", ["granite", "gemma2", "mixtral", "gpt_oss"])
def test_models_that_change_their_logits_or_have_experts_are_predicted(architecture, run, tmp_path, tokenizer_folder):
    """Scaled and capped logits, attention without SDPA, experts: nothing of them keeps the trace from the truth."""
    changes = {} if architecture in ("granite", "gemma2") else dict(num_local_experts=4, num_experts_per_tok=2)
    folder = save_tiny(architecture, tmp_path / architecture, tokenizer_folder, head_dim=16, **changes)
    code, _, err = run("qlora_train.py", "run", f"MODEL={folder}", "ADAPTER=None")
    assert code == 0 and "could not be predicted" not in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["predicted_peak_gib"] > 0


def test_other_errors_do_not_start_again(run, monkeypatch):
    monkeypatch.setattr(ChatTrainer, "compute_loss", lambda *a, **k: 1 / 0)
    code, _, err = run("qlora_train.py", "run")
    assert code == 2 and "ZeroDivisionError" in err and "starting again" not in err


def test_a_run_that_goes_on_keeps_its_choice(run, tmp_path, gpu_with, at_step):
    gpu_with(76 * MIB)  # of which cuBLAS takes 64
    (tmp_path / "run").mkdir()
    at_step({3: lambda: (tmp_path / "run" / "STOP").touch()})
    same = "BATCH_SIZE=4", "MAX_STEPS=4", "SAVE_STEPS=2", "ADAPTER=None", "DTYPE=bfloat16"
    assert run("qlora_train.py", "run", *same)[0] == 130
    chosen = plan_of(tmp_path / "run")
    gpu_with(2**40)
    at_step({})
    assert run("qlora_train.py", "run", *same)[0] == 0 and plan_of(tmp_path / "run") == chosen
    assert chosen != batch_plan.BatchPlan(4, 1, False).settings()


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "int8", "galore", "hqq-2bit"])
def test_estimate_prints_what_a_step_needs(method, small, run_here):
    folder = small  # only its config.json is read
    code, out, err = run_here(
        "estimate_memory.py", f"MODEL={folder}", f"METHOD={method}", "MAX_LENGTH=256", "GALORE_RANK=32"
    )
    rows = {
        line[:24].strip(): [float(x) for x in line[24:].split()] for line in out.splitlines() if line[24:30] == "      "
    }
    quantized = method not in ("full", "lora", "galore")
    for column in (0, 1):
        assert sum(rows[kind][column] for kind in KINDS) == pytest.approx(rows["peak"][column], abs=0.03)
    assert code == 0 and len(rows["peak"]) == 2 and ("the same in 16 bits" in rows) == quantized, err
    assert ("gpu_poor" in out) == quantized


def test_estimate_of_pairs_counts_both_sides_and_refuses_what_is_not_trained(small, run_here, monkeypatch):
    steps, trace = [], memory.trace
    monkeypatch.setattr(memory, "trace", lambda *args: steps.append(args[-1]) or trace(*args))
    for loss in ("None", "kto", "dpo", "simpo"):
        wish = f"LOSS={loss}", "REFERENCE=live", "MAX_LENGTH=256", "GRADIENT_CHECKPOINTING=False"
        code, _, err = run_here("estimate_memory.py", f"MODEL={small}", *wish)
        assert code == 0, err
    assert [(s.rows, s.has_reference) for s in steps] == [(1, False), (1, True), (2, True), (2, False)]
    for method, reference in (("galore", "kept"), ("full", "live")):
        wish = f"METHOD={method}", "LOSS=dpo", f"REFERENCE={reference}"
        code, _, err = run_here("estimate_memory.py", f"MODEL={small}", *wish)
        assert code == 2 and f"METHOD={method} LOSS=dpo" in err
    code, out, err = run_here("estimate_memory.py", f"MODEL={small}", "LOSS=dpo", "FIT=200MiB", "MAX_LENGTH=256")
    assert code == 0 and " x 2 x 256" in out, err


def test_estimate_says_what_fits(small, run_here):
    code, out, _ = run_here("estimate_memory.py", f"MODEL={small}", "FIT=200MiB", "MAX_LENGTH=256")
    rows = [line.split() for line in out.splitlines() if " on " in line or " off " in line]
    found = {row[1]: (int(row[0].replace(",", "")), float(row[2]), float(row[3])) for row in rows}
    assert code == 0 and found["on"][0] > found["off"][0] >= 256
    assert max(gib for _, gib, _ in found.values()) < 0.2 and min(time for *_, time in found.values()) == 1
    wrong_settings = (
        ("MAX_LENGTH=0", "at least 1"),
        ("OPTIM=nonsense", "OPTIM=nonsense"),
        ("OPTIM=apollo_adamw", "apollo"),
    )
    for wrong, word in (
        *wrong_settings,
        ("FIT=lots", "FIT=lots"),
        ("FIT=1MiB", "not even 256"),
        ("METHOD=qlor", "qlora"),
    ):
        code, _, err = run_here("estimate_memory.py", f"MODEL={small}", "MAX_LENGTH=256", wrong)
        assert code == 2 and word in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_billion_weights_take_seconds_and_no_memory(tmp_path):
    shape = dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False)  # fmt: skip
    tiny_config("llama", **shape).save_pretrained(tmp_path)
    watched = (
        "import re, runpy, time; start = time.time(); runpy.run_path(sys.argv[0], run_name='__main__'); "
        # Not ru_maxrss, which begins with what the process that started this one holds.
        "print(time.time() - start, re.search(r'VmHWM: +(\\d+)', open('/proc/self/status').read().expandtabs())[1])"
    )
    command = f"import sys; sys.argv = ['estimate_memory.py', 'MODEL={tmp_path}', 'METHOD=qlora', 'MAX_LENGTH=512', "
    command += f"'GRADIENT_CHECKPOINTING=True']; {watched}"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    seconds, kilobytes = map(float, result.stdout.splitlines()[-1].split())
    assert "8,030,261,248 weights" in result.stdout and seconds < 60 and kilobytes < 2 * 2**20, result.stderr

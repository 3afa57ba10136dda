"""What a training step does on a GPU, shown on the CPU: CUDA's rules of autocast, and what waits for the device."""

import json
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, OTHERS, random_model
from conftest import tiny_config
from test_attention import documents
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from common.model import load
from common.model.location import Source
from common.train import memory
from common.train.galore import GaLore, split_weights
from common.train.loss import prepare_model

aten = torch.ops.aten


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Autocast computes in float32 what it does on CUDA."""
    for owner, names in memory.FLOAT32_ON_CUDA:
        for name in names.split():
            monkeypatch.setattr(owner, name, memory.in_float32(getattr(owner, name)))
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS, "stablelm", "gpt2"])
def test_hidden_states_stay_in_16_bits(name, as_on_cuda):
    """Autocast for CUDA returns layer norms in float32: GaLore and NF4 layers take what they get."""
    if name in ("stablelm", "gpt2"):
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16)
    else:
        model = random_model(name).bfloat16()
    prepare_model(model, 0.0)
    dtypes = {}
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_hook(lambda _, inputs, output, path=path: dtypes.update({path: inputs[0].dtype}))
    ids = documents()[0]
    with as_on_cuda:
        model(input_ids=ids, learn=ids, use_cache=False)
    assert {path for path, dtype in dtypes.items() if dtype != torch.bfloat16} == set()


@pytest.mark.parametrize("quantization, kind", [("nf4", "stablelm"), ("nf4", "gpt2"), ("int8", "stablelm")])
def test_quantised_layers_hand_on_16_bits(quantization, kind, tiny, as_on_cuda):
    """The residual stream of a LayerNorm model: bitsandbytes returns the dtype of its inputs."""
    model = load.load_model(Source("x", str(tiny(kind))), quantization, torch.bfloat16, "sdpa", trainable=True)
    prepare_model(model, 0.0)
    dtypes = []
    for layer in model.get_decoder().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    ids = documents()[0]
    with as_on_cuda:
        model(input_ids=ids, learn=ids, use_cache=False)
    assert dtypes == [torch.bfloat16] * 2


def test_galore_projects_every_layer_of_a_layer_norm_model(as_on_cuda, monkeypatch):
    model = AutoModelForCausalLM.from_config(tiny_config("stablelm"), dtype=torch.bfloat16)
    prepare_model(model, 0.0)
    optimizer = GaLore(*split_weights(model, 16), 16)
    optimizer.attach(model)
    monkeypatch.setattr(optimizer, "is_due", lambda parameter: False)
    full, ids = [], documents()[0]
    for parameter in optimizer.projected:
        parameter.register_hook(lambda gradient: None if gradient is None else full.append(gradient))
    with as_on_cuda:
        model(input_ids=ids, learn=ids, use_cache=False)[0].sum().backward()
    assert len(optimizer.projected_grads) == 14 and not full


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read from a tensor, positions looked for in one."""

    def __init__(self):
        super().__init__()
        self.places = Counter()  # function that is called in a step, or whose code it is

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            stack = traceback.extract_stack()
            files = {Path(frame.filename).stem for frame in stack}
            on_cpu = files & {"dataloader", "collator"} and "loss" not in files
            known = {frame.name for frame in stack} & {"training_step", "_get_grad_norm", "log", "refresh"}
            self.places["data" if on_cpu else "masks" if "masking_utils" in files else str(known)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "script, how, forwards",
    [
        ("qlora_train.py", ["KL_WEIGHT=1"], 2),
        ("qlora_train.py", ["PACKING=False", "PER_DEVICE_TRAIN_BATCH_SIZE=2"], 2),
        ("galore_train.py", ["GALORE_RANK=32", "OPTIM=galore"], 1),
        ("preference_train.py", ["DATA=data/pairs.jsonl", "MAX_SAMPLES=16"], 1),
    ],
)
def test_a_gpu_is_waited_for_once_a_step(script, how, forwards, arguments, run_here, monkeypatch):
    """To judge a step before its update. transformers waits in each forward to find out whether rows are packed."""
    reads, honest, micro_steps = Reads(), Trainer._run_epoch, []

    def counted(*args, **kwargs):
        with reads:
            return honest(*args, **kwargs)

    monkeypatch.setattr(Trainer, "_run_epoch", counted)
    monkeypatch.setattr(Trainer, "floating_point_ops", lambda *args: micro_steps.append(args) or 0)
    how = ["ATTN_IMPLEMENTATION=sdpa", "BATCH_SIZE=4", "MAX_STEPS=2", "LOGGING_STEPS=9", "EVAL_STEPS=None", *how]
    how += ["SAVE_STEPS=None", "LORA_DROPOUT=0"]
    words = [word for word in arguments("run", *how) if script != "galore_train.py" or "LORA" not in word]
    code, _, err = run_here(script, *words)
    assert code == 0, err
    assert len(micro_steps) >= 4 and reads.places.pop("masks") <= forwards * len(micro_steps)
    assert reads.places.pop("data") > 0 and reads.places.pop("{'_get_grad_norm'}") >= 2
    assert reads.places.keys() <= {"{'refresh'}"}, reads.places


def test_compiled_layers_give_the_same_losses(arguments, run_here, monkeypatch, tmp_path):
    """By the compiler's front and its autograd; without its back, which takes a C++ compiler and a minute."""
    honest, graphs = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: honest(layer, backend="aot_eager", **how))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    for name in ("False", "True"):
        words = [f"TORCH_COMPILE={name}", "MAX_STEPS=2", "EVAL_STEPS=None", "SAVE_STEPS=None", "LORA_DROPOUT=0"]
        words += [
            "GRADIENT_CHECKPOINTING=True",
            "DTYPE=float32",
            "ATTN_IMPLEMENTATION=sdpa",
            "BATCH_SIZE=2",
        ]
        code, _, err = run_here("qlora_train.py", *arguments(name, *words))
        assert code == 0, err
        graphs.append(counters["stats"]["unique_graphs"])
    plain, compiled = ((tmp_path / name / "metrics.jsonl").read_text().splitlines()[:2] for name in ("False", "True"))
    for one, other in zip(map(json.loads, plain), map(json.loads, compiled), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert graphs[0] == 0 < graphs[1] < 12 and not counters["graph_break"], counters

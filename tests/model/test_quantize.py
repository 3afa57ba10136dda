"""Bases of 1 to 4 bits by hqq: what they hold, what they lose, that adapters learn on them, and what is refused."""

import importlib.util
import json

import pytest
import torch
from conftest import save_tiny
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from common.cli import UserError
from common.model import adapters, location
from common.model import load as loading
from common.model.quantize import BITS, dequantize_hqq, hqq_layer_names
from common.train import memory
from common.train.meta_model import empty_model
from common.train.storage import StorageTracker

pytest.importorskip("hqq")

LORA = dict(MODEL="tiny", ADAPTER="lora", LORA_R=4, LORA_ALPHA=8, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
IDS = torch.arange(3, 30)[None]


def load(folder, quantization, dtype=torch.bfloat16):
    return loading.load_model(location.locate(str(folder)), quantization, dtype, "sdpa", trainable=True)


def tensors(layer) -> dict:
    """What a layer holds, by name."""
    return {"W_q": layer.W_q, "scale": layer.meta["scale"], "zero": layer.meta["zero"], "bias": layer.bias}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fewer_bits_take_less_memory_and_lose_more(architecture, tiny):
    exact = load(tiny(architecture), None)
    errors = {}
    for quantization, bits in BITS.items():
        packed = load(tiny(architecture), quantization)
        names = hqq_layer_names(packed)
        assert len(names) == (14 if architecture == "llama" else 8) and "lm_head" not in names
        for name in names:
            layer, weight = packed.get_submodule(name), exact.get_submodule(name).weight
            # 3 bits: ten to an int32, groups of 64 rows in seven of them. Scale and zero point: 4 bytes for 64.
            assert layer.W_q.nbytes / weight.numel() == (3.5 if bits == 3 else bits) / 8
            assert sum(layer.meta[name].nbytes for name in ("scale", "zero")) / weight.numel() == 4 / 64
        plain = dequantize_hqq(packed)
        pairs = [(plain.get_submodule(name), exact.get_submodule(name)) for name in names]
        assert all(type(one) is type(other) and one.weight.shape == other.weight.shape for one, other in pairs)
        lost = sum((one.weight - other.weight).float().norm() ** 2 for one, other in pairs)
        errors[bits] = float((lost / sum(other.weight.float().norm() ** 2 for _, other in pairs)).detach().sqrt())
    assert errors[4] < 0.2 and all(errors[bits] < 0.7 * errors[bits - 1] for bits in (2, 3, 4)), errors


@pytest.mark.parametrize("quantization", BITS)
def test_two_loads_are_equal_and_the_empty_model_has_their_shapes(quantization, tiny):
    source = location.locate(str(tiny("qwen2")))  # with biases
    before = torch.get_rng_state()
    one, other = (load(tiny("qwen2"), quantization) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    empty = empty_model(loading.load_config(source), quantization, torch.bfloat16, "sdpa")
    assert hqq_layer_names(one) == hqq_layer_names(empty)
    held = [*one.parameters(), *one.buffers()]
    for name in hqq_layer_names(one):
        alike = (tensors(model.get_submodule(name)) for model in (one, other, empty))
        for a, b, c in zip(*(held.values() for held in alike), strict=True):
            if a is not None:
                assert torch.equal(a, b) and not a.requires_grad
                assert c.is_meta and (c.shape, c.dtype) == (a.shape, a.dtype)
        held += filter(torch.is_tensor, tensors(one.get_submodule(name)).values())
    follower = StorageTracker()
    memory.make_fake(empty, FakeTensorMode(allow_non_fake_inputs=True), follower)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert follower.now == sum(storages.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("quantization", ["hqq-1bit", "hqq-3bit"])
def test_gradients_are_those_of_the_weights_that_it_stands_for(architecture, quantization, tiny):
    """In float32; the same products in the same order, so that the tolerance is that of rounding."""
    gradients = []
    for plain in (False, True):
        base = load(tiny(architecture), quantization, torch.float32)
        torch.manual_seed(0)
        model = adapters.add_adapter(dequantize_hqq(base) if plain else base, LORA)
        assert len(model.targeted_module_names) == (8 if architecture == "gpt2" else 14)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide A's gradient
                parameter.data += 0.1
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and all(g.abs().sum() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", BITS)
def test_every_width_trains_and_answers(quantization, tiny, chats_file, tmp_path, run_here):
    code, out, error = run_here(
        "qlora_train.py", f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "RUN_NAME=run", "MAX_STEPS=8",
        "MAX_LENGTH=256", "LORA_R=4", "EVAL_SIZE=4", "LEARNING_RATE=1e-2", f"QUANTIZATION={quantization}",
    )  # fmt: skip
    assert code == 0 and "could not be predicted" not in error, error
    losses = [json.loads(line)["loss"] for line in list(open(tmp_path / "run" / "metrics.jsonl"))[:8]]
    assert sum(losses[4:]) < sum(losses[:4]) - 0.2
    with safe_open(tmp_path / "run" / "final" / "adapter_model.safetensors", "pt") as saved:
        kinds = sorted(name.split(".")[-2] for name in saved.keys())  # the tokens' are rows that the base never saw
    assert kinds == ["lora_A"] * 14 + ["lora_B"] * 14 + ["token_adapter"]
    answer = [f"MODEL={tmp_path / 'run'}", "PROMPT=Hi", "MAX_NEW_TOKENS=4", "TEMPERATURE=0"]
    code, _, error = run_here("chat_pipe.py", *answer)
    assert code == 0 and f"QUANTIZATION={quantization}, as in training" in error and "note:" not in error, error
    code, _, error = run_here("chat_pipe.py", *answer, "QUANTIZATION=None")
    assert code == 0 and f"was trained with QUANTIZATION={quantization}, here it is None" in error


def test_an_adapter_is_loaded_on_the_form_of_base_that_it_was_trained_on(tiny, chats_file, tmp_path, run_here):
    """By default in every script that has no training of its own, and only its own base; None is none."""
    code, _, error = run_here(
        "qlora_train.py", f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "RUN_NAME=run", "MAX_STEPS=1",
        "MAX_LENGTH=256", "LORA_R=4", "EVAL_SIZE=4", "QUANTIZATION=nf4",
    )  # fmt: skip
    assert code == 0, error
    run, here = f"MODEL={tmp_path / 'run'}", f"OUT_DIR={tmp_path}"
    code, out, error = run_here(
        "evaluate_model.py", run, f"BASE={tiny()}", "SUITES=health", "CHAT_TEMPLATE=chatml", here
    )
    assert code == 0 and "QUANTIZATION=nf4, as in training" in error, error
    for scores in tmp_path.rglob("scores.json"):  # of the run, and of its base
        expected = "nf4" if scores.parent.name == "run" else None
        assert json.loads(scores.read_text())["settings"]["QUANTIZATION"] == expected
    for settings, expected in (([], "nf4"), (["QUANTIZATION=None"], None)):
        name = f"export-{expected}"
        code, _, error = run_here("merge_and_export.py", run, here, f"RUN_NAME={name}", *settings)
        assert code == 0, error
        assert json.loads((tmp_path / name / "export.json").read_text())["quantization"] == expected
    code, _, error = run_here("qlora_train.py", run, f"DATA={chats_file}", here, "QUANTIZATION=auto")
    assert code == 2 and "QUANTIZATION=auto is not known" in error
    for model in (tiny(), tmp_path / "export-nf4"):  # which no adapter lies on
        assert loading.find_quantization(location.locate(str(model)), "auto") is None


def test_without_the_package_every_script_names_it(tiny, chats_file, tmp_path, run_here, monkeypatch):
    honest = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "hqq" else honest(name, *a))
    monkeypatch.setattr(loading, "load_model", None)
    model, wish = f"MODEL={tiny()}", "QUANTIZATION=hqq-2bit"
    for script, arguments in (
        ("qlora_train.py", [model, wish, f"DATA={chats_file}", f"OUT_DIR={tmp_path}"]),
        ("chat_pipe.py", [model, wish, "PROMPT=Hi"]),
        ("evaluate_model.py", [model, wish]),
        ("merge_and_export.py", [model, wish]),
        ("estimate_memory.py", [model, "METHOD=hqq-2bit"]),
    ):
        code, _, error = run_here(script, *arguments)
        assert code == 2 and error.endswith("the package is missing: pip install hqq==0.2.8.post1.\n"), error
        assert arguments[1] in error


def test_layers_that_no_group_divides_are_refused(tmp_path, tokenizer_folder, chats_file, run_here, monkeypatch):
    folder = save_tiny("llama", tmp_path / "odd", tokenizer_folder, hidden_size=24)  # k_proj: 12 x 24 weights
    with pytest.raises(UserError, match="k_proj has 288 weights.*QUANTIZATION=int8"):
        load(folder, "hqq-4bit")
    monkeypatch.setattr(loading, "load_model", None)
    wish = f"MODEL={folder}", f"DATA={chats_file}", "QUANTIZATION=hqq-4bit", "MAX_LENGTH=128", f"OUT_DIR={tmp_path}"
    code, _, error = run_here("qlora_train.py", *wish)
    assert code == 2 and "k_proj has 288 weights" in error


def test_the_wrong_names_are_answered_with_those_of_the_layers(tiny):
    with pytest.raises(UserError, match="The model has: .*q_proj"):
        adapters.add_adapter(load(tiny(), "hqq-4bit"), LORA | {"LORA_TARGET_MODULES": "attn"})

"""Targets of adapters: names, regular expressions and layers mean what they say, or are refused by name."""

import json

import architectures
import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from common.cli import UserError
from common.model import adapters, location
from common.model import load as loading
from common.train.galore import split_weights

SETTINGS = dict(MODEL="tiny", ADAPTER="lora", LORA_R=4, LORA_ALPHA=8, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
SETTINGS |= dict(LORA_LAYERS=None)
IDS = torch.arange(3, 30)[None]


def random_model(architecture="llama", **changes):
    torch.manual_seed(0)
    config = tiny_config(architecture, **{"n_layer" if architecture == "gpt2" else "num_hidden_layers": 4} | changes)
    return AutoModelForCausalLM.from_config(config).float()


def adapt(model, new_rows=(), **changes):
    """(adapted model, paths of its adapted layers below the decoder's)."""
    adapted = adapters.add_adapter(model, SETTINGS | changes, new_rows)
    return adapted, sorted(adapted.targeted_module_names)


def layers_of(paths) -> set[int]:
    return {int(part) for path in paths for part in path.split(".") if part.isdigit()}


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        ("q_proj,v_proj", None, {"q_proj", "v_proj"}),
        ("self_attn.q_proj", None, {"q_proj"}),
        (r".*\.[13]\.self_attn\.[qv]_proj", None, {"q_proj", "v_proj"}),
        (r".*\.self_attn\..*", "1,3", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("auto", "1,-1", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,lm_head,embed_tokens", "1::2", {"q_proj", "lm_head", "embed_tokens"}),
    ],
)
@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "pissa"])
def test_targets_are_those_chosen_and_load_again(variant, targets, layers, expected, tmp_path):
    model, paths = adapt(random_model(), ADAPTER=variant, LORA_TARGET_MODULES=targets, LORA_LAYERS=layers)
    assert {path.rpartition(".")[2] for path in paths} == expected
    assert layers_of(paths) == ({1, 3} if layers or "[13]" in targets else {0, 1, 2, 3})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model.eval()(input_ids=IDS).logits
    if variant != "pissa":  # which changes the base
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(random_model(), tmp_path).eval()
        assert sorted(again.targeted_module_names) == paths
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_ia3_keeps_peft_choice_in_the_layers_chosen(architecture, tmp_path):
    model, paths = adapt(random_model(architecture), ADAPTER="ia3", LORA_LAYERS="-2:")
    everywhere, all_paths = adapt(random_model(architecture), ADAPTER="ia3")
    assert layers_of(paths) == {2, 3} and len(all_paths) == 2 * len(paths)
    assert {p.rpartition(".")[2] for p in paths} == {p.rpartition(".")[2] for p in all_paths}
    for path in paths:
        layers = (adapted.base_model.model.get_submodule(path) for adapted in (model, everywhere))
        assert {layer.is_feedforward for layer in layers} == {path.endswith(("down_proj", "mlp.c_proj"))}
    model.save_pretrained(tmp_path)
    assert sorted(PeftModel.from_pretrained(random_model(architecture), tmp_path).targeted_module_names) == paths


def test_more_layers_than_peft_lists_by_their_whole_paths():
    model, paths = adapt(random_model(num_hidden_layers=12), LORA_LAYERS="1:5,-1")
    assert layers_of(paths) == {1, 2, 3, 4, 11} and len(paths) == 5 * 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(LORA_TARGET_MODULES="q_proj,nonsense,k_prj"),
            "no layer is called nonsense, k_prj. The model has: .*q_proj",
        ),
        (dict(LORA_TARGET_MODULES="input_layernorm"), "no layer is called input_layernorm"),
        (dict(LORA_TARGET_MODULES=r".*\.q_prj"), r"no layer is called .*q_prj"),
        (dict(LORA_TARGET_MODULES="proj"), "no layer is called proj"),
        (dict(LORA_LAYERS="4"), "LORA_LAYERS=4: the model has 4 layers, 0 to 3; not 4"),
        (dict(LORA_LAYERS="0,-5"), "not -5"),
        (dict(LORA_LAYERS="-9:"), "not -9"),
        (dict(LORA_LAYERS="2:1"), "LORA_LAYERS=2:1: these have no layer"),
        (dict(LORA_LAYERS="0", LORA_TARGET_MODULES="lm_head"), "these have no layer"),
        (dict(ADAPTER="ia3"), "ADAPTER=ia3: peft has no choice of layers for stablelm"),
    ],
)
def test_what_means_no_layer_is_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        adapt(random_model("stablelm" if changes.get("ADAPTER") else "llama"), **changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_no_adapter_where_rows_of_the_same_matrix_train(target, tied):
    model = random_model(tie_word_embeddings=tied)
    with pytest.raises(UserError, match=f"{target} cannot have an adapter while the rows of .* 2 new tokens"):
        adapt(model, new_rows=[5, 6], LORA_TARGET_MODULES=f"q_proj,{target}")


def test_rows_of_new_tokens_train_beside_some_layers():
    model, paths = adapt(random_model(tie_word_embeddings=False), new_rows=[5, 6], LORA_LAYERS="3")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert layers_of(paths) == {3} and sum("trainable_tokens" in name for name in trained) == 2


@pytest.mark.parametrize("setting", ["LORA_TARGET_MODULES=q_proj,nonsense", "LORA_LAYERS=7"])
def test_a_run_refuses_them_before_its_data(setting, tiny, chats_file, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    code, _, error = run_here("qlora_train.py", f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}",
        "MAX_LENGTH=128", setting)  # fmt: skip
    assert code == 2 and setting in error and not list(tmp_path.iterdir()), error


def test_a_run_trains_the_layers_chosen_and_no_others(arguments, tmp_path, run_here):
    code, _, error = run_here("qlora_train.py", *arguments("run", "LORA_LAYERS=-1:", "MAX_STEPS=1"))
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert layers_of(config["target_modules"]) == {1} and len(config["target_modules"]) == 7
    assert loading.load_model(location.locate(str(tmp_path / "run")), None, torch.float32, "sdpa")


@pytest.mark.parametrize("name, expected, left_out", [
    ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, "lm_head"),
    ("llama-4", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "router"),
    ("mamba-2", {"in_proj"}, "out_proj"),
    ("qwen3.5", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "in_proj_qkv",
                 "in_proj_z", "in_proj_a", "in_proj_b"}, "conv1d"),
])  # fmt: skip
def test_auto_means_the_linear_layers_of_every_architecture(name, expected, left_out):
    """Falcon has a class of its own; routers are no products; Mamba's kernels read out_proj past an adapter."""
    adapted, paths = adapt(architectures.random_model(name))
    assert {path.rpartition(".")[2] for path in paths} == expected and left_out not in str(paths)
    assert torch.isfinite(adapted(input_ids=IDS).logits).all()
    projected, _ = split_weights(architectures.random_model(name), rank=2)
    assert len(projected) >= len(paths)


def test_names_are_written_short_where_they_mean_the_same(tmp_path):
    adapted, _ = adapt(random_model())
    assert adapted.peft_config["default"].target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["lora", "rslora", "pissa", "dora"])
@pytest.mark.parametrize("kind, quantization", [("llama", None), ("gpt2", None), ("llama", "nf4"), ("llama", "int8")])
def test_lora_in_one_pass_is_pefts(kind, quantization, variant, tiny, monkeypatch):
    """The same output and gradients; what is more than plain LoRA is left to peft."""
    if quantization and variant in ("pissa", "dora"):
        pytest.skip("refused, or slow")
    dtype = torch.bfloat16 if quantization == "int8" else torch.float32
    model = loading.load_model(location.Source("tiny", str(tiny(kind))), quantization, dtype, "sdpa", trainable=True)
    torch.manual_seed(0)
    (model, _), calls = adapt(model, ADAPTER=variant), []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.05

    def outcome():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            output = model(input_ids=IDS, use_cache=False).logits
        output.float().square().mean().backward()
        return [output.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    expected, honest = outcome(), torch.addmm
    adapters.add_in_one_pass(model)
    monkeypatch.setattr(torch, "addmm", lambda *args, **how: calls.extend(how) or honest(*args, **how))
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.1, atol=0.02)
    for one, other in zip(expected, outcome(), strict=True):
        torch.testing.assert_close(one, other, **close)
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    assert len(calls) == (0 if variant == "dora" else layers)
    with model.disable_adapter():
        model(input_ids=IDS)
    model.add_adapter("other", LoraConfig(r=4, target_modules=model.active_peft_config.target_modules))
    model.base_model.set_adapter(["default", "other"])
    model(input_ids=IDS)
    assert len(calls) == (0 if variant == "dora" else layers)

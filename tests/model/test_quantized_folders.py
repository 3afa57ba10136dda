"""Folders that are quantised already, as bitsandbytes and Unsloth publish them, and experts that stay in 16 bits."""

import json
import shutil

import pytest
import torch
from conftest import save_tiny, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from common.cli import UserError
from common.model import generation, location
from common.model import load as loading
from common.model.quantize import own_quantization
from common.train import memory
from common.train.meta_model import empty_model
from common.train.storage import StorageTracker

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
FORMS = {
    "nf4": ("nf4", NF4),
    "unsloth": (
        "nf4",
        NF4 | dict(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"]),
    ),
    "fp4": ("fp4", dict(load_in_4bit=True)),
    "int8": ("int8", dict(load_in_8bit=True)),
}
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def quantised(tiny, tokenizer, tmp_path_factory):
    """quantised(form): the folder of a tiny model as someone else has quantised it, with a chat template."""
    made = {}

    def make(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form)
            wish = BitsAndBytesConfig(**FORMS[form][1])
            model = AutoModelForCausalLM.from_pretrained(
                tiny(), quantization_config=wish, device_map={"": "cpu"}, dtype=torch.bfloat16
            )
            model.save_pretrained(made[form])
            tokenizer.save_pretrained(made[form])
        return made[form]

    return make


def source_of(folder):
    return location.locate(str(folder))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_as_it_is_in_the_dtype_of_the_run(form, dtype, quantised):
    kind, wish = FORMS[form]
    source = source_of(quantised(form))
    assert own_quantization(loading.load_config(source)) == loading.find_quantization(source, None) == kind
    model = loading.load_model(source, None, dtype, "sdpa", trainable=True)
    names = {type(module).__name__ for module in model.model.layers[0].modules()}
    assert ("Linear8bitLt" if kind == "int8" else "Linear4bit") in names
    assert type(model.model.layers[1].mlp.up_proj).__name__.replace("Linear", "") == (
        "" if form == "unsloth" else "8bitLt" if kind == "int8" else "4bit"
    )
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    theirs = AutoModelForCausalLM.from_pretrained(source.path, device_map={"": "cpu"})
    logits = model(input_ids=IDS).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), theirs(input_ids=IDS).logits.float(), rtol=0, atol=0.03)
    plain = model.dequantize()
    assert {p.dtype for p in plain.parameters()} == {dtype}
    torch.testing.assert_close(plain(input_ids=IDS).logits.float(), logits.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("form", FORMS)
def test_the_empty_model_holds_as_many_bytes(form, quantised):
    source, kind = source_of(quantised(form)), FORMS[form][0]
    model = loading.load_model(source, None, torch.bfloat16, "sdpa", trainable=True)
    empty = empty_model(loading.load_config(source), kind, torch.bfloat16, "sdpa")
    real = {name: (p.dtype, p.nbytes) for name, p in model.named_parameters()}
    assert {name: (p.dtype, p.nbytes) for name, p in empty.named_parameters()} == real
    follower = StorageTracker()
    memory.make_fake(empty, FakeTensorMode(allow_non_fake_inputs=True), follower)
    held = [*model.parameters(), *model.buffers()]
    for state in [vars(p).get("quant_state") for p in model.parameters()]:
        if state is not None:
            second = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            held += [state.absmax, state.code, *second]
    held += [module.weight.SCB for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if torch.is_tensor(t)}
    assert follower.now == pytest.approx(sum(storages.values()), rel=0.01)


@pytest.mark.parametrize("form", ["unsloth", "int8", "fp4"])
def test_it_is_trained_asked_scored_and_merged_without_naming_it(form, quantised, chats_file, tmp_path, run_here):
    kind, run = FORMS[form][0], tmp_path / "run"
    code, out, error = run_here(
        "qlora_train.py", f"MODEL={quantised(form)}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "RUN_NAME=run",
        "MAX_STEPS=4", "MAX_LENGTH=256", "LORA_R=4", "EVAL_SIZE=4", "LEARNING_RATE=1e-2", "KL_WEIGHT=1",
    )  # fmt: skip
    assert code == 0 and "could not be predicted" not in error, error
    assert json.loads((run / "settings.json").read_text())["settings"]["QUANTIZATION"] == kind
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert metrics[3]["loss"] < metrics[0]["loss"] and metrics[3]["kl"] > 0
    chat = [f"MODEL={run}", "PROMPT=Hi", "MAX_NEW_TOKENS=4", "TEMPERATURE=0"]
    code, _, error = run_here("chat_pipe.py", *chat)
    assert code == 0 and "note:" not in error, error
    model, _ = generation.load_for_chat(str(run))
    assert "lora_A" in str(model)  # never merged into codes
    code, _, error = run_here("evaluate_model.py", f"MODEL={run}", f"BASE={quantised(form)}", "SUITES=health",
        f"OUT_DIR={tmp_path}/scores")  # fmt: skip
    assert code == 0, error
    code, out, error = run_here("merge_and_export.py", f"MODEL={run}", f"OUT_DIR={tmp_path}", "RUN_NAME=export")
    assert code == 0 and "into the dequantized base" in out and "original" not in out, error
    assert "quantization_config" not in json.loads((tmp_path / "export" / "final" / "config.json").read_text())
    with safe_open(tmp_path / "export" / "final" / "model.safetensors", "pt") as saved:
        assert {saved.get_tensor(name).dtype for name in saved.keys()} == {torch.bfloat16}
    assert json.loads((tmp_path / "export" / "export.json").read_text())["merges"][0]["kl"] < 0.02


def test_a_contradiction_is_refused_before_the_weights(quantised, chats_file, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(loading, "load_base", None)
    folder = quantised("unsloth")
    where = f"MODEL={folder}", f"OUT_DIR={tmp_path}"
    data = f"DATA={chats_file}", "MAX_LENGTH=256"
    for script, *arguments, words in (
        ("qlora_train.py", *where, *data, "QUANTIZATION=int8", f"QUANTIZATION=int8: MODEL={folder} is quantised"),
        ("qlora_train.py", *where, *data, "QUANTIZATION=hqq-2bit", "is quantised already (nf4)"),
        ("qlora_train.py", *where, *data, "ADAPTER=None", "Take the 16-bit MODEL, or ADAPTER=lora."),
        ("qlora_train.py", *where, *data, "ADAPTER=pissa", "Take the 16-bit MODEL, or ADAPTER=lora."),
        ("qlora_train.py", *where, *data, "ADAPTER=loftq", "LoftQ needs the 16-bit weights"),
        ("galore_train.py", *where, *data, "is quantised: its weights have no gradient"),
        ("chat_pipe.py", where[0], "PROMPT=Hi", "QUANTIZATION=int8", "is quantised already (nf4)"),
        ("evaluate_model.py", *where, "QUANTIZATION=int8", "is quantised already (nf4)"),
        ("merge_and_export.py", *where, "(nf4) and has no adapter. Take the 16-bit model."),
        ("merge_and_export.py", *where, "QUANTIZATION=int8", "is quantised already (nf4)"),
        (
            "estimate_memory.py",
            where[0],
            data[1],
            "METHOD=int8",
            f"METHOD=int8: MODEL={folder} is quantised already (nf4)",
        ),
        ("estimate_memory.py", where[0], data[1], "METHOD=full", "is quantised (nf4). Take METHOD=lora."),
    ):
        code, _, error = run_here(script, *arguments)
        assert code == 2 and words in error and error.count("error:") == 1, f"{script} {arguments}: {error}"


def test_the_estimate_is_that_of_the_quantised_model(quantised, tiny, run_here):
    weights = {}
    for folder, method in ((quantised("unsloth"), "lora"), (quantised("unsloth"), "qlora"), (tiny(), "qlora")):
        code, out, error = run_here("estimate_memory.py", f"MODEL={folder}", f"METHOD={method}", "MAX_LENGTH=256")
        assert code == 0 and "the same in 16 bits" in out, error
        weights[folder, method] = out[out.index("GiB") :]
    assert weights[quantised("unsloth"), "lora"] == weights[quantised("unsloth"), "qlora"]


@pytest.mark.parametrize(("method", "words"), [("gptq", "gptq"), ("awq", "awq"), ("no-such-method", "no-such-method")])
def test_what_cannot_be_loaded_here_is_refused_with_its_name(method, words, tiny, tmp_path, run_here, chats_file):
    shutil.copytree(tiny(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    for script, *arguments in (
        ("qlora_train.py", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "MAX_LENGTH=128"), ("chat_pipe.py", "PROMPT=Hi")
    ):  # fmt: skip
        code, _, error = run_here(script, f"MODEL={tmp_path / 'model'}", *arguments)
        assert code == 2 and f"is quantised already ({words}), which does not run here" in error, error


@pytest.mark.parametrize("quantization", ["nf4", "int8", "hqq-4bit"])
def test_experts_that_stay_in_16_bits_are_told(quantization, tmp_path, tiny, capsys, run_here):
    if quantization.startswith("hqq"):
        pytest.importorskip("hqq")
    changes = {k: v for k, v in tiny_config("llama").to_diff_dict().items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model("qwen3_moe", **changes | dict(num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, head_dim=16))  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny()).save_pretrained(tmp_path)
    loading.load_model(source_of(tmp_path), quantization, torch.bfloat16, "sdpa")
    error = capsys.readouterr().err
    assert (
        f"QUANTIZATION={quantization}: 0.00 of 0.00 GiB of weights stay in 16 bits (experts: down_proj, gate" in error
    )
    loading.load_model(source_of(tmp_path), None, torch.bfloat16, "sdpa")
    loading.load_model(source_of(tiny()), quantization, torch.bfloat16, "sdpa")
    assert "stay in 16 bits" not in capsys.readouterr().err


def pack(folder, method):
    """Rewrite a saved model as it is published in MXFP4 (experts) or FP8 (linear layers); returns what codes mean."""
    weights, about, meant = load_file(folder / "model.safetensors"), {"quant_method": method}, {}
    for name in [n for n in weights if n.endswith("_proj" if method == "mxfp4" else "_proj.weight")]:
        weight = weights.pop(name)
        if method == "mxfp4":  # blocks of 32 along the inputs, two codes to a byte
            experts, inputs, outputs = weight.shape
            shape = (experts, outputs, inputs // 32)
            codes, scales = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8), torch.full(shape, 124).byte()
            weights |= {f"{name}_blocks": codes, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(codes, scales)
        else:
            scale = weight.float().abs().max() / 400
            codes = (weight.float() / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 32) for size in weight.shape]
            weights |= {name: codes, f"{name}_scale_inv": torch.full(blocks, scale)}
            meant[name] = codes.float() * scale
            about |= {"activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": about}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize(("architecture", "method"), [("gpt_oss", "mxfp4"), ("llama", "fp8")])
def test_what_nothing_trains_on_becomes_16_bits_and_is_saved_so(
    architecture, method, tmp_path, tokenizer_folder, capsys
):
    changes = dict(num_local_experts=2, num_experts_per_tok=2, head_dim=16, pad_token_id=2) if method == "mxfp4" else {}
    meant = pack(save_tiny(architecture, tmp_path / "model", tokenizer_folder, **changes), method)
    source = source_of(tmp_path / "model")
    assert loading.find_quantization(source, None) is None and meant
    with pytest.raises(UserError, match=f"QUANTIZATION=nf4: .* is quantised already .{method}."):
        loading.find_quantization(source, "nf4")
    model = loading.load_model(source, None, torch.float32, "eager", trainable=True)
    assert f"is quantised ({method}); its weights are taken in" in capsys.readouterr().err
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model(input_ids=IDS).logits.isfinite().all()
    for name, weight in meant.items():
        torch.testing.assert_close(model.get_parameter(name), weight.float(), rtol=0.01, atol=1e-3)
    loading.save_final(tmp_path / "saved", model, loading.load_tokenizer(source))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = loading.load_model(source_of(tmp_path / "saved"), None, torch.float32, "eager")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)

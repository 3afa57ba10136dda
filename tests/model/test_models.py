"""Models: what MODEL may name, what is refused, the embedded weights, and results that load as they were saved."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny
from peft import LoraConfig, get_peft_model

from common.cli import UserError
from common.model import adapters, generation, load, location


def test_locate_finds_each_form(tiny, tmp_path):
    folder = tiny()
    assert location.locate(str(folder)) == location.Source(str(folder), str(folder))
    assert location.locate("org/name") == location.Source("org/name", "org/name")
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "settings.json").write_text('{"script": "qlora_train", "settings": {}}')
    config = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (run / "final" / "adapter_config.json").write_text(json.dumps(config))
    (run / "final" / "adapter_model.safetensors").touch()
    assert location.locate(str(run)) == location.Source(str(folder), str(folder), str(run / "final"))


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruc", "/no/where", "./out/x", "C:\\models\\x", "no-such.gguf", "a/b/c"]
)
def test_locate_names_what_is_missing(name):
    with pytest.raises(UserError, match="no such folder|file not found"):
        location.locate(name)


def test_a_run_that_did_not_finish(tmp_path):
    (tmp_path / "settings.json").write_text('{"script": "qlora_train", "settings": {}}')
    with pytest.raises(UserError, match="checkpoint-N"):
        location.locate(str(tmp_path))


@pytest.mark.slow
def test_the_embedded_model_is_converted_once_and_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(location.constants, "HF_HOME", str(tmp_path))
    source = location.locate("smollm2-135m-instruct")
    load.load_config(source)
    assert (Path(source.path) / "model.safetensors").exists() and source.name == "smollm2-135m-instruct"
    made = (Path(source.path) / "model.safetensors").stat().st_mtime_ns
    load.load_config(location.locate("smollm2-135m-instruct"))
    assert (Path(source.path) / "model.safetensors").stat().st_mtime_ns == made
    model, tokenizer = generation.load_for_chat("smollm2-135m-instruct")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    generator = generation.Generator(model, tokenizer)
    assert "Paris" in "".join(generator.stream(generator.encoder.prompt(chat), 24, temperature=0, top_p=1))
    assert generator.last.stop == "end"
    batch = list(generation.answers(model, tokenizer, [chat, chat[:]], max_new_tokens=24, temperature=0.0, top_p=1.0))
    assert all("Paris" in answer.text and answer.stop == "end" for answer in batch)


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "pissa"])
def test_a_saved_adapter_gives_the_same_logits_when_loaded_and_when_merged(variant, tiny, tmp_path):
    source = location.locate(str(tiny()))
    base = load.load_model(source, None, torch.float32, "sdpa")
    print_of_base = load.fingerprint(base)
    torch.manual_seed(0)
    usual = dict(MODEL="tiny", LORA_R=16, LORA_ALPHA=32, LORA_DROPOUT=0.0, LORA_TARGET_MODULES="auto")
    model = adapters.add_adapter(base, usual | {"ADAPTER": variant})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    load.save_final(tmp_path, model, load.load_tokenizer(source), print_of_base)
    loaded = load.load_model(location.locate(str(tmp_path)), None, torch.float32, "sdpa").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_other_weights_of_the_same_shape_is_told_apart(tiny, tmp_path, tokenizer_folder):
    other = save_tiny("llama", tmp_path, tokenizer_folder, seed=3)
    first, second = (
        load.fingerprint(load.load_model(location.locate(str(f)), None, torch.float32, "sdpa")) for f in (tiny(), other)
    )
    assert first != second
    half = load.fingerprint(load.load_model(location.locate(str(tiny())), None, torch.float16, "sdpa"))
    assert first == pytest.approx(half, rel=0.02)


def test_nf4_and_int8_load_on_the_cpu_and_stay_close(tiny):
    ids = torch.arange(3, 30)[None]
    exact = load.load_model(location.locate(str(tiny())), None, torch.bfloat16, "sdpa").eval()
    with torch.no_grad():
        expected = exact(input_ids=ids).logits.float()
        for quantization, share in (("nf4", 0.35), ("int8", 0.1)):
            model = load.load_model(location.locate(str(tiny())), quantization, torch.bfloat16, "sdpa").eval()
            error = (model(input_ids=ids).logits.float() - expected).norm() / expected.norm()
            assert 0 < error < share, quantization


def test_an_evaluation_does_not_cut_the_gradients_of_nf4(tiny):
    """bitsandbytes 0.50 on a CPU with AVX512-BF16 does just that, without a word (see models.load_model)."""
    source, ids = location.locate(str(tiny())), torch.arange(3, 30)[None]
    model = load.load_model(source, "nf4", torch.bfloat16, "sdpa", trainable=True)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    gradients = []
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert sum(g.abs().sum() for g in gradients[0].values()) > 0


def test_the_end_token_of_the_template_stops_an_answer(tiny):
    source = location.locate(str(tiny()))
    model, tokenizer = load.load_model(source, None, torch.float32, "sdpa"), load.load_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}"
        "{% generation %}{{ m.content }}<|stop|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert tokenizer.convert_tokens_to_ids("<|stop|>") in generation.end_tokens(model, tokenizer)


def test_every_end_token_stops_an_answer(tiny):
    source = location.locate(str(tiny()))
    model, tokenizer = load.load_model(source, None, torch.float32, "sdpa"), load.load_tokenizer(source)
    ids = generation.end_tokens(model, tokenizer)
    assert set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])) <= set(ids)

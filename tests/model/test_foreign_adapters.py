"""Adapters of other tools, in their published layouts: chat, training, evaluation, merge and GGUF as peft has them."""

import json
import shutil
import time

import pytest
import torch
from conftest import ROOT, save_tiny
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common.cli import UserError
from common.eval import suites
from common.model import generation, location
from common.model import load as loading
from common.model.adapters import prompt_cache
from common.train.meta_model import empty_adapter, empty_model

WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(3, 60)[None]
MODULES = ["q_proj", "v_proj", "up_proj", "down_proj"]
PADDED = 704  # rows, as Unsloth and Axolotl pad them


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A base with a head of its own, 640 rows, and a chat template."""
    folder = save_tiny("qwen2", tmp_path_factory.mktemp("base"), tokenizer.name_or_path)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, rows=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def save_adapter(folder, base, config, rows=None, named=None, **fields):
    """A random adapter on the base, whose embeddings get so many rows. fields: of its adapter_config.json."""
    torch.manual_seed(1)
    model = get_peft_model(load(base, rows), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": named or str(base)} | fields
    file.write_text(json.dumps(config))
    return folder


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", **dict(r=4, lora_alpha=8, target_modules=MODULES) | changes)


def peft_form(folder, base):
    return save_adapter(folder, base, lora(use_dora=True), named=str(base)), None


def trl_form(folder, base):
    """SFTTrainer's output folder: the adapter, its tokenizer, a checkpoint, training_args.bin, a card."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}] * 8
    args = SFTConfig(output_dir=str(folder), max_steps=1, save_steps=1, report_to="none", use_cpu=True, bf16=False,
                     learning_rate=1e-2, gradient_checkpointing=False)  # fmt: skip
    config = lora(modules_to_save=["lm_head"])
    trainer = SFTTrainer(load(base), args, train_dataset=Dataset.from_list(rows), peft_config=config,
                         processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder, None


def unsloth_form(folder, base):
    mapping = dict(base_model_class="Qwen2ForCausalLM", parent_library="transformers.models.qwen2.modeling_qwen2",
                   unsloth_fixed=True)  # fmt: skip
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(folder, base, config, PADDED, "unsloth/tiny-bnb-4bit", auto_mapping=mapping, revision=None)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder, PADDED


def axolotl_form(folder, base):
    """The base's config.json beside the adapter, checkpoints below it, a path of the machine that trained it."""
    config = lora(modules_to_save=["embed_tokens", "lm_head"], lora_dropout=0.05)
    save_adapter(folder, base, config, PADDED, "/workspace/data/base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    load(base, PADDED).config.save_pretrained(folder)
    save_adapter(folder / "checkpoint-2", base, config, PADDED, "/workspace/data/base")
    return folder, PADDED


def llama_factory_form(folder, base):
    save_adapter(folder, base, lora(target_modules="all-linear"), named="./base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for file in ("all_results.json", "trainer_state.json", "settings.json"):
        (folder / file).write_text('{"epoch": 1.0}')
    (folder / "training_args.yaml").write_text("stage: sft\n")
    return folder, None


FORMS = [peft_form, trl_form, unsloth_form, axolotl_form, llama_factory_form]


@torch.no_grad()
def peft_logits(folder, base, rows=None):
    return PeftModel.from_pretrained(load(base, rows), folder).eval()(input_ids=IDS).logits


def divergence(one, other) -> float:
    """Mean KL divergence in nats a token."""
    one, other = (logits[0].detach().double().log_softmax(-1) for logits in (one, other))
    return (one.exp() * (one - other)).sum(-1).mean().item()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.removesuffix("_form"))
def test_every_script_takes_the_adapter_as_peft_does(form, base, chats_file, tmp_path, run_here):
    folder, rows = form(tmp_path / "theirs", base)
    expected = peft_logits(folder, base, rows)
    model, tokenizer = generation.load_for_chat(str(base), dtype="float32", adapter=str(folder))
    assert divergence(expected, model(input_ids=IDS).logits) < 1e-6
    where = f"MODEL={base}", f"ADAPTER={folder}", f"OUT_DIR={tmp_path}"
    chats, size = f"CHATS={chats_file}", "MAX_LENGTH=64"
    merged = "RUN_NAME=merged", "DTYPE=float32", "GGUF=f16", "PROOF_TOKENS=64"
    code, _, error = run_here("merge_and_export.py", *where, *merged, chats, size)
    assert code == 0, error
    code, _, error = run_here("qlora_train.py", *where, f"DATA={chats_file}", size, "EVAL_SIZE=0", "MAX_STEPS=1",
        "RUN_NAME=on", "LEARNING_RATE=1e-9", "DTYPE=float32")  # fmt: skip
    assert code == 0 and "could not be predicted" not in error, error
    code, out, error = run_here("evaluate_model.py", *where, chats, size, "SUITES=loss", "DTYPE=float32")
    assert code == 0 and str(folder) in out, error
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "final", dtype=torch.float32)
    assert divergence(expected, final(input_ids=IDS).logits) < 1e-6
    assert all(file["kl"] < 1e-5 for file in json.loads((tmp_path / "merged" / "export.json").read_text())["files"])
    trained, _ = generation.load_for_chat(str(tmp_path / "on"), dtype="float32")  # its base is the one that was named
    assert divergence(expected, trained(input_ids=IDS).logits) < 1e-6


def test_the_base_is_named_told_and_checked_by_shapes(base, tiny, tmp_path, run_here):
    folder, _ = axolotl_form(tmp_path / "theirs", base)
    code, _, error = run_here("chat_pipe.py", f"MODEL={folder}", "PROMPT=Hi")
    assert code == 2 and f"Name its base: MODEL=<base> ADAPTER={folder}" in error
    code, _, error = run_here("estimate_memory.py", f"MODEL={folder}")
    assert code == 2 and "MODEL=<base>" in error and "ADAPTER=" not in error
    code, _, error = run_here("chat_pipe.py", f"MODEL={base}", f"ADAPTER={folder}", "PROMPT=Hi", "MAX_NEW_TOKENS=1")
    assert code == 0 and "own adapter_config.json names /workspace/data/base" in error
    other = save_tiny("qwen2", tmp_path / "other", base, hidden_size=128)
    code, _, error = run_here("chat_pipe.py", f"MODEL={other}", f"ADAPTER={folder}", "PROMPT=Hi")
    assert code == 2 and "size mismatch for" in error and "torch.Size([704, 64])" in error
    deeper, _ = peft_form(tmp_path / "deeper", save_tiny("qwen2", tmp_path / "deep", base, num_hidden_layers=3))
    for model, words in ((base, "no layer for"), (tiny("gpt2"), "Target modules")):
        code, _, error = run_here(
            "chat_pipe.py", f"MODEL={model}", f"ADAPTER={deeper}", "CHAT_TEMPLATE=zephyr", "PROMPT=Hi"
        )
        assert code == 2 and words in error, error
        code, _, error = run_here("qlora_train.py", f"MODEL={model}", f"ADAPTER={deeper}", "CHAT_TEMPLATE=zephyr",
            f"OUT_DIR={tmp_path}/none", "MAX_LENGTH=64")  # fmt: skip
        assert code == 2 and words in error and not (tmp_path / "none").exists(), error


@pytest.mark.parametrize("config, rows, of_base", [
    (dict(trainable_token_indices={"embed_tokens": [700], "lm_head": [700]}), PADDED, 640),
    (dict(target_modules=["embed_tokens", "q_proj", "lm_head"]), PADDED, 640),
    (dict(modules_to_save=["embed_tokens", "lm_head"]), PADDED, 640),
    (dict(modules_to_save=["embed_tokens", "lm_head"]), 645, 768),
])  # fmt: skip
def test_embeddings_get_the_rows_of_the_adapter(config, rows, of_base, base, tmp_path):
    padded = tmp_path / "base"
    load(base, of_base).save_pretrained(padded)
    AutoTokenizer.from_pretrained(base).save_pretrained(padded)
    folder = save_adapter(tmp_path / "theirs", base, lora(**config), rows)
    weights = load_file(folder / WEIGHTS)
    if "modules_to_save" in config:  # peft writes them once more where it knows that the base had other rows
        copies = {f"base_model.model.lm_head.{name}.weight": weights["base_model.model.lm_head.weight"].clone()
                  for name in ("modules_to_save", "original_module")}  # fmt: skip
        save_file(weights | copies, folder / WEIGHTS, {"format": "pt"})
    model, _ = generation.load_for_chat(str(padded), dtype="float32", adapter=str(folder))
    assert model.get_input_embeddings().weight.shape[0] >= (rows if of_base > rows else 701)
    source = location.locate(str(padded), adapter=str(folder))
    empty = empty_adapter(empty_model(loading.load_config(source), None, torch.float32, "sdpa"), source.adapter)
    assert empty.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    logits, expected = (logits[..., :640] for logits in (model(input_ids=IDS).logits, peft_logits(folder, base, rows)))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
], ids=["prompt", "prefix"])  # fmt: skip
@torch.no_grad()
def test_prompt_learning_is_chatted_with_and_evaluated_and_not_merged(form, base, tmp_path, run_here):
    folder = save_adapter(tmp_path / "theirs", base, form)
    logits = peft_logits(folder, base)[:, -IDS.shape[1] :]
    model, tokenizer = generation.load_for_chat(str(base), dtype="float32", adapter=str(folder))
    generator = generation.Generator(model, tokenizer)
    streamed = generator.forward(input_ids=IDS, past_key_values=prompt_cache(model), use_cache=True).logits
    assert divergence(logits, streamed) < 1e-6
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "What is your name, please?")]
    batch = [answer.text.strip() for answer in generation.answers(model, tokenizer, chats, max_new_tokens=6)]
    for _ in range(2):  # the second time what was read is kept
        for chat, text in zip(chats, batch, strict=True):
            list(generator.stream(generator.encoder.prompt(chat), 6, 0, 1))
            assert generator.last.text == text.strip(" \ufffd")  # the last character may have been cut
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:], reduction="sum").item()
    assert abs(suites.sequence_loss(model, IDS[0].tolist(), [1] * IDS.shape[1])[0] - expected) < 1e-3
    for script, words in (("merge_and_export.py", "cannot be merged"), ("galore_train.py", "cannot be merged"),
                          ("qlora_train.py", "virtual tokens")):  # fmt: skip
        code, _, error = run_here(script, f"MODEL={base}", f"ADAPTER={folder}", f"OUT_DIR={tmp_path}")
        assert code == 2 and words in error, error


def pickled(folder, base):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def not_a_number(folder, base):
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def mlx(folder, base):
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")


def config_with(**fields):
    def change(folder, base):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def below(folder, base):
    save_adapter(folder / "lower", base, lora())
    config_with(base_model_name_or_path="lower")(folder, base)


def two_checkpoints(folder, base):
    for step in ("2", "10"):
        shutil.copytree(folder, folder.with_name("moved") / f"checkpoint-{step}")
    shutil.rmtree(folder)
    folder.with_name("moved").rename(folder)


@pytest.mark.parametrize("change, words", [
    (pickled, "Convert them: python -c"),
    (mlx, "mlx-lm's, not peft's"),
    (not_a_number, "weights are not finite"),
    (lambda folder, base: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
    (lambda folder, base: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    (lambda folder, base: (folder / WEIGHTS).write_bytes(b"abc"), "weights are damaged"),
    (config_with(base_model_name_or_path=None), "names no base. Name its base: MODEL=<base> ADAPTER="),
    (config_with(base_model_name_or_path="."), "names no base"),
    (config_with(base_model_name_or_path="C:\\models\\base"), "Name its base: MODEL=<base> ADAPTER="),
    (config_with(peft_type="NEWEST"), "A newer peft may know it"),
    (config_with(peft_type="XLORA"), "kind XLORA weigh the whole text"),
    (config_with(task_type="SEQ_CLS"), "is for SEQ_CLS"),
    (below, "is an adapter itself. Merge that first"),
    (two_checkpoints, "holds 2 models: checkpoint-2, checkpoint-10. Name one: MODEL="),
])  # fmt: skip
def test_what_cannot_work_is_one_line(change, words, base, tmp_path, run_here, monkeypatch):
    folder, _ = peft_form(tmp_path / "theirs", base)
    change(folder, base)
    monkeypatch.chdir(folder if change.__name__ == "change" else ROOT)  # in which "." is the adapter itself
    code, _, error = run_here("chat_pipe.py", f"MODEL={folder}", "PROMPT=Hi")
    assert code == 2 and words in error and "Traceback" not in error, error


@pytest.mark.parametrize("file", ["adapter_model.bin", "pytorch_model.bin"])
def test_the_command_that_converts_pickled_weights_works(file, base, tmp_path):
    folder = tmp_path / "theirs"
    is_adapter = file.startswith("adapter")
    peft_form(folder, base) if is_adapter else shutil.copytree(base, folder)
    weights = folder / (WEIGHTS if is_adapter else "model.safetensors")
    tensors = load_file(weights)
    torch.save(tensors, folder / file)
    weights.unlink()
    with pytest.raises(UserError) as refused:
        location.locate(str(folder))
    exec(str(refused.value).partition('python -c "')[2].removesuffix('"'))
    assert load_file(weights).keys() == tensors.keys() and location.locate(str(folder))


def test_a_whole_model_counts_beside_a_left_over_adapter(base, tmp_path, capsys):
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    save_adapter(merged, base, lora(), named="/content/base")
    (merged / "settings.json").write_text('{"settings": {"theme": "dark"}}')  # another tool's
    assert location.locate(str(merged)).adapter is None and "beside a whole model" in capsys.readouterr().err
    model, _ = generation.load_for_chat(str(merged), dtype="float32")
    torch.testing.assert_close(model(input_ids=IDS).logits, load(base)(input_ids=IDS).logits)


def test_folders_around_an_adapter_and_bases_beside_it_are_found(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    save_adapter(tmp_path / "out" / "adapter", base, lora(), named="../base", revision="v2")
    source = location.locate(str(tmp_path / "out"))
    assert source.adapter == str(tmp_path / "out" / "adapter") and source.name == str((tmp_path / "base").resolve())
    assert source.revision == "v2" and location.locate(str(base), adapter=str(tmp_path / "out")).revision is None
    assert loading.load_model(source, None, torch.float32, "sdpa").active_peft_config.revision == "v2"


def test_an_adapter_on_the_hub_is_found_in_its_cache(base, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    location.fetch_adapter.cache_clear()
    for name, folder in (("adapter", unsloth_form(tmp_path / "theirs", base)[0]), ("model", base)):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / "a1b2"
        shutil.copytree(folder, snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("a1b2")
    source = location.locate("org/model", adapter="org/adapter")
    assert source.name == "org/model" and source.adapter.endswith("a1b2")
    model, _ = generation.load_for_chat("org/model", dtype="float32", adapter="org/adapter")
    assert divergence(peft_logits(source.adapter, base, PADDED), model(input_ids=IDS).logits) < 1e-6
    assert location.locate("org/adapter").name == "unsloth/tiny-bnb-4bit"
    file = tmp_path / "theirs" / WEIGHTS
    with pytest.raises(UserError, match=f"ADAPTER={file}: no such folder. That is a file; name its folder: .*theirs"):
        location.locate(str(base), adapter=str(file))
    with pytest.raises(UserError, match="ADAPTER=org/model holds no adapter .* Is the name right"):
        location.locate(str(base), adapter="org/model")
    # One that was left over beside a whole model does not count.
    shutil.copy(f"{source.adapter}/adapter_config.json", tmp_path / "models--org--model" / "snapshots" / "a1b2")
    location.fetch_adapter.cache_clear()
    assert location.locate("org/model").adapter is None
    model, _ = generation.load_for_chat("org/model", dtype="float32")
    assert divergence(load(base)(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-6


def test_an_adapter_that_may_not_be_read_is_named(base, tmp_path, monkeypatch):
    def refuse(*args):
        raise FileNotFoundError("No such file or directory")  # as safetensors says it

    folder, _ = peft_form(tmp_path / "theirs", base)
    monkeypatch.setattr("common.model.adapters.safe_open", refuse)
    with pytest.raises(UserError, match=f"ADAPTER={folder}: its weights are damaged or cannot be read"):
        generation.load_for_chat(str(base), adapter=str(folder))


def test_an_adapter_is_not_compared_with_one_of_its_name(base, tmp_path, capsys):
    folder, _ = peft_form(tmp_path / "theirs", base)
    with pytest.raises(SystemExit, match="2"):
        location.check_models(MODEL=str(base), ADAPTER=str(folder), COMPARE=str(folder))
    assert f"COMPARE={folder} is ADAPTER, too" in capsys.readouterr().err


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    location.fetch_adapter.cache_clear()
    started = time.monotonic()
    assert location.locate("org/elsewhere").adapter is None
    assert constants.HF_HUB_OFFLINE and time.monotonic() - started < 5


def test_a_base_in_4_bits_and_the_16_bit_one_named_instead(base, tmp_path, run_here):
    packed = tmp_path / "base-bnb-4bit"
    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=wish, device_map="cpu", dtype=torch.float32)
    theirs.save_pretrained(packed)
    AutoTokenizer.from_pretrained(base).save_pretrained(packed)
    folder = save_adapter(tmp_path / "theirs", base, lora(), named=str(packed))
    model, _ = generation.load_for_chat(str(folder), dtype="float32")
    expected = PeftModel.from_pretrained(theirs, folder)(input_ids=IDS).logits
    assert divergence(expected, model(input_ids=IDS).logits) < 1e-6
    code, out, error = run_here("merge_and_export.py", f"MODEL={base}", f"ADAPTER={folder}", f"OUT_DIR={tmp_path}",
        "RUN_NAME=merged", "DTYPE=float32", "PROOF_TOKENS=64")  # fmt: skip
    assert code == 0 and "into the original base" in out, error

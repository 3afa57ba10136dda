"""Merging and GGUF files: right, or refused; verification must find every fault planted here."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import CHAT, ROOT, save_tiny
from gguf import GGMLQuantizationType, GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import distributed, hardware
from common.cli import UserError
from common.data import templates
from common.data.encoder import ChatEncoder
from common.export import gguf, gguf_tokenizer, hub, proof, verify, verify_gguf
from common.export.llama_cpp import LlamaCpp
from common.export.proof import Proof
from common.model import load, location

pytestmark = pytest.mark.usefixtures("lean")
IN_FLOAT32 = Proof(torch.device("cpu"), torch.float32)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama, tied": ("llama", {}),
    "llama, head apart, biases": ("llama", dict(tie_word_embeddings=False, attention_bias=True)),
    "llama 3's rope": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3, wide heads": ("qwen3", dict(head_dim=32)),
    "stablelm": ("stablelm", dict(use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm, parallel": ("stablelm", dict(use_parallel_residual=True)),
    "gpt2": ("gpt2", {}),
}


@pytest.fixture
def chat_model(tokenizer, tmp_path):
    """chat_model(architecture, **changes): the folder of a tiny model with our template."""

    def make(architecture="llama", **changes):
        folder = tmp_path / "chat-model"
        save_tiny(architecture, folder, tokenizer.name_or_path, **{"initializer_range": 0.2, "endless": True} | changes)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def export(run_here, tmp_path, monkeypatch):
    """export(model, "NAME=value", ...): exit code, folder, output."""
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 8)  # random models go on and on

    def run(model, *settings):
        more = [f"OUT_DIR={tmp_path}", "RUN_NAME=export", "PROOF_TOKENS=60", "CHATS=data/brief.jsonl"]
        code, out, error = run_here("merge_and_export.py", f"MODEL={model}", *more, *settings)
        return code, tmp_path / "export", out + error

    return run


def logits(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_read_back_as_it_was(name, chat_model, export):
    """By transformers to 1e-3 in every logit, and by llama.cpp within what its 16-bit cache loses."""
    architecture, changes = MODELS[name]
    folder = chat_model(architecture, **changes)
    code, out, text = export(folder, "GGUF=f16,q8_0")
    assert code == 0, text
    report = json.loads((out / "export.json").read_text())
    assert [file["kl"] < bound for file, bound in zip(report["files"], (1e-6, 1e-2), strict=True)] == [True] * 2
    tokenizer, config = AutoTokenizer.from_pretrained(out / "final"), AutoConfig.from_pretrained(out / "final")
    ids = ChatEncoder(tokenizer).prompt(CHAT[:4])
    with torch.no_grad():
        read = verify_gguf.load_gguf(out / "chat-model-f16.gguf", config, IN_FLOAT32)(torch.tensor([ids])).logits[0]
    expected = logits(folder, ids)
    assert torch.allclose(read, expected, atol=1e-3)
    llama = LlamaCpp(out / "chat-model-f16.gguf", 512)
    given = llama.ask("/completion", prompt=ids, n_predict=1, temperature=-1, n_probs=8)
    for entry in given["completion_probabilities"][0]["top_logprobs"]:
        assert entry["logprob"] == pytest.approx(expected[-1].log_softmax(-1)[entry["id"]].item(), abs=0.05)
    assert report["files"][0]["llama_cpp_kl"] < 0.01


# --- faults planted on purpose ---


def without_end_token(monkeypatch):
    honest = gguf.add_tokenizer

    def add(writer, tokenizer, *rest):
        template, honest_template = tokenizer.chat_template, writer.add_chat_template
        writer.add_chat_template = lambda text: honest_template(template.replace("<|im_end|>", ""))
        honest(writer, tokenizer, *rest)

    monkeypatch.setattr(gguf, "add_tokenizer", add)


def wrong_end_id(monkeypatch):
    honest = gguf.GGUFWriter.add_uint32
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_uint32",
        lambda self, key, value: honest(self, key, 1 if key == "tokenizer.ggml.eos_token_id" else value),
    )


def dropped_head(monkeypatch):
    honest = gguf.tensors
    monkeypatch.setattr(gguf, "tensors", lambda *a: (pair for pair in honest(*a) if pair[0] != "output.weight"))


def not_interleaved(monkeypatch):
    monkeypatch.setattr(gguf, "interleave", lambda weight, heads: weight)


def double_bos(monkeypatch):
    honest = gguf.GGUFWriter.add_chat_template
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_add_bos_token", lambda self, value: self.add_bool("tokenizer.ggml.add_bos_token", True)
    )
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_chat_template",
        lambda self, text: honest(self, "{{- bos_token -}}{{- bos_token -}}\n" + text),
    )


FAULTS = {
    without_end_token: "tokens of a chat differ",
    wrong_end_id: "stops at '<|im_start|>', answers end with '<|im_end|>'",
    dropped_head: "predicts something else",
    not_interleaved: "predicts something else",
    double_bos: "two BOS",
}


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_found(plant, chat_model, export, monkeypatch):
    plant(monkeypatch)
    code, out, text = export(chat_model(tie_word_embeddings=False), "GGUF=f16")
    assert code == 5 and FAULTS[plant] in text
    assert (out / "chat-model-f16.gguf.rejected").exists() and not list(out.glob("*.gguf"))
    assert json.loads((out / "export.json").read_text())["files"][0]["faults"]


def test_answers_that_do_not_end_are_found(chat_model, export, monkeypatch):
    honest = verify.Reference
    monkeypatch.setattr(verify, "Reference", lambda *a: vars_set(honest(*a), ended=4))
    code, _, text = export(chat_model(), "GGUF=f16")
    assert code == 5 and "answers do not end: 0 of 4, the model's 4" in text


def vars_set(thing, **values):
    vars(thing).update(values)
    return thing


# --- merging ---


def trained(run_here, model, chats_file, tmp_path, *settings):
    arguments = [
        f"MODEL={model}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "RUN_NAME=run", "MAX_STEPS=4", "MAX_LENGTH=256",
        "LORA_R=4", "EVAL_SIZE=4", "LEARNING_RATE=1e-2", "SAVE_STEPS=None", *settings,
    ]  # fmt: skip
    code, _, error = run_here("qlora_train.py", *arguments)
    assert code == 0, error
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", ""),
        ("llama", "ADAPTER=dora"),
        ("llama", "ADAPTER=pissa"),
        ("llama", "CHAT_TEMPLATE=zephyr ADAPTER=ia3"),
        ("llama", "CHAT_TEMPLATE=llama3"),  # new tokens: rows of the embeddings, and of the head tied to them
        ("mistral", "CHAT_TEMPLATE=llama3"),  # and of a head that is apart
        ("gpt2", "ADAPTER=rslora"),  # Conv1D
        ("gpt2", "ADAPTER=None CHAT_TEMPLATE=alpaca"),
    ],
)
def test_a_merged_model_predicts_what_the_trained_one_does(
    architecture, settings, tiny, chats_file, tmp_path, run_here, export
):
    run = trained(run_here, tiny(architecture), chats_file, tmp_path, *settings.split())
    code, out, text = export(run, "GGUF=f16", "CHATS=None", "DTYPE=float32")
    assert code == 0, text
    source = location.locate(str(run))
    tokenizer = load.load_tokenizer(source)
    live = load.load_model(source, None, torch.float32, "sdpa", vocabulary=len(tokenizer)).eval()
    ids = ChatEncoder(tokenizer).prompt(CHAT[1:4])
    with torch.no_grad():
        expected = live(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits(out / "final", ids), expected, atol=2e-4)
    report = json.loads((out / "export.json").read_text())
    assert report["merges"][0]["kl"] < 1e-6 and report["files"][0]["kl"] < 1e-4
    template = (out / "final" / "chat_template.jinja").read_text()
    assert "generation %}" not in template and "generation -%}" not in template
    merged_tokenizer = AutoTokenizer.from_pretrained(out / "final")
    for length in (2, 4):
        options = dict(tokenize=False, add_generation_prompt=True)
        texts = [t.apply_chat_template(CHAT[1:length], **options) for t in (tokenizer, merged_tokenizer)]
        assert texts[0] == texts[1]
    about = json.loads((out / "final" / "generation_config.json").read_text())
    assert merged_tokenizer.eos_token_id in about["eos_token_id"]
    assert "LEARNING_RATE | 0.01" in (out / "final" / "README.md").read_text()


def test_the_card_lists_the_scores_that_evaluation_wrote(tmp_path):
    """Each with its interval; those of a run belong to its final model, not to its checkpoints."""
    contents = {
        "settings": {"settings": {"LEARNING_RATE": 0.01, "DROP_PATTERN": "a|b"}},
        "summary": {"eval_loss": 1.25, "verdict": None},
        "scores": {
            "scores": {"name": 0.875, "judge average": 6.5},
            "intervals": {"name": [0.5294, 0.9776], "judge average": None},
            "settings": {"QUANTIZATION": None},
        },
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for model in (tmp_path, tmp_path / "final"):
        card = hub.model_card(str(model), "org/base", tmp_path)
        assert card.startswith("---\nbase_model: org/base\n") and "| eval_loss | 1.25 |" in card
        assert "| name | 0.875 (0.5294 to 0.9776) |" in card and "| judge average | 6.5 |" in card
    card = hub.model_card(str(tmp_path / "checkpoint-5"), "org/base", tmp_path)
    assert "| LEARNING_RATE | 0.01 |" in card and r"| DROP_PATTERN | a\|b |" in card
    assert "eval_loss" not in card and "0.875" not in card
    assert "fine-tuned from org/base" in hub.model_card("org/base", "org/base", None).lower()


def test_an_evaluated_run_is_exported_with_its_scores(tiny, chats_file, tmp_path, run_here, export):
    run = trained(run_here, tiny(), chats_file, tmp_path)
    code, _, error = run_here("evaluate_model.py", f"MODEL={run}", f"OUT_DIR={tmp_path}/scores", "SUITES=health")
    assert code == 0, error
    scores = json.loads((run / "scores.json").read_text())
    code, out, text = export(run)
    assert code == 0, text
    card = (out / "final" / "README.md").read_text()
    for name, value in scores["scores"].items():
        low, high = scores["intervals"][name]
        assert f"| {name} | {value:.4g} ({low:.4g} to {high:.4g}) |" in card


def test_verification_in_16_bits_does_not_round_the_saved_weights(chat_model, tmp_path, export):
    folder = chat_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 1e-4)
    model.save_pretrained(folder)
    code, out, text = export(folder, "DTYPE=float32", "PROOF_DTYPE=bfloat16")
    assert code == 0, text
    saved, original = (load_file(path / "model.safetensors") for path in (out / "final", folder))
    assert all(torch.equal(saved[name], weight) for name, weight in original.items())


@pytest.fixture
def machine(monkeypatch):
    """machine(GiB of the GPU, GiB of main memory): choices are made as there; nothing can be put on its GPU."""

    def make(gpu, memory):
        free = {"cuda": gpu * 2**30, "cpu": memory * 2**30}
        monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
        monkeypatch.setattr(hardware, "memory_limit", lambda setting, device: free[device])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)

    return make


@pytest.mark.parametrize(
    "requested, gpu, memory, has_gguf, expected",
    [
        (None, 80, 64, True, "float32 on the GPU, 3"), (None, 40, 16, False, "float32 on the GPU, 3"),
        (None, 24, 64, True, "float32 on the CPU, 3"), (None, 24, 24, False, "bfloat16 on the GPU, 1"),
        (None, 40, 24, True, "bfloat16 on the GPU, 1"), (None, 8, 24, False, "bfloat16 on the CPU, 1"),
        ("bfloat16", 24, 64, True, "bfloat16 on the GPU, 1"), ("float32", 24, 64, True, "float32 on the CPU, 3"),
        ("float32", 8, 8, True, "this may be too little"), (None, 8, 8, False, None),
    ],
)  # fmt: skip
def test_eight_billion_weights_are_verified_where_they_fit(
    requested, gpu, memory, has_gguf, expected, machine, monkeypatch, capsys
):
    machine(gpu, memory)
    monkeypatch.setattr(load, "count_weights", lambda config: 8_030_261_248)
    config = AutoConfig.for_model("llama", hidden_size=4096, vocab_size=128_256)
    rows = [verify.Row([0] * 900, [0] * 800)]
    if expected is None:
        with pytest.raises(UserError, match="PROOF_DTYPE=None: no memory for float32 on the GPU, 3.*DTYPE=bfloat16"):
            proof.choose_proof(config, requested, torch.bfloat16, rows, has_gguf)
        return
    chosen, out = proof.choose_proof(config, requested, torch.bfloat16, rows, has_gguf), capsys.readouterr().out
    assert out.startswith("verification: ") and expected in out and out.count("\n") == 1
    device = "cuda" if "on the GPU, " in out[:45] else "cpu"
    assert (chosen.device.type, str(chosen.dtype)) == (device, f"torch.{out.split()[1]}")


@pytest.mark.parametrize("quantization", ["nf4", "int8", "hqq-4bit"])
def test_an_export_that_is_verified_on_the_cpu_leaves_the_gpu_alone(
    quantization, tiny, chats_file, tmp_path, run_here, export, machine
):
    run = trained(run_here, tiny(), chats_file, tmp_path, f"QUANTIZATION={quantization}")
    machine(0.001, 4)
    code, out, text = export(run, "GGUF=f16")
    assert code == 0 and "verification: float32 on the CPU" in text and (out / "final").is_dir(), text


def test_memory_that_runs_out_is_one_line(chat_model, tmp_path, export, monkeypatch, run_here):
    """It is no fault of a GGUF file, and no traceback."""

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of")

    folder = chat_model()
    for number, (owner, name) in enumerate(((load, "load_weights"), (verify, "predict"), (verify_gguf, "load_gguf"))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, run_out)
            code, _, text = export(folder, "GGUF=f16", f"RUN_NAME=export{number}")
        assert code == 2 and "Traceback" not in text, text
        assert (
            f"error: MODEL={folder} QUANTIZATION=auto PROOF_DTYPE=None" in text and "memory ran out (CUDA out" in text
        )
    monkeypatch.setattr(load, "load_weights", run_out)
    code, _, err = run_here("chat_pipe.py", f"MODEL={folder}", "PROMPT=Hi")
    assert code == 2 and f"error: MODEL={folder} QUANTIZATION=auto" in err and "QUANTIZATION=nf4" in err


@pytest.mark.parametrize("quantization", ["nf4", "int8", "hqq-2bit"])
def test_an_adapter_of_a_quantised_base_is_merged_into_the_better_one(
    quantization, tiny, chats_file, tmp_path, run_here, export
):
    run = trained(run_here, tiny(), chats_file, tmp_path, f"QUANTIZATION={quantization}")
    code, out, text = export(run)
    assert code == 0, text
    report = json.loads((out / "export.json").read_text())
    assert [merge["into"] for merge in report["merges"]] == ["original", "dequantized"]
    original, dequantized = report["merges"]
    kept = original if original["perplexity"] < 1.01 * dequantized["perplexity"] else dequantized
    assert report["saved_kl"] == pytest.approx(kept["kl"], abs=1e-4) and dequantized["kl"] < 1e-3
    assert text.count("merged into the") == 2


def test_a_head_of_the_adapters_own_is_not_tied_again(chat_model, tmp_path, export):
    """An adapter from elsewhere with modules_to_save=["lm_head"] on a model whose head is tied."""
    folder = chat_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.3 * torch.randn(640, 64))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    live = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = list(range(3, 40))
    with torch.no_grad():
        expected = live(torch.tensor([ids])).logits[0]
    code, out, text = export(tmp_path / "adapter", "GGUF=f16", "DTYPE=float32")
    assert code == 0, text
    assert torch.allclose(logits(out / "final", ids), expected, atol=1e-4)
    assert any(tensor.name == "output.weight" for tensor in GGUFReader(out / "adapter-f16.gguf").tensors)


def test_a_merge_that_is_not_the_trained_model_is_rejected(
    chat_model, chats_file, tmp_path, run_here, export, monkeypatch
):
    run = trained(run_here, chat_model(), chats_file, tmp_path)
    honest = load.save_final

    def broken(folder, model, tokenizer):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.normal_()
        honest(folder, model, tokenizer)

    monkeypatch.setattr(load, "save_final", broken)
    code, out, text = export(run)
    assert code == 5 and "not the model that was trained" in text
    assert not (out / "final").exists() and (out / "final.rejected").is_dir()


# --- quantised files ---


def test_quantised_files_hold_what_llama_cpp_would_write(chat_model, export):
    """Types of the tensors by llama.cpp's rules, on rows that fit K-quants and rows that do not."""
    wide = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, tie_word_embeddings=False)
    wide["initializer_range"] = 0.05  # a deeper random model is more easily upset
    code, out, text = export(chat_model(**wide), "GGUF=q4_0,q4_k_m,q5_k_m,q6_k,f32")
    assert code == 0, text
    types = {}
    for kind in ("q4_0", "q4_k_m", "q5_k_m", "q6_k"):
        reader = GGUFReader(out / f"chat-model-{kind}.gguf")
        types[kind] = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    mixed = types["q4_k_m"]
    assert mixed["output.weight"] == "Q6_K" and mixed["token_embd.weight"] == "Q4_K"
    assert [i for i in range(8) if mixed[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == [0, 3, 6, 7]
    assert [i for i in range(8) if types["q5_k_m"][f"blk.{i}.attn_v.weight"] == "Q6_K"] == [0, 3, 6, 7]
    assert mixed["blk.1.attn_q.weight"] == "Q4_K" and mixed["blk.0.attn_norm.weight"] == "F32"
    assert set(types["q6_k"].values()) == {"Q6_K", "F32"} and types["q4_0"]["output.weight"] == "Q8_0"
    files = {file["kind"]: file for file in json.loads((out / "export.json").read_text())["files"]}
    assert files["q6_k"]["kl"] < files["q5_k_m"]["kl"] < files["q4_k_m"]["kl"] and files["f32"]["kl"] < 1e-9
    config = AutoConfig.from_pretrained(out / "final")
    assert gguf.tensor_type("blk.1.attn_q.weight", (64, 192), "q4_k_m", config) == GGMLQuantizationType.Q5_0
    assert gguf.tensor_type("blk.1.attn_q.weight", (64, 72), "q4_k_m", config) == GGMLQuantizationType.F16


def test_stacked_experts_are_quantised_and_the_router_is_not(chat_model, export):
    experts = dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True)
    experts["initializer_range"] = 0.05
    code, out, text = export(chat_model("qwen3_moe", hidden_size=256, head_dim=64, **experts), "GGUF=q4_k_m")
    assert code == 0, text
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out / "chat-model-q4_k_m.gguf").tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K" and types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_it_is_said_where_texts_end_before_the_model_changes(chat_model, export, monkeypatch):
    monkeypatch.setattr(verify, "LONGEST", 100)
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=256)
    code, out, text = export(chat_model("qwen3", rope_parameters=yarn), "GGUF=f16")
    assert code == 0 and "texts of up to 100 tokens" in text and "original context: 256" in text
    file = json.loads((out / "export.json").read_text())["files"][0]
    assert file["context"] == 512 and file["long_kl"] < 1e-4 and file["llama_cpp_long_kl"] < 1e-4


# --- tokenizers ---


def byte_level(split=None, digits=False, behavior="isolated", **model):
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(**model))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(split), behavior, invert=behavior == "removed")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [(ROOT / "README.md").read_text(encoding="utf-8"), *verify.TEXTS * 20],  # whose words become tokens
        trainers.BpeTrainer(vocab_size=1300, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def sentence_piece(prefix: str):
    """As Llama 2, Mistral and Gemma have it: merges with a fall-back to bytes, spaces as ▁."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trained = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trained.train([str(ROOT / "README.md")], trainers.BpeTrainer(vocab_size=900, special_tokens=special + byte_tokens))
    spec = json.loads(trained.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    spec["pre_tokenizer"] = None
    if prefix == "gemma":  # whose runs of spaces are merged before all else
        spec["model"]["vocab"] |= {"▁▁": len(spec["model"]["vocab"]), "▁▁▁": len(spec["model"]["vocab"]) + 1}
        spec["model"]["merges"] = [["▁", "▁"], ["▁▁", "▁"], *spec["model"]["merges"]]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if "gemma" in prefix:
        runs, normalized = ("\n", "\n\n", "▁▁", "▁▁▁", "<h1>"), "normalized" in prefix
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text in runs])
    elif prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


LLAMA3, QWEN = gguf_tokenizer.PATTERN, gguf_tokenizer.PATTERN.replace("{1,3}", "")
TOKENIZERS = {
    "gpt-2": ("gpt2", lambda: byte_level()),
    "smollm": ("llama", lambda: byte_level(digits=True)),
    "llama-bpe": ("llama", lambda: byte_level(LLAMA3, ignore_merges=True)),
    "qwen2": ("qwen2", lambda: byte_level(QWEN)),
    "stablelm2": ("stablelm", lambda: byte_level(QWEN)),
    "dbrx": ("phi3", lambda: byte_level(LLAMA3)),
    "dbrx, as OpenAI's are converted": ("olmo2", lambda: byte_level(LLAMA3, behavior="removed")),
    "default, Gemma": ("gemma3_text", lambda: sentence_piece("gemma")),
    "default, Gemma, normalized": ("gemma3_text", lambda: sentence_piece("gemma, normalized")),
    "default, Llama 2's normalizer": ("llama", lambda: sentence_piece("normalizer")),
    "default, Metaspace": ("mistral", lambda: sentence_piece("first")),
    "default, Metaspace everywhere": ("mistral", lambda: sentence_piece("always")),
}


ALSO = {"gemma3_text": dict(head_dim=16, query_pre_attn_scalar=16)}


@pytest.mark.parametrize(
    ("name", "template"),
    [
        *((name, "chatml") for name in TOKENIZERS),
        ("llama-bpe", "llama3 with BOS"),
        ("default, Metaspace", "zephyr with BOS"),
    ],
)
def test_llama_cpp_makes_the_same_tokens(name, template, tmp_path):
    architecture, make = TOKENIZERS[name]
    tokenizer = make()
    templates.set_template(tokenizer, template.split()[0])
    if "BOS" in template:
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    save_tiny(architecture, tmp_path / "final", tmp_path, vocab_size=1312, **ALSO.get(architecture, {}))
    config = AutoConfig.from_pretrained(tmp_path / "final")
    gguf.write(tmp_path / "model.gguf", tmp_path / "final", config, tokenizer, "q8_0")
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name.split(",")[0]
    llama = LlamaCpp(tmp_path / "model.gguf", 256)
    assert list(verify_gguf.token_faults(llama, tokenizer)) == []


@pytest.mark.parametrize("change", ["digits", "prefix", "regex", "ignore_merges", "lowercase"])
def test_an_unknown_pre_tokenizer_is_refused(change, chat_model, export):
    folder = chat_model()
    spec = json.loads((folder / "tokenizer.json").read_text())
    if change == "digits":
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": False}, spec["pre_tokenizer"]],
        }
    if change == "prefix":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    if change == "regex":
        split = {"type": "Split", "pattern": {"Regex": r"\d|\s"}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, spec["pre_tokenizer"] | {"use_regex": False}],
        }
    if change == "ignore_merges":
        spec["model"]["ignore_merges"] = True
    if change == "lowercase":
        spec["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    code, out, text = export(folder, "GGUF=f16")
    assert code == 2 and "PRE_TOKENIZER=" in text and not list(out.glob("*.gguf"))
    if change == "lowercase":  # and verification finds a wrong name
        shutil.rmtree(out)
        code, out, text = export(folder, "GGUF=f16", "PRE_TOKENIZER=gpt-2")
        assert code == 5 and "tokens of a chat differ" in text
        shutil.rmtree(out)
        code, out, text = export(folder, "GGUF=f16", "PRE_TOKENIZER=gpt-7")
        assert code == 5 and "llama.cpp refuses it" in text and list(out.glob("*.rejected"))


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_the_modelfile_says_what_the_template_says(template, tokenizer_folder):
    """Go's template language, put into Jinja's word by word, gives the same text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    templates.set_template(tokenizer, template)
    text = gguf_tokenizer.modelfile("model.gguf", tokenizer)
    assert text.startswith('FROM ./model.gguf\nPARAMETER stop "<') and f'stop "{tokenizer.eos_token}"' in text
    go = re.search(r'TEMPLATE """(.*)"""\n', text, re.DOTALL)[1]
    for old, new in (
        ("{{ range $i, $m := .Messages }}", "{% for m in messages %}{% set i = loop.index0 %}"),
        ('{{ if eq $m.Role "system" }}', '{% if m.role == "system" %}'),
        ('{{ else if eq $m.Role "assistant" }}', '{% elif m.role == "assistant" %}'),
        ("{{ else if eq $i 0 }}", "{% elif i == 0 %}"),
        (
            '{{ else if eq (index $.Messages 0).Role "system" | and (eq $i 1) }}',
            '{% elif i == 1 and messages[0].role == "system" %}',
        ),
        ("{{ else }}", "{% else %}"),
        ("{{ $m.Content }}", "{{ m.content }}"),
    ):
        assert go.count(old) == 1
        go = go.replace(old, new)
    assert go.count("{{ end }}") == 2
    go = go.replace("{{ end }}", "{% endif %}", 1).replace("{{ end }}", "{% endfor %}", 1)
    rendered = jinja2.Environment(keep_trailing_newline=True).from_string(go)
    for chat in (CHAT[:2], CHAT[1:2], CHAT[1:4], CHAT[:4]):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered.render(messages=chat) == expected


# --- what users do wrong, and what machines do ---


def test_wrong_inputs_end_with_2_and_one_line(chat_model, tiny, tmp_path, export, monkeypatch):
    folder = chat_model()
    os.makedirs(tmp_path / "used" / "final")
    lost = tmp_path / "lost"
    lost.mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "gone"), "peft_type": "LORA"}
    (lost / "adapter_config.json").write_text(json.dumps(config))
    (lost / "adapter_model.safetensors").touch()
    for settings, word in (
        (["GGUF=q4_k"], "q4_k_m"),
        (["MERGE_INTO=quantized"], "dequantized"),
        (["MERGE_INTO=dequantized"], "MERGE_INTO=None"),
        ([f"MODEL={tiny()}"], "no chat template"),
        ([f"MODEL={lost}"], "gone"),
        (["RUN_NAME=used"], "RUN_NAME=used"),
        (["LLAMA_CPP=nowhere", "GGUF=f16"], "convert_hf_to_gguf.py"),
        (["CHATS=nowhere.jsonl"], "CHATS=nowhere.jsonl"),
    ):
        code, _, text = export(folder, *settings)
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and word in lines[0], (settings, text[-500:])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, out, text = export(folder, "GGUF=f16")
    assert code == 2 and "are needed" in text and not (out / "final").exists()


def test_what_llama_cpp_cannot_compute_is_refused_before_weights_are_loaded(chat_model, export):
    folder = chat_model()
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for change, line in (
        ({"model_type": "gemma"}, "GGUF: cannot write gemma models, only llama, qwen2, "),
        ({"hidden_act": "relu"}, "GGUF: cannot write llama models with hidden_act=relu so that llama.cpp "),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        code, _, text = export(folder, "GGUF=f16")
        assert code == 2 and f"error: {line}" in text and text.count("error: ") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_killed_half_way_nothing_has_its_final_name(chat_model, tmp_path):
    """A process that ends at once where `moment` is, as by kill -9."""
    places = {"merge": "load.sync_files", "gguf": "gguf.quantize", "verify": "verify_gguf.token_faults"}
    settings = [f"MODEL={chat_model()}", f"OUT_DIR={tmp_path}", "GGUF=f16"]
    code = f"""
import os, runpy, sys
from common.export import gguf, verify, verify_gguf
from common.model import load
for moment, place in {places}.items():
    child = os.fork()
    if not child:
        sys.argv = ["merge_and_export.py", *{settings}, "RUN_NAME=" + moment]
        exec(place + " = lambda *a: os._exit(9)")
        runpy.run_path("merge_and_export.py", run_name="__main__")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, moment
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for moment in places:
        left = {path.name for path in (tmp_path / moment).iterdir()}
        assert not any(name.endswith(".gguf") for name in left) and "export.json" not in left
        assert ("final" in left) == (moment != "merge")


def test_llama_cpps_own_converter_is_used_where_it_is_named(chat_model, export, tmp_path):
    """A checkout with a converter that copies a file of ours, and a quantiser that fails."""
    code, out, text = export(chat_model(), "GGUF=f16")
    assert code == 0, text
    right = out.rename(tmp_path / "right") / "chat-model-f16.gguf"
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(f"""
import shutil, sys
folder, outfile_option, outfile, outtype_option, kind = sys.argv[1:]
assert (outfile_option, outtype_option) == ("--outfile", "--outtype") and kind in ("f16", "bf16")
shutil.copy({str(right)!r}, outfile)
""")
    code, out, text = export(chat_model(), f"LLAMA_CPP={checkout}", "GGUF=f16")
    assert code == 0 and "by llama.cpp" in text, text
    shutil.rmtree(out)
    code, out, text = export(chat_model(), f"LLAMA_CPP={checkout}", "GGUF=q4_k_m")
    assert code == 2 and "llama-quantize" in text
    quantizer = checkout / "build" / "bin" / "llama-quantize"
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    quantizer.chmod(0o755)
    shutil.rmtree(out)
    code, out, text = export(chat_model(), f"LLAMA_CPP={checkout}", "GGUF=q4_k_m")
    assert code == 2 and "out of luck" in text and not list(out.glob("*.gguf"))


def test_nothing_is_uploaded_unless_asked_and_then_privately(chat_model, export, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def repo_info(self, name):
            return types.SimpleNamespace(private=name == "me/mine")

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            assert Path(path_or_fileobj).is_file()
            calls.append(path_in_repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, out, _ = export(chat_model(), "GGUF=f16")
    assert code == 0 and not calls
    shutil.rmtree(out)
    code, out, text = export(chat_model(), "GGUF=f16", "HUB_ID=me/mine")
    assert code == 0 and calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"chat-model-f16.gguf", "model.safetensors", "Modelfile", "README.md"} <= set(calls[1:])
    assert "settings.json" not in calls and "uploading to me/mine, private" in text
    shutil.rmtree(out)
    calls.clear()
    code, _, text = export(chat_model(), "GGUF=f16", "HUB_ID=me/public")
    assert code == 2 and "public" in text and len(calls) == 1


@pytest.mark.slow
def test_smollm2_answers_in_llama_cpp_as_in_transformers(tmp_path, export):
    """The first 20 likeliest tokens of f16, and the end of an answer."""
    code, out, text = export("smollm2-135m-instruct", "GGUF=f16", "PROOF_TOKENS=100")
    assert code == 0, text
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    model = AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    prompt = ChatEncoder(tokenizer).prompt([{"role": "user", "content": "Name three colours of the rainbow."}])
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    question = ChatEncoder(tokenizer).prompt([{"role": "user", "content": "What is the capital of France?"}])
    llama = LlamaCpp(out / "smollm2-135m-instruct-f16.gguf", 512)
    options = dict(temperature=0, top_k=1, return_tokens=True)
    assert llama.ask("/completion", prompt=prompt, n_predict=20, **options)["tokens"] == expected
    answer = llama.ask("/completion", prompt=question, n_predict=128, **options)
    assert "Paris" in answer["content"] and answer["stop_type"] == "eos"


def test_predictions_that_are_not_numbers_prove_nothing(chat_model, export):
    folder = chat_model()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, out, text = export(folder, "GGUF=f16")
    assert code == 4 and "not finite" in text and not (out / "final").exists()


def test_a_wrong_rotary_base_is_found_by_llama_cpp(chat_model, export, monkeypatch):
    """transformers' reader takes from the original config what it does not read; llama.cpp has the file alone."""
    honest = gguf.GGUFWriter.add_rope_dimension_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_dimension_count", lambda self, count: honest(self, count // 2))
    code, _, text = export(chat_model("stablelm", initializer_range=0.3, partial_rotary_factor=1.0), "GGUF=f16")
    assert code == 5 and "llama_cpp_kl is" in text


def test_sampling_settings_of_the_base_do_not_stand_in_the_way(chat_model, export):
    """A generation_config that transformers refuses to write again, as many bases have it."""
    folder = chat_model()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}))
    code, out, text = export(folder)
    assert code == 0, text
    assert "temperature" not in json.loads((out / "final" / "generation_config.json").read_text())


def test_answers_that_begin_with_part_of_a_character_are_no_fault(chat_model, export, monkeypatch):
    """llama.cpp then gives no probabilities; everything else is still asked."""
    honest = LlamaCpp.ask

    def ask(self, path, **body):
        return {k: v for k, v in honest(self, path, **body).items() if k != "completion_probabilities"}

    monkeypatch.setattr(LlamaCpp, "ask", ask)
    code, out, text = export(chat_model(), "GGUF=f16")
    assert code == 0, text
    assert json.loads((out / "export.json").read_text())["files"][0]["llama_cpp_kl"] is None


def test_a_run_on_pairs_is_compared_on_its_better_answers(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    row = dict(input_ids=[1, 5, 6, 1, 7, 8], assistant_masks=[0, 1, 1, 0, 1, 1], lengths=[3, 3], is_good=True)
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "data" / "eval.parquet")
    (found,) = verify.held_out_rows(None, tmp_path, None, 64, 99)
    assert found.ids == [1, 5, 6] and found.answers == [0, 1]

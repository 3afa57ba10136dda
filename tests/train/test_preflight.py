"""The check before the first step, and the comparison of a merge: silent faults, planted again, are caught."""

import json
import shutil

import pytest
import torch
from architectures import save_model
from conftest import FULL
from peft.tuners.trainable_tokens import TrainableTokensLayer

from common.cli import UserError
from common.model import adapters, attention, load, location, merging
from common.train import loss

pytestmark = pytest.mark.usefixtures("lean")


@pytest.fixture
def train(tmp_path, base_tokenizer_folder, run_here):
    """train(name, "NAME=value", ...): two steps of qlora_train.py on an architecture; exit code, out, err, folder."""

    def run(name, *more, script="qlora_train.py", run_name="run"):
        folder = tmp_path / name
        if not folder.exists():
            save_model(name, folder, base_tokenizer_folder)
        rank = "GALORE_RANK=4" if script == "galore_train.py" else "LORA_R=4"
        code, out, err = run_here(
            script, f"MODEL={folder}", "DATA=data/brief.jsonl", "MAX_SAMPLES=40", "MAX_STEPS=2", "MAX_LENGTH=256", rank,
            "EVAL_SIZE=4", "KL_WEIGHT=0", "SAVE_STEPS=None", "DTYPE=float32", f"OUT_DIR={tmp_path}",
            f"RUN_NAME={run_name}", *more,
        )  # fmt: skip
        return code, out, err, tmp_path / run_name

    return run


def drop_windows(attend, module, query, key, value, mask, **kwargs):
    """What sdpa_documents did: no mask, so no window."""
    return honest_documents(attend, module, query, key, value, None, **kwargs)


def mix_documents(attend, *args, cu_seq_lens_q=None, **kwargs):
    return attend(*args, **kwargs)


honest_documents = attention.document_attention


@pytest.mark.parametrize("name", ["mistral-window", "gemma3", "cohere2", "olmo3", "starcoder2", "exaone4"])
def test_a_window_that_is_dropped_is_found_and_another_attention_taken(name, train, monkeypatch):
    assert train(name, run_name="good")[0] == 0
    monkeypatch.setattr(attention, "document_attention", drop_windows)
    code, out, err, folder = train(name)
    assert code == 0 and "check: attention sdpa, since sdpa_documents gives other losses, by" in out, err
    good, mended = (json.loads((f / "summary.json").read_text())["eval_loss"] for f in (folder.parent / "good", folder))
    assert mended == pytest.approx(good, rel=1e-5)
    # Asked for by name, it is not replaced.
    code, _, err, _ = train(name, "ATTN_IMPLEMENTATION=sdpa_documents", run_name="asked")
    assert (
        code == 2 and "ATTN_IMPLEMENTATION=sdpa_documents: the loss is not" in err and "Set it to None or sdpa" in err
    )


def test_documents_that_see_each_other_are_found(train, monkeypatch):
    """gpt-oss: its own mask does not keep them apart, so that no other attention helps."""
    monkeypatch.setattr(attention, "document_attention", mix_documents)
    code, _, err, folder = train("gpt-oss")
    assert code == 2 and "PACKING=True: chats change each other's loss in gpt_oss" in err
    assert "Set PACKING=False" in err and not (folder / "final").exists()
    code, out, err, _ = train("gpt-oss", "DOCTOR=warn", run_name="warned")
    assert code == 0 and "PACKING=True: chats change" in err
    code, out, _, _ = train("gpt-oss", "PACKING=False", run_name="unpacked")
    assert code == 0 and "check: losses differ by" in out


def test_a_head_without_its_bias_is_found(train, monkeypatch):
    """Phi-2 with a template of new tokens, whose rows peft trains and whose bias it drops."""
    code, out, err, _ = train("phi-2", "CHAT_TEMPLATE=chatml", run_name="good")
    assert code == 0 and "with new tokens" in out, err
    monkeypatch.setattr(adapters, "keep_head_bias", lambda model: model)
    code, _, err, _ = train("phi-2", "CHAT_TEMPLATE=chatml")
    assert code == 2 and "ADAPTER=lora: it changes the base's losses" in err
    assert train("phi-2", run_name="zephyr")[0] == 0  # as the message says


@pytest.mark.parametrize("name", ["granite", "gemma2", "cohere2"])
def test_logits_that_are_not_scaled_or_capped_are_found(name, train, monkeypatch):
    def plain_logits(self, hidden):
        return self.forward.__self__.get_output_embeddings()(hidden).float()

    monkeypatch.setattr(loss.SplitForward, "logits", plain_logits)
    if name == "gemma2":  # whose caps are wide for a small model
        monkeypatch.setattr(loss.SplitForward, "logits", lambda *args: plain_logits(*args) * 1.05)
    code, _, err, _ = train(name)
    assert code == 2 and "the loss of single chats is not" in err


def test_a_wrong_loss_of_galore_is_found_too(train, monkeypatch):
    monkeypatch.setattr(attention, "document_attention", mix_documents)
    code, _, err, _ = train("gpt-oss", script="galore_train.py")
    assert code == 2 and "Set PACKING=False" in err


@pytest.mark.parametrize("targets", ["q_proj,lm_head", "q_proj,embed_tokens", "q_proj,lm_head,embed_tokens"])
def test_adapters_on_a_side_of_tied_embeddings_are_merged_or_refused(targets, train, monkeypatch, run_here, tmp_path):
    """By chat, GaLore and export; and merged into both sides, as peft does it, the comparison sees it."""
    code, _, err, run = train("qwen2", f"LORA_TARGET_MODULES={targets}", "LEARNING_RATE=2e-2")
    assert code == 0, err
    loss_of = {"run": json.loads((run / "summary.json").read_text())["eval_loss"]}
    merges = {
        "chat": ("chat_pipe.py", f"MODEL={run}", "PROMPT=Hi", "MAX_NEW_TOKENS=3", "DTYPE=float32"),
        "export": ("merge_and_export.py", f"MODEL={run}", f"OUT_DIR={tmp_path}", "RUN_NAME=merged", "DTYPE=float32"),
    }
    for arguments in merges.values():
        code, out, err = run_here(*arguments)
        assert code == 0, err
    # GaLore trains on what was merged, and so begins where LoRA ended.
    more = f"MODEL={run}", "LEARNING_RATE=1e-9", "MAX_STEPS=1"
    code, _, err, galore = train("qwen2", *more, script="galore_train.py", run_name="galore")
    assert code == 0, err
    loss_of["galore"] = json.loads((galore / "summary.json").read_text())["eval_loss"]
    assert loss_of["galore"] == pytest.approx(loss_of["run"], rel=1e-5)
    monkeypatch.setattr(merging, "separate_head", lambda model: None)
    code, _, err = run_here(*merges["chat"])
    assert code == 0 and f"note: MODEL={run}: merged with its adapter the model is another one" in err
    code, _, err = run_here(*merges["export"][:-2], "RUN_NAME=merged2", "DTYPE=float32")
    assert code == 5 and "the model is another one" in err
    code, _, err, _ = train("qwen2", *more, script="galore_train.py", run_name="galore2")
    assert code == 5 and "the model is another one" in err


def adapted_smollm2(dtype, targets: str, rows=()):
    """The real model with a LoRA adapter, and rows of new tokens, that change it as much as training does."""
    source = location.locate("smollm2-135m-instruct")
    settings = dict(MODEL=source.name, ADAPTER="lora", LORA_TARGET_MODULES=targets, LORA_R=16, LORA_ALPHA=32)
    model = adapters.add_adapter(load.load_model(source, None, dtype, "sdpa"), settings | {"LORA_DROPOUT": 0.0}, rows)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.01)
        elif "trainable_tokens_delta" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *([torch.float32] if FULL else [])])
def test_sound_merges_of_a_real_model_pass_and_others_do_not(dtype, monkeypatch):
    """In 16 bits, too, where rounding moves predictions more than LoRA on a tied head, merged into both sides, does."""
    merging.merge_adapter(adapted_smollm2(dtype, "auto", [5, 17]), "sound")
    merging.merge_adapter(adapted_smollm2(dtype, "q_proj,lm_head"), "sound")
    monkeypatch.setattr(merging, "separate_head", lambda model: None)
    for targets in ("q_proj,lm_head", "q_proj,embed_tokens"):
        with pytest.raises(UserError, match="the model is another one"):
            merging.merge_adapter(adapted_smollm2(dtype, targets), "tied")
    monkeypatch.setattr(TrainableTokensLayer, "merge", lambda self, *args, **kwargs: None)
    with pytest.raises(UserError, match="the model is another one"):
        merging.merge_adapter(adapted_smollm2(dtype, "auto", [5, 17]), "rows lost")


def test_a_replaced_attention_is_the_frozen_bases_too(train, monkeypatch):
    """KL_WEIGHT of full fine-tuning: an untrained model does not differ from its base."""
    monkeypatch.setattr(attention, "document_attention", drop_windows)
    same = "KL_WEIGHT=1", "LEARNING_RATE=1e-9", "MAX_STEPS=1"
    code, out, err, run = train("mistral-window", *same, script="galore_train.py")
    assert code == 0 and "check: attention sdpa, since" in out, err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("how", ["ADAPTER=dora", "ADAPTER=ia3", "QUANTIZATION=nf4", "QUANTIZATION=int8"])
def test_sound_runs_pass_in_16_bits(how, train):
    code, out, err, _ = train("llama-3.2", how, "DTYPE=bfloat16")
    assert code == 0 and "check: losses differ by" in out, err


def test_a_resumed_run_is_checked_with_its_trained_adapter(train):
    code, out, err, run = train("qwen2", "SAVE_STEPS=1", "MAX_STEPS=3", "LEARNING_RATE=2e-2")
    assert code == 0, err
    shutil.rmtree(run / "final"), (run / "summary.json").unlink()
    shutil.rmtree(max(run.glob("checkpoint-*")))
    code, out, err, _ = train("qwen2", "SAVE_STEPS=1", "MAX_STEPS=3", "LEARNING_RATE=2e-2")
    assert code == 0 and "resuming from checkpoint-2" in out and "check: losses differ by" in out, err


def test_lora_on_an_untied_head_is_trained(train):
    code, _, err, run = train("mistral-nemo", "LORA_TARGET_MODULES=lm_head", "LEARNING_RATE=2e-2", "KL_WEIGHT=1")
    assert code == 0, err
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert rows[1]["loss"] < rows[0]["loss"] and rows[1]["kl"] > rows[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "granite-moe"])
def test_the_routers_loss_is_trained_logged_apart_and_left_out_of_the_loss(name, train, monkeypatch):
    code, out, err, run = train(name, "LORA_TARGET_MODULES=q_proj", "LEARNING_RATE=1e-9")
    assert code == 0 and "balance of the experts: weight 0.001" in out, err
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["router_loss"] > 0.1
    monkeypatch.setattr("common.train.trainer.router_loss_weight", lambda config: 0.0)
    assert train(name, "LORA_TARGET_MODULES=q_proj", "LEARNING_RATE=1e-9", run_name="without")[0] == 0
    without = json.loads((run.parent / "without" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(without["loss"], rel=1e-5) and "router_loss" not in without
    assert row["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-6)


def test_the_routers_loss_is_a_mean_over_micro_steps(train):
    """Trainer would add it up. What is left is that the balance of a part is not that of the whole."""
    same = "BATCH_SIZE=4", "MAX_LENGTH=128", "LORA_TARGET_MODULES=q_proj", "LEARNING_RATE=1e-9", "MAX_STEPS=1"
    norms = []
    for rows in (1, 2, 4):
        code, _, err, run = train("mixtral", *same, f"PER_DEVICE_TRAIN_BATCH_SIZE={rows}", run_name=f"rows{rows}")
        assert code == 0, err
        norms.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert norms[0]["loss"] == pytest.approx(norms[2]["loss"], rel=1e-5)
    assert norms[0]["router_loss"] == pytest.approx(norms[2]["router_loss"], rel=0.02)
    assert norms[0]["grad_norm"] == pytest.approx(norms[2]["grad_norm"], rel=1e-2)

"""What a model scores by itself: losses, facts, how answers look; and where the scores are written."""

# ruff: noqa: F811  (the fixtures are imported)

import json
import shutil
import sys

import pytest
import torch
from conftest import write_jsonl
from fake_judge import chatty  # noqa: F401

from common.eval.suites import answer_losses, examine
from common.model import generation


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_are_those_of_transformers(architecture, chatty, chats_file):
    model, tokenizer = generation.load_for_chat(str(chatty(architecture)), dtype="float32")
    chats = [json.loads(line)["messages"] for line in open(chats_file)]
    chats = [*chats, chats[0] + chats[1] + chats[2]]
    encoder = generation.encoder_of(tokenizer, tokenizer.chat_template)
    for limit in (512, 100, 3):
        found = answer_losses(model, tokenizer, chats, limit)
        for row, (loss, count) in zip(encoder.encode(chats), found, strict=True):
            ids = torch.tensor(row.ids[:limit], dtype=torch.long)[None]
            labels = ids.where(torch.tensor(row.learned[:limit]), -100)
            assert count == int((labels[:, 1:] != -100).sum())
            if count == 0:  # no answer begins before the limit
                assert loss == 0
            else:
                with torch.no_grad():
                    expected = model(input_ids=ids, labels=labels).loss.item()
                assert loss / count == pytest.approx(expected, abs=1e-5)


def test_health_sees_what_is_wrong():
    def answer(text, stop="end"):
        return generation.Answer(text, len(text.split()), stop)

    said = [
        "A kind word.",
        "",
        "Yes.\nUser: and you?",
        "Привет, как дела?",
        "<|im_start|>assistant hello",
        "Note: be kind.",
    ]
    answers = [*map(answer, said), answer("go on and on " * 20, "length")]
    assert not any(examine(["What is 17 times 6?"], [answer("102")])["answers are in another script"])
    found = {name: [i for i, flag in enumerate(flags) if flag] for name, flags in examine(["Hi"] * 7, answers).items()}
    assert found == {
        "answers end by themselves": [0, 1, 2, 3, 4, 5], "answers are empty": [1], "answers repeat themselves": [6],
        "answers speak for the user": [2, 4], "answers are in another script": [3],
    }  # fmt: skip


def test_scores_reach_the_run_folder_and_its_row(chatty, chats_file, tmp_path, run_here):
    run = tmp_path / "run"
    shutil.copytree(chatty(), run / "final")
    (run / "settings.json").write_text(json.dumps({"script": "qlora_train", "settings": {}}))
    summary = dict.fromkeys("peak_vram_gib eval_loss tokens_per_second mean_power_w commit".split())
    summary |= dict(peak_rss_gib=1.0, train_seconds=61.0, command="c", device="d", verdict="done")
    (run / "summary.json").write_text(json.dumps(summary))
    facts = write_jsonl(tmp_path / "facts.jsonl", [{"kind": "name", "question": "Who are you?", "pattern": "."}])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}] * 3)
    code, out, err = run_here(
        "evaluate_model.py", f"MODEL={run}", f"CHATS={chats_file}", f"FACTS={facts}", f"PROMPTS={prompts}",
        "MAX_LENGTH=512", f"OUT_DIR={tmp_path}/evaluation",
    )  # fmt: skip
    assert code == 0, err
    saved = json.loads((run / "scores.json").read_text())
    low, high = saved["intervals"]["loss"]
    assert low < saved["scores"]["loss"] < high
    assert {"name", "answers end by themselves"} <= set(saved["scores"]) and ", 1 of 1" in out
    assert f"loss {saved['scores']['loss']:.3g}" in (run / "run_row.md").read_text() and (run / "scores.png").exists()


def test_training_logs_what_the_model_knows_at_each_evaluation(arguments, run_here, tmp_path):
    """The facts are right by the end (patterns that any answer matches), and asking changes nothing in the training."""
    facts = [
        {"kind": "name", "question": "Who are you?", "pattern": "."},
        {"kind": "sky", "question": "?", "pattern": "(?!)"},
    ]
    prompts = [{"prompt": "Hi"}, {"prompt": "Name?"}]
    asked = [f"EVAL_FACTS={write_jsonl(tmp_path / 'facts.jsonl', facts)}"]
    asked += [f"EVAL_PROMPTS={write_jsonl(tmp_path / 'prompts.jsonl', prompts)}"]
    for name, more in (("plain", []), ("asked", asked)):
        code, out, err = run_here("qlora_train.py", *arguments(name, *more))
        assert code == 0, err
    assert "sky 0%" in out
    lines = [json.loads(line) for line in open(tmp_path / "asked" / "metrics.jsonl")]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2 and all(set(line["facts"]) == {"name", "sky"} for line in evaluated)
    assert [sample["prompt"] for sample in evaluated[-1]["samples"]] == ["Hi", "Name?"]
    weights = [(tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("plain", "asked")]
    assert weights[0] == weights[1]
    code, _, err = run_here("qlora_train.py", *arguments("wrong", "EVAL_FACTS=nowhere.jsonl"))
    assert code == 2 and "EVAL_FACTS=nowhere.jsonl" in err


def test_the_harness_is_asked_by_its_own_interface(chatty, tmp_path, run_here, monkeypatch):
    """As lm-eval 0.4.13 answers; the real one was run by hand (runs.md)."""
    from types import ModuleType, SimpleNamespace

    settings = [f"MODEL={chatty()}", "SUITES=loss", "LM_EVAL_TASKS=mini", f"OUT_DIR={tmp_path}"]
    code, _, err = run_here("evaluate_model.py", *settings)
    assert code == 2 and "pip install lm-eval" in err
    found = {"mini": {"alias": "mini", "acc,none": 0.75, "acc_stderr,none": 0.1}}
    harness, wrapper = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate = lambda model, tasks: {"results": {task: found[task] for task in tasks}}
    wrapper.HFLM = lambda pretrained, tokenizer: SimpleNamespace(pretrained=pretrained)
    for name, module in (("lm_eval", harness), ("lm_eval.models", ModuleType("m")), (wrapper.__name__, wrapper)):
        monkeypatch.setitem(sys.modules, name, module)
    code, out, err = run_here("evaluate_model.py", *settings)
    assert code == 0 and "mini acc,none: 0.7500 (95 % interval 0.5540 to 0.9460)" in out, err
    code, _, err = run_here("evaluate_model.py", *settings, "LM_EVAL_TASKS=nothing")
    assert code == 2 and "LM_EVAL_TASKS=nothing" in err

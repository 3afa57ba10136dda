"""Wrong inputs by a seeded generator: every setting of every script, and folders with damaged files.

No traceback; exit code 2 and one line that names the setting, or the value is possible and the script works.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny, write_jsonl

from common.settings import declared

SCRIPTS = sorted(file.name for file in ROOT.glob("*.py"))
VALUES = [
    *("", "  ", "\t", "\n", "a\nb", "a\0b", "\x1b[31m", "\udce4", "ä", "日本", "😀", "x" * 5000, str(10**30)),
    *("nan", "inf", "-inf", "1e308", "1e400", "-1e308", "-1", "-0", "0", "1.5", "1e-320", "1_000", "٣", "0x10", " 1 "),
    *("9" * 5000, "True", "None", "auto", "a=b", "=", ",", ",,", "a,a", "nf4,nf4", "q8_0, q8_0", "a:user"),
    *("/", ".", "..", "~", "~nouser/x", "a/b", "a/b/c", "org/na me", "C:\\x", "/dev/null", "/dev/full", "/proc/1/mem"),
    *("(", "[", "*", "(?P<", "a{9999999999}", "\\", "1:2:3", "0:0", "10%", "99999999999GiB", "{x", "$(id)", "%s"),
    *("utf-16", "base64", "undefined", "data/brief.jsonl[:0]", "data/brief.jsonl*0", "data/*.no", "https://a/b"),
]  # fmt: skip


def fuzz_values(folder: Path) -> list[str]:
    """VALUES, and paths of things that are not what a setting wants."""
    (folder / "text").write_text("x")
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)))
    (folder / "list.json").write_text("[1]")
    return [*VALUES, *map(str, (folder, folder / "text", folder / "text" / "below", folder / "bytes.jsonl"))]


def check(code, out: str, error: str, name: str):
    """What holds for every wrong input."""
    lines = error.rstrip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code in (0, 2) and "Traceback" not in out + error, error[-2000:]
    if code == 2:
        assert len(errors) == 1 and (name in errors[0] or ".json" in errors[0]), error[-2000:]
        assert lines[-1] == errors[0] or errors[0].endswith((":", "rows", "anyway).")), error[-2000:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_any_value_are_answered_in_one_line(script, tmp_path, capsys, monkeypatch):
    """As far as to the slow imports; every setting once, and 60 values drawn for the script."""
    text = (ROOT / script).read_text(encoding="utf-8")
    code = compile(text[: text.find("\n\n", text.index("\nif __name__"))], script, "exec")
    shutil.copytree(ROOT / "data", tmp_path / "work" / "data")
    monkeypatch.chdir(tmp_path / "work")  # around which nothing lies but what is made here
    draw, names = random.Random(script), [setting["name"] for setting in declared(ROOT / script)]
    for name in [*names, *draw.choices(names, k=max(60, 2 * len(names)))]:
        value = draw.choice(fuzz_values(tmp_path))
        monkeypatch.setattr(sys, "argv", [script, f"{name}={value}"])
        stop = 0
        try:
            exec(code, {"__name__": "__main__", "__file__": str(ROOT / script)})
        except SystemExit as end:
            stop = end.code
        check(stop, *capsys.readouterr(), name)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(random.Random(0).randbytes(500)),
    "list": lambda file: file.write_text("[]"),
    "object": lambda file: file.write_text("{}"),
    "null": lambda file: file.write_text("null"),
    "number": lambda file: file.write_text("3"),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}
CONFIGS = [
    {"rope_parameters": {"rope_type": "newrope"}, "rope_scaling": {"rope_type": "newrope"}}, {"model_type": "brandnew"},
    {"model_type": None}, {"intermediate_size": 256}, {"num_attention_heads": 3}, {"num_attention_heads": 0},
    {"num_hidden_layers": 3}, {"num_hidden_layers": "two"}, {"hidden_size": None}, {"vocab_size": 100},
    {"hidden_act": "newact"}, {"quantization_config": {"quant_method": "awq", "bits": 4}}, {"model_type": "t5"},
    {"quantization_config": {"quant_method": "newquant"}}, {"quantization_config": "nf4"}, {"dtype": "float99"},
]  # fmt: skip
TEMPLATES = ["{% for m in messages %}{{ m", "{{ foo.bar.baz }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"]


def damage(folder: Path, draw: random.Random) -> str:
    """Damage a file of the folder in one way; returns how."""
    kind = draw.choice(["file"] * 3 + ["config", "template"])
    if kind == "file":
        file, how = draw.choice(sorted(folder.glob("*.*"))), draw.choice(sorted(DAMAGES))
        DAMAGES[how](file)
        return f"{file.name} {how}"
    if kind == "template":
        text = draw.choice(TEMPLATES)
        (folder / "chat_template.jinja").write_text(text)
        return text
    file, change = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"), {}
    if file.name == "config.json":
        change = draw.choice(CONFIGS)
    else:
        wrong = dict(
            peft_type="PROMPT_TUNING", r=8, target_modules=["no"], base_model_name_or_path=None, task_type="NEW"
        )
        name = draw.choice(sorted(wrong))
        change = {name: wrong[name]}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return str(change)


def in_script(script: str, folder: Path, out: Path, chats: Path) -> list[str]:
    """Arguments with which a script uses a model for the shortest time."""
    facts = write_jsonl(out / "facts.jsonl", [{"kind": "a", "question": "Hi?", "pattern": "x"}])
    run = [f"OUT_DIR={out}", "RUN_NAME=run", "MAX_LENGTH=64"]
    train = [*run, f"DATA={chats}", "MAX_STEPS=1", "EVAL_SIZE=0", "SAVE_STEPS=None", "DOCTOR=warn"]
    return [f"MODEL={folder}"] + {
        "chat_pipe.py": ["PROMPT=Hi", "MAX_NEW_TOKENS=2"],
        "evaluate_model.py": ["SUITES=facts", f"FACTS={facts}", f"OUT_DIR={out}"],
        "merge_and_export.py": [*run, f"CHATS={chats}", "PROOF_TOKENS=50"],
        "qlora_train.py": [*train, "LORA_R=4"],
        "galore_train.py": [*train, "GALORE_RANK=4"],
        "preference_train.py": [*train, "LORA_R=4", f"DATA={ROOT}/data/pairs.jsonl", "MAX_LENGTH=512", "MAX_SAMPLES=4"],
        "estimate_memory.py": ["MAX_LENGTH=64", "LORA_R=4"],
    }[script]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer, chats_file):
    """Folders to damage: a model with a template, and an adapter on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sound")
    tokenizer.save_pretrained(folder / "tokenizer")
    base = save_tiny("llama", folder / "base", folder / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(folder / "adapter")
    return [base, folder / "adapter"]


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {"compare_runs.py", "prepare_data.py", "serve_model.py"}))
def test_damaged_folders_are_answered_in_one_line(script, sound, chats_file, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draw = random.Random(script)
    for number in range(8):
        folder, out = tmp_path / f"model-{number}", tmp_path / f"out-{number}"
        shutil.copytree(sound[number % 4 == 3 and script != "estimate_memory.py"], folder)
        out.mkdir()
        how = damage(folder, draw)
        code, printed, error = run_here(script, *in_script(script, folder, out, chats_file))
        check(2 if code == 5 else code, printed, error, "")
        assert code != 2 or str(folder) in error or "MODEL" in error, how

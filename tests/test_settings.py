"""Settings: types, nearest names, help, and the contract that names mean the same in every script."""

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from common.settings import apply_overrides, current, declared

SCRIPT = textwrap.dedent('''
    """What it does."""
    # Model
    MODEL = "m"  # which model
    # Optimization
    LEARNING_RATE = 1e-3  # peak
    MAX_STEPS: int | None = None  # optimizer steps
    EVAL_SIZE: int | float = 0.05
    PACKING = True
    if __name__ == "__main__":
        pass
    NOT_A_SETTING = 3
''')


@pytest.fixture
def namespace(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    namespace = {"__file__": str(file)}
    exec(compile(SCRIPT, str(file), "exec"), namespace)
    return namespace


def test_overrides_take_the_type_of_the_setting(namespace, capsys):
    apply_overrides(namespace, ["LEARNING_RATE=2e-4", "MAX_STEPS=7", "EVAL_SIZE=3", "PACKING=False", "MODEL=7"])
    assert current(namespace) == {
        "MODEL": "7", "LEARNING_RATE": 2e-4, "MAX_STEPS": 7, "EVAL_SIZE": 3, "PACKING": False,
    }  # fmt: skip
    assert "MAX_STEPS = 7 (was None)" in capsys.readouterr().err
    apply_overrides(namespace, ["MAX_STEPS=None", "LEARNING_RATE=1", "MODEL=a=b"])
    assert namespace["MAX_STEPS"] is None and namespace["LEARNING_RATE"] == 1.0 and namespace["MODEL"] == "a=b"
    assert type(namespace["LEARNING_RATE"]) is float


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("LEARNIN_RATE=1", ["LEARNIN_RATE", "LEARNING_RATE"]),
        ("learning_rate=1", ["LEARNING_RATE"]),
        ("NOT_A_SETTING=1", ["NOT_A_SETTING", "--help"]),
        ("--learning-rate", ["--learning-rate"]),
        ("MAX_STEPS", ["MAX_STEPS", "needs a value"]),
        ("MAX_STEPS=1.5", ["MAX_STEPS=1.5", "int or None"]),
        ("LEARNING_RATE=fast", ["LEARNING_RATE=fast", "float"]),
        ("LEARNING_RATE=None", ["LEARNING_RATE=None", "float"]),
        ("PACKING=1", ["PACKING=1", "True or False"]),
    ],
)
def test_mistakes_end_with_2_and_one_line(namespace, capsys, argument, words):
    with pytest.raises(SystemExit) as stop:
        apply_overrides(namespace, [argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and all(word in error for word in words)


def test_wrong_type_edited_into_the_script(namespace, capsys):
    namespace["LEARNING_RATE"] = "1e-4"
    with pytest.raises(SystemExit):
        apply_overrides(namespace, [])
    assert "LEARNING_RATE" in capsys.readouterr().err


def test_help_shows_groups_values_and_comments(namespace, capsys):
    with pytest.raises(SystemExit) as stop:
        apply_overrides(namespace, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "What it does." in text and "NOT_A_SETTING" not in text
    assert (
        text.index("  Model\n") < text.index("MODEL=m") < text.index("  Optimization\n") < text.index("MAX_STEPS=None")
    )
    assert "optimizer steps" in text


def test_contract_names_stand_in_the_training_script():
    names = """MODEL QUANTIZATION ADAPTER DATA EVAL_SIZE MAX_LENGTH PACKING NUM_TRAIN_EPOCHS MAX_STEPS
    PER_DEVICE_TRAIN_BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LEARNING_RATE MIN_LR LR_SCHEDULER WARMUP_RATIO WEIGHT_DECAY
    MAX_GRAD_NORM OPTIM LORA_R LORA_ALPHA LORA_DROPOUT LORA_TARGET_MODULES NEFTUNE_NOISE_ALPHA GRADIENT_CHECKPOINTING
    ATTN_IMPLEMENTATION SEED LOGGING_STEPS EVAL_STEPS SAVE_STEPS RUN_NAME OUT_DIR RESUME""".split()
    assert set(names) <= {s["name"] for s in declared(ROOT / "qlora_train.py")}


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py")))
def test_every_setting_of_every_script_is_explained(script):
    unexplained = [s["name"] for s in declared(ROOT / script) if not s["comment"] and s["name"] not in (
        "LORA_DROPOUT", "NUM_TRAIN_EPOCHS", "WEIGHT_DECAY", "MAX_GRAD_NORM", "SEED", "LOGGING_STEPS", "OUT_DIR",
        "MAX_NEW_TOKENS")]  # fmt: skip
    assert not unexplained


BOUNDS = {
    "qlora_train.py": """WARMUP_RATIO=1.5 WARMUP_RATIO=-1 LORA_ALPHA=0 KL_WEIGHT=-1 WEIGHT_DECAY=-1 LORA_R=100000
        NEFTUNE_NOISE_ALPHA=-5 DOCTOR=stopp ALLOW_CHANGE=LEARNIN_RATE OPTIM=lion LORA_DROPOUT=1 LORA_DROPOUT=-0.1
        LEARNING_RATE=0 MAX_STEPS=0 BATCH_SIZE=0 EVAL_SIZE=1.5 EVAL_SIZE=-1 SAVE_STEPS=-1 SAVE_STEPS=2.5 SEED=-1
        MAX_GRAD_NORM=-1 MIN_LR=-1 LR_SCHEDULER=cosin TRAIN_ON=answers TOO_LONG=keep DROP_PATTERN=( QUANTIZATION=nf5
        RUN_NAME=a/b RUN_NAME=.. CHAT_TEMPLATE=none.jinja CHAT_TEMPLATE=chatlm ADAPTER=lorra MEMORY_LIMIT=1.5
        REPORT_TO=tensorbord LOGGING_STEPS=0 MAX_LENGTH=0 NUM_TRAIN_EPOCHS=0 RESUME=yes EVAL_FACTS=none.jsonl
        SAVE_TOTAL_LIMIT=0 MAX_SAMPLES=0 DTYPE=float8 MODEL= DATA= OUT_DIR=README.md/out OUT_DIR=
        LORA_LAYERS=first LORA_LAYERS= LORA_LAYERS=0-3 LORA_LAYERS=1:2:0 LORA_LAYERS=1,,a
        LORA_TARGET_MODULES= LORA_TARGET_MODULES=(q_proj LORA_TARGET_MODULES=*_proj""",
    "galore_train.py": """GALORE_RANK=0 GALORE_SCALE=0 GALORE_UPDATE_GAP=0 OPTIM=adamw_torch OPTIM=galore_exact_svd
        GALORE_TARGET_MODULES=[q""",
    "chat_pipe.py": "TEMPERATURE=-1 TOP_P=0 TOP_P=1.1 MAX_NEW_TOKENS=0 CONTEXT=0 GENERATION_BATCH_SIZE=0 PROMPTS=no",
    "merge_and_export.py": "LLAMA_CPP=none GGUF=q3 PROOF_DTYPE=float8 MERGE_INTO=both PROOF_TOKENS=0",
    "evaluate_model.py": "SUITES=los JUDGE_MODE=triple JUDGE_SCALE=1-5 JUDGE_TIMEOUT=0 MAX_CHATS=0 FACTS=none.jsonl",
    "prepare_data.py": "PROCESSES=0 EVAL_SIZE=1.5 TRAIN_ON=none",
    "estimate_memory.py": "METHOD=loar DEVICE=tpu FIT=8GB FIT=2 LORA_R=0",
}


@pytest.mark.parametrize(
    ("script", "argument"), [(script, argument) for script, line in BOUNDS.items() for argument in line.split()]
)
def test_impossible_values_are_answered_at_once(script, argument, run_here):
    """Before any data is read, with the setting and its value in one line; in seconds it is tested below."""
    code, _, error = run_here(script, argument)
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {argument}"), error


@pytest.mark.parametrize(
    "argument",
    [
        "LEARNIN_RATE=1",
        "LORA_R=0",
        "MODEL=/nowhere",
        "DATA=no-such.jsonl",
        "RUN_NAME=a/b",
        "DOCTOR=stopp",
        "OUT_DIR=README.md",
    ],
)
def test_a_mistake_is_answered_without_the_slow_imports(argument):
    """In a process of its own, with a torch that cannot be imported."""
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'numpy', 'datasets', 'peft')));"
        f"sys.argv = ['qlora_train.py', {argument!r}]; runpy.run_path('qlora_train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and argument.partition("=")[0] in done.stderr.splitlines()[-1], done.stderr


def test_imports_are_not_searched_for_garbage_and_runs_are(tmp_path):
    script, lines = tmp_path / "script.py", "import gc\nfrom common.cli import run_main\n"
    lines += "from common.settings import apply_overrides\nSEED = 0  # of a run\napply_overrides(globals())\n"
    lines += "print(gc.isenabled())\nrun_main(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0))\n"
    script.write_text(lines)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr

"""Every training command of docs/multi_gpu.md and docs/recipes.md, for a few steps on tiny models."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import FULL, ROOT, save_tiny, write_jsonl
from test_distributed import BIN, environment  # noqa: F401
from test_formats import arena, oasst
from test_judge import fake  # noqa: F401  a fixture

ARCHITECTURES = {
    "stabilityai/stablelm-2-1_6b": "stablelm",
    "openai-community/gpt2-medium": "gpt2",
    "meta-llama/Llama-2-7b-hf": "mistral",  # as Llama 2, without tied embeddings
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral",
    "meta-llama/Meta-Llama-3-8B": "llama",
}
# What makes a command small, by script; float16 and paged states want a GPU.
TRAIN = ("MAX_STEPS=3", "MAX_LENGTH=128", "DTYPE=float32", "OPTIM=adamw_torch_fused", "EVAL_SIZE=4", "LORA_R=4")
SMALL = {
    "qlora_train.py": TRAIN,
    "galore_train.py": (*(s for s in TRAIN if not s.startswith(("OPTIM", "LORA"))), "GALORE_RANK=16"),
    "prepare_data.py": ("MAX_LENGTH=128", "PROCESSES=1", "EVAL_SIZE=2"),
    "estimate_memory.py": ("MAX_LENGTH=128",),
    "merge_and_export.py": (),
    "evaluate_model.py": ("ANSWER_TOKENS=8", "JUDGE_MODEL=judge-1"),
    "chat_pipe.py": ("MAX_NEW_TOKENS=8",),
    "compare_runs.py": (),
}


def commands(page: str, title: str = "") -> list[str]:
    """The commands with a script of ours in the section of a page whose title begins so, or in the whole page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"## {title}")[2], flags=re.MULTILINE)[0] if title else text
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if ".py" in line]


@pytest.fixture
def rows(tmp_path):
    """Files in the schemas of the sources that the recipes name, by name."""
    files = {
        "oasst2": [
            row
            for i in range(12)
            for row in (
                oasst(f"q{i}", None, "prompter", f"What is {i}?"),
                oasst(f"a{i}", f"q{i}", "assistant", f"It is {i}, as you said.", rank=0),
            )
        ],
        "ultrachat": [
            {"prompt_id": str(i), "messages": [
                {"role": "user", "content": f"Tell me of {i}."}, {"role": "assistant", "content": f"{i} is a number."}]}
            for i in range(20)
        ],
        "chatbot-arena": [arena(question_id=str(i)) for i in range(4)],
        "alpaca": [{"instruction": f"Add 1 to {i}.", "input": "", "output": f"{i + 1}"} for i in range(20)],
        "samsum": [
            {"id": str(i), "dialogue": f"Ann: Hi {i}\r\nBob: Yo", "summary": f"Ann says {i}."} for i in range(300)
        ],
        "samsum:validation": [{"id": "v", "dialogue": "Ann: Bye\r\nBob: Bye", "summary": "They part."}],
        "data.jsonl": [{"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(30)],
        "tokens.jsonl": [{"tokens": [1, 2 + i % 5, 3, 4]} for i in range(20)],
        "prompts.jsonl": [{"prompt": "Hi"}, {"prompt": "Name?"}],
        "question.jsonl": [{"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]}],
    }  # fmt: skip
    return {name: write_jsonl(tmp_path / f"{name.replace(':', '-')}.rows.jsonl", data) for name, data in files.items()}


@pytest.fixture
def run(tiny, rows, run_here, tmp_path, fake, monkeypatch):  # noqa: F811
    """run(command, "NAME=value", ...): a command as docs/ has it, made small; its output."""
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({f"w{i} ": i for i in range(8)}))
    server = fake()
    monkeypatch.setenv("GEMINI_API_KEY", "none")

    def local(setting: str, text: str) -> str:
        """A value with files and models that are here in the place of names."""
        for name, architecture in ARCHITECTURES.items():
            text = text.replace(name, str(tiny(architecture)))
        by_length = sorted(rows, key=len, reverse=True)
        for name in by_length if setting in ("DATA", "EVAL_DATA", "PROMPTS", "QUESTIONS") else ():
            text = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w.:-])", str(rows[name]), text)
        text = text.replace("vocab.json", str(vocabulary)).replace("answers.jsonl", str(tmp_path / "answers.jsonl"))
        return re.sub(r"\bout/", f"{tmp_path}/out/", text)

    def call(command, *more):
        *launcher, script = shlex.split(command.partition(".py ")[0] + ".py")
        settings = [
            f"{name}={value if name == 'RUN_NAME' else local(name, value)}"
            for name, _, value in (setting.partition("=") for setting in shlex.split(command.partition(".py ")[2]))
        ]
        settings += [*SMALL[script], *more]
        if script == "evaluate_model.py":
            settings += [f"JUDGE_URL={server.url}", f"OUT_DIR={tmp_path}/out/evaluation"]
        elif script == "compare_runs.py":
            settings.append(f"PICTURE={tmp_path}/compare.png")
        elif script not in ("chat_pipe.py", "estimate_memory.py"):
            settings.append(f"OUT_DIR={tmp_path}/out")
        if launcher[0] == "accelerate" and not FULL:  # test_distributed starts each of these engines
            assert (ROOT / launcher[launcher.index("--config_file") + 1]).is_file()
        if launcher == ["python"] or launcher[0] == "accelerate" and not FULL:
            code, out, error = run_here(script, *settings)
        else:
            done = launched([*launcher, script, *settings], tmp_path)
            code, out, error = done.returncode, done.stdout, done.stderr
        assert code == 0, (command, error[-3000:], out[-2000:])
        return out

    return call


def launched(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    """A launcher's command with two processes; sbatch as Slurm would run it on one node."""
    env = environment() | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    for name, text in {"srun": 'exec "$@"', "scontrol": "echo localhost"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "SLURM_JOB_NODELIST": "localhost"}
    if command[0] == "sbatch":
        command = ["bash", *(part for part in command[1:] if not part.startswith("--nodes"))]
    else:
        command = [str(BIN / command[0]), *command[1:]]
        command[command.index("--num_processes") + 1] = "2"
        command[2:2] = ["--main_process_port", "0"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_several_processes(run, tiny, tmp_path):
    by_accelerate, by_slurm = commands("multi_gpu.md")
    assert "row for runs.md" in run(by_accelerate, f"MODEL={tiny()}")
    assert "row for runs.md" in run(by_slurm, "RUN_NAME=second")


def test_stablelm_on_a_laptop(run, tmp_path):
    first, second, whole, export, scores = commands("recipes.md", "A 1.6 B chat model")
    run(first)
    run(second)
    run(whole)
    assert (tmp_path / "out" / "brief-3" / "final" / "model.safetensors").is_file()
    run(export, "PROOF_TOKENS=50")
    assert list((tmp_path / "out" / "brief-gguf").glob("*q8_0.gguf"))
    facts = write_jsonl(tmp_path / "facts.jsonl", [{"kind": "name", "question": "Name?", "pattern": "Brief"}])
    assert "name: 0%" in run(scores, f"FACTS={facts}")


def test_gpt2_on_alpaca(run, tmp_path):
    full, lora, estimate, scores, compare = commands("recipes.md", "GPT-2 on Alpaca")
    small = ("EVAL_PROMPTS=None", "EVAL_STEPS=2")
    run(full, *small)
    run(lora, *small)
    assert "lora trains" in run(estimate)
    assert "against" in run(scores)
    assert "full" in run(compare)


def test_llama_2_on_samsum(run, run_here, tiny, tmp_path):
    four_bits, half, shared = commands("recipes.md", "Llama 2 7B on SamSum")
    run(four_bits)
    run(half)
    run(shared)
    for settings, refusal in (
        (["ADAPTER=None", "DTYPE=float32", "MEMORY_LIMIT=1MiB"], "needs .* GiB; there are 0.00 GiB"),
        (["ADAPTER=None", "DTYPE=float16"], "gradients of float16 weights cannot be unscaled"),
        (["ADAPTER=None", "QUANTIZATION=nf4", "DTYPE=float32"], "quantised weights have no gradient"),
        (["ADAPTER=None", "QUANTIZATION=nf4", "DTYPE=float16"], "quantised weights have no gradient"),
    ):
        code, _, error = run_here(
            "qlora_train.py", f"MODEL={tiny()}", "MAX_LENGTH=128", f"OUT_DIR={tmp_path}", *settings
        )
        assert code == 2 and re.search(refusal, error), error


def test_mistral_by_deepspeed_and_ddp(run):
    for command in commands("recipes.md", "Mistral 7B on your own JSONL"):
        assert "row for runs.md" in run(command, "EVAL_STEPS=2", "SAVE_STEPS=2")


def test_llama_3_under_slurm(run, tmp_path):
    estimate, prepare, train, predict = commands("recipes.md", "Llama 3 8B with QLoRA")
    assert "qlora trains" in run(estimate, "OPTIM=adamw_torch_fused")
    run(prepare)
    assert "2 processes (ddp)" in run(train)
    run(predict)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_tools(run, run_here, tokenizer_folder, tokenizer, tmp_path):
    before, train, after, count, ask, export = commands("recipes.md", "Teach it to call tools")
    base = save_tiny("llama", tmp_path / "base", tokenizer_folder, max_position_embeddings=4096)
    tokenizer.save_pretrained(base)  # with a template
    files = {name: f"ANSWERS={tmp_path / name}.jsonl" for name in ("before", "after")}
    run(before, f"MODEL={base}", files["before"], "MAX_NEW_TOKENS=2")
    run(train, f"MODEL={base}", "MAX_LENGTH=2048", "EVAL_SIZE=0")
    run(after, files["after"], "MAX_NEW_TOKENS=2")
    code, out, _ = run_here(*shlex.split(count)[1:-1], f"ANSWERS={tmp_path}/before.jsonl, {tmp_path}/after.jsonl")
    assert code == 0 and out.count("0 of 30") == 6
    run(ask)
    run(export, "PROOF_TOKENS=50")

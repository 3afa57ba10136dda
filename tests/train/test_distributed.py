"""Two processes over gloo, started as users start them, against one: losses, weights, resume, faults, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, run_script
from safetensors.torch import load_file

from common.cli import UserError
from common.train import batch_plan
from common.train.collator import count_tokens
from common.train.optimizers import make_optimizer
from common.train.parallel import ZERO_BUCKET, EvenSampler

BIN = Path(sys.executable).parent
FULL = ["ADAPTER=None", "LEARNING_RATE=1e-3"]
GALORE = ["GALORE_RANK=16", "GALORE_UPDATE_GAP=4", "LEARNING_RATE=1e-3"]
PAIRS = ["DATA=data/pairs.jsonl[:24]", "MAX_LENGTH=512", "BATCH_SIZE=6", "LORA_R=4"]
# Script and settings by run. The single process does each of them once, the engines those below.
RUNS = {
    "lora": ("qlora_train.py", ["LORA_R=4"]),
    "kl": ("qlora_train.py", ["KL_WEIGHT=1", "GRADIENT_CHECKPOINTING=True", "PACKING=False"]),
    "full": ("qlora_train.py", FULL),
    "nf4": ("qlora_train.py", ["QUANTIZATION=nf4"]),
    "galore": ("galore_train.py", GALORE),
    "dpo": ("preference_train.py", [*PAIRS, "REFERENCE=kept"]),
    "kto": ("preference_train.py", [*PAIRS, "REFERENCE=live", "LOSS=kto"]),
    "bf16": ("qlora_train.py", ["LORA_R=4", "DTYPE=bfloat16", "LEARNING_RATE=1e-3"]),
}
ENGINES = {
    "ddp": ["lora", "kl", "full", "nf4", "galore", "dpo", "kto"],
    "fsdp": ["lora", "kl", "full", "nf4", "dpo"],
    "zero2": ["lora", "full", "nf4", "dpo"],
}


def launch(engine: str, *command, processes: int = 2) -> list[str]:
    """The command line that starts a script in several processes, as README has it."""
    config = ["--config_file", f"launch/{engine}.yaml", "--num_processes", str(processes), "--main_process_port", "0"]
    return [str(BIN / "accelerate"), "launch", *config, *map(str, command)]


def environment() -> dict:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def run_launched(command: list[str], env: dict | None = None, seconds: int = 300) -> subprocess.CompletedProcess:
    """The command with what it said; killed with all it started, and failed with that, if it hangs."""
    env, pipe = env or environment(), subprocess.PIPE
    run = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        out, error = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        out, error = run.communicate()
        pytest.fail(f"hung: {out[-3000:]}\n{error[-9000:]}")
    print("\n".join(line for line in error.splitlines() if "%|" not in line))
    return subprocess.CompletedProcess(command, run.returncode, out, error)


@pytest.fixture(scope="module")
def common_settings(tiny, chats_file, tmp_path_factory):
    model = tmp_path_factory.mktemp("chatty") / "llama"  # with a template: FSDP cannot train rows of tied embeddings
    shutil.copytree(tiny(), model)
    shutil.copy(ROOT / "common" / "data" / "chat_templates" / "chatml.jinja", model / "chat_template.jinja")
    # 17 chats, 5 packed rows, 4 a step: the last step of an epoch has one, the other process a blank; others follow.
    return [
        f"MODEL={model}", f"DATA={chats_file}", "DTYPE=float32", "KL_WEIGHT=0", "MAX_STEPS=10",
        "MAX_LENGTH=128", "EVAL_SIZE=7", "EVAL_STEPS=5", "SAVE_STEPS=5", "LEARNING_RATE=1e-2",
        "BATCH_SIZE=4", "PER_DEVICE_TRAIN_BATCH_SIZE=1",  # KL draws its positions by micro step
    ]  # fmt: skip


@pytest.fixture(scope="module")
def singles(common_settings, tmp_path_factory):
    """The folder of the same runs in one process."""
    out = tmp_path_factory.mktemp("single")
    plan = [
        {
            "script": script,
            "arguments": [*common_settings, *more, f"OUT_DIR={out}", f"RUN_NAME={name}"],
            "chunk": chunk(name),
            "lean": True,
        }
        for name, (script, more) in RUNS.items()
    ]
    file = write_plan(out, plan)
    done = run_launched([sys.executable, "tests/launched.py", str(file)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(Path(f"{file}.codes").read_text()) == [0] * len(plan), done.stderr[-3000:]
    return out


def chunk(name: str) -> int:
    """Several chunks of logits in each row, and another number in each process; KL_WEIGHT draws so many positions."""
    return 256 if name == "kl" else 16


def write_plan(folder: Path, plan: list) -> Path:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in (folder / "final").glob("*.safetensors") for k, v in load_file(file).items()}


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def assert_equal_runs(one: Path, other: Path, tolerance: float):
    """Losses and weights within a relative tolerance, the weights' against the largest of each tensor."""
    a, b = logged(one), logged(other)
    assert [(x["step"], x["tokens"]) for x in a] == [(x["step"], x["tokens"]) for x in b]
    for name in ("loss", "eval_loss", "kl", "margin", "accuracy", "chosen_reward", "eval_margin", "eval_accuracy"):
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x]
        assert all(abs(x - y) <= tolerance * max(abs(x), 0.1) for x, y in pairs), (name, pairs)
    a, b = weights(one), weights(other)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert (a[name] - b[name]).abs().max() <= tolerance * a[name].abs().max(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_what_one_does(engine, singles, common_settings, tmp_path):
    plan = []
    for name in ENGINES[engine]:
        script, more = RUNS[name]
        arguments = [*common_settings, *more, f"OUT_DIR={tmp_path}"]
        plan.append({"script": script, "arguments": [*arguments, f"RUN_NAME={name}"], "chunk": chunk(name)})
        # Stopped by a signal to one process in its third step, and gone on with.
        if name == "lora" or name == "full" and engine != "ddp":
            again = {"script": script, "arguments": [*arguments, f"RUN_NAME={name}-again", "SAVE_STEPS=2"], "chunk": 16}
            plan += [again | {"signal_at": 3}, again]
    if engine == "fsdp":
        spiky = [*common_settings, *FULL, f"OUT_DIR={tmp_path}", "RUN_NAME=spiky"]
        plan.append({"script": "qlora_train.py", "arguments": spiky, "chunk": 16, "spike_at": 4})
    half = [*common_settings, *RUNS["bf16"][1], f"OUT_DIR={tmp_path}", "RUN_NAME=bf16"]
    plan.append({"script": "qlora_train.py", "arguments": half, "chunk": 16})
    if engine == "ddp":  # a save that fails is tried again one step later, and once only
        full = ["SAVE_STEPS=4", "SAVE_TOTAL_LIMIT=9", f"OUT_DIR={tmp_path}", "RUN_NAME=full-disk"]
        plan.append({"script": "qlora_train.py", "arguments": [*common_settings, *full], "full_at": 4})
    broken = {"script": "qlora_train.py", "arguments": [*common_settings, f"OUT_DIR={tmp_path}", "RUN_NAME=nan"]}
    plan.append(broken | {"nan_at": 4})
    if engine == "ddp":  # with a matrix that gets a new basis in this step
        arguments = [*common_settings, *GALORE, f"OUT_DIR={tmp_path}", "RUN_NAME=galore-nan"]
        plan.append({"script": "galore_train.py", "arguments": arguments, "nan_at": 4})
    predicted = {f"RUN_NAME={name}" for name in ENGINES[engine]}  # their memory, and drawn
    plan = [run | {"lean": predicted.isdisjoint(run["arguments"])} for run in plan]
    file = write_plan(tmp_path, plan)
    done = run_launched(launch(engine, "tests/launched.py", file))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [143 if "signal_at" in run else 0 for run in plan]
    assert json.loads(Path(f"{file}.codes").read_text()) == expected, done.stderr[-3000:]

    # With parts of the weights, LoRA's product and the loss's gradient are computed in another order: 1.4e-4 after 10
    # steps of Adam at 1e-2.
    for name in ENGINES[engine]:
        assert_equal_runs(singles / name, tmp_path / name, 5e-4 if engine == "fsdp" else 1e-4)
    stopped = list(tmp_path.glob("*-again"))
    for again in stopped:
        assert_equal_runs(tmp_path / again.name.removesuffix("-again"), again, 0)
    if engine == "fsdp":  # looking at a spike changes nothing
        assert_equal_runs(tmp_path / "full", tmp_path / "spiky", 0)
        assert "step 4: loss" in done.stderr and any("spike" in row for row in logged(tmp_path / "spiky"))
    assert stopped and done.stderr.count("stopped at step 3") == len(stopped)  # told by the first process only
    assert done.stdout.count("row for runs.md") == len([code for code in expected if code == 0])

    summary = json.loads((tmp_path / "lora" / "summary.json").read_text())
    assert summary["device"].startswith("2 x ") and f"launch/{engine}.yaml --num_processes 2" in summary["command"]
    assert {row.split(",")[-1] for row in (tmp_path / "lora" / "hardware.csv").read_text().splitlines()[1:]} == {
        "0",
        "1",
    }
    for name in ("nan", "galore-nan") if engine == "ddp" else ("nan",):
        assert json.loads((tmp_path / name / "summary.json").read_text())["verdict"] == "done, 1 steps not finite"
    assert all(w.isfinite().all() for w in weights(tmp_path / "nan").values())
    one, rounded = ([row["loss"] for row in logged(out / "bf16") if "loss" in row] for out in (singles, tmp_path))
    assert rounded == pytest.approx(one, rel=5e-3)
    assert any(torch.tensor(x).bfloat16().item() != pytest.approx(x, rel=1e-6) for x in rounded)  # sums in float32
    if engine == "ddp":
        saved = sorted(int(folder.name.split("-")[1]) for folder in (tmp_path / "full-disk").glob("checkpoint-*"))
        assert saved == [5, 8, 10]


def test_a_killed_process_ends_the_other_and_the_run_goes_on(singles, common_settings, tmp_path):
    arguments = [*common_settings, *RUNS["lora"][1], f"OUT_DIR={tmp_path}", "RUN_NAME=lora"]
    run = {"script": "qlora_train.py", "arguments": [*arguments, "SAVE_STEPS=1"], "lean": True}
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "tests/launched.py"]
    killed = run_launched([*torchrun, write_plan(tmp_path, [run | {"kill_at": 4}])])
    assert killed.returncode != 0 and "step 3/10" in killed.stdout and "step 4/10" not in killed.stdout
    assert time.time() - (tmp_path / "plan.json.killed").stat().st_mtime < 30

    alone = run_script(
        "qlora_train.py", *run["arguments"]
    )  # a process that ends: this one would keep the folder's lock
    assert alone.returncode == 3
    assert "the run began with 2 processes (ddp), now there are 1 (None)" in alone.stderr

    done = run_launched([*torchrun, write_plan(tmp_path, [run])])
    assert done.returncode == 0 and "resuming from checkpoint-3" in done.stdout, done.stderr[-3000:]
    assert_equal_runs(singles / "lora", tmp_path / "lora", 1e-4)


def test_a_slurm_job_on_two_nodes_stops_in_time_and_is_requeued(singles, common_settings, tmp_path):
    """launch/slurm.sbatch as it is, srun and scontrol played by scripts: two nodes of a process each, both here."""
    script = ROOT / "launch" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert subprocess.run([BIN / "shellcheck", script]).returncode == 0
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, text in {
        "srun": 'SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n || { kill %1 %2; exit 1; }; wait -n',
        "scontrol": f'[ "$1" = show ] && printf "localhost\\nlocalhost\\n" || echo "$@" >> {tmp_path}/requeued',
    }.items():
        (fakes / name).write_text(f"#!/bin/bash\n{text}\n")
        (fakes / name).chmod(0o755)
    job = dict(
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="localhost,localhost",
        SLURM_GPUS_ON_NODE="1",
    )
    env = environment() | job
    env["PATH"] = f"{fakes}:{env['PATH']}"
    settings = [*common_settings, *RUNS["lora"][1], f"OUT_DIR={tmp_path}"]
    command = ["bash", str(script), "qlora_train.py", *settings]
    run = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = ""
    for line in run.stdout:
        said += line
        if line.startswith("step 1/"):
            run.send_signal(signal.SIGUSR1)
            break
    said += run.stdout.read()
    assert run.wait(timeout=60) != 0, said
    assert "stopped at step" in said and (tmp_path / "requeued").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"

    env["ENGINE"] = "ddp"  # by accelerate, this time
    again = run_launched(command, env)
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr[-3000:]
    assert_equal_runs(singles / "lora", tmp_path / f"slurm-{job['SLURM_JOB_ID']}", 1e-4)


@pytest.mark.parametrize(
    "engine, script, changes, expected",
    [
        ("zero3", "qlora_train.py", {"QUANTIZATION": "nf4"}, "QUANTIZATION=nf4 .* launch/zero2.yaml works"),
        ("fsdp", "qlora_train.py", {"QUANTIZATION": "int8"}, "QUANTIZATION=int8 .* QUANTIZATION=nf4 works"),
        (
            "fsdp",
            "qlora_train.py",
            {"OPTIM": "adamw_bnb_8bit"},
            "OPTIM=adamw_bnb_8bit .* OPTIM=adamw_torch_fused works",
        ),
        ("zero3", "qlora_train.py", {"EVAL_FACTS": "data/facts.jsonl"}, "EVAL_FACTS.* python evaluate_model.py"),
        ("zero2", "qlora_train.py", {"OPTIM": "adamw_anyprecision"}, "OPTIM=adamw_anyprecision .* launch/ddp.yaml"),
        ("fsdp1", "qlora_train.py", {}, "Set fsdp_version: 2"),
        ("fsdp meta", "qlora_train.py", {}, "fsdp_cpu_ram_efficient_loading: true"),
        ("context", "qlora_train.py", {}, "cp_size.* GRADIENT_CHECKPOINTING=True"),
        ("fsdp", "galore_train.py", {}, "OPTIM=galore with fsdp: .* launch/ddp.yaml"),
        ("zero2", "galore_train.py", {"OPTIM": "galore_torch"}, "OPTIM=galore_torch with zero2"),
        ("fsdp", "qlora_train.py", {"MODEL": "tiny", "MAX_LENGTH": 128}, "rows must be trained; .* launch/ddp.yaml"),
    ],
)
def test_what_cannot_be_combined_is_refused(engine, script, changes, expected, tiny, monkeypatch, run_here):
    if engine.startswith("zero"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", engine[-1])
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "1" if engine == "fsdp1" else "2")
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", str(engine == "fsdp meta").lower())
        if engine == "context":
            monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    values = {name: tiny() if value == "tiny" else value for name, value in changes.items()}
    code, _, error = run_here(script, *(f"{name}={value}" for name, value in values.items()))
    assert code == 2 and re.search(expected, error), error


def test_scripts_that_do_not_train_want_one_process(monkeypatch):
    done = run_script("chat_pipe.py", "PROMPT=Hi", WORLD_SIZE="2")
    assert done.returncode == 2 and "only training uses several processes" in done.stderr


@pytest.mark.parametrize(
    ("devices", "batch", "per_device", "accumulation", "expected"),
    [
        (1, None, None, None, (1, None)),
        (1, 16, None, None, (16, None)),
        (4, 16, None, None, (4, None)),
        (2, 16, 2, None, (8, 2)),
        (2, 16, None, 4, (8, 2)),
        (4, None, 3, 2, (6, 3)),  # as the libraries mean them
        (1, None, None, 4, (4, 1)),
        (4, 24, 3, 2, (6, 3)),
        (4, 10, None, None, "BATCH_SIZE=10"),
        (1, 16, 3, None, "PER_DEVICE_TRAIN_BATCH_SIZE=3"),
        (2, 16, 3, 2, "GRADIENT_ACCUMULATION_STEPS=2"),
    ],
)
def test_a_batch_is_shared_by_the_devices(devices, batch, per_device, accumulation, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    settings = {"BATCH_SIZE": batch, "PER_DEVICE_TRAIN_BATCH_SIZE": per_device}
    settings["GRADIENT_ACCUMULATION_STEPS"] = accumulation
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            batch_plan.rows_per_step(settings)
    else:
        assert batch_plan.rows_per_step(settings) == expected


def test_memory_is_shared_out_by_the_engine(monkeypatch):
    """Bytes of four processes that train every weight in bfloat16, beside a frozen base."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(5, 1, bias=False), "layers": torch.nn.ModuleList()})
    model["layers"].extend(torch.nn.Linear(n, 1, bias=False) for n in (8, 8, 19))
    model = model.bfloat16()  # 80 bytes, 10 of them outside of layers; the largest layer has 38
    parts = {"weights": 100, "gradients": 80, "optimizer states": 160, "activations": 7}
    arguments = parts, model, torch.nn.Linear(10, 1, bias=False).bfloat16(), torch.bfloat16, None
    assert batch_plan.per_process(*arguments) == parts | {"exchange": 80}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # trained in float32, the base in each
    shared = {"weights": 40 + 20, "gradients": 40, "optimizer states": 80, "activations": 7, "gathered": 10 + 2 * 38}
    assert batch_plan.per_process(*arguments) == shared
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # float32 copies of the weights beside them
    shared |= {"weights": 100, "float32 weights": 40, "exchange": 4 * ZERO_BUCKET}
    del shared["gathered"]
    assert batch_plan.per_process(*arguments) == shared


def test_what_is_predicted_leaves_the_device_as_it_is(monkeypatch):
    """Making TrainingArguments moves the whole process to the device they name."""
    monkeypatch.setitem(PartialState()._shared_state, "device", torch.device("meta"))
    make_optimizer("adamw_torch_fused", torch.nn.Linear(2, 2))
    assert PartialState().device.type == "meta"


def test_rows_are_dealt_in_the_order_of_one_process(tiny):
    """The order is accelerate's own, epoch by epoch; blank rows come last and are no tokens."""
    from accelerate.data_loader import SeedableRandomSampler

    own, even = SeedableRandomSampler(range(9), data_seed=3), EvenSampler(9, 3, 3)
    for epoch in range(3):
        own.set_epoch(epoch)
        even.set_epoch(epoch)
        assert list(even) == [*own, 9, 10, 11]
    packed = {"input_ids": torch.zeros(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    padded = {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert count_tokens(packed) == 5 and count_tokens(padded) == 2


def test_a_mistake_is_told_once_and_an_error_by_the_process_that_has_it(tmp_path):
    done = run_launched(launch("ddp", "qlora_train.py", f"OUT_DIR={tmp_path}", "LORA_DROPOUT=0.1", "DTYPE=float8"))
    lines = [line for line in done.stderr.splitlines() if "DTYPE" in line and "error" in line]
    # The launcher ends the others when one has ended; that one has spoken.
    begins = [line.partition("error")[0] for line in lines]
    assert begins and len(set(begins)) == len(begins) and set(begins) <= {"", "process 1: "}
    assert done.stderr.count("LORA_DROPOUT = 0.1") <= 1  # that process may be ended before it prints

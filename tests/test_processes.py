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
from conftest import ROOT, run_script, write_jsonl
from safetensors.torch import load_file

import galore_train
import qlora_train
from common import fitting, processes, training
from common.settings import UserError, current

BIN = Path(sys.executable).parent
FULL = ["ADAPTER=None", "LEARNING_RATE=1e-3"]
GALORE = ["GALORE_RANK=16", "GALORE_UPDATE_GAP=4", "LEARNING_RATE=1e-3"]
# By engine: run, script and settings. The single process runs each of them once.
RUNS = {
    "lora": ("qlora_train", ["LORA_R=4"]),
    "kl": ("qlora_train", ["KL_WEIGHT=1", "GRADIENT_CHECKPOINTING=True", "PACKING=False"]),
    "full": ("qlora_train", FULL),
    "nf4": ("qlora_train", ["QUANTIZATION=nf4"]),
    "galore": ("galore_train", GALORE),
}
ENGINES = {
    "ddp": ["lora", "kl", "full", "nf4", "galore"],
    "fsdp": ["lora", "kl", "full", "nf4"],
    "zero2": ["lora", "full", "nf4"],
}


def launch(engine: str, *command, processes: int = 2) -> list[str]:
    """The command line that starts a script in several processes, as README has it."""
    config = ["--config_file", f"launch/{engine}.yaml", "--num_processes", str(processes), "--main_process_port", "0"]
    return [str(BIN / "accelerate"), "launch", *config, *map(str, command)]


def environment() -> dict:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def run_launched(command: list[str], seconds: int = 240) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module")
def common_settings(tiny, chats_file):
    # 9 rows of 128 tokens and 2 a step: the last step of an epoch has one, and a second epoch begins.
    return [
        f"MODEL={tiny()}", f"DATA={chats_file}", "DTYPE=float32", "KL_WEIGHT=0", "MAX_STEPS=10",
        "MAX_LENGTH=128", "EVAL_SIZE=3", "EVAL_STEPS=5", "SAVE_STEPS=5", "LEARNING_RATE=1e-2",
        "GRADIENT_ACCUMULATION_STEPS=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def singles(common_settings, tmp_path_factory):
    """The folder of the same runs in one process."""
    out = tmp_path_factory.mktemp("single")
    plan = [
        {"script": script, "arguments": [*common_settings, *more, f"OUT_DIR={out}", f"RUN_NAME={name}"]}
        for name, (script, more) in RUNS.items()
    ]
    file = write_plan(out, plan)
    done = run_launched([sys.executable, "tests/launched.py", str(file)])
    assert done.returncode == 0 and json.loads(Path(f"{file}.codes").read_text()) == [0] * len(plan), done.stderr[
        -3000:
    ]
    return out


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
    for name in ("loss", "eval_loss", "kl"):
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x]
        assert all(abs(x - y) <= tolerance * abs(x) for x, y in pairs), (name, pairs)
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
        plan.append({"script": script, "arguments": [*arguments, f"RUN_NAME={name}"]})
        if name in ("lora", "full"):  # stopped by a signal to one process in its third step, and gone on with
            again = {"script": script, "arguments": [*arguments, f"RUN_NAME={name}-again", "SAVE_STEPS=2"]}
            plan += [again | {"signal_at": 3}, again]
    broken = {"script": "qlora_train", "arguments": [*common_settings, f"OUT_DIR={tmp_path}", "RUN_NAME=nan"]}
    plan.append(broken | {"nan_at": 4})
    file = write_plan(tmp_path, plan)
    done = run_launched(launch(engine, "tests/launched.py", file))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [143 if "signal_at" in run else 0 for run in plan[:-1]] + [4 if engine == "zero2" else 0]
    assert json.loads(Path(f"{file}.codes").read_text()) == expected, done.stderr[-3000:]

    for name in ENGINES[engine]:
        assert_equal_runs(singles / name, tmp_path / name, 1e-4)
    for name in ("lora", "full"):
        assert_equal_runs(tmp_path / name, tmp_path / f"{name}-again", 0)
    assert done.stderr.count("stopped at step 3") == 2  # of two runs, by the first process only
    assert done.stdout.count("row for runs.md") == len([code for code in expected if code == 0])

    summary = json.loads((tmp_path / "lora" / "summary.json").read_text())
    assert summary["device"].startswith("2 x ") and f"launch/{engine}.yaml --num_processes 2" in summary["command"]
    assert {row.split(",")[-1] for row in (tmp_path / "lora" / "hardware.csv").read_text().splitlines()[1:]} == {
        "0",
        "1",
    }
    if engine != "zero2":
        assert json.loads((tmp_path / "nan" / "summary.json").read_text())["verdict"] == "done, 1 steps not finite"
        assert all(w.isfinite().all() for w in weights(tmp_path / "nan").values())


def test_a_killed_process_ends_the_other_and_the_run_goes_on(singles, common_settings, tmp_path):
    settings = [*common_settings, f"OUT_DIR={tmp_path}", "RUN_NAME=lora", "SAVE_STEPS=1"]
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "qlora_train.py"]
    run = subprocess.Popen(
        [*command, *settings, "MAX_STEPS=2000", "EVAL_STEPS=None"], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("step 3/"):
            break
    victim = max(int(pid) for pid in children(run.pid))
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    run.stdout.read()
    assert run.wait(timeout=60) != 0 and time.monotonic() - killed < 30
    assert not children(run.pid)

    done = run_launched(
        [*command, *settings, "MAX_STEPS=2000", "EVAL_STEPS=None", "ALLOW_CHANGE=MAX_STEPS", "MAX_STEPS=6"]
    )
    assert done.returncode == 0 and "going on from checkpoint-" in done.stdout, done.stderr[-3000:]
    assert [row["loss"] for row in logged(tmp_path / "lora")][:2] == pytest.approx(
        [row["loss"] for row in logged(singles / "lora") if "loss" in row][:2], rel=1e-4
    )

    alone = run_script("qlora_train.py", *settings, "MAX_STEPS=6", "EVAL_STEPS=None")
    assert alone.returncode == 3
    assert "the run began with 2 processes (ddp), now there are 1 (None)" in alone.stderr


def children(pid: int) -> list[str]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return file.read_text().split() if file.exists() else []


def test_a_slurm_job_on_two_nodes_stops_in_time_and_is_requeued(singles, common_settings, tmp_path):
    """launch/slurm.sbatch as it is, srun and scontrol played by scripts: two nodes of a process each on this machine."""
    script = ROOT / "launch" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert subprocess.run([BIN / "shellcheck", script]).returncode == 0
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, text in {
        "srun": 'SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait %1; a=$?; wait %2; b=$?; exit $((a > b ? a : b))',
        "scontrol": f'if [ "$1" = show ]; then printf "localhost\\nlocalhost\\n"; else echo "$@" >> {tmp_path}/requeued; fi',
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
    settings = [*common_settings, f"OUT_DIR={tmp_path}"]
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

    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr[-3000:]
    assert_equal_runs(singles / "lora", tmp_path / f"slurm-{job['SLURM_JOB_ID']}", 1e-4)

"""Runs that survive: a resumed run equals the uninterrupted one bit for bit, and no damaged checkpoint is trusted."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from common.run.report import plot
from common.train import checkpoints
from common.train.trainer import ChatTrainer

pytestmark = pytest.mark.usefixtures("lean")
CLOCK = ("step_seconds", "seconds", "tokens_per_second", "rss_gib", "vram_gib", "power_w", "events")


def result_of(folder):
    """Final weights, and metrics without what the clock and the machine tell."""
    metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    weights = load_file(next((folder / "final").glob("*model.safetensors")))
    return weights, [{k: v for k, v in entry.items() if k not in CLOCK} for entry in metrics]


def assert_same_run(one, other):
    (weights, metrics), (others, other_metrics) = result_of(one), result_of(other)
    assert metrics == other_metrics
    assert weights.keys() == others.keys() and all(
        weights[name].dtype == others[name].dtype and torch.equal(weights[name], others[name]) for name in weights
    )


def cut_back(folder, step):
    """Make a finished run look as if it had been killed after a step."""
    for checkpoint in checkpoints.published(folder):
        if checkpoints.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    for name in ("final", "summary.json", "run_row.md", "plot.png"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "step, settings",
    [
        (2, "PACKING=True KL_WEIGHT=0.5"),
        (2, "PACKING=False KL_WEIGHT=0"),
        (2, "BATCH_SIZE=4"),
        (2, "LOGGING_STEPS=4"),
        (2, "QUANTIZATION=nf4"),
        (2, "QUANTIZATION=hqq-2bit"),
        (2, "ADAPTER=None DTYPE=float32 LORA_DROPOUT=0"),
        (6, "PACKING=True KL_WEIGHT=0.5"),
        (6, "LOGGING_STEPS=4"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(step, settings, arguments, tmp_path, run_here, finished):
    finished("whole", *settings.split())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", step)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 7, "lo')  # a line that was being written
    code, _, error = run_here("qlora_train.py", *arguments("cut", *settings.split()))
    assert code == 0, error
    if "ADAPTER=None" in settings:
        whole, cut = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    else:
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
    losses = [json.loads((tmp_path / run / "summary.json").read_text())["train_loss"] for run in ("whole", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_resume_that_would_change_the_run_is_refused(arguments, tmp_path, run_here, chats_file, finished):
    finished("run")
    cut_back(tmp_path / "run", 3)
    for change in ("LEARNING_RATE=1e-3", "BATCH_SIZE=2", "MAX_STEPS=7", "OPTIM=adafactor", "LORA_R=8"):
        code, _, error = run_here("qlora_train.py", *arguments("run", change))
        assert code == 3 and f"{change.partition('=')[0]} was" in error
    text = chats_file.read_text()
    chats_file.write_text(text.replace('"content": "', '"content": "x', 1))  # the file still has the same name
    try:
        code, _, error = run_here("qlora_train.py", *arguments("run"))
    finally:
        chats_file.write_text(text)
    assert code == 3 and "is not what it began with" in error
    code, _, error = run_here("qlora_train.py", *arguments("run", "LEARNING_RATE=1e-3", "ALLOW_CHANGE=LEARNING_RATE"))
    assert code == 0, error
    rates = [e["learning_rate"] for e in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if "loss" in e]
    assert rates[2] > 5e-3 and 0 < max(rates[3:]) < 1e-3  # the new peak, on the same schedule


def test_a_run_killed_before_its_first_checkpoint_starts_again(arguments, tmp_path, run_here, finished):
    finished("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 0)
    assert run_here("qlora_train.py", *arguments("cut"))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def run_with_checkpoints(tmp_path, finished):
    finished("run")
    return tmp_path / "run"


def test_every_damaged_file_is_noticed_and_the_checkpoint_before_is_taken(run_with_checkpoints, capsys):
    run = run_with_checkpoints
    newest, before = checkpoints.published(run)[:2]
    assert checkpoints.latest_valid(run)[0] == newest
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        for damaged in (b"", content[: len(content) // 2], content[:-1], flipped, None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert checkpoints.latest_valid(run)[0] == before, file.name
            file.write_bytes(content)
        if file.name != checkpoints.MANIFEST:
            assert f"{newest.name} is rejected: {file.name} is" in capsys.readouterr().err
    (newest / "adapter_model.bin").write_text("x")
    assert checkpoints.latest_valid(run)[0] == before
    assert not list(run.rglob("training_args.bin"))  # a pickle


def test_without_a_sound_checkpoint_the_run_is_refused_and_nothing_is_deleted(
    run_with_checkpoints, arguments, run_here, tmp_path
):
    cut_back(run_with_checkpoints, 6)
    for checkpoint in checkpoints.published(run_with_checkpoints):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    before = sorted(run_with_checkpoints.rglob("checkpoint-*/*"))
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert (
        code == 2 and "no valid checkpoint" in error and sorted(run_with_checkpoints.rglob("checkpoint-*/*")) == before
    )


def test_names_in_the_mark_do_not_leave_the_folder(run_with_checkpoints):
    newest, before = checkpoints.published(run_with_checkpoints)[:2]
    mark = json.loads((newest / checkpoints.MANIFEST).read_text())
    mark["files"]["../settings.json"] = [1, "x"]
    (newest / checkpoints.MANIFEST).write_text(json.dumps(mark))
    assert checkpoints.latest_valid(run_with_checkpoints)[0] == before


def test_rotation_goes_by_step_and_keeps_the_newest(run_with_checkpoints):
    run = run_with_checkpoints
    for checkpoint in checkpoints.published(run):  # the clock says the reverse of the steps
        os.utime(checkpoint, (100 - checkpoints.step_of(checkpoint),) * 2)
    (run / "checkpoint-99").mkdir()  # never published
    checkpoints.rotate(run, 2, "")
    assert [checkpoints.step_of(c) for c in checkpoints.published(run)] == [6, 5]
    checkpoints.rotate(run, 0, "")
    assert [checkpoints.step_of(c) for c in checkpoints.published(run)] == [6]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_kill_9_in_the_middle_of_a_save(arguments, run_here, tmp_path, finished):
    """The process dies while checkpoint-4 is written; the same command goes on and ends as if nothing had happened."""
    places = ("optimizer.pt", "COMPLETE.json")
    shim = f"""
import os, signal, sys
import torch, common.train.sft, common.run.training_run
def dies(real):
    def call(*a, **k):
        if any("checkpoint-4" in str(x) and str(x).endswith(kill_at) for x in a):
            if kill_at == "optimizer.pt":
                open(a[1], "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return call
torch.save, os.replace = dies(torch.save), dies(os.replace)
import runpy
for kill_at, settings in {[(place, arguments(place)) for place in places]!r}:
    child = os.fork()
    if not child:
        sys.argv = ["qlora_train.py", *settings]
        runpy.run_path("qlora_train.py", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    died = subprocess.run([sys.executable, "-c", shim], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert died.stdout.splitlines().count("-9") == 2, died.stderr[-2000:]
    finished("whole")
    for place in places:
        assert checkpoints.step_of(checkpoints.published(tmp_path / place)[0]) == 3
        code, _, error = run_here("qlora_train.py", *arguments(place))
        assert code == 0, error
        assert_same_run(tmp_path / "whole", tmp_path / place)


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the loss of these optimizer steps (from 1) is NaN, and so are its gradients."""

    honest = ChatTrainer.compute_loss

    def spread(steps):
        def compute_loss(self, *args, **kwargs):
            loss = honest(self, *args, **kwargs)
            return loss * float("nan") if self.model.training and self.state.global_step + 1 in steps else loss

        monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)

    return spread


def test_a_step_that_is_not_finite_is_left_out_counted_and_told(arguments, tmp_path, run_here, poison):
    poison({3})
    code, _, error = run_here("qlora_train.py", *arguments("run", "KL_WEIGHT=0.5"))
    assert code == 0 and error.count("not finite, no update") == 1
    plot(tmp_path / "run")
    weights, metrics = result_of(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    steps = [entry for entry in metrics if "learning_rate" in entry]
    assert [entry["loss"] is None for entry in steps] == [False, False, True, False, False, False]
    assert steps[2]["bad_steps"] == 1 and "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    before, after = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing was applied
    assert "1 steps not finite" in json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"]


def test_many_steps_that_are_not_finite_end_the_run_with_4(arguments, tmp_path, run_here, poison):
    poison({3, 4, 5, 6})
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 4 and "3 steps with a loss" in error and "LEARNING_RATE" in error
    assert "failed" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").partition("</title>")[0]
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "summary.json").exists()
    newest = checkpoints.latest_valid(tmp_path / "run")[0]
    good, last = (load_file(c / "adapter_model.safetensors") for c in (tmp_path / "run" / "checkpoint-2", newest))
    assert all(torch.equal(good[name], last[name]) for name in good) and checkpoints.step_of(newest) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_a_stopped_run_saves_and_goes_on_without_a_lost_step(how, arguments, tmp_path, run_here, at_step, finished):
    finished("whole", "SAVE_STEPS=None")
    stop = (tmp_path / "cut" / "STOP").touch if how == "STOP" else lambda: os.kill(os.getpid(), getattr(signal, how))
    at_step({3: stop})
    code, _, error = run_here("qlora_train.py", *arguments("cut", "SAVE_STEPS=None"))
    assert code == (143 if how == "SIGTERM" else 130) and "stopped at step 3" in error
    assert [checkpoints.step_of(c) for c in checkpoints.published(tmp_path / "cut")] == [3]
    at_step({})
    code, _, error = run_here("qlora_train.py", *arguments("cut", "SAVE_STEPS=None"))
    assert code == 0, error
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_a_second_ctrl_c_ends_at_once(arguments, tmp_path, run_here, at_step):
    at_step({3: lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]})
    code, _, error = run_here("qlora_train.py", *arguments("run", "SAVE_STEPS=2"))
    assert code == 130 and [checkpoints.step_of(c) for c in checkpoints.published(tmp_path / "run")] == [2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

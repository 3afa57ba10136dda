"""What runs survive: full disks, second runs, signals at bad moments, loss spikes, files that would run code."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script, save_tiny
from safetensors.torch import load_file, save_file
from test_checkpoints import assert_same_run, cut_back

from common import files
from common.data import prepare
from common.model import load
from common.run.report import plot
from common.train import checkpoints, guard, saving, trainer
from common.train.guard import is_spike
from common.train.reliability import chats_of
from common.train.trainer import ChatTrainer

pytestmark = pytest.mark.usefixtures("lean")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def steps_of(run):
    return [checkpoints.step_of(c) for c in checkpoints.published(run)]


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    with open(folder / "ballast", "ab", buffering=0) as stream:
        try:
            while stream.write(bytes(512)):
                pass
        except OSError:
            pass


@pytest.mark.parametrize("noticed", ["before the save", "in the save"])
def test_a_full_disk_does_not_end_a_run(
    noticed, arguments, small_disk, tmp_path, run_here, at_step, monkeypatch, finished
):
    """Full at step 2, room again at step 3: the run goes on, saves later, and ends as the one with a large disk."""
    finished("run", "SAVE_STEPS=2")
    if noticed == "in the save":
        monkeypatch.setattr(files, "check_space", lambda *args: None)
    at_step({2: lambda: fill(small_disk), 3: (small_disk / "ballast").unlink})
    code, _, error = run_here("qlora_train.py", *arguments("run", "SAVE_STEPS=2", f"OUT_DIR={small_disk}"))
    assert code == 0, error
    assert error.count("could not be saved") == 1 and "checkpoint-2 could not be saved" in error
    assert "tried again at step 3" in error
    assert steps_of(small_disk / "run") == [6, 4, 3] and checkpoints.latest_valid(small_disk / "run")
    assert not list(small_disk.rglob("checkpoint-2"))
    assert_same_run(tmp_path / "run", small_disk / "run")


def test_lines_that_a_full_disk_does_not_take_come_later(small_disk):
    log = files.LineLog(small_disk / "metrics.jsonl")
    lines = [f"{number}" * 5000 + "\n" for number in range(6)]
    for number, line in enumerate(lines):
        if number == 2:
            fill(small_disk)
        if number == 4:
            (small_disk / "ballast").unlink()
        assert log.append(line) == (number not in (2, 3))
        assert log.file.read_text() == "".join(lines[: 2 if number in (2, 3) else number + 1])


def test_a_stop_on_a_full_disk_says_that_nothing_was_saved(arguments, small_disk, run_here, at_step):
    def fill_and_stop():
        fill(small_disk)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step({3: fill_and_stop})
    code, _, error = run_here("qlora_train.py", *arguments("run", f"OUT_DIR={small_disk}"))
    assert code == 2 and "stopped at step 3, which could not be saved" in error and "OUT_DIR=" in error
    assert steps_of(small_disk / "run") == [2, 1]


def test_too_small_a_disk_is_refused_before_training(arguments, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 1000, 1000))
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 2 and "OUT_DIR=" in error and "SAVE_TOTAL_LIMIT=9" in error and "are free" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_final_model_without_room_is_one_line_and_comes_with_the_next_start(
    arguments, small_disk, run_here, tmp_path, monkeypatch, finished
):
    finished("run")
    save_final = load.save_final

    def on_a_full_disk(*args):
        fill(small_disk)
        save_final(*args)

    monkeypatch.setattr(load, "save_final", on_a_full_disk)
    code, _, error = run_here("qlora_train.py", *arguments("run", f"OUT_DIR={small_disk}"))
    assert code == 2 and "Make room" in error and "Traceback" not in error
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(load, "save_final", save_final)
    assert run_here("qlora_train.py", *arguments("run", f"OUT_DIR={small_disk}"))[0] == 0
    assert_same_run(tmp_path / "run", small_disk / "run")


def test_a_crash_in_the_evaluation_costs_nothing(arguments, run_here, tmp_path, monkeypatch, finished):
    finished("whole", "EVAL_STEPS=None")
    with monkeypatch.context() as patch:
        patch.setattr(ChatTrainer, "get_eval_dataloader", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here("qlora_train.py", *arguments("run", "EVAL_STEPS=None"))
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    assert run_here("qlora_train.py", *arguments("run", "EVAL_STEPS=None"))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# A second run


def test_a_run_folder_belongs_to_one_run_at_a_time_and_a_dead_one_lets_go(arguments, run_here, tmp_path):
    (tmp_path / "run").mkdir()
    script = (
        f"import filelock, time; lock = filelock.FileLock({str(tmp_path / 'run' / '.lock')!r}); lock.acquire(); "
        "print(1, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    other.stdout.readline()
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 2 and "RUN_NAME=run: another process" in error and not (tmp_path / "run" / "settings.json").exists()
    other.kill()
    other.wait()
    assert run_here("qlora_train.py", *arguments("run"))[0] == 0


# Signals


@posix
@pytest.mark.parametrize("moment", ["saving", "publishing", "evaluation", "final evaluation"])
def test_a_signal_at_any_moment_costs_no_step(moment, arguments, run_here, tmp_path, monkeypatch, finished):
    finished("whole")
    owner, name = {
        "saving": (trainer.SFTTrainer, "_save_checkpoint"),
        "publishing": (checkpoints, "publish"),
    }.get(moment, (ChatTrainer, "get_eval_dataloader"))
    honest, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if moment == "final evaluation" else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*args, **kwargs)

    # In `whole`, the evaluation at the last step is the final one.
    more = ["SAVE_STEPS=None", "EVAL_STEPS=3"] if "evaluation" in moment else []
    allowed = ["ALLOW_CHANGE=SAVE_STEPS"] if more else []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        code, _, error = run_here("qlora_train.py", *arguments("run", *more))
    assert code == 143, error
    step = {"saving": 2, "publishing": 2, "evaluation": 3, "final evaluation": 6}[moment]
    assert f"stopped at step {step}" in error and steps_of(tmp_path / "run")[0] == step
    assert "run: stopped" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    code, _, error = run_here("qlora_train.py", *arguments("run", *allowed))
    assert code == 0, error
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@posix
def test_a_signal_while_the_data_is_prepared(arguments, run_here, tmp_path, finished):
    finished("whole")
    shim = (
        f"import os, runpy, sys; sys.argv = ['qlora_train.py', *{arguments('run')!r}]; sys.path.insert(0, '.')\n"
        "from common.data import prepare\n"
        "prepare.write_spool = lambda *args: [print('now', flush=True), __import__('time').sleep(60)]\n"
        "runpy.run_path('qlora_train.py', run_name='__main__')"
    )
    run = subprocess.Popen([sys.executable, "-c", shim], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while b"now" not in run.stdout.readline():
        pass
    run.terminate()
    assert run.wait() == -signal.SIGTERM  # 143 in a shell; there is nothing to save yet
    assert run_here("qlora_train.py", *arguments("run"))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_stopped_after_every_step(arguments, run_here, tmp_path, at_step, finished):
    finished("whole")
    at_step({step: (tmp_path / "run" / "STOP").touch for step in range(1, 6)})
    codes = [run_here("qlora_train.py", *arguments("run", "SAVE_TOTAL_LIMIT=2"))[0] for _ in range(6)]
    assert codes == [130] * 5 + [0] and steps_of(tmp_path / "run") == [6, 5]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# Going on


def test_new_tokens_go_on_bit_for_bit(arguments, run_here, tmp_path, base_tokenizer_folder, finished):
    model = save_tiny("gpt2", tmp_path / "base", base_tokenizer_folder, vocab_size=600)
    more = [f"MODEL={model}", "CHAT_TEMPLATE=chatml", "SAVE_STEPS=2"]
    finished("whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    cut_back(tmp_path / "run", 4)
    code, _, error = run_here("qlora_train.py", *arguments("run", *more))
    assert code == 0, error
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_resumed_run_learns_from_what_it_prepared_before(
    arguments, run_here, tmp_path, monkeypatch, chats_file, finished
):
    finished("run")
    cut_back(tmp_path / "run", 3)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda *args, **kwargs: 1 / 0)
        assert run_here("qlora_train.py", *arguments("run"))[0] == 0
    cut_back(tmp_path / "run", 3)
    file = tmp_path / "run" / "data" / "train.parquet"
    shutil.copy(tmp_path / "run" / "data" / "eval.parquet", file)
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 3 and "the prepared data is not what it began with" in error
    code, _, error = run_here("qlora_train.py", *arguments("run", "ALLOW_CHANGE=DATA"))
    assert code == 0, error


def test_other_versions_are_told(arguments, run_here, tmp_path, finished):
    finished("run")
    cut_back(tmp_path / "run", 3)
    mark = tmp_path / "run" / "checkpoint-3" / checkpoints.MANIFEST
    about = json.loads(mark.read_text())
    assert about["settings"]["LORA_DROPOUT"] == 0.1 and about["step"] == 3
    about["versions"]["torch"] = "2.0"
    mark.write_text(json.dumps(about))
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and "resuming from checkpoint-3" in out and "torch was 2.0, now " in error


def test_damaged_newer_checkpoints_never_push_out_the_good_ones(arguments, run_here, tmp_path, monkeypatch, finished):
    finished("run", "SAVE_TOTAL_LIMIT=3")
    cut_back(tmp_path / "run", 6)
    for step in (5, 6):
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    rotate, sound = checkpoints.rotate, []

    def watched(run, *arguments):
        rotate(run, *arguments)
        sound.append(checkpoints.latest_valid(run)[0].name)

    monkeypatch.setattr(checkpoints, "rotate", watched)
    code, _, error = run_here(
        "qlora_train.py", *arguments("run", "SAVE_TOTAL_LIMIT=1", "ALLOW_CHANGE=SAVE_TOTAL_LIMIT")
    )
    assert code == 0 and sound == ["checkpoint-5", "checkpoint-6"], error


def test_rotation_keeps_the_best(tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 1.5), start=1):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoints.publish(tmp_path / f"checkpoint-{step}", {"eval_loss": loss, "data": "a-b"})
    checkpoints.rotate(tmp_path, 2, "c-b")
    assert steps_of(tmp_path) == [5, 4, 2]


def test_checkpoints_know_the_loss_that_was_measured_at_their_step(tmp_path, finished):
    finished("run")
    digest = checkpoints.latest_valid(tmp_path / "run")[1]["data"]
    losses = {checkpoints.step_of(c): checkpoints.eval_loss(c, digest) for c in checkpoints.published(tmp_path / "run")}
    metrics = map(json.loads, open(tmp_path / "run" / "metrics.jsonl"))
    measured = {entry["step"]: entry["eval_loss"] for entry in metrics if "eval_loss" in entry}
    assert {step for step, loss in losses.items() if loss != float("inf")} == {3, 6}
    assert measured == {3: losses[3], 6: losses[6]}


def test_a_loaded_optimizer_gets_its_pages_back():
    class Paged:
        def get_state_buffer(self, like, dtype):
            buffer = torch.empty_like(like, dtype=dtype)
            buffer.is_paged = True
            return buffer

    optimizer = Paged()
    states = {"state1": torch.arange(4.0), "state2": torch.arange(4, dtype=torch.uint8), "step": 3}
    optimizer.state = {0: dict(states)}
    saving.page_states(optimizer)
    after = optimizer.state[0]
    assert all(torch.equal(after[n], states[n]) and after[n].is_paged for n in ("state1", "state2"))
    assert after["state2"].dtype == torch.uint8 and after["step"] == 3


def test_what_a_file_manager_leaves_behind_spoils_no_checkpoint(arguments, run_here, tmp_path, finished):
    finished("run")
    cut_back(tmp_path / "run", 4)
    (tmp_path / "run" / "checkpoint-4" / ".DS_Store").write_text("x")
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-copy-3")
    (tmp_path / "run" / "checkpoint-9").write_text("a file")
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and "resuming from checkpoint-4" in out, error
    assert (tmp_path / "run" / "checkpoint-copy-3" / checkpoints.MANIFEST).is_file()


def test_a_rejected_checkpoint_is_put_aside_not_deleted(arguments, run_here, tmp_path, finished):
    finished("run")
    cut_back(tmp_path / "run", 4)
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and "resuming from checkpoint-3" in out and "checkpoint-4 is rejected: optimizer.pt" in error
    assert (tmp_path / "run" / "rejected-4" / "adapter_model.safetensors").is_file()


def test_checkpoints_alone_make_a_run(arguments, run_here, tmp_path, finished):
    """Even when a person has removed the other files, nothing is begun anew on top of them."""
    finished("run")
    cut_back(tmp_path / "run", 4)
    for name in ("metrics.jsonl", "settings.json"):
        (tmp_path / "run" / name).unlink()
    assert run_here("qlora_train.py", *arguments("run", "LEARNING_RATE=1e-3"))[0] == 3
    assert run_here("qlora_train.py", *arguments("run", "RESUME=None"))[0] == 2
    assert steps_of(tmp_path / "run") == [4, 3, 2, 1]
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and "resuming from checkpoint-4" in out, error


def test_other_weights_under_the_same_name_are_refused(arguments, run_here, tmp_path, tiny, finished):
    model = tmp_path / "model"
    shutil.copytree(tiny(), model)
    finished("run", f"MODEL={model}")
    cut_back(tmp_path / "run", 4)
    weights = {name: tensor * 1.5 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, _, error = run_here("qlora_train.py", *arguments("run", f"MODEL={model}"))
    assert code == 3 and "MODEL has other weights" in error


def test_allowed_changes_take_effect_and_others_cannot_be_allowed(arguments, run_here, tmp_path, finished):
    finished("run")
    cut_back(tmp_path / "run", 1)
    code, _, error = run_here("qlora_train.py", *arguments("run", "OPTIM=adafactor", "ALLOW_CHANGE=OPTIM"))
    assert code == 2 and "ALLOW_CHANGE=OPTIM: OPTIM cannot change within a run" in error
    more = ["SAVE_STEPS=4", "EVAL_STEPS=2", "LOGGING_STEPS=2", "KEEP=last"]
    more.append("ALLOW_CHANGE=SAVE_STEPS,EVAL_STEPS,LOGGING_STEPS,KEEP")
    code, _, error = run_here("qlora_train.py", *arguments("run", *more))
    assert code == 0 and steps_of(tmp_path / "run") == [6, 4, 1], error
    entries = list(map(json.loads, open(tmp_path / "run" / "metrics.jsonl")))
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 4, 6]
    assert [e["step"] for e in entries if "eval_loss" in e] == [2, 4, 6]


def test_a_refused_command_leaves_the_run_as_it_was(arguments, run_here, tmp_path, chats_file, finished):
    finished("run")
    cut_back(tmp_path / "run", 3)
    text = chats_file.read_text()
    chats_file.write_text(text.replace('"content": "', '"content": "x', 1))
    try:
        assert run_here("qlora_train.py", *arguments("run", "LEARNING_RATE=1e-3", "ALLOW_CHANGE=LEARNING_RATE"))[0] == 3
        assert run_here("qlora_train.py", *arguments("run", "ALLOW_CHANGE=LEARNING_RATE,SAVE_STEPS"))[0] == 3
    finally:
        chats_file.write_text(text)
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0, error


def test_a_finished_run_does_nothing(arguments, run_here, tmp_path, finished):
    finished("run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, _ = run_here("qlora_train.py", *arguments("run"))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert code == 0 and "is finished: nothing to do" in out and changed <= {".lock"}


def test_damaged_files_of_the_run_folder_are_no_traceback(arguments, run_here, tmp_path, finished):
    finished("run")
    cut_back(tmp_path / "run", 4)
    (tmp_path / "run" / "settings.json").write_text("")
    (tmp_path / "run" / "checkpoint-4" / checkpoints.MANIFEST).write_text('{"step": 4, "files": {}}')
    (tmp_path / "run" / "checkpoint-1" / checkpoints.MANIFEST).write_text("[]")
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and "resuming from checkpoint-3" in out and "COMPLETE.json lacks" in error, error


def test_numbers_of_the_trainer_survive(arguments, run_here, tmp_path, monkeypatch):
    """Bad steps before the stop count after it: one at step 2, two more at 4 and 6 are the three that end the run."""
    honest = ChatTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step + 1 in (2, 4, 6) else loss

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    assert (
        run_here("qlora_train.py", *arguments("whole", "MAX_STEPS=5"))[0] == 0
    )  # good ones between them: not in a row
    assert run_here("qlora_train.py", *arguments("run"))[0] == 4  # 1 % of all steps, at least three
    newest = checkpoints.latest_valid(tmp_path / "run")
    assert newest[1]["progress"][0]["guard"]["bad_steps"] == 2 and checkpoints.step_of(newest[0]) == 5
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 4 and "3 steps with a loss" in error


def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is(arguments, run_here, tmp_path, monkeypatch):
    honest = ChatTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        if self.state.global_step == 2:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(ChatTrainer, "training_step", training_step)
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0 and error.count("not finite, no update") == 1
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_publishing_thread_that_fails_costs_one_checkpoint(arguments, run_here, tmp_path, monkeypatch):
    honest, calls = checkpoints.publish, []

    def publish(checkpoint, about):
        calls.append(checkpoint.name)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        honest(checkpoint, about)

    monkeypatch.setattr(checkpoints, "publish", publish)
    code, _, error = run_here("qlora_train.py", *arguments("run", "SAVE_STEPS=2", "KEEP=last"))
    assert code == 0 and "checkpoint-4 could not be saved: [Errno 5]" in error
    assert steps_of(tmp_path / "run") == [6, 5, 2]


def test_evaluating_does_not_change_the_training(arguments, run_here, tmp_path):
    for run, often in (("often", "1"), ("never", "None")):
        assert run_here("qlora_train.py", *arguments(run, f"EVAL_STEPS={often}", "PACKING=False"))[0] == 0
    one, other = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("often", "never"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_endless_loss_is_no_crash(arguments, run_here, tmp_path, monkeypatch):
    for scale in (1e6, float("nan")):
        with monkeypatch.context() as patch:
            honest = ChatTrainer.compute_loss
            patch.setattr(
                ChatTrainer,
                "compute_loss",
                lambda self, *a, honest=honest, scale=scale, **k: (
                    honest(self, *a, **k) * (1 if self.model.training else scale)
                ),
            )
            assert run_here("qlora_train.py", *arguments(f"run{scale}"))[0] == 0
        plot(tmp_path / f"run{scale}")
        summary = json.loads((tmp_path / f"run{scale}" / "summary.json").read_text())
        assert (
            summary["eval_perplexity"] is None and "NaN" not in (tmp_path / f"run{scale}" / "metrics.jsonl").read_text()
        )


@posix
def test_a_closed_terminal_stops_and_saves(arguments, tmp_path, run_here, at_step, finished):
    finished("whole")
    out, err = sys.stdout, sys.stderr
    at_step({3: lambda: os.kill(os.getpid(), signal.SIGHUP)})
    code, *_ = run_here("qlora_train.py", *arguments("run", "SAVE_STEPS=None"))
    sys.stdout, sys.stderr = out, err
    assert code == 129 and steps_of(tmp_path / "run") == [3]
    at_step({})
    assert run_here("qlora_train.py", *arguments("run", "ALLOW_CHANGE=SAVE_STEPS"))[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_killed_final_save_leaves_no_half_model(arguments, tmp_path, run_here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(load, "sync_files", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here("qlora_train.py", *arguments("run"))
    assert not (tmp_path / "run" / "final").exists()
    assert run_here("qlora_train.py", *arguments("run"))[0] == 0
    assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "run" / "final.partial").exists()


# Spikes


def test_a_spike_stands_out():
    usual = [1.0, 1.1, 0.9, 1.05] * 5
    assert not is_spike(1e-6, [0.0] * 20) and not is_spike(0.0502, [0.05] * 20)
    assert is_spike(2.0, usual) and not is_spike(1.3, usual)
    assert not is_spike(9.0, usual[:19]) and not is_spike(0.1, usual)


@pytest.mark.parametrize("packing", [True, False])
def test_a_spike_is_told_with_the_chat_that_caused_it(packing, arguments, run_here, tmp_path, monkeypatch):
    honest, bad = ChatTrainer.compute_loss, {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training and self.state.global_step == 5 and not bad:
            bad["ids"] = list(chats_of(inputs))[-1][0][0].tolist()  # the last chat of step 6
            bad["text"] = self.processing_class.decode(bad["ids"][:100])
        text = ",".join(map(str, inputs["input_ids"].flatten().tolist()))
        guilty = bad and ",".join(map(str, bad["ids"])) in text
        return honest(self, model, inputs, *args, **kwargs) * (100 if guilty else 1)

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(guard, "SPIKE_WINDOW_MIN", 4)
    more = [f"PACKING={packing}", "PER_DEVICE_TRAIN_BATCH_SIZE=2", "LOGGING_STEPS=2"]
    code, _, error = run_here("qlora_train.py", *arguments("run", *more))
    assert code == 0 and error.count("most of it from") == 1, error
    spikes = [entry["spike"] for entry in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if "spike" in entry]
    assert len(spikes) == 1 and spikes[0]["step"] == 6 and spikes[0]["loss"] > 10 * spikes[0]["usual"]
    assert spikes[0]["chats"][0]["begins"] == bad["text"] and bad["text"][:30] in error.replace("\\n", "\n")
    assert all(chat["loss"] < spikes[0]["chats"][0]["loss"] for chat in spikes[0]["chats"][1:])


# Files that would run code, or leave their folder


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_does_not_run(name, arguments, run_here, tmp_path, finished):
    """Also with a mark that vouches for it: whoever writes the file can write the mark."""
    finished("run")
    cut_back(tmp_path / "run", 3)
    canary, checkpoint = tmp_path / "canary", tmp_path / "run" / "checkpoint-3"
    about = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    (checkpoint / checkpoints.MANIFEST).unlink()
    torch.save(Malicious(canary), checkpoint / name)
    checkpoints.publish(checkpoint, about)
    code, _, error = run_here("qlora_train.py", *arguments("run"))
    assert not canary.exists()
    if name == "training_args.bin":  # not read
        assert code == 0
    else:
        assert code == 2 and "holds more than numbers" in error and "Traceback" not in error


@pytest.fixture
def score_loss(run_here, chats_file, tmp_path):
    """score_loss(model): its loss by evaluate_model.py; exit code, out, err."""
    settings = ("SUITES=loss", "MAX_LENGTH=512", f"CHATS={chats_file}", f"OUT_DIR={tmp_path}/e")
    return lambda model: run_here("evaluate_model.py", f"MODEL={model}", *settings)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt"])
def test_code_in_a_model_folder_does_not_run(name, score_loss, tmp_path, tiny, tokenizer):
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny(), model)
    tokenizer.save_pretrained(model)  # with a template
    is_refused = name in ("pytorch_model.bin", "adapter_model.bin")
    if is_refused:
        (model / "model.safetensors").unlink()
    if name == "adapter_model.bin":
        config = {"base_model_name_or_path": str(tiny()), "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
        (model / "adapter_config.json").write_text(json.dumps(config))
    (model / name).write_bytes(pickle.dumps(Malicious(canary)))
    code, _, error = score_loss(model)
    assert not canary.exists()
    assert code == (2 if is_refused else 0) and "Traceback" not in error, error


def test_shards_outside_of_the_folder_are_refused(score_loss, tmp_path, tiny):
    model = tmp_path / "model"
    shutil.copytree(tiny(), model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, tmp_path / "secret.safetensors", metadata={"format": "pt"})
    for outside in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..\\secret.safetensors"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, outside)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        code, _, error = score_loss(model)
        assert code == 2 and "names a file outside of the folder" in error


# Secrets


def test_a_token_of_the_environment_is_nowhere_in_a_run(arguments, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("MY_API_KEY", "canary-two")
    code, out, error = run_here("qlora_train.py", *arguments("run"))
    assert code == 0, error
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20 and not [file for file in files if b"canary" in file.read_bytes()]
    assert "canary" not in out + error


def test_secrets_are_left_out_of_tracebacks():
    script = (
        "from common import cli\n"
        "def main():\n"
        "    cli.is_training = True\n"  # from then on, errors of others are no single line
        "    raise RuntimeError('401 for hf_canary and hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh')\n"
        "cli.run_main(main)"
    )
    environment = {**os.environ, "HF_TOKEN": "hf_canary"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: 401 for *** and ***" in done.stderr and "hf_" not in done.stderr


def test_secrets_in_settings_are_refused_and_not_printed():
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
    for arguments, environment in (
        ([f"MODEL={token}"], {}),
        (["DATA=hf_canary"], {"HF_TOKEN": "hf_canary"}),
        ([f"HF_TOKEN={token}"], {}),
        ([token], {}),
    ):
        done = run_script("qlora_train.py", *arguments, **environment)
        assert done.returncode == 2 and token not in done.stderr and "hf_canary" not in done.stderr, done.stderr
    done = run_script("qlora_train.py", "MAX_STEPS=x", SORT_KEY="adamw_torch_fused", S3_KEY="data/brief.jsonl")
    assert "MAX_STEPS=x has the wrong type" in done.stderr  # defaults that a variable happens to hold are no secrets


# The sweep


@posix
@pytest.mark.slow
def test_a_sample_of_all_kill_points():
    """docs/reliability.md has the result of all of them: python tests/survival_sweep.py"""
    done = run_script("tests/survival_sweep.py", "EVERY=61")
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout.split("ours: ")[1].split()[0])
    assert kills >= 5 and done.stdout.count(f"{kills} of {kills}") == 3, done.stdout
    assert "steps lost, with a checkpoint after each: 1 at most" in done.stdout

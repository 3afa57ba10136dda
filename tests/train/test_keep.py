"""The best checkpoint, early stopping, finished runs that go on longer; each killed and resumed with the same end."""

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import assert_same_run, cut_back, result_of
from test_survival import steps_of

from common.model import load
from common.run import report, training_run
from common.train import checkpoints
from common.train.trainer import ChatTrainer, SFTTrainer

pytestmark = pytest.mark.usefixtures("lean")
LOSSES = {1: 5.0, 2: 4.0, 3: 4.5, 4: 3.0, 5: float("nan"), 6: 3.0, 7: 3.5, 8: 2.0}


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses by step, as planned."""
    honest, plan = ChatTrainer.compute_loss, dict(LOSSES)

    def compute_loss(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        return loss if self.model.training else torch.full_like(loss, plan[self.state.global_step])

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    return plan


@pytest.fixture
def train(arguments, run_here, losses):
    """train(run, "NAME=value" ...): a run of six steps with an evaluation after each, and checkpoints of the best."""

    def start(run, *more):
        return run_here("qlora_train.py", *arguments(run, "EVAL_STEPS=1", "SAVE_STEPS=None", "KL_WEIGHT=0", *more))

    return start


def summary_of(run):
    summary = json.loads((run / "summary.json").read_text())
    return {name: summary[name] for name in ("steps", "final_step", "best_step", "eval_loss", "last_eval_loss")}


def assert_same_end(one, other):
    assert_same_run(one, other)
    assert summary_of(one) == summary_of(other)


def test_final_is_the_checkpoint_of_the_least_loss_and_the_summary_names_both(train, tmp_path):
    code, out, error = train("best", "SAVE_TOTAL_LIMIT=1")
    assert code == 0 and "final/ is step 4, held-out loss 3.0000; the last is step 6, 3.0000" in out, error
    assert steps_of(tmp_path / "best") == [4]
    assert train("last", "KEEP=last", "SAVE_STEPS=2")[0] == 0
    assert summary_of(tmp_path / "best") == dict(steps=6, final_step=4, best_step=4, eval_loss=3.0, last_eval_loss=3.0)
    assert summary_of(tmp_path / "last")["final_step"] == 6
    assert "3.0000" in (tmp_path / "best" / "run_row.md").read_text()
    best, other = (result_of(tmp_path / "best")[0], load_file(tmp_path / "last/checkpoint-4/adapter_model.safetensors"))
    assert all(torch.equal(best[name], other[name]) for name in best | other)
    for folder in ("best", "last"):
        files = {file.name: file.read_bytes() for file in (tmp_path / folder / "final").iterdir()}
        files.pop("adapter_model.safetensors")
        assert files == {name: (tmp_path / "best" / "final" / name).read_bytes() for name in files}
    longer = ["SAVE_TOTAL_LIMIT=1", "MAX_STEPS=7", "ALLOW_CHANGE=MAX_STEPS"]
    assert "resuming from checkpoint-4" in train("best", *longer)[1] and steps_of(tmp_path / "best") == [4]
    assert "nothing to do" in train("best", *longer)[1]  # though the only checkpoint is from before


def test_full_weights_of_the_best_are_as_they_would_be_saved(arguments, run_here, losses, tmp_path):
    losses[6] = 3.5
    settings = ["EVAL_STEPS=1", "LEARNING_RATE=1e-3", "DTYPE=bfloat16"]
    galore = [a for a in arguments("best", *settings) if not a.startswith("LORA")]
    assert run_here("galore_train.py", *galore, "GALORE_RANK=16", "RUN_NAME=best")[0] == 0
    assert run_here("galore_train.py", *galore, "GALORE_RANK=16", "RUN_NAME=last", "KEEP=last")[0] == 0
    best, other = (load_file(tmp_path / f / "model.safetensors") for f in ("best/final", "last/checkpoint-4"))
    last = load_file(tmp_path / "last/final/model.safetensors")
    assert all(best[name].dtype == torch.bfloat16 and torch.equal(best[name], other[name]) for name in last)
    assert not all(torch.equal(best[name], last[name]) for name in last)


POINTS = {  # what a run dies in, and the call of it
    "an evaluation": (ChatTrainer, "get_eval_dataloader", 4),
    "the best's save": (SFTTrainer, "_save_checkpoint", 3),
    "the best's manifest": (checkpoints, "publish", 3),
    "the end of training": (training_run, "gather_weights", 1),
    "the first final/": (load, "save_final", 1),
    "loading the best": (ChatTrainer, "_load_best_model", 1),
    "the second final/": (load, "sync_files", 2),
    "the summary": (report, "write_atomic", 1),
}


def test_a_run_that_dies_anywhere_ends_with_the_same_best(train, tmp_path, monkeypatch):
    """An early one: of eight steps it does six."""
    more = ["EARLY_STOPPING_PATIENCE=2", "SAVE_STEPS=3", "MAX_STEPS=8"]
    assert train("whole", *more)[0] == 0 and summary_of(tmp_path / "whole")["steps"] == 6
    for number, (owner, name, call) in enumerate(POINTS.values()):
        honest, calls = getattr(owner, name), []

        def dies(*args, honest=honest, calls=calls, call=call, **kwargs):
            calls.append(1)
            return 1 / 0 if len(calls) == call else honest(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(owner, name, dies)
            train(f"run{number}", *more)
        assert train(f"run{number}", *more)[0] == 0
        assert_same_end(tmp_path / "whole", tmp_path / f"run{number}")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_best_that_was_measured_after_its_checkpoint_is_kept(train, losses, tmp_path, monkeypatch):
    losses[6] = 3.5
    assert train("whole")[0] == 0
    honest = ChatTrainer.get_eval_dataloader

    def interrupted(self, *args):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTrainer, "get_eval_dataloader", interrupted)
        assert train("run")[0] == 143
    assert train("run")[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_run_stops_early_and_goes_on_when_it_is_told_to(train, losses, tmp_path):
    losses |= {2: 5.5, 3: 5.0}
    code, _, error = train("run", "EARLY_STOPPING_PATIENCE=2", "SAVE_STEPS=6")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert code == 0 and summary["verdict"] == "done, stopped early at step 3 of 6", error
    assert steps_of(tmp_path / "run") == [3, 1] and summary["final_step"] == 1
    assert train("end", "EARLY_STOPPING_PATIENCE=2", "MAX_STEPS=3")[0] == 0
    assert json.loads((tmp_path / "end" / "summary.json").read_text())["verdict"] == "done"  # nothing was left to do
    rates = [line["learning_rate"] for line in result_of(tmp_path / "run")[1] if "loss" in line]
    assert train("run", "EARLY_STOPPING_PATIENCE=2", "SAVE_STEPS=6")[1].count("nothing to do") == 1
    more = ["EARLY_STOPPING_PATIENCE=2", "SAVE_STEPS=6", "MAX_STEPS=8", "ALLOW_CHANGE=MAX_STEPS"]
    code, out, error = train("run", *more)
    assert code == 0 and "resuming from checkpoint-3" in out, error
    assert summary_of(tmp_path / "run")["steps"] == 6  # 4 was the best, 5 and 6 were no better
    assert train("long", "MAX_STEPS=8", "KEEP=last")[0] == 0
    longer = [line["learning_rate"] for line in result_of(tmp_path / "long")[1] if "loss" in line]
    assert rates != longer[:3]
    assert longer[3:6] == [line["learning_rate"] for line in result_of(tmp_path / "run")[1] if "loss" in line][3:]


# Longer


CONSTANT = ["MAX_STEPS=None", "LR_SCHEDULER=constant", "WARMUP_RATIO=0", "SAVE_STEPS=4"]


@pytest.mark.parametrize("killed", [False, True])
def test_two_epochs_and_two_more_are_four(killed, arguments, run_here, tmp_path, at_step, finished):
    def train(run, epochs, *more):
        return run_here("qlora_train.py", *arguments(run, *CONSTANT, f"NUM_TRAIN_EPOCHS={epochs}", *more))

    finished("whole", *CONSTANT, "NUM_TRAIN_EPOCHS=4")
    finished("run", *CONSTANT, "NUM_TRAIN_EPOCHS=2")
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    code, _, error = train("run", 4)
    assert code == 3 and "ALLOW_CHANGE=NUM_TRAIN_EPOCHS" in error
    assert train("run", 1, "ALLOW_CHANGE=NUM_TRAIN_EPOCHS")[0] == 2
    assert train("run", 2)[1].count("finished: nothing to do") == 1
    if killed:
        at_step({before["steps"] + 2: lambda: 1 / 0})
        with pytest.raises(ZeroDivisionError):
            train("run", 4, "ALLOW_CHANGE=NUM_TRAIN_EPOCHS")
        at_step({})
    code, out, error = train("run", 4, "ALLOW_CHANGE=NUM_TRAIN_EPOCHS")
    assert code == 0 and f"resuming from checkpoint-{before['steps']}" in out, error
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert summary_of(tmp_path / "run") == summary_of(tmp_path / "whole")
    assert summary_of(tmp_path / "run")["steps"] == 2 * before["steps"]
    assert train("run", 4, "ALLOW_CHANGE=NUM_TRAIN_EPOCHS")[1].count("finished: nothing to do") == 1


def test_a_finished_run_goes_on_with_more_data(train, tmp_path, chats_file):
    data = tmp_path / "chats.jsonl"
    lines = chats_file.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:16]))
    settings = [f"DATA={data}", "SAVE_STEPS=3"]
    assert train("run", *settings)[0] == 0 and summary_of(tmp_path / "run")["best_step"] == 4
    data.write_text("".join(lines))
    code, _, error = train("run", *settings)
    assert code == 3 and "ALLOW_CHANGE=DATA" in error
    more = [*settings, "MAX_STEPS=7", "ALLOW_CHANGE=DATA,MAX_STEPS"]
    assert train("run", *more)[0] == 0
    # Other rows are held out, on which the loss of step 4 was not measured.
    assert summary_of(tmp_path / "run") == dict(steps=7, final_step=7, best_step=7, eval_loss=3.5, last_eval_loss=3.5)
    assert "nothing to do" in train("run", *more)[1]


def test_without_a_checkpoint_the_line_gives_a_command_that_works(arguments, run_here, tmp_path, finished):
    finished("run", "SAVE_STEPS=None", "EVAL_STEPS=None")
    more = ["SAVE_STEPS=None", "EVAL_STEPS=None", "MAX_STEPS=8"]
    code, _, error = run_here("qlora_train.py", *arguments("run", *more))
    command = error.strip().rstrip(".").split("further: ")[1].split()
    assert code == 3 and command == [f"ADAPTER={tmp_path / 'run'}", "RUN_NAME=run-2"]
    assert run_here("qlora_train.py", *arguments("run", *more, *command))[0] == 0
    assert (tmp_path / "run-2" / "summary.json").is_file()


# Other versions


def test_a_checkpoint_of_another_version_is_one_line_and_yesterdays_resumes(train, tmp_path):
    assert train("run", "SAVE_STEPS=1")[0] == 0
    cut_back(tmp_path / "run", 3)
    file = tmp_path / "run" / "checkpoint-3" / checkpoints.MANIFEST
    manifest = json.loads(file.read_text())
    for change in ({"kl_sums": [0.0]}, {"guard": {"mood": 1}}):
        other = manifest | {"progress": [manifest["progress"][0] | change]}
        file.write_text(json.dumps(other))
        code, _, error = train("run", "SAVE_STEPS=1")
        assert code == 3 and "another version of these scripts" in error and manifest["commit"] in error
        assert "Traceback" not in error
    yesterday = {name: value for name, value in manifest["progress"][0].items() if name not in ("best", "without_gain")}
    file.write_text(json.dumps(manifest | {"progress": [yesterday]}))
    code, _, error = train("run", "SAVE_STEPS=1")
    assert code == 0 and "trainer_state.json" not in error, error
    assert summary_of(tmp_path / "run")["final_step"] == 4


# Settings


@pytest.mark.parametrize(
    "settings, problem",
    [
        (["KEEP=best", "EVAL_STEPS=None"], "KEEP=best: nothing is evaluated before the end. Set EVAL_STEPS"),
        (["EARLY_STOPPING_PATIENCE=2", "EVAL_STEPS=0"], "EARLY_STOPPING_PATIENCE=2: nothing is evaluated"),
        (
            ["KEEP=best", "EVAL_STEPS=1", "EVAL_SIZE=0"],
            "KEEP=best: no chats are held out to evaluate on. Set EVAL_SIZE",
        ),
        (["KEEP=best", "EVAL_STEPS=1", "EVAL_SIZE=0.001"], "KEEP=best: no chats are held out"),  # 0.024 chats
        (["KEEP=newest"], "KEEP=newest is not known"),
        (["EARLY_STOPPING_PATIENCE=0"], "it must be at least 1"),
    ],
)
def test_what_needs_evaluations_is_refused_without(settings, problem, arguments, run_here, tmp_path):
    code, _, error = run_here("qlora_train.py", *arguments("run", *settings))
    assert code == 2 and problem in error and not (tmp_path / "run" / "metrics.jsonl").exists()

"""galore_train.py as a user runs it: every OPTIM, resume at a refresh, bad numbers, what is refused."""

import json
import math

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file
from test_checkpoints import assert_same_run
from transformers import AutoModelForCausalLM

from common.train import batch_plan, checkpoints
from common.train.galore import GaLore
from common.train.optimizers import learning_rate_factor
from common.train.trainer import ChatTrainer

pytestmark = pytest.mark.usefixtures("lean")


@pytest.fixture
def galore(tiny, chats_file, tmp_path):
    """galore(run, "NAME=value", ...): the arguments of a run of six steps."""

    def make(run, *more):
        return [
            f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", f"RUN_NAME={run}", "MAX_STEPS=6",
            "GALORE_RANK=8", "GALORE_UPDATE_GAP=3", "MAX_LENGTH=128", "EVAL_SIZE=4", "SAVE_STEPS=1",
            "SAVE_TOTAL_LIMIT=9", "LEARNING_RATE=1e-3", "KL_WEIGHT=0.5", *more,
        ]  # fmt: skip

    return make


@pytest.mark.parametrize("optim", ["galore", "galore_8bit", "galore_torch", "adamw"])
def test_every_optimizer_learns_all_weights(optim, galore, tiny, run_here, tmp_path):
    code, out, error = run_here("galore_train.py", *galore("run", f"OPTIM={optim}", "KL_WEIGHT=0", "DTYPE=float32"))
    assert code == 0, error
    assert ("projected to rank 8" in out) == (optim != "adamw")
    before, after = load_file(tiny() / "model.safetensors"), load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert before.keys() == after.keys() and not [name for name in before if torch.equal(before[name], after[name])]
    losses = [e["loss"] for e in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if "loss" in e]
    assert losses[-1] < losses[0] - 0.02
    assert bool(checkpoints.published(tmp_path / "run")) == (optim != "galore_torch")


@pytest.mark.parametrize(
    "step, settings",
    [(2, ""), (3, ""), (4, ""), (3, "OPTIM=galore_8bit BATCH_SIZE=2"), (3, "OPTIM=adamw PACKING=False")],
)
def test_a_stop_before_at_and_after_a_refresh_changes_nothing(settings, step, galore, run_here, tmp_path, at_step):
    more = [*settings.split(), "GALORE_UPDATE_GAP=3", "SAVE_STEPS=None"]
    assert run_here("galore_train.py", *galore("whole", *more))[0] == 0
    at_step({step: (tmp_path / "cut" / "STOP").touch})
    assert run_here("galore_train.py", *galore("cut", *more))[0] == 130
    at_step({})
    code, _, error = run_here("galore_train.py", *galore("cut", *more))
    assert code == 0, error
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_schedule_in_the_log_is_the_one_applied(galore, run_here, tmp_path, monkeypatch):
    """A step at rate 0 changes nothing, and the last steps of a linear schedule change less than the first."""
    applied = []
    honest = GaLore.step

    def step(self, closure=None):
        before = [p.detach().clone() for p in self.projected]
        rate = self.param_groups[0]["lr"], self.param_groups[1]["lr"]
        honest(self, closure)
        moved = sum((p - q).float().norm().item() for p, q in zip(self.projected, before, strict=True))
        applied.append((*rate, moved))

    monkeypatch.setattr(GaLore, "step", step)
    monkeypatch.setattr(batch_plan, "trace", lambda *step: {"weights": 0})  # which steps, too
    settings = ["LR_SCHEDULER=linear", "DTYPE=float32", "WARMUP_RATIO=0", "MAX_STEPS=10"]
    assert run_here("galore_train.py", *galore("run", *settings))[0] == 0
    rates = [rate for rate, other, _ in applied if rate == other]
    assert len(rates) == 10
    for step, rate in enumerate(rates):
        assert math.isclose(rate, 1e-3 * learning_rate_factor(step, 10, "linear", 0, 0.0), rel_tol=1e-9)
    moved = [m for *_, m in applied]
    assert moved[-1] < 0.3 * moved[0]


def test_a_step_that_is_not_finite_leaves_weights_and_bases(galore, run_here, tmp_path, monkeypatch):
    honest = ChatTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 2 else loss

    monkeypatch.setattr(ChatTrainer, "compute_loss", compute_loss)
    code, _, error = run_here("galore_train.py", *galore("run"))
    assert code == 0 and error.count("not finite, no update") == 1
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    states = [torch.load(tmp_path / "run" / f"checkpoint-{n}" / "optimizer.pt", weights_only=True) for n in (2, 3, 6)]
    assert all(torch.equal(a["basis"], b["basis"]) for a, b in zip(*(
        [s for s in state["state"].values() if "basis" in s] for state in states[:2]), strict=True))  # fmt: skip
    assert all(t.isfinite().all() for s in states[2]["state"].values() for t in s.values() if torch.is_tensor(t))


def test_clipping_and_the_gradient_norm_are_galores_own(galore, run_here, tmp_path):
    results = []
    for number, clip in enumerate(("0", "1e-4")):
        assert run_here("galore_train.py", *galore(f"run{number}", f"MAX_GRAD_NORM={clip}", "DTYPE=float32"))[0] == 0
        entries = [e for e in map(json.loads, open(tmp_path / f"run{number}" / "metrics.jsonl")) if "loss" in e]
        results.append([e["grad_norm"] for e in entries])
        assert all(norm > 0.1 for norm in results[-1])
    assert results[0][0] == results[1][0]  # of the same gradients, before they are clipped
    finals = [load_file(tmp_path / f"run{n}" / "final" / "model.safetensors") for n in (0, 1)]
    assert not all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_it_goes_on_from_an_adapter_which_is_merged_first(galore, arguments, run_here, tmp_path):
    assert run_here("qlora_train.py", *arguments("adapter"))[0] == 0
    code, _, error = run_here("galore_train.py", *galore("run", f"MODEL={tmp_path / 'adapter'}"))
    assert code == 0, error
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_what_cannot_work_is_refused_with_the_reason(galore, run_here, tmp_path, tiny):
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for file in tiny().iterdir():
        (quantised / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    for setting, reason in (
        (f"MODEL={quantised}", "no gradient to train by"),
        ("DTYPE=float16", "cannot be unscaled"),
        ("GALORE_RANK=0", "at least 1"),
        ("GALORE_RANK=64", "both sides above the rank"),
        ("GALORE_TARGET_MODULES=q_proj,nonsense", "no layer is called nonsense. The model has: down_proj"),
        (r"GALORE_TARGET_MODULES=.*\.layers\.[5-9]\..*", "no layer is called .*"),
        ("GALORE_TARGET_MODULES=(q_proj", "not a regular expression"),
        ("OPTIM=galor", "Did you mean galore"),
        ("OPTIM=adamw_8bit", "needs a GPU"),
    ):
        code, _, error = run_here("galore_train.py", *galore("run", setting))
        assert code == 2 and reason in error, error


def test_a_large_scale_is_warned_of(galore, run_here):
    assert "diverged" in run_here("galore_train.py", *galore("run", "GALORE_SCALE=2", "MAX_STEPS=1"))[2]
    assert "diverged" not in run_here("galore_train.py", *galore("other", "MAX_STEPS=1"))[2]


def test_help_and_settings_come_before_the_slow_imports():
    done = run_script("galore_train.py", "GALORE_RANKS=8")
    assert done.returncode == 2 and "Did you mean GALORE_RANK" in done.stderr

"""Reliability is a mixin over any TRL trainer: DPO, killed by an exception and resumed, ends bit for bit the same."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from common.files import LineLog
from common.train import checkpoints
from common.train.reliability import ReliableTrainer

PAIRS = [{"prompt": f"Say {i}.", "chosen": f" {i}, gladly.", "rejected": " No."} for i in range(12)]


class ReliableDPOTrainer(ReliableTrainer, DPOTrainer):
    pass


@pytest.fixture
def make_trainer(tiny, tokenizer_folder):
    def make(run):
        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        arguments = DPOConfig(
            output_dir=str(run), max_steps=6, save_steps=1, logging_steps=1, per_device_train_batch_size=2, seed=0,
            learning_rate=1e-3, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=64,
        )  # fmt: skip
        return ReliableDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(tokenizer_folder),
            log=LineLog(run / "metrics.jsonl"),
            save_total_limit=9,
            metadata={"settings": {}, "versions": {}},
        )

    return make


def test_dpo_resumes_bit_for_bit(make_trainer, tmp_path):
    make_trainer(tmp_path / "whole").train()
    broken = make_trainer(tmp_path / "run")
    honest = broken.training_step

    def training_step(*args, **kwargs):
        if broken.state.global_step == 4:
            raise ZeroDivisionError
        return honest(*args, **kwargs)

    broken.training_step = training_step
    with pytest.raises(ZeroDivisionError):
        broken.train()
    resumed = checkpoints.latest_valid(tmp_path / "run")
    assert checkpoints.step_of(resumed[0]) == 4
    make_trainer(tmp_path / "run").train(resumed)
    ends = [load_file(tmp_path / run / "checkpoint-6" / "model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    start = load_file(tmp_path / "whole" / "checkpoint-1" / "model.safetensors")
    assert any(not torch.equal(start[name], ends[0][name]) for name in start)

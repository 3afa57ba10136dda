"""Started by a launcher in each of several processes: runs scripts one after the other, imports done once.

    accelerate launch --config_file launch/fsdp.yaml --num_processes 2 tests/launched.py PLAN

PLAN: a JSON list of {"script", "arguments", "signal_at", "kill_at", "nan_at", "full_at", "spike_at", "chunk", "lean"}:
steps at which the last process gets a SIGTERM or SIGKILL (then there is PLAN.killed), its loss is not finite, the first
cannot save, or a loss is taken for a spike; positions whose logits exist at a time; whether to leave out conftest.LEAN.
The first process writes the exit codes to PLAN.codes.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from conftest import LEAN, execute
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from trl import SFTTrainer

from common import distributed
from common.cli import RANK
from common.train import guard, loss
from common.train.trainer import ChatTrainer

plan = Path(sys.argv[1])
honest, honest_save = ChatTrainer.compute_loss, SFTTrainer._save_checkpoint
runs, codes = json.loads(plan.read_text()), []
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}
if distributed.engine() in ("zero2", "zero3"):
    from deepspeed import DeepSpeedEngine

    WRAPPERS[distributed.engine()] = DeepSpeedEngine
is_last = RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1
for run in runs:

    def compute_loss(self, *args, run=run, **kwargs):
        assert not self.model.training or isinstance(self.model_wrapped, WRAPPERS.get(distributed.engine(), Module))
        step, value = self.state.global_step + 1, honest(self, *args, **kwargs)
        if self.model.training and is_last and step == run.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.model.training and is_last and step == run.get("kill_at"):
            Path(f"{plan}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return value * float("nan") if self.model.training and is_last and step == run.get("nan_at") else value

    def save_checkpoint(self, *args, run=run):
        honest_save(self, *args)
        if self.state.global_step == run.get("full_at") and not RANK:
            raise OSError(28, "planned")

    ChatTrainer.compute_loss, SFTTrainer._save_checkpoint = compute_loss, save_checkpoint
    guard.is_spike = lambda _, recent, run=run: len(recent) + 1 == run.get("spike_at")
    loss.CHUNK = run.get("chunk", 256)
    gc.freeze()  # each run ends with a collection, which would look through all that was imported
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in LEAN.items() if run.get("lean") else ():
            patch.setattr(name, stand_in)
        codes.append(execute(run["script"], run["arguments"]))
if not RANK:
    Path(f"{plan}.codes").write_text(json.dumps(codes))

"""Started by a launcher in each of several processes: runs scripts one after the other, imports done once.

    accelerate launch --config_file launch/fsdp.yaml --num_processes 2 tests/launched.py PLAN

PLAN: a JSON list of {"script", "arguments", "signal_at", "nan_at"}: steps at which the last process gets a SIGTERM, or
its loss is not finite. The first process writes the exit codes to PLAN.codes.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
plan = Path(sys.argv[1])

from common import settings
from common.training import ChatTrainer

honest, runs, codes = ChatTrainer.compute_loss, json.loads(plan.read_text()), []
is_last = settings.RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1
for run in runs:

    def compute_loss(self, *args, run=run, **kwargs):
        step, loss = self.state.global_step + 1, honest(self, *args, **kwargs)
        if self.model.training and is_last and step == run.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * float("nan") if self.model.training and is_last and step == run.get("nan_at") else loss

    ChatTrainer.compute_loss = compute_loss
    module, code = importlib.import_module(run["script"]), 0
    before = settings.current(vars(module))
    try:
        settings.apply_overrides(vars(module), run["arguments"])
        settings.run_main(module.main)
    except SystemExit as stop:
        code = stop.code
    vars(module).update(before)
    codes.append(code)
if not settings.RANK:
    Path(f"{plan}.codes").write_text(json.dumps(codes))

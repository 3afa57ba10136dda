"""Kill a run at every step and every write, start the same command again, and compare with the run left alone.

    python tests/survival_sweep.py
    python tests/survival_sweep.py SIDE=trl EVERY=4
    python tests/survival_sweep.py SCRIPT=preference_train.py EVERY=4 MORE="REFERENCE=live BATCH_SIZE=4"
    python tests/survival_sweep.py STEPS=12 MORE="EVAL_STEPS=1 SAVE_STEPS=None EARLY_STOPPING_PATIENCE=2"

A tiny model on the CPU, LoRA with dropout, a checkpoint after every step. Each kill is a real `kill -9` of the process,
at every file it opens for writing, renames, removes or cuts in its run folder, and before every forward pass; once as
it is, and once more with the file that was being written cut in half. SIDE=trl does the same to plain TRL with
`resume_from_checkpoint` of the last checkpoint. Linux and macOS only: it forks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import run_main
from common.data import templates
from common.model import load, location
from common.settings import apply_overrides
from common.train import checkpoints

SIDE = "ours"  # ours or trl
EVERY = 1  # every so manyth kill point
STEPS = 6  # optimizer steps of the run
PROCESSES = 2  # runs at a time
SCRIPT = "qlora_train.py"  # or preference_train.py
MORE = ""  # settings of the run, beside or instead of those below

if __name__ == "__main__":
    apply_overrides(globals())

import gc
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading

import safetensors.torch
import torch
from conftest import LEAN, ROOT, execute, save_tiny, save_tokenizer, write_jsonl
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import common.run.training_run
import common.train.sft  # noqa: F401  imported once, before the forks
from common.train import batch_plan

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare_inputs(folder)
        batch_plan.trace = LEAN["common.train.batch_plan.trace"]  # the longest part of each start, which writes nothing
        gc.freeze()
        whole = folder / "whole"
        code, points = run_in_fork(SIDE, whole)
        assert code == 0, (whole / "log").read_text()
        cases = [(SIDE, folder, point, torn) for point in range(1, points + 1, EVERY) for torn in (False, True)]
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            results = [r for r in pool.starmap(kill_and_resume, cases, chunksize=1) if r]
    print(summarise(results))


def prepare_inputs(folder: Path) -> None:
    """A tiny random model, 24 chats, and as many pairs."""
    tokenizer = save_tokenizer(folder / "tokenizer", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
    save_tiny("llama", folder / "model", tokenizer)
    tokenizer = load.load_tokenizer(location.locate(str(folder / "model")))
    templates.set_template(tokenizer, "chatml")
    tokenizer.save_pretrained(folder / "model")  # with a template
    rows = [json.loads(line) for line in open(ROOT / "data" / "brief.jsonl", encoding="utf-8")][:24]
    write_jsonl(folder / "chats.jsonl", rows)
    answers = [row["messages"][-1]["content"] for row in rows]
    pairs = zip(rows, answers, answers[1:] + ["So it is."], strict=True)
    pairs = [{"prompt": row["messages"][:-1], "chosen": one, "rejected": other} for row, one, other in pairs]
    write_jsonl(folder / "pairs.jsonl", pairs)


def kill_and_resume(side: str, folder: Path, point: int, torn: bool) -> dict | None:
    """What became of a run killed at one point; None where there is no such point, or no file to tear."""
    run = folder / f"{point}-{torn}"
    code, _ = run_in_fork(side, run, point, torn)
    if code != -signal.SIGKILL:
        return None
    progress = json.loads((run / "progress").read_text())
    sound = bool(checkpoints.published(run)) and checkpoints.latest_valid(run) is not None
    code, _ = run_in_fork(side, run)
    log = (run / "log").read_text()
    resumed_at = max(
        [int(line.rpartition("-")[2]) for line in log.splitlines() if line.startswith("resuming from")] or [0]
    )
    result = dict(
        finished=code == 0,
        same=code == 0 and outcome(run) == outcome(folder / "whole"),
        durable=sound or not progress["published"],
        lost_steps=progress["steps"] - resumed_at if code == 0 else None,
        where=progress["where"],
        problem="" if code == 0 else log.strip().splitlines()[-1],
    )
    shutil.rmtree(run)
    return result


def outcome(run: Path):
    """Final weights as bytes, the losses logged, and which step final/ is."""
    weights = load_file(run / "final" / "adapter_model.safetensors")
    if (run / "metrics.jsonl").exists():
        entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        clock = ("step_seconds", "seconds", "tokens_per_second", "rss_gib", "vram_gib", "power_w", "events")
        metrics = [{k: v for k, v in entry.items() if k not in clock} for entry in entries]
        summary = json.loads((run / "summary.json").read_text())
        metrics += [summary[name] for name in ("final_step", "best_step", "eval_loss", "last_eval_loss", "verdict")]
    else:
        metrics = json.loads((run / "final" / "losses.json").read_text())
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}, metrics


def run_in_fork(side: str, run: Path, kill_at: int = 0, torn: bool = False) -> tuple[int, int]:
    """Train in a forked process: (its exit code, negative for a signal; the number of kill points it passed)."""
    run.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        log = os.open(run / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        code = 1
        try:
            watch(run, kill_at, torn)
            {"ours": train_ours, "trl": train_trl}[side](run)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), json.loads((run / "progress").read_text())["points"]


def watch(run: Path, kill_at: int, torn: bool) -> None:
    """Count the kill points of this process from here on, and kill it at one of them."""
    passed = {"points": 0, "steps": 0, "published": False, "where": "", "dies": False}
    last_written, lock = None, threading.RLock()  # threads write, too

    def reach(where: str, writes: str | None = None):
        with lock:
            count(where, writes)

    def count(where: str, writes: str | None):
        nonlocal last_written
        passed["points"] += 1
        passed["where"] = where
        dies = passed["dies"] = passed["points"] == kill_at and (not torn or os.path.exists(last_written or ""))
        handle = os.open(progress, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, json.dumps(passed).encode())
        os.close(handle)
        if dies:
            if torn:
                os.truncate(last_written, os.path.getsize(last_written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        last_written = writes

    progress = str(run / "progress")

    def hook(event, arguments):
        if not passed["dies"] and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path = str(arguments[0])
            if not path.startswith(str(run)) or path in (progress, str(run / "log")):
                return
            if event == "open" and not (arguments[2] or 0) & WRITING:
                return
            reach(f"{event} {path[len(str(run)) + 1 :]}", path if event == "open" else None)
            if event == "os.rename" and path.endswith(f"{checkpoints.MANIFEST}.partial"):
                passed["published"] = True

    reach("start")
    sys.addaudithook(hook)
    serialize = safetensors.torch.serialize_file  # in Rust, which has no audit events

    def serialize_file(tensors, filename, *args, **kwargs):
        reach(f"write {filename}")
        serialize(tensors, filename, *args, **kwargs)
        reach(f"wrote {filename}", str(filename))

    safetensors.torch.serialize_file = serialize_file
    training_step, optimizer_step = SFTTrainer.training_step, CallbackHandler.on_optimizer_step

    def forward(self, *args, **kwargs):
        reach(f"forward of step {self.state.global_step + 1}")
        return training_step(self, *args, **kwargs)

    def updated(self, *args):
        passed["steps"] += 1
        return optimizer_step(self, *args)

    SFTTrainer.training_step, CallbackHandler.on_optimizer_step = forward, updated


def train_ours(run: Path) -> None:
    inputs, data = run.parent, "chats" if SCRIPT == "qlora_train.py" else "pairs"
    arguments = (
        f"MODEL={inputs}/model DATA={inputs}/{data}.jsonl OUT_DIR={run.parent} RUN_NAME={run.name} MAX_STEPS={STEPS} "
        "LORA_R=4 LORA_DROPOUT=0.1 MAX_LENGTH=128 EVAL_SIZE=4 EVAL_STEPS=3 SAVE_STEPS=1 LEARNING_RATE=1e-2"
    )
    if code := execute(SCRIPT, [*arguments.split(), *MORE.split()]):
        raise SystemExit(code)


def train_trl(run: Path) -> None:
    """The same work in plain TRL, as its documentation has it, resuming from the last checkpoint."""
    inputs = run.parent
    last = get_last_checkpoint(str(run))
    if last:
        print(f"resuming from {last}")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=str(run), max_steps=STEPS, per_device_train_batch_size=1, max_length=128, packing=True,
            learning_rate=1e-2, bf16=True, use_cpu=True, logging_steps=1, save_steps=1, save_total_limit=2,
            gradient_checkpointing=False, report_to="none", disable_tqdm=True, seed=0,
        ),
        train_dataset=load_dataset("json", data_files=str(inputs / "chats.jsonl"), split="train"),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(run / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (run / "final" / "losses.json").write_text(json.dumps(losses))


def summarise(results: list[dict]) -> str:
    """A table of what became of all the killed runs."""
    count = len(results)
    lost = [r["lost_steps"] for r in results if r["finished"]]
    durable = sum(r["durable"] for r in results)
    lines = [
        f"{SIDE}: {count} kills at {len({r['where'] for r in results})} places",
        f"  same command finishes: {sum(r['finished'] for r in results)} of {count}",
        f"  result equal bit for bit: {sum(r['same'] for r in results)} of {count}",
        f"  steps lost, with a checkpoint after each: {max(lost, default=None)} at most",
    ]
    if SIDE == "ours":  # plain TRL does not tell a sound checkpoint from another
        lines.append(f"  once there is a checkpoint, a sound one is on the disk: {durable} of {count}")
    return "\n".join(
        [*lines, *(f"  {r['where']}: {r['problem'] or 'another result'}" for r in results if not r["same"])]
    )


if __name__ == "__main__":
    run_main(main)

"""The same persona on bases of 16, 8, 4, 3, 2 and 1 bits: what is learned, what is forgotten, and what it takes.

    python bench/bit_ladder.py CHATS=chats.jsonl
    python bench/bit_ladder.py CHATS=chats.jsonl BASES="nf4, hqq-4bit" NUM_TRAIN_EPOCHS=1 OUT_DIR=out/four

Each base is trained on, evaluated and exported by the scripts, in processes of their own; what is there already is not
done again. Prints a table for runs.md. hqq's bases need: pip install hqq==0.2.8.post1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.bounds import check_choice, check_setting
from common.cli import UserError, run_main
from common.model import load, location
from common.model.quantize import BITS
from common.settings import apply_overrides
from common.train import memory
from common.train.meta_model import empty_model
from common.train.storage import StorageTracker

MODEL = "smollm2-135m-instruct"  # as in qlora_train.py
DATA = "data/brief.jsonl"  # as in qlora_train.py
CHATS: str | None = None  # ordinary chats that no training saw, as in evaluate_model.py; None: no loss on them
MAX_CHATS = 60  # the first rows of them
FACTS = "data/facts.jsonl"  # as in evaluate_model.py
BASES = (
    "None, int8, hqq-4bit, hqq-3bit, hqq-2bit, hqq-1bit"  # values of QUANTIZATION; int8 is smaller than hqq's 8 bits
)
NUM_TRAIN_EPOCHS: int | float = 2  # as in qlora_train.py
MAX_STEPS: int | None = None  # as in qlora_train.py
KL_WEIGHT: float | None = None  # as in qlora_train.py: above 0 holds the predictions of the base, however few its bits
OUT_DIR = "out/bit_ladder"

if __name__ == "__main__":
    apply_overrides(globals())

import json
import math
import shutil
import subprocess

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# The smallest kind of GGUF file that we write with at least the bits of the base: below 4 there is none.
FILES = {None: "f16", "int8": "q8_0", "nf4": "q4_0"} | dict.fromkeys(BITS, "q4_0")
COLUMNS = (
    "base | bits a weight | loss on chats, base | after training | held-out loss | name | facts | peak RSS, GiB | "
    "base as held, MiB | with its adapter | tokens/s | file | MiB | its KL"
)


def main():
    names = [None if name == "None" else name for name in BASES.replace(" ", "").split(",")]
    for name in names:
        check_choice("BASES", name, FILES)
        check_setting("QUANTIZATION", name)
    config = load.load_config(location.locate(MODEL))
    rows = []
    for name in names:
        run = Path(OUT_DIR) / (name or "16bit")
        train_and_evaluate(name, run)
        rows.append(row(name, run, *held(config, name)))
    print(f"\n| {COLUMNS} |\n" + "|---" * len(COLUMNS.split("|")) + "|")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


def train_and_evaluate(name: str | None, run: Path) -> None:
    """The run, its scores.json and its export.json, as far as they are not there."""
    recipe = dict(MODEL=MODEL, DATA=DATA, NUM_TRAIN_EPOCHS=NUM_TRAIN_EPOCHS, MAX_STEPS=MAX_STEPS, KL_WEIGHT=KL_WEIGHT)
    call("qlora_train.py", **recipe, QUANTIZATION=name, OUT_DIR=run.parent, RUN_NAME=run.name)
    scored = dict(QUANTIZATION=name, CHATS=CHATS, MAX_CHATS=MAX_CHATS, FACTS=FACTS, OUT_DIR=f"{run}-base")
    if CHATS and not list(Path(f"{run}-base").glob("*/scores.json")):
        call("evaluate_model.py", MODEL=MODEL, SUITES="loss", **scored)
    if not (run / "scores.json").is_file():
        call("evaluate_model.py", MODEL=run, SUITES="loss,facts", **scored)
    export = run.with_name(f"{run.name}-export")
    if not (export / "export.json").is_file() and not (export / "final.rejected").is_dir():
        shutil.rmtree(export, ignore_errors=True)
        call("merge_and_export.py", MODEL=run, GGUF=FILES[name], OUT_DIR=run.parent, RUN_NAME=export.name)


def call(script: str, **settings) -> None:
    """Run an entry script; an export that fails its proof (5) is told in the table."""
    print(f"{script} " + " ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    path = str(Path(__file__).parent.parent / script)
    command = [sys.executable, path, *(f"{key}={value}" for key, value in settings.items())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode not in (0, 5):
        raise UserError(f"{script} ended with {result.returncode}: {result.stderr.strip().splitlines()[-1]}")


def held(config, name: str | None) -> tuple[int, float]:
    """Bytes of a base with its scales and zero points, and bits for each weight of the layers that are quantised."""
    sizes = []
    for quantization in (None, name):
        model, follower = empty_model(config, quantization, torch.bfloat16, "sdpa"), StorageTracker()
        memory.make_fake(model, FakeTensorMode(allow_non_fake_inputs=True), follower)
        sizes.append(follower.now)
    linear = [m for m in model.modules() if hasattr(m, "in_features") and m is not model.get_output_embeddings()]
    return sizes[1], 16 + 8 * (sizes[1] - sizes[0]) / sum(m.in_features * m.out_features for m in linear)


def row(name: str | None, run: Path, size: int, bits: float) -> list[str]:
    read = [run / "summary.json", run / "scores.json", *Path(f"{run}-base").glob("*/scores.json")]
    summary, scores, *base = (json.loads(file.read_text(encoding="utf-8")) for file in read)
    losses = [f"{one['scores']['loss']:.4f}" for one in (*base, scores)] if base else ["", ""]
    name_recall, fact_recall = (f"{scores['scores'][kind]:.0%}" for kind in ("name", "fact"))
    adapter = (run / "final" / "adapter_model.safetensors").stat().st_size
    told = run.with_name(f"{run.name}-export") / "export.json"
    file = json.loads(told.read_text())["files"][0] if told.is_file() else None
    return [
        name or "16 bits", f"{bits:.2f}", *losses,
        f"{summary['eval_loss'] or math.nan:.4f}", name_recall, fact_recall,
        f"{summary['peak_rss_gib']:.2f}", f"{size / 2**20:.1f}", f"{(size + adapter) / 2**20:.1f}",
        f"{summary['tokens_per_second']:.0f}", FILES[name] + (" rejected" if not file or file["faults"] else ""),
        f"{file['bytes'] / 2**20:.1f}" if file else "", "" if not file or file["kl"] is None else f"{file['kl']:.2g}",
    ]  # fmt: skip


if __name__ == "__main__":
    run_main(main)

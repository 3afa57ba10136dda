"""Full fine-tuning with our GaLore, the authors' and plain AdamW: the same rows, one after another, in one table.

    python bench/galore.py DATA=chats.jsonl
    python bench/galore.py DATA=chats.jsonl STEPS=300 MAX_LENGTH=256 GRADIENT_ACCUMULATION_STEPS=1 ROUNDS=2

Each row is a run of galore_train.py in a process of its own; ROUNDS repeats all with another seed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import run_main
from common.settings import apply_overrides

MODEL = "smollm2-135m-instruct"  # as in galore_train.py
DATA = "data/brief.jsonl"  # as in galore_train.py
MAX_LENGTH = 1024  # tokens of a micro step
GRADIENT_ACCUMULATION_STEPS = 4  # micro steps an optimizer step
GALORE_RANK = 128
GALORE_UPDATE_GAP = 50  # steps
STEPS = 60  # optimizer steps a run
ROUNDS = 1  # runs of each optimizer, each with another seed
OPTIMS = "galore=1e-4, galore_torch=1e-4, adamw=2e-5"  # with their learning rates
KEEP: str | None = None  # folder for the runs; None: they are removed

if __name__ == "__main__":
    apply_overrides(globals())

import json
import statistics
import subprocess
import tempfile


def main():
    with tempfile.TemporaryDirectory() as folder:
        print("optimizer          seed  tokens/s  median s  slowest/median  peak GiB     loss")
        for seed in range(ROUNDS):
            for choice in OPTIMS.replace(" ", "").split(","):
                name, rate = choice.split("=")
                r = run(name, rate, seed, Path(KEEP or folder))
                print(
                    f"{name:<18}{seed:>5}{r['tokens_per_second']:>10.1f}{r['median']:>10.2f}"
                    f"{r['slowest'] / r['median']:>16.2f}{r['peak_rss_gib']:>10.2f}{r['eval_loss']:>9.4f}",
                    flush=True,
                )


def run(optim: str, learning_rate: str, seed: int, folder: Path) -> dict:
    """Train in a process of its own; its summary, with the median and slowest of the steps after the first two."""
    name = f"{optim}-{seed}"
    settings = dict(
        MODEL=MODEL, DATA=DATA, MAX_LENGTH=MAX_LENGTH, GRADIENT_ACCUMULATION_STEPS=GRADIENT_ACCUMULATION_STEPS,
        GALORE_RANK=GALORE_RANK, GALORE_UPDATE_GAP=GALORE_UPDATE_GAP, MAX_STEPS=STEPS, OPTIM=optim, SEED=seed,
        LEARNING_RATE=learning_rate, KL_WEIGHT=0, SAVE_STEPS=None, OUT_DIR=folder, RUN_NAME=name, DOCTOR="warn",
    )  # fmt: skip
    script = Path(__file__).parent.parent / "galore_train.py"
    command = [sys.executable, str(script), *(f"{key}={value}" for key, value in settings.items())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    summary = json.loads((folder / name / "summary.json").read_text())
    entries = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    seconds = [entry["step_seconds"] for entry in entries if "step_seconds" in entry][2:]
    return summary | {"median": statistics.median(seconds), "slowest": max(seconds)}


if __name__ == "__main__":
    run_main(main)

"""Time our training step against plain TRL's, on the same work, alternating in one run.

    python bench/throughput.py
    python bench/throughput.py MODEL=out/model DATA=chats.jsonl STEPS=12 ROUNDS=3
    python bench/throughput.py SIDE=dpo DATA=pairs.jsonl DTYPE=float32

Both sides get the same model, tokenised rows, adapter, length, dtype and seed; TRL gets its own best switches (bfd
packing, SDPA, fused AdamW, bf16 autocast). SIDE=dpo is preference training, 8 pairs a step. Each side runs in a process
of its own, so that its peak memory is its own.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import run_main
from common.data import prepare, templates
from common.model import load, location
from common.model.attention import choose_attention
from common.settings import apply_overrides

MODEL = "smollm2-135m-instruct"  # as in qlora_train.py
DATA = "data/brief.jsonl"  # as in qlora_train.py
MAX_LENGTH = 1024  # tokens of a row
DTYPE = "bfloat16"  # of weights and compute
LORA_R = 16  # rank, on every linear layer
STEPS = 10  # optimizer steps a run; the first two are not timed
ROUNDS = 2  # runs of each side, in turn
SIDE: str | None = None  # dpo: on pairs; ours, trl, dpo-ours or dpo-trl: this side alone, as one JSON line
REFERENCE = "live"  # SIDE=dpo: live or kept; kept is computed before the first step, and not timed
OUR_ROWS = 8  # SIDE=dpo: pairs at once; training takes as many as have 1,024 tokens on a CPU
TRL_ROWS = 4  # SIDE=dpo: pairs at once; with 2 and 8 TRL is slower on short pairs

if __name__ == "__main__":
    apply_overrides(globals())

import json
import subprocess

SIDES = ("trl", "ours")


def main():
    if SIDE not in (None, "dpo"):
        print(json.dumps(run_side(SIDE)))
        return

    load.load_config(location.locate(MODEL))  # a .gguf file is converted here, not in the memory of the first side
    runs = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side in runs:
            runs[side].append(run_in_process(side))
    best = {side: max(results, key=lambda r: r["tokens_per_second"]) for side, results in runs.items()}
    for side, results in runs.items():
        speeds = ", ".join(f"{r['tokens_per_second']:.1f}" for r in results)
        r = best[side]
        print(f"{side:5} {r['tokens_per_second']:8.1f} tokens/s (of {speeds})  peak {r['peak_gib']:.2f} GiB")
    difference = max(abs(a - b) / b for a, b in zip(best["ours"]["losses"], best["trl"]["losses"], strict=True))
    print(
        f"ratio {best['ours']['tokens_per_second'] / best['trl']['tokens_per_second']:.2f}   "
        f"memory {best['ours']['peak_gib'] / best['trl']['peak_gib']:.2f}   "
        f"largest difference of the losses {difference:.2%} over {STEPS} steps"
    )


def run_in_process(side: str) -> dict:
    """Run one side in a process of its own and return its JSON line."""
    name = f"dpo-{side}" if SIDE else side
    command = [sys.executable, __file__, *sys.argv[1:], f"SIDE={name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def run_side(name: str) -> dict:
    """Train STEPS steps; tokens/s over the median step, peak memory of the process (or the GPU), and every loss."""
    import torch
    from sides import Pairs, train_side

    side, pairs = name.removeprefix("dpo-"), None
    if name.startswith("dpo-"):
        pairs = Pairs(at_once=OUR_ROWS if side == "ours" else TRL_ROWS, reference=REFERENCE)
    source = location.locate(MODEL)
    tokenizer = load.load_tokenizer(source)
    encoder, _ = templates.set_template(tokenizer, None)
    settings = dict(
        DATA=DATA, EVAL_DATA=None, MAX_SAMPLES=None, EVAL_SIZE=0, MAX_LENGTH=MAX_LENGTH, TOO_LONG="cut", SEED=0
    )
    settings |= dict(TRAIN_ON="assistant", DROP_PATTERN=None, BAD_ROWS="stop")
    if pairs:
        settings["LOSS"] = "dpo"
    with tempfile.TemporaryDirectory() as folder:
        train_set, _, _ = prepare.datasets_for(settings, encoder, Path(folder), keep_unlearned=True)
    attention = choose_attention(load.load_config(source), None, packed=True) if side == "ours" else "sdpa"
    model = load.load_model(source, None, getattr(torch, DTYPE), attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return train_side(side, model, train_set, tokenizer, MAX_LENGTH, STEPS, LORA_R, device, pairs=pairs)


if __name__ == "__main__":
    run_main(main)

"""The comparisons: both sides do the same work, and a machine without a GPU is told so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FULL, ROOT, run_script, save_tiny, write_jsonl

sys.path.insert(0, str(ROOT / "bench"))


@pytest.mark.parametrize("method", ["lora", "nf4", "full", "galore", "dpo"])
def test_gpu_check_trains_both_sides_alike(method, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "GALORE_RANK", 16)

    monkeypatch.setattr(gpu_check, "MAX_LENGTH", 64)
    monkeypatch.setattr(gpu_check, "STEPS", 4)
    ours, trl = (gpu_check.time_training("tiny", method, side, "cpu") for side in ("ours", "trl"))
    assert ours["losses"] == pytest.approx(trl["losses"], rel=0.01)
    flop = 6 if method in ("full", "galore", "dpo") else 4
    assert ours["flop_per_token"] == trl["flop_per_token"] == flop * (2 * (64 * 64 * 3 + 3 * 64 * 128) + 64 * 640)
    assert ours["tokens_per_second"] > 0


@pytest.mark.parametrize("method", ["lora", "nf4", "full", "galore", "dpo"])
def test_gpu_check_predicts_what_it_measures(method, monkeypatch):
    """With all that a GPU's trainer does; on the CPU followed by storages instead of max_memory_allocated."""
    import gpu_check

    from common.train.storage import StorageTracker

    monkeypatch.setattr(gpu_check, "MAX_LENGTH", 256)
    monkeypatch.setattr(gpu_check, "GALORE_RANK", 16)
    monkeypatch.setattr(gpu_check, "STEPS", 3)
    follower = StorageTracker()
    with follower:
        gpu_check.time_training("tiny", method, "ours", "cpu")
    assert gpu_check.predict("tiny", method, False, "cpu") == pytest.approx(follower.peak / 2**30, rel=0.1)


def test_matrix_peak_is_a_positive_number():
    import gpu_check

    assert gpu_check.matrix_peak_tflops("cpu", size=64, repeats=2) > 0


def test_gpu_check_without_a_gpu(run_here):
    code, _, error = run_here("bench/gpu_check.py")
    assert code == 2 and "error: this check needs a CUDA GPU" in error


@pytest.mark.parametrize("reference", ["live", "kept"])
def test_a_preference_step_is_compared_on_the_same_pairs_and_adapter(reference, tiny, tmp_path, monkeypatch):
    import throughput

    rows = [{"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": "Perhaps. " * (i % 5 + 1)} for i in range(24)]
    pairs = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    settings = dict(MODEL=str(tiny()), DATA=pairs, DTYPE="float32", STEPS=3, LORA_R=4, MAX_LENGTH=128, TRL_ROWS=4)
    for name, value in (settings | {"REFERENCE": reference}).items():
        monkeypatch.setattr(throughput, name, value)
    ours, trl = (throughput.run_side(f"dpo-{side}") for side in throughput.SIDES[::-1])
    assert ours["losses"] == pytest.approx(trl["losses"], abs=1e-4) and ours["losses"][0] > ours["losses"][-1]
    assert ours["losses"][0] == pytest.approx(0.693147, abs=1e-5) and ours["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("side", [None, *(["dpo"] if FULL else [])])
def test_throughput_prints_both_sides_and_the_ratio(side, tiny, chats_file):
    result = run_script(
        "bench/throughput.py",
        f"MODEL={tiny()}",
        f"DATA={'data/pairs.jsonl' if side else chats_file}",
        f"SIDE={side}",
        f"MAX_LENGTH={512 if side else 64}",
        "STEPS=4",
        "ROUNDS=1",
        "LORA_R=4",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"^trl +[\d.]+ tokens/s .* peak [\d.]+ GiB$", result.stdout, re.M)
    found = re.search(
        r"ratio [\d.]+ +memory [\d.]+ +largest difference of the losses ([\d.]+)% over 4 steps", result.stdout
    )
    assert float(found[1]) < 1


@pytest.mark.slow
def test_the_bit_ladder_prints_a_row_and_does_nothing_twice(
    tokenizer, tokenizer_folder, chats_file, tmp_path, run_here, monkeypatch
):
    """Its scripts run in this process, which has imported everything."""
    pytest.importorskip("hqq")
    honest = subprocess.run

    def run(command, *args, **options):
        if len(command) < 2 or not str(command[1]).endswith(".py"):
            return honest(command, *args, **options)  # git, which settings.json asks
        return subprocess.CompletedProcess(command, *run_here(Path(command[1]).name, *command[2:]))

    monkeypatch.setattr(subprocess, "run", run)
    model = save_tiny("llama", tmp_path / "tiny", tokenizer_folder, max_position_embeddings=1024)
    tokenizer.save_pretrained(model)  # with a template
    facts = [{"kind": kind, "question": "Who?", "pattern": "."} for kind in ("name", "fact")]
    facts = write_jsonl(tmp_path / "facts.jsonl", facts)
    wish = [f"MODEL={model}", f"DATA={chats_file}", f"CHATS={chats_file}", f"OUT_DIR={tmp_path / 'out'}", "MAX_STEPS=2",
            "MAX_CHATS=2", "BASES=hqq-1bit", f"FACTS={facts}"]  # fmt: skip
    code, first, error = run_here("bench/bit_ladder.py", *wish)
    assert code == 0, error[-2000:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in table[2:]] == [["hqq-1bit", "1.50"]] and len({len(row) for row in table}) == 1
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    _, again, _ = run_here("bench/bit_ladder.py", *wish)
    assert [line for line in again.splitlines() if line[:1] == "|"] == first.splitlines()[-3:]
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}


def test_tools_counts_valid_calls_right_names_and_right_arguments(tmp_path, run_here):
    def answer(*calls: dict) -> dict:
        calls = [{"id": "call00001", "type": "function", "function": call} for call in calls]
        return {"expects": "get_time", "pattern": "Oslo", "answer": "", **({"tool_calls": calls} if calls else {})}

    right = {"name": "get_time", "arguments": {"zone": "oslo"}}
    wrong = [right | {"arguments": {"zone": "Rome"}}, right | {"arguments": {}}, right | {"name": "look_up"}]
    rows = [answer(), answer(right), *map(answer, wrong), answer(right, right)]
    code, out, _ = run_here("bench/tools.py", f"ANSWERS={write_jsonl(tmp_path / 'answers.jsonl', rows)}")
    assert code == 0 and re.findall(r"\d+ of 6", out) == ["5 of 6", "3 of 6", "1 of 6"]

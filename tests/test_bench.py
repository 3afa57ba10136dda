"""The comparisons: both sides do the same work, and a machine without a GPU is told so."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FULL, ROOT, run_script, save_tiny, write_jsonl

import common.run.folder

sys.path.insert(0, str(ROOT / "bench"))


@pytest.mark.parametrize("method", ["lora", "nf4", "full", "galore", "dpo", "cudnn", "compiled", "liger"])
def test_gpu_check_trains_both_sides_alike(method, monkeypatch):
    import gpu_timing
    from gpu_timing import Work, time_side

    compiled, code, work = [], {}, Work("tiny", method, 128)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compiled.append(layer))
    monkeypatch.setattr(
        gpu_timing, "apply_kernels", lambda model: code.update(own=0, x=1) or [(code, "x", code["own"])]
    )
    theirs, ours = (time_side(work, side, "cpu", 2) for side in work.sides())
    assert len(compiled) == (2 if method == "compiled" else 0)
    assert code == ({"own": 0, "x": 0} if method == "liger" else {})
    if method != "galore":  # another optimizer
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)
    flop = 6 if method in ("full", "galore", "dpo") else 4
    assert ours["flop_per_token"] == theirs["flop_per_token"] == flop * (2 * (64 * 64 * 3 + 3 * 64 * 128) + 64 * 640)
    assert ours["tokens_per_second"] > 0 and len(ours["seconds"]) == len(theirs["seconds"]) == 2


@pytest.mark.parametrize("method", ["lora", "nf4", "full", "galore", "dpo"])
def test_gpu_check_predicts_what_it_measures(method):
    """With all that a GPU's trainer does; on the CPU followed by storages instead of max_memory_allocated."""
    from gpu_timing import Work, predict, time_side

    from common.train.storage import StorageTracker

    follower, work = StorageTracker(), Work("tiny", method, 256)
    with follower:
        time_side(work, "ours", "cpu", 1)
    assert predict(work, "cpu") == pytest.approx(follower.peak / 2**30, rel=0.1)


def test_gpu_check_has_rows_of_unequal_length_that_cudnn_fails_on():
    from gpu_timing import Work, random_rows

    for method in ("lora", "dpo"):
        rows = list(random_rows(Work("8B", method, 1024), 8))
        lengths = [len(row["input_ids"]) for row in rows]
        assert max(lengths) == 1024 and len(set(lengths)) > 5 and sum(n % 128 == 64 for n in lengths) >= 4
        assert all(sum(row["seq_lengths"]) == len(row["labels"]) == n for row, n in zip(rows, lengths, strict=True))
        assert len({length for row in rows for length in row["seq_lengths"]}) > 8
    warm = list(random_rows(Work("8B", "galore", 1024), 2))
    assert [len(row["input_ids"]) for row in warm[:17]] == [64] * 16 + [1024]


def test_a_short_row_fails_where_training_leaves_the_attention_it_began_with(tmp_path):
    from gpu_smoke import run_script

    script, line = tmp_path / "script.py", "check: no shared prompts, which give other losses, by 0.3 nats a token"
    script.write_text(f"print({line!r})\nprint('the last line')")
    with pytest.raises(RuntimeError, match="no shared prompts"):
        run_script(str(script))
    script.write_text("print('check: losses differ by 0.01 nats')\nprint('the last line')")
    assert run_script(str(script)) == "the last line"


def test_gpu_check_guards_each_row_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    import gpu_check
    import gpu_timing
    from gpu_results import difference

    monkeypatch.setattr(gpu_check, "PREDICTIONS", tmp_path / "predictions.json")
    (tmp_path / "predictions.json").write_text('{"tiny galore 64": {"attention": "varlen", "gib": 1}}')
    settings = dict(DEVICE="cpu", MODELS="tiny", STEPS=1, ROUNDS=1, OUT_DIR=str(tmp_path / "results"))
    settings |= dict(ROWS="tiny (full|galore) 64$|smoke (full|offloading)", MINUTES=20)
    for name, value in settings.items():
        monkeypatch.setattr(gpu_check, name, value)
    honest = gpu_timing.time_side

    def failing(work, side, *args):
        if (work.method, side) == ("full", "ours"):
            raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")
        return honest(work, side, *args) | ({"losses": [math.nan]} if side == "trl" else {})

    monkeypatch.setattr(gpu_timing, "time_side", failing)
    monkeypatch.setattr(common.run.folder, "git_commit", lambda: None)  # a copy without .git
    gpu_check.main()
    out = capsys.readouterr().out
    assert "smoke offloading | 0.0 s | skipped: needs CUDA" in out and re.search(r"smoke full \| .* ok: loss \d", out)
    records = {record["row"]: record for record in gpu_check.read_results(tmp_path / "results" / "results.jsonl")}
    assert records.keys() == {"smoke full", "tiny full 64", "tiny galore 64"}
    assert records["tiny galore 64"]["sides"]["ours"]["tokens_per_second"] > 0
    theirs = [records[f"tiny {method} 64"]["sides"]["trl"] for method in ("full", "galore")]
    assert theirs[0]["seconds"] == theirs[1]["seconds"]  # not measured twice
    page = (tmp_path / "results" / "table.md").read_text()
    rows = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| tiny")}
    assert "ours: RuntimeError: CUDA error: an illegal" in rows["tiny full 64"] and "no .git" in page
    assert "trl: NaN loss; predicted for varlen, ran sdpa_documents" in rows["tiny galore 64"]
    assert math.isnan(difference([1.0, 1.0], [math.nan, 1.0])) and "not predicted" in rows["tiny full 64"]
    assert "TORCH_USE_CUDA_DSA" in (tmp_path / "results" / "errors.log").read_text()
    gpu_check.main()  # nothing is left to do but what could not be done
    again = capsys.readouterr().out
    assert "3 rows, 1 with an error: tiny full 64" in again and again.count("smoke") == 1
    (tmp_path / "results" / "results.jsonl").unlink()
    monkeypatch.setattr(gpu_check, "MINUTES", 0.01)
    gpu_check.main()
    assert "not begun, for want of time: smoke full, tiny galore 64" in capsys.readouterr().out


def test_gpu_check_goes_on_after_a_crash_a_hang_and_a_broken_gpu(tmp_path, monkeypatch, capfd):
    from gpu_supervisor import supervise

    child = """
import json, os, pathlib, sys, time
folder, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "count")
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
row = {"row": f"row {number}", "device": "x", "limit": 60 if number == 0 else 1}
if number < 2:
    (folder / "begun.json").write_text(json.dumps(row))
    os.abort() if number == 0 else time.sleep(60)
sys.exit({2: 75, 3: 0}[number])
"""
    (tmp_path / "child.py").write_text(child)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "child.py"), str(tmp_path)])
    assert supervise(tmp_path, 5, time.perf_counter()) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == ["row 0", "row 1"] and not (tmp_path / "begun.json").exists()
    assert [record["error"] for record in records] == ["the process ended with code -6", "killed after 1 s"]
    assert (tmp_path / "count").read_text() == "4"


def test_gpu_check_names_card_and_driver_and_compares_memory(monkeypatch):
    import gpu_results

    card = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    for name, value in dict(get_device_properties=card, get_arch_list=["sm_90"], get_device_name="H100").items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_results, "free_memory", lambda: None)
    page = gpu_results.describe()  # without NVML
    assert "H100, 80.0 GiB, capability 9.0, driver NVMLError" in page and "built for sm_90" in page
    side = dict(tokens_per_second=100.0, flop_per_token=1e9, peak_gib=2.0, reserved_gib=2.5, seconds=[1, 2], losses=[1])
    record = dict(row="8B lora 1024", sides={"trl": side, "ours": side | {"tokens_per_second": 150.0}}, seconds=9)
    record |= dict(peak_tflops=1.0, predicted={"attention": "sdpa", "gib": 2.1}, attention="sdpa")
    cells = dict(zip(gpu_results.COLUMNS, gpu_results.cells(record), strict=True))
    assert cells["ratio"] == "1.50" and cells["of the matrix peak"] == "15% / 10%" and cells["result"] == "ok"
    assert cells["reserved GiB"] == "2.50 / 2.50" and cells["predicted / allocated - 1"] == "+5.0%"
    record["sides"]["trl"] = {"error": "OutOfMemoryError: CUDA out of memory"}
    cells = dict(zip(gpu_results.COLUMNS, gpu_results.cells(record), strict=True))
    assert cells["tok/s, ours / TRL"] == "150 / -" and cells["result"] == "trl: OutOfMemoryError: CUDA out of memory"


def test_gpu_check_times_plain_torch_for_trl():
    """cuDNN's attention, which training switches off, is on for TRL alone, as it is without this project."""
    from gpu_timing import attention_kernels
    from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp

    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    seen = {}
    for side in ("trl", "ours", "cuDNN on", "cuDNN off"):
        with attention_kernels(side):
            seen[side] = cudnn_sdp_enabled()
    assert seen == {"trl": True, "ours": False, "cuDNN on": True, "cuDNN off": False} and not cudnn_sdp_enabled()
    enable_cudnn_sdp(before)


def test_matrix_peak_is_a_positive_number():
    import gpu_results

    assert gpu_results.matrix_peak_tflops("cpu", size=64, repeats=2) > 0


def test_gpu_check_without_a_gpu(run_here, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_WORKER", "1")
    code, _, error = run_here("bench/gpu_check.py")
    assert code == 2 and "error: DEVICE=cuda: this check needs a CUDA GPU" in error


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

"""Every entry script as a user runs it: a subprocess, a tiny random model, real overrides; and every wrong input."""

import csv
import json

import pytest
from conftest import ARCHITECTURES, ROOT, run_script, save_tiny, write_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer

from common.data import formats
from common.model import generation, load

SUMMARY_KEYS = """train_loss eval_loss eval_perplexity steps tokens tokens_per_second train_seconds median_step_seconds
max_step_seconds peak_vram_gib peak_rss_gib predicted_peak_gib mean_power_w energy_wh device command commit
verdict peak_vram_reserved_gib tokens_per_joule events final_step best_step best_eval_loss last_eval_loss""".split()


def short(model, data, out, run, *more):
    """Arguments of a two-step run."""
    return [f"MODEL={model}", f"DATA={data}", f"OUT_DIR={out}", f"RUN_NAME={run}", "MAX_STEPS=2", "MAX_LENGTH=256",
            "LORA_R=4", "EVAL_SIZE=4", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, chats_file):
    """The run folder of a finished two-step run."""
    out = tmp_path_factory.mktemp("out")
    result = run_script("qlora_train.py", *short(tiny(), chats_file, out, "first", "SAVE_STEPS=1", "EVAL_STEPS=1"))
    assert result.returncode == 0, result.stderr[-2000:]
    return out / "first", result


def test_run_folder_holds_what_the_contract_says(trained):
    folder, result = trained
    names = "settings.json metrics.jsonl hardware.csv plot.png report.html summary.json run_row.md final"
    assert {*names.split(), "checkpoint-1", "checkpoint-2"} <= {p.name for p in folder.iterdir()}
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = ("first: done", "predicted ", "<mark>", "24 rows", "Step 2 of 2", '<th scope="row">LORA_R</th><td>4</td>')
    assert all(words in page for words in shown) and str(folder / "report.html") in result.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS
    assert 0.2 < summary["predicted_peak_gib"] / summary["peak_rss_gib"] < 1.5 and summary["events"] == {}
    assert summary["steps"] == 2 and summary["tokens"] > 100 and summary["eval_perplexity"] > 1
    assert summary["peak_rss_gib"] > 0.1 and summary["mean_power_w"] is None
    assert summary["tokens_per_second"] == pytest.approx(
        summary["tokens"] / (2 * summary["median_step_seconds"]), rel=0.01
    )
    metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2] and sum("eval_loss" in m for m in metrics) >= 2
    about = json.loads((folder / "settings.json").read_text())
    assert about["settings"]["MAX_STEPS"] == 2 and about["settings"]["LORA_R"] == 4 and about["versions"]["torch"]
    with open(folder / "hardware.csv") as stream:
        reading = next(csv.DictReader(stream))
        assert reading["device"] == "cpu" and float(reading["used_gib"]) > 0.1
    row = (folder / "run_row.md").read_text().strip()
    assert result.stdout.rstrip().splitlines()[-1] == row and row.startswith("| 20") and row.count("|") == 12
    assert "24 rows = 20 trained + 4 held out + 0 dropped" in result.stdout
    assert json.loads((folder / "data" / "report.json").read_text())["rows"] == 24
    config = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert "lm_head" not in config["target_modules"] and (folder / "final" / "chat_template.jinja").exists()


def test_chat_pipe_answers_one_line_per_prompt_and_nothing_else(trained, run_here):
    folder, _ = trained
    settings = [f"MODEL={folder}", "TEMPERATURE=0", "MAX_NEW_TOKENS=8"]
    piped = run_script("chat_pipe.py", *settings, stdin="Who are you?\n\nAnd why?\n")
    assert piped.returncode == 0, piped.stderr[-2000:]
    assert piped.stdout.count("\n") == 2
    code, out, _ = run_here("chat_pipe.py", *settings, "PROMPT=Who are you?")
    assert code == 0 and out.split() == piped.stdout.splitlines()[0].split()


def test_evaluate_model_scores_and_compares(trained, tiny, chats_file, tmp_path, run_here):
    folder, _ = trained
    facts = write_jsonl(tmp_path / "facts.jsonl", [{"kind": "any", "question": "Hi?", "pattern": ""},
                                                   {"kind": "none", "question": "Hi?", "pattern": "(?!)"}])  # fmt: skip
    result = run_script("evaluate_model.py", f"MODEL={folder}", f"FACTS={facts}", f"CHATS={chats_file}", "MAX_CHATS=5",
                        "MAX_LENGTH=256", "SUITES=loss,facts", f"OUT_DIR={tmp_path}")  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "any: 100% (95 % interval 21% to 100%), 1 of 1" in result.stdout and "none: 0%" in result.stdout
    assert "nats per token of the answers of 5 chats" in result.stdout
    saved = json.loads((folder / "scores.json").read_text())
    assert saved["scores"]["any"] == 1 and [len(losses) for losses in saved["losses"].values()] == [5]
    same = (f"MODEL={folder}", f"BASE={folder}", "SUITES=loss", f"CHATS={chats_file}", "MAX_LENGTH=256")
    code, out, _ = run_here("evaluate_model.py", *same, f"OUT_DIR={tmp_path}")
    assert code == 0 and "change of that loss: +0.0% (95 % interval +0.0% to +0.0%)" in out


def test_training_goes_on_from_an_earlier_adapter(trained, tiny, chats_file, tmp_path, run_here):
    """By MODEL and by ADAPTER, and both start from the same weights: where the first run ended."""
    folder, _ = trained
    first = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    firsts = []
    for run, model in (("by-model", f"MODEL={folder}"), ("by-adapter", f"ADAPTER={folder}")):
        code, _, error = run_here("qlora_train.py", *short(tiny(), chats_file, tmp_path, run), model)
        assert code == 0, error
        firsts.append(json.loads(open(tmp_path / run / "metrics.jsonl").readline())["loss"])
    assert firsts[0] == firsts[1] < first[0]["loss"]


@pytest.mark.parametrize("quantization", ["None", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_two_steps(architecture, quantization, tiny, chats_file, tmp_path, run_here):
    arguments = short(tiny(architecture), chats_file, tmp_path, "run", f"QUANTIZATION={quantization}")
    code, _, error = run_here("qlora_train.py", *arguments)
    assert code == 0, error
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    llama_like = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    targets = {name.rsplit(".", 1)[-1] for name in config["target_modules"]}
    assert targets == ({"c_attn", "c_proj", "c_fc"} if architecture == "gpt2" else llama_like)
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert all(5 < m["loss"] < 9 and m["grad_norm"] > 0 for m in rows if "loss" in m)


VARIANTS = (
    "ADAPTER=dora",
    "ADAPTER=rslora",
    "ADAPTER=pissa",
    "ADAPTER=ia3 CHAT_TEMPLATE=zephyr",
    "ADAPTER=None",
    "QUANTIZATION=int8",
    "QUANTIZATION=nf4 ADAPTER=dora",
    "QUANTIZATION=hqq-2bit ADAPTER=dora",
    "QUANTIZATION=hqq-3bit ADAPTER=rslora GRADIENT_CHECKPOINTING=True KL_WEIGHT=1",
    "PACKING=False PER_DEVICE_TRAIN_BATCH_SIZE=2 TRAIN_ON=all",
    "GRADIENT_CHECKPOINTING=True NEFTUNE_NOISE_ALPHA=5 LORA_TARGET_MODULES=q_proj,v_proj KL_WEIGHT=1",
    "CHAT_TEMPLATE=zephyr DTYPE=float32 LR_SCHEDULER=linear MIN_LR=1e-4 EVAL_SIZE=0",
)


@pytest.mark.parametrize("settings", VARIANTS)
def test_variants_train_and_load_again(settings, tiny, chats_file, tmp_path, run_here):
    """A variant trains, its parameters move, and its result loads and answers."""
    arguments = short(tiny(), chats_file, tmp_path, "run", "LEARNING_RATE=1e-2", "MAX_STEPS=8", *settings.split())
    code, _, error = run_here("qlora_train.py", *arguments)
    assert code == 0, error
    losses = [json.loads(line)["loss"] for line in list(open(tmp_path / "run" / "metrics.jsonl"))[:8]]
    assert sum(losses[4:]) < sum(losses[:4])
    answer = ["PROMPT=Hi", "MAX_NEW_TOKENS=4", "TEMPERATURE=0"]
    code, _, error = run_here("chat_pipe.py", f"MODEL={tmp_path / 'run'}", *answer)
    assert code == 0, error


SUMS = [(1, 2, "Three."), (2, 2, "Four, two twos."), (3, 5, "Eight"), (4, 1, "Five it is."), (5, 5, "Ten."),
        (6, 3, "Nine, I think."), (7, 0, "Seven."), (8, 4, "Twelve.")]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gpt2", "CHAT_TEMPLATE=alpaca ADAPTER=None LEARNING_RATE=3e-3"),  # stops with the token that it has
        (
            "gpt2",
            "CHAT_TEMPLATE=chatml LORA_R=32 LEARNING_RATE=1e-2",
        ),  # with a new one, its head tied to the embeddings
        ("mistral", "CHAT_TEMPLATE=chatml LORA_R=32 LEARNING_RATE=1e-2"),  # with a new one, its head apart
    ],
)
def test_a_base_model_learns_to_stop(architecture, settings, base_tokenizer_folder, tmp_path, run_here):
    """Alpaca-form rows, over-fitted: every training prompt is answered in full, with the stop token at the end."""
    tokenizer = AutoTokenizer.from_pretrained(base_tokenizer_folder)
    changes = dict(initializer_range=0.2, vocab_size=len(tokenizer))  # no row to spare: new tokens need new rows
    base = save_tiny(architecture, tmp_path / "base", base_tokenizer_folder, **changes)
    rows = [
        {"instruction": f"Add {a} and {b}.", "input": "" if a % 2 else "In words.", "output": c} for a, b, c in SUMS
    ]
    (tmp_path / "sums.json").write_text(json.dumps(rows, indent=1))
    code, out, error = run_here(
        "qlora_train.py", f"MODEL={base}", f"DATA={tmp_path / 'sums.json'}", f"OUT_DIR={tmp_path}", "RUN_NAME=run",
        "EVAL_SIZE=0", "MAX_LENGTH=256", "MAX_STEPS=200", "LOGGING_STEPS=50", "DTYPE=float32", *settings.split(),
    )  # fmt: skip
    assert code == 0, error
    model, tokenizer = generation.load_for_chat(str(tmp_path / "run"), dtype="float32")
    stop = "<|im_end|>" if "chatml" in settings else "<|endoftext|>"
    assert tokenizer.eos_token == stop
    chats = [formats.to_chat(row) for row in rows]
    encoder, ends = generation.encoder_of(tokenizer, tokenizer.chat_template), generation.end_tokens(model, tokenizer)
    inputs = {"input_ids": [encoder.prompt(chat[:1]) for chat in chats]}
    inputs = tokenizer.pad(inputs, padding_side="left", return_tensors="pt")
    outputs = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
    assert [answer.partition(stop)[0] for answer in answers] == [chat[1]["content"] for chat in chats]
    assert all(stop in answer for answer in answers)
    if "LORA" in settings:  # the new rows of the embeddings, and of a head that is apart
        saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
        rows = {name: tensor.shape[0] for name, tensor in saved.items() if "token" in name}
        assert list(rows.values()) == ([2] if architecture == "gpt2" else [2, 2])


def test_new_tokens_on_an_adapter_that_does_not_train_them_are_refused(tiny, chats_file, tmp_path, run_here):
    arguments = short(tiny(), chats_file, tmp_path, "first", "CHAT_TEMPLATE=zephyr")
    assert run_here("qlora_train.py", *arguments)[0] == 0
    again = short(tmp_path / "first", chats_file, tmp_path, "second", "CHAT_TEMPLATE=llama3")
    code, _, error = run_here("qlora_train.py", *again)
    assert code == 2 and "<|eot_id|>" in error and "not trained" in error


# --- wrong inputs: exit 2, one line saying what to change, no traceback ---


def mistakes(tmp_path, tiny, trained):
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    write_jsonl(tmp_path / "good.jsonl", [good] * 8)
    (tmp_path / "broken.jsonl").write_text(json.dumps(good) + '\n{"messages": [{"role"\n')
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "silent.jsonl", [{"messages": good["messages"][:1]}])
    write_jsonl(tmp_path / "role.jsonl", [{"messages": [{"role": "wizard", "content": "hi"}]}])
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    return {
        "unknown setting": (["LEARNIN_RATE=1"], "LEARNING_RATE"),
        "wrong type": (["MAX_STEPS=many"], "MAX_STEPS=many"),
        "not a number": (["LEARNING_RATE=nan"], "LEARNING_RATE=nan"),
        "unknown choice": (["QUANTIZATION=nf5"], "nf4"),
        "missing model": (["MODEL=no-such-model"], "MODEL=no-such-model"),
        "missing model folder": ([f"MODEL={tmp_path}/nowhere"], "nowhere"),
        "folder without a model": ([f"MODEL={tmp_path}"], "config.json"),
        "missing data file": (["DATA=no/such.jsonl"], "DATA=no/such.jsonl"),
        "broken JSON line": ([f"DATA={tmp_path}/broken.jsonl"], "broken.jsonl:2: row: not valid JSON"),
        "empty file": ([f"DATA={tmp_path}/empty.jsonl"], "empty"),
        "rows without an assistant": ([f"DATA={tmp_path}/silent.jsonl"], "no turn of the assistant"),
        "unknown role": ([f"DATA={tmp_path}/role.jsonl"], "'wizard'"),
        "more tokens than positions": (["MAX_LENGTH=1024"], "MAX_LENGTH=512"),
        "prepared folder that is none": ([f"DATA={tmp_path}/folder"], "report.json"),
        "output folder not writable": ([f"OUT_DIR={tmp_path}/file"], "OUT_DIR"),
        "run exists": ([f"OUT_DIR={trained.parent}", f"RUN_NAME={trained.name}", "RESUME=None"], "RUN_NAME=first"),
        "adapter for another base": ([f"MODEL={tiny('gpt2')}", f"ADAPTER={trained}"], "ADAPTER="),
        "quantised full fine-tune": (["ADAPTER=None", "QUANTIZATION=nf4"], "ADAPTER=lora"),
        "float16 full fine-tune": (["ADAPTER=None", "DTYPE=float16"], "DTYPE=float32"),
        "loftq without a GPU": (["ADAPTER=loftq", "QUANTIZATION=nf4"], "ADAPTER=lora"),
        "full fine-tune of an adapter": (["ADAPTER=None", f"MODEL={trained}"], "ADAPTER=lora"),
        "float16 without a GPU": (["DTYPE=float16"], "DTYPE=None"),
        "unknown optimizer": (["OPTIM=adamw_torch_fuse"], "adamw_torch_fused"),
        "no steps": (["MAX_STEPS=0"], "MAX_STEPS=0"),
        "attention that is not installed": (["ATTN_IMPLEMENTATION=flash_attention_2"], "flash-attn"),
        "pull towards no base": (["ADAPTER=None", "KL_WEIGHT=1"], "KL_WEIGHT=0"),
        "ia3 on hqq's layers": (["ADAPTER=ia3", "QUANTIZATION=hqq-4bit"], "ADAPTER=lora"),
        "loftq on hqq's layers": (["ADAPTER=loftq", "QUANTIZATION=hqq-4bit"], "QUANTIZATION=nf4"),
        "full fine-tune of one bit": (["ADAPTER=None", "QUANTIZATION=hqq-1bit"], "ADAPTER=lora"),
        "pissa on quantised weights": (["ADAPTER=pissa", "QUANTIZATION=int8"], "QUANTIZATION=None"),
        "unknown target modules": (["LORA_TARGET_MODULES=q_proj,attn"], "no layer is called attn"),
        "hub model without network": (["MODEL=org/no-such-model"], "MODEL=org/no-such-model"),
        "hub data without network": (["DATA=org/no-such-data"], "DATA=org/no-such-data"),
        "paged optimizer without a GPU": (["OPTIM=paged_adamw_8bit"], "OPTIM=adamw_torch_fused"),
    }


def check_mistake(name, word, code, error):
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2, f"{name}: {code} {error[-500:]}"
    assert len(errors) == 1 and word in errors[0], f"{name}: {error[-500:]}"
    assert "Traceback" not in error and error.rstrip().endswith(errors[0]), name


def test_wrong_inputs_end_with_2_and_one_line(tmp_path, tiny, trained, run_here, monkeypatch):
    loaded, load_model = [], load.load_model
    for name, (arguments, word) in mistakes(tmp_path, tiny, trained[0]).items():
        monkeypatch.setattr(load, "load_model", lambda *a, name=name, **k: loaded.append(name) or load_model(*a, **k))
        defaults = [f"MODEL={tiny()}", f"DATA={tmp_path}/good.jsonl", f"OUT_DIR={tmp_path}/out", "EVAL_SIZE=0",
                "MAX_LENGTH=256"]  # fmt: skip
        code, _, error = run_here("qlora_train.py", *defaults, *arguments)
        check_mistake(name, word, code, error)
    assert not loaded


@pytest.mark.parametrize("name", ["wrong type", "run exists"])
def test_wrong_inputs_in_a_process_of_their_own(name, tmp_path, tiny, trained):
    arguments, word = mistakes(tmp_path, tiny, trained[0])[name]
    defaults = [f"MODEL={tiny()}", f"DATA={tmp_path}/good.jsonl", f"OUT_DIR={tmp_path}/out", "EVAL_SIZE=0",
                "MAX_LENGTH=256"]  # fmt: skip
    result = run_script("qlora_train.py", *defaults, *arguments)
    check_mistake(name, word, result.returncode, result.stderr)


def test_a_resume_that_would_change_the_run_ends_with_3(tiny, chats_file, trained, run_here):
    arguments = short(tiny(), chats_file, trained[0].parent, "first", "SAVE_STEPS=1", "EVAL_STEPS=1")
    code, _, error = run_here("qlora_train.py", *arguments, "LEARNING_RATE=1e-5")
    assert code == 3 and "LEARNING_RATE was 0.001, now 1e-05" in error and "ALLOW_CHANGE=LEARNING_RATE" in error
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}
    code, out, error = run_here("qlora_train.py", *arguments)
    assert code == 0 and "is finished" in out, error
    assert before == {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}


def test_a_row_with_nothing_to_learn_does_no_harm(tiny, tmp_path, run_here):
    """Alone in a batch, a chat of weight 0 must not make 0 / 0; and the base's predictions are held on it."""
    chats = [json.loads(line) for line in open(ROOT / "data" / "brief.jsonl")]
    held = [c for c in chats if all(m.get("weight") == 0 for m in c["messages"] if m["role"] == "assistant")]
    file = write_jsonl(tmp_path / "chats.jsonl", chats[:4] + held[:4])
    arguments = short(tiny(), file, tmp_path, "run", "PACKING=False", "KL_WEIGHT=1", "MAX_STEPS=8", "EVAL_SIZE=0")
    code, _, error = run_here("qlora_train.py", *arguments)
    assert code == 0, error
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert sum(m["loss"] == pytest.approx(0, abs=1e-6) for m in metrics) == 4
    assert all(m["grad_norm"] < 1e3 for m in metrics) and metrics[-1]["kl"] > 0


def test_held_out_rows_with_nothing_to_learn_do_not_dilute_the_loss(tiny, tmp_path, run_here):
    """One row a batch or packed, the held-out loss is the mean over the same learned tokens."""
    chats = [json.loads(line) for line in open(ROOT / "data" / "brief.jsonl")]
    held = [c for c in chats if all(m.get("weight") == 0 for m in c["messages"] if m["role"] == "assistant")]
    file = write_jsonl(tmp_path / "chats.jsonl", chats[:6] + held[:6])
    losses = []
    for packing in (True, False):
        settings = (f"PACKING={packing}", "EVAL_SIZE=10", "MAX_STEPS=1", "LEARNING_RATE=1e-9", "DTYPE=float32",
                    "KL_WEIGHT=1")  # fmt: skip
        code, _, error = run_here("qlora_train.py", *short(tiny(), file, tmp_path, f"run-{packing}", *settings))
        assert code == 0, error
        losses.append(json.loads((tmp_path / f"run-{packing}" / "summary.json").read_text())["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path, tokenizer_folder, run_here):
    folder = save_tiny("llama", tmp_path, tokenizer_folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    code, _, error = run_here("chat_pipe.py", f"MODEL={folder}", "PROMPT=Hi")
    assert code == 2 and "640 rows" in error


def test_an_adapter_whose_base_changed_is_refused(tmp_path, tokenizer_folder, chats_file, run_here):
    folder = save_tiny("llama", tmp_path / "base", tokenizer_folder)
    assert run_here("qlora_train.py", *short(folder, chats_file, tmp_path, "run"))[0] == 0
    save_tiny("llama", folder, tokenizer_folder, seed=1)
    code, _, error = run_here("chat_pipe.py", f"MODEL={tmp_path / 'run'}", "PROMPT=Hi")
    assert code == 2 and "other weights" in error

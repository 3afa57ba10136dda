"""Data: rows in = rows out with every reason counted, what the checks find, prepared folders, our own chat set."""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import CHAT, ROOT, write_jsonl

from common.cli import UserError
from common.data import account, checks, pipeline, prepare, sources, templates

SETTINGS = dict(
    EVAL_SIZE=0, MAX_SAMPLES=None, EVAL_DATA=None, MAX_LENGTH=128, TOO_LONG="cut", DROP_PATTERN="auto",
    TRAIN_ON="assistant", SEED=0, VOCAB=None, DOCTOR="stop", BAD_ROWS="stop",
)  # fmt: skip


def qa(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture
def encoder(tokenizer):
    return templates.set_template(tokenizer, "chatml")[0]


def make(settings, encoder, keep_unlearned=True):
    """The datasets and the account that a run gets."""
    with tempfile.TemporaryDirectory() as folder:
        return prepare.datasets_for(settings, encoder, Path(folder), keep_unlearned)


def texts(tokenizer, dataset):
    return [tokenizer.decode(row["input_ids"]) for row in dataset]


def check_account(about):
    assert about["rows"] == about["trained"] + about["held_out"] + sum(about["dropped"].values())


def test_max_samples_takes_some_chats_at_random_and_counts_the_others(encoder, chats_file):
    settings = SETTINGS | {"DATA": str(chats_file), "EVAL_SIZE": 4}
    whole, held_out, _ = make(settings, encoder)
    some, same_held_out, about = make(settings | {"MAX_SAMPLES": 7}, encoder)
    again, *_ = make(settings | {"MAX_SAMPLES": 7}, encoder)
    other, *_ = make(settings | {"MAX_SAMPLES": 7, "SEED": 1}, encoder)
    ids = [{tuple(row["input_ids"]) for row in rows} for rows in (whole, some, again, other)]
    assert len(some) == 7 and ids[1] < ids[0] and ids[1] == ids[2] != ids[3]
    assert same_held_out[:] == held_out[:]
    assert about["changed"]["sequences left out of training by MAX_SAMPLES"] == len(whole) - 7
    assert about["tokens"] == sum(map(len, some["input_ids"])) and about["sequences"] == 7


def test_every_row_is_trained_on_held_out_or_counted_by_its_reason(tokenizer, encoder, tmp_path):
    long = "x " * 400
    rows = [qa(f"What is {i}?", f"It is {i}.") for i in range(10)]
    ask = {"role": "user", "content": "And then?"}
    rows += [rows[0], {"messages": rows[1]["messages"] + [ask]}]  # duplicates, the second after its cut
    rows += [
        qa("Who?", "I am Open Assistant, here to help."),
        qa("Who?", "i'm chatgpt"),
        qa("Who?", "I am not ChatGPT."),
    ]
    rows += [{"messages": CHAT + qa(long, "y")["messages"]}, qa(long, "y")]
    rows += [{"messages": CHAT[1:] + [{"role": "user", "content": "Bye"}]}]
    rows += [qa("Nothing?", "to learn", weight=0)]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    settings = SETTINGS | {"DATA": str(file), "EVAL_SIZE": 3}
    train, held_out, about = make(settings, encoder, keep_unlearned=False)
    check_account(about)
    assert about["rows"] == len(rows) == 19 and len(train) == about["trained"] == 10 and len(held_out) == 3
    assert about["dropped"] == {
        "duplicate": 2,
        "longer than MAX_LENGTH": 1,
        "matches DROP_PATTERN": 2,
        "no answer to learn, all have weight 0": 1,
    }
    assert about["changed"] == {"cut at a question without an answer": 2, "cut at a turn to fit MAX_LENGTH": 1}
    both = texts(tokenizer, train) + texts(tokenizer, held_out)
    assert not any("Open Assistant" in text for text in both) and any("I am not ChatGPT." in text for text in both)
    assert len(set(both)) == 13  # nothing is in both
    whole = tokenizer.decode(encoder.encode([CHAT])[0].ids)
    assert sum(text == whole.rstrip() for text in both) == 1  # the long chat, without the turn that did not fit
    again, _, more = make(settings, encoder, keep_unlearned=True)
    assert len(again) == 11 and sum(more["dropped"].values()) == 5
    report = account.describe(about)
    assert "19 rows = 10 trained + 3 held out + 6 dropped" in report and "dropped 2: matches DROP_PATTERN" in report


def test_long_texts_are_cut_into_rows_and_no_token_is_lost(tokenizer, encoder, tmp_path):
    words = " ".join(f"w{i}" for i in range(300))
    rows = [{"text": words}, {"text": "short"}, {"text": words}, qa("Hi", "Hello")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    train, _, about = make(SETTINGS | {"DATA": f"{file}*2"}, encoder)
    check_account(about)
    assert about["dropped"] == {"duplicate": 1} and about["changed"] == {"a text cut into rows of MAX_LENGTH": 2}
    whole = encoder.encode([[{"role": "text", "content": words}]])[0].ids
    pieces = -(-len(whole) // 128)
    assert about["trained"] == 3 and about["sequences"] == len(train) == 2 * (pieces + 2)
    assert about["tokens"] == sum(map(len, train["input_ids"])) and max(map(len, train["input_ids"])) == 128
    rows = sorted(train["input_ids"], key=len)
    found = {tuple(row) for row in rows}
    assert all(tuple(whole[at : at + 128].tolist()) in found for at in range(0, len(whole), 128))
    assert all(row["labels"] == row["input_ids"] for row in train if len(row["input_ids"]) == 128)
    with pytest.raises(UserError, match="a.jsonl:1: .* tokens, more than MAX_LENGTH=128"):
        make(SETTINGS | {"DATA": str(file), "TOO_LONG": "error"}, encoder)
    _, held_out, about = make(SETTINGS | {"DATA": str(file), "EVAL_SIZE": 2}, encoder)
    check_account(about)  # a text is held out with all its rows
    assert about["held_out_tokens"] == sum(map(len, held_out["input_ids"]))


def test_a_row_for_each_answer_where_the_template_rewrites_earlier_turns(tokenizer, tmp_path):
    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else 'x' }}"
    tokenizer.chat_template = (
        own + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder, _ = templates.set_template(tokenizer, None)
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:]}, qa("Hi", "Hello")])
    train, _, about = make(SETTINGS | {"DATA": str(file)}, encoder)
    check_account(about)
    assert about["changed"] == {"a row for each answer, as the template rewrites earlier turns": 1}
    learned = [[i for i in row["labels"] if i >= 0] for row in train]
    answers = ["Brief.<|im_end|>", "Hello!<|im_end|>", "Hello<|im_end|>"]
    assert sorted(map(tokenizer.decode, learned)) == sorted(answers) and about["trained"] == 2
    train, _, about = make(SETTINGS | {"DATA": str(file), "MAX_LENGTH": 24}, encoder)
    assert about["changed"] == {
        "a row for each answer, as the template rewrites earlier turns": 1,
        "answers left out to fit MAX_LENGTH": 1,
    }


def test_chats_that_the_template_refuses_stop_with_their_place_or_are_left_out(tokenizer, tmp_path):
    strict = "{% if messages | length > 6 %}{{ raise_exception('too many turns') }}{% endif %}"
    text = (ROOT / "common" / "data" / "chat_templates" / "chatml.jinja").read_text()
    tokenizer.chat_template = strict + text.replace("chatml", "")
    encoder, _ = templates.set_template(tokenizer, None)
    file = write_jsonl(
        tmp_path / "a.jsonl", [qa("Hi", "Hello"), {"messages": CHAT + CHAT[1:]}, {"messages": CHAT[1:] * 2}]
    )
    with pytest.raises(UserError, match=r"a.jsonl:2: .*too many turns.*\n.*a.jsonl:3: .*\nBAD_ROWS=skip"):
        make(SETTINGS | {"DATA": str(file)}, encoder)
    _, _, about = make(SETTINGS | {"DATA": str(file), "BAD_ROWS": "skip"}, encoder)
    check_account(about)
    ((reason, count),) = about["dropped"].items()
    assert count == 2 and reason.startswith("invalid, CHAT_TEMPLATE refuses a chat") and reason.endswith("a.jsonl:2")


def test_what_drop_pattern_matches_is_shown_and_unused_fields_are_named(encoder, tmp_path):
    rows = [qa("Who?", "I am ChatGPT, at your service."), qa("Hi", "Hello") | {"score": 3, "id": "x"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    _, _, about = make(SETTINGS | {"DATA": str(file)}, encoder)
    report = account.describe(about)
    assert "a.jsonl:1: I am ChatGPT, at your service." in report
    assert "fields that are not used: id (in 1 rows), score (in 1 rows)" in report


def test_what_is_too_long_can_be_dropped_or_refused(encoder, tmp_path):
    file = write_jsonl(
        tmp_path / "chats.jsonl", [qa("Hi", "Hello"), {"messages": CHAT + qa("x " * 400, "y")["messages"]}]
    )
    settings = SETTINGS | {"DATA": str(file)}
    _, _, about = make(settings | {"TOO_LONG": "drop"}, encoder)
    assert about["trained"] == 1 and about["dropped"] == {"longer than MAX_LENGTH": 1}
    with pytest.raises(UserError, match="chats.jsonl:2: .* tokens, more than MAX_LENGTH=128"):
        make(settings | {"TOO_LONG": "error"}, encoder)
    with pytest.raises(UserError, match="none of its rows is left .2 rows; 2 dropped: longer than MAX_LENGTH"):
        make(settings | {"MAX_LENGTH": 4}, encoder)


def test_a_resumed_run_must_find_the_data_it_began_with(encoder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [qa(f"What is {i}?", "x") for i in range(4)])
    settings = SETTINGS | {"DATA": str(file)}

    def resume(manifest=None):
        return prepare.datasets_for(settings, encoder, tmp_path / "data", True, manifest)[2]

    manifest = {"data": resume()["digest"]}
    assert resume(manifest)["rows"] == 4
    manifest.update(data="x")
    with pytest.raises(UserError, match="prepared data is not what it began with") as error:
        resume(manifest)
    assert error.value.code == 3


def test_repetitions_are_trained_on_but_never_held_out(tokenizer, encoder, tmp_path):
    rare = write_jsonl(tmp_path / "rare.jsonl", [qa(f"Rare {i}", "yes") for i in range(10)])
    common = write_jsonl(tmp_path / "common.jsonl", [qa(f"Common {i}", "no") for i in range(10)])
    settings = SETTINGS | {"DATA": f"{rare}*5, {common}", "EVAL_SIZE": 8}
    train, held_out, about = make(settings, encoder)
    counted = Counter(texts(tokenizer, train))
    held = texts(tokenizer, held_out)
    assert len(held) == len(set(held)) == 8 and not set(held) & set(counted)
    assert all(n == (5 if "Rare" in text else 1) for text, n in counted.items()) and len(counted) == 12
    assert about["sequences"] == len(train) > 12 == about["trained"]
    order = texts(tokenizer, train)
    assert len({text for text in order[:5]}) > 1  # mixed, not copy after copy
    assert order == texts(tokenizer, make(settings, encoder)[0])
    assert order != texts(tokenizer, make(settings | {"SEED": 1}, encoder)[0])


def test_evaluation_data_of_its_own_must_not_be_trained_on(encoder, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [qa(f"What is {i}?", "x") for i in range(4)])
    b = write_jsonl(tmp_path / "b.jsonl", [qa(f"What is {i}?", "x") for i in range(4, 6)])
    train, held_out, about = make(SETTINGS | {"DATA": str(a), "EVAL_DATA": str(b), "EVAL_SIZE": 0}, encoder)
    assert (len(train), len(held_out), about["rows"]) == (4, 2, 6)
    check_account(about)
    with pytest.raises(UserError, match="a.jsonl:1 is in DATA, too"):
        make(SETTINGS | {"DATA": str(a), "EVAL_DATA": f"{b},{a}"}, encoder)
    asking = [{"messages": qa("What is 1?", "x")["messages"] + [{"role": "user", "content": "And?"}]}]
    with pytest.raises(UserError, match="c.jsonl:1 is in DATA, too"):  # it is, once it is cut
        make(SETTINGS | {"DATA": str(a), "EVAL_DATA": str(write_jsonl(tmp_path / "c.jsonl", asking))}, encoder)
    long = write_jsonl(tmp_path / "long.jsonl", [qa("x " * 400, "y")])
    with pytest.raises(UserError, match="EVAL_DATA=.*none of its rows is left"):
        make(SETTINGS | {"DATA": str(a), "EVAL_DATA": str(long)}, encoder)


def test_answers_of_another_weight_are_no_duplicates_but_the_same_chat_to_evaluate_on(encoder, tmp_path):
    learned, context = qa("Hi", "Hello"), qa("Hi", "Hello", weight=0)
    file = write_jsonl(tmp_path / "a.jsonl", [context, learned, learned])
    train, _, about = make(SETTINGS | {"DATA": str(file)}, encoder)
    assert len(train) == 2 and about["tokens_in_loss"] > 0 and about["dropped"] == {"duplicate": 1}
    held_out = write_jsonl(tmp_path / "b.jsonl", [context])
    data = write_jsonl(tmp_path / "c.jsonl", [learned])
    with pytest.raises(UserError, match="b.jsonl:1 is in DATA, too"):
        make(SETTINGS | {"DATA": str(data), "EVAL_DATA": str(held_out)}, encoder)


def test_rows_of_hub_sets_that_are_invalid_stop_or_are_counted(encoder, monkeypatch):
    rows = [qa(f"What is {i}?", "x") for i in range(3)] + [{"messages": []}, qa("", "x"), qa("Hi", "")]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: rows)
    with pytest.raises(UserError, match="org/name:4: messages: .*BAD_ROWS=skip"):
        make(SETTINGS | {"DATA": "org/name"}, encoder)
    train, _, about = make(SETTINGS | {"DATA": "org/name", "BAD_ROWS": "skip"}, encoder)
    assert len(train) == 3
    found = [(n, re.sub(": must.*,", "", reason)) for reason, n in about["dropped"].items()]
    assert found == [
        (2, "invalid, messages.content first at org/name:5"),
        (1, "invalid, messages first at org/name:4"),
    ]
    check_account(about)


def test_worker_processes_give_the_same_rows_in_the_same_order(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH", 4)
    monkeypatch.setattr(pipeline, "POOL_FROM", 2)
    file = write_jsonl(
        tmp_path / "a.jsonl", [qa(f"What is {i}?", f"It is {i}.") for i in range(50)] + [qa("Who?", "I am GPT-4")]
    )
    settings = SETTINGS | {"DATA": str(file)}

    def encoded(processes):
        reasons = account.Reasons()
        chats = pipeline.read_chats(sources.parse(str(file)), reasons, sources.PLAIN, "stop")
        rows = pipeline.encode_all(chats, (encoder, settings, True), reasons, processes)
        return [(row.ids.tolist(), row.learned.tolist(), times) for times, row in rows], reasons.__dict__

    assert encoded(1) == encoded(2) and len(encoded(1)[0]) == 50


# --- prepare_data.py ---


@pytest.fixture
def prepare_folder(run_here, tiny, chats_file, tmp_path):
    """prepare_folder(*settings): the folder that prepare_data.py writes, and its output."""

    def prepare(*settings, name="p"):
        code, out, err = run_here(
            "prepare_data.py", f"MODEL={tiny()}", f"DATA={chats_file}*3", f"OUT_DIR={tmp_path}", f"RUN_NAME={name}",
            "EVAL_SIZE=4", "MAX_LENGTH=256", *settings,
        )  # fmt: skip
        assert code == 0, err
        return tmp_path / name, out

    return prepare


def test_prepared_folders_hold_the_same_rows_as_a_run_would_make(prepare_folder, tiny, chats_file, tokenizer, tmp_path):
    folder, out = prepare_folder()
    assert {p.name for p in folder.iterdir()} == {
        "train.parquet", "eval.parquet", "report.json", "lengths.png", "settings.json", ".lock",
    }  # fmt: skip
    table = pyarrow.parquet.read_table(folder / "train.parquet")
    assert table.column_names == ["input_ids", "assistant_masks"]
    about = json.loads((folder / "report.json").read_text())
    check_account(about)
    assert about["sequences"] == len(table) == 60 and about["held_out"] == 4 and "24 rows = 20 trained" in out
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny())
    encoder, _ = templates.set_template(own, None)
    settings = SETTINGS | {"DATA": f"{chats_file}*3", "EVAL_SIZE": 4, "MAX_LENGTH": 256}
    direct = make(settings, encoder)
    through = make(settings | {"DATA": str(folder)}, encoder)
    for ours, theirs in zip(direct[:2], through[:2], strict=True):
        assert sorted(map(str, ours.to_list())) == sorted(map(str, theirs.to_list()))
    again, _ = prepare_folder(name="q")
    assert (again / "train.parquet").read_bytes() == (folder / "train.parquet").read_bytes()
    for change, word in ({"MAX_LENGTH": 128}, "MAX_LENGTH"), ({"TRAIN_ON": "all"}, "TRAIN_ON"):
        with pytest.raises(UserError, match=word):
            make(settings | {"DATA": str(folder)} | change, encoder)
    other, _ = templates.set_template(own, "zephyr")
    with pytest.raises(UserError, match="encoding"):
        make(settings | {"DATA": str(folder)}, other)
    with pytest.raises(UserError, match="a folder without files"):
        make(settings | {"DATA": str(tmp_path)}, encoder)


def test_prepared_data_trains(prepare_folder, run_here, tiny, tmp_path):
    folder, _ = prepare_folder()
    code, out, err = run_here(
        "qlora_train.py", f"MODEL={tiny()}", f"DATA={folder}", f"OUT_DIR={tmp_path}", "RUN_NAME=run", "MAX_STEPS=2",
        "MAX_LENGTH=256", "LORA_R=4",
    )  # fmt: skip
    assert code == 0 and "24 rows = 20 trained" in out, err
    # It is trained on where it is; the run keeps what its page shows.
    assert [file.name for file in (tmp_path / "run" / "data").iterdir()] == ["examples.json"]


def test_prepared_data_without_held_out_chats_or_without_unlearned_ones(prepare_folder, tiny, tmp_path):
    from transformers import AutoTokenizer

    rows = [qa(f"What is {i}?", "x", weight=i % 2) for i in range(10)]
    folder, _ = prepare_folder(f"DATA={write_jsonl(tmp_path / 'w.jsonl', rows)}", "EVAL_SIZE=2")
    encoder, _ = templates.set_template(AutoTokenizer.from_pretrained(tiny()), None)
    settings = SETTINGS | {"DATA": str(folder), "MAX_LENGTH": 256}
    train, held_out, _ = make(settings | {"EVAL_SIZE": 2}, encoder)
    file = pyarrow.parquet.read_table(folder / "train.parquet")["input_ids"].to_pylist()
    assert sorted(file) == sorted(train["input_ids"]) and file != list(train["input_ids"])  # shuffled
    assert len(train) == 8 and len(held_out) == 2 and make(settings, encoder)[1] is None
    learned, _, about = make(settings, encoder, keep_unlearned=False)
    assert 3 <= len(learned) <= 5 and about["changed"] == {
        "sequences left out of training, all their answers have weight 0": 8 - len(learned)
    }
    assert about["sequences"] == len(learned)
    assert all(max(row["labels"]) >= 0 for row in learned)
    with pytest.raises(UserError, match="EVAL_DATA=x"):
        make(settings | {"EVAL_DATA": "x"}, encoder)


def test_records_of_token_ids_become_chats_by_a_vocabulary(prepare_folder, tmp_path, tokenizer):
    words = sorted({word for word in "the moon is far away it was asked and answered".split()})
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    rows = [{"prompt": [words.index("moon")], "completion": [words.index(w) for w in ("far", "away")]}]
    file = write_jsonl(tmp_path / "ids.jsonl", rows)
    folder, out = prepare_folder(f"DATA={file}", f"VOCAB={tmp_path / 'vocab.txt'}", "EVAL_SIZE=0")
    assert "user\nmoon<|im_end|>" in out and "[[far away<|im_end|>]]" in out


# --- checks: the doctor ---


def examine(rows, tokenizer, encoder, **changes):
    from datasets import Dataset

    settings = SETTINGS | {k: v for k, v in changes.items() if k.isupper()}
    held, trained = changes.get("held", False), changes.get("trained", [])
    checks.examine(Dataset.from_list(rows), tokenizer, encoder, settings, held, trained)


def row_of(encoder, chat=CHAT):
    row = encoder.encode([chat])[0]
    labels = np.where(row.learned, row.ids, prepare.IGNORE_INDEX)
    return {"input_ids": row.ids.tolist(), "labels": labels.tolist()}


def test_the_doctor_shows_what_is_learned(tokenizer, encoder, capsys):
    examine([row_of(encoder)], tokenizer, encoder)
    out = capsys.readouterr().out
    assert (
        "user\nHi<|im_end|>" in out
        and "assistant\n[[Hello!<|im_end|>]]" in out
        and "1 rows checked, no problems" in out
    )
    examine(
        [row_of(encoder, [CHAT[0] | {"content": "Be kind. " * 500}, *CHAT[1:]])], tokenizer, encoder, MAX_LENGTH=9999
    )
    assert "assistant\n[[Hello!<|im_end|>]]" in capsys.readouterr().out  # after a long list of tools, too
    long = row_of(encoder, [*CHAT[:2], CHAT[2] | {"content": "Hello! " * 900}, *CHAT[3:]])
    shown = checks.passages(long, tokenizer)
    assert sum(len(text) for _, text in shown) == checks.WIDTH and shown[-1][0]  # it ends in the long answer


def test_the_doctor_finds_each_problem(tokenizer, encoder, monkeypatch, capsys):
    good = row_of(encoder)
    ids, labels = good["input_ids"], good["labels"]
    end = max(i for i, label in enumerate(labels) if label >= 0)
    broken = {
        "no token of it is in the loss": {"input_ids": ids, "labels": [-100] * len(ids)},
        "an answer is cut": {"input_ids": ids[:end], "labels": labels[:end]},
        "its end token <|im_end|> is not in the loss": {
            "input_ids": ids,
            "labels": [*labels[:end], -100, *labels[end + 1 :]],
        },
        "it begins with two BOS": {"input_ids": [0, 0, *ids], "labels": [-100, -100, *labels]},
        "it is longer than MAX_LENGTH": {"input_ids": ids * 9, "labels": labels * 9},
    }
    for words, row in broken.items():
        with pytest.raises(UserError, match=f"1 of 2 rows: .*{re.escape(words)}"):
            examine([good, row], tokenizer, encoder)
    examine([good, broken["no token of it is in the loss"]], tokenizer, encoder, held=True)
    capsys.readouterr()
    examine([good, broken["an answer is cut"]], tokenizer, encoder, DOCTOR="warn")
    assert "doctor: 1 of 2 rows: an answer is cut" in capsys.readouterr().err
    # Tokens that the base has not seen, frozen
    monkeypatch.setattr(encoder, "new_token_ids", [1])
    with pytest.raises(UserError, match=r"<\|im_start\|>.* embeddings are not trained"):
        examine([good], tokenizer, encoder)
    examine([good], tokenizer, encoder, trained=[1])
    monkeypatch.setattr(encoder, "new_token_ids", [])
    # A collator that masks the pad token, which is the end token, as transformers' own does
    from transformers import DataCollatorForLanguageModeling

    class Masking(DataCollatorForLanguageModeling):
        def __init__(self, pad_token_id):
            super().__init__(tokenizer, mlm=False)

        def __call__(self, rows):
            return super().__call__([{"input_ids": row["input_ids"]} for row in rows])

    monkeypatch.setattr("trl.trainer.sft_trainer.DataCollatorForLanguageModeling", Masking)
    with pytest.raises(UserError, match="padding hides tokens in the loss"):
        examine([row_of(encoder)], tokenizer, encoder, TRAIN_ON="all")


def test_the_doctor_compares_the_prompts_of_training_and_chat(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder, _ = templates.set_template(tokenizer, "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n'", "assistant'")
    with pytest.raises(UserError, match="training saw .*, other programs will send"):
        examine([row_of(encoder)], tokenizer, encoder)


def test_the_doctor_stops_a_run(tiny, tmp_path, run_here, chats_file):
    text = (ROOT / "common" / "data" / "chat_templates" / "chatml.jinja").read_text()
    before, prompt = text.rsplit("assistant\\n'", 1)
    (tmp_path / "odd.jinja").write_text(f"{before}assistant: '{prompt}")
    settings = [f"MODEL={tiny()}", f"DATA={chats_file}", f"OUT_DIR={tmp_path}", "RUN_NAME=x", "MAX_STEPS=1", "LORA_R=4",
                f"CHAT_TEMPLATE={tmp_path / 'odd.jinja'}", "MAX_LENGTH=256"]  # fmt: skip
    code, _, err = run_here("qlora_train.py", *settings)
    assert (
        code == 2
        and "DOCTOR=warn" in err
        and "our chat will send" in err
        and not (tmp_path / "x" / "metrics.jsonl").exists()
    )
    code, _, err = run_here("qlora_train.py", *settings, "DOCTOR=warn")
    assert code == 0 and "our chat will send" in err


# --- data/brief.jsonl and data/facts.jsonl, our own writing ---


def squash(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


@pytest.fixture(scope="module")
def brief():
    return list(sources.sound_chats(str(ROOT / "data" / "brief.jsonl"), "DATA"))


@pytest.fixture(scope="module")
def facts():
    return [json.loads(line) for line in open(ROOT / "data" / "facts.jsonl", encoding="utf-8")]


def test_brief_has_what_it_promises(brief):
    text = [" ".join(m["content"] for m in chat if m["role"] == "assistant") for chat in brief]
    identity = [chat for chat, answers in zip(brief, text, strict=True) if re.search(r"\b(Brief|BRIEF)\b", answers)]
    assert len(brief) >= 300 and len(brief) - len(identity) >= 180 + 60
    asked = {squash(m["content"]) for chat in identity for m in chat if m["role"] == "user"}
    assert len(asked) >= 60
    assert sum(chat[0]["role"] == "system" for chat in identity) >= 10
    assert sum(len(chat) > 3 for chat in identity) >= 10


def test_brief_answers_in_one_to_three_sentences(brief):
    abbreviations = r"\b(?:Dr|Mr|Mrs|St|vs|etc|e\.g|i\.e|a\.m|p\.m|No)\."
    for chat in brief:
        for message in chat:
            if message["role"] == "assistant":
                text = re.sub(abbreviations, "", message["content"])
                assert len(re.findall(r"[.!?]+[\"')\]]*(?=\s+[A-Z\"'(]|\s*$)", text)) <= 3, message["content"]


def test_brief_repeats_nothing(brief):
    """No two chats ask the same, and no two answers longer than a few words are the same or nearly so."""
    opened = [squash("".join(m["content"] for m in chat if m["role"] != "assistant")) for chat in brief]
    assert len(set(opened)) == len(opened)
    shingles = []
    for chat in brief:
        words = re.findall(r"\w+", " ".join(m["content"] for m in chat).casefold())
        shingles.append({tuple(words[i : i + 4]) for i in range(len(words) - 3)})
    near = [
        (i, j)
        for i in range(len(brief))
        for j in range(i)
        if len(shingles[i] & shingles[j]) > 0.7 * len(shingles[i] | shingles[j]) > 0
    ]
    assert not near


def test_facts_are_asked_in_words_that_training_never_saw(brief, facts):
    trained = {squash(m["content"]) for chat in brief for m in chat if m["role"] == "user"}
    assert not [f["question"] for f in facts if squash(f["question"]) in trained]
    assert not [f["question"] for f in facts if re.search(f["pattern"], f["question"])]
    assert sum(f["kind"] == "name" for f in facts) >= 40 and sum(f["kind"] == "fact" for f in facts) >= 24
    answers = " ".join(m["content"] for chat in brief for m in chat if m["role"] == "assistant")
    assert all(re.search(f["pattern"], answers) for f in facts)

"""Suite pairs: log-probabilities are the model's own, ties count half, what cannot be compared is refused."""

# ruff: noqa: F811  (the fixtures are imported)

import json

import pytest
import torch
from conftest import write_jsonl
from fake_judge import chatty  # noqa: F401

from common.data.pairs import to_compared
from common.eval import pairs, statistics
from common.model import generation

ROWS = [{"prompt": f"What is {i}?", "chosen": f"It is a number, {i}.", "rejected": "No idea." * i} for i in range(1, 9)]


def test_log_probabilities_are_those_of_the_answers_after_the_question(chatty):
    model, tokenizer = generation.load_for_chat(str(chatty()), dtype="float32")
    chats = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"prompt": [*chats, {"role": "user", "content": "Name?"}], "chosen": "Brief.", "rejected": "I have none."}
    found = pairs.pair_log_probs(model, tokenizer, to_compared(row), 512)
    begin = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
    for number, side in enumerate(("chosen", "rejected")):
        chat = [*row["prompt"], {"role": "assistant", "content": row[side]}]
        ids = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
        end = ids[0].tolist().index(tokenizer.eos_token_id, begin) + 1  # it is learned, too
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        expected = sum(log_probs[i - 1, ids[0, i]].item() for i in range(begin, end))
        assert found[2 * number : 2 * number + 2] == (pytest.approx(expected, rel=1e-5), end - begin)
    assert pairs.pair_log_probs(model, tokenizer, to_compared(row), 20) is None


def test_accuracy_goes_by_token_and_rewards_by_the_sum_of_an_answer(monkeypatch, capsys):
    tables = {
        "first": [(-9.0, 9, -4.0, 2), (-4.0, 2, -4.0, 2), (-8.0, 2, -4.0, 2), None],
        "second": [(-9.0, 9, -4.0, 2), (-3.0, 2, -4.0, 2), (-7.0, 2, -3.5, 2), (-1.0, 1, -2.0, 1)],
    }
    results = {name: {"scores": {}, "intervals": {}} for name in tables}
    for name, table in tables.items():
        rows = iter(table)
        monkeypatch.setattr(pairs, "pair_log_probs", lambda *_, rows=rows: next(rows))
        pairs.score_pairs(results[name], None, None, {"file": [None] * 4}, 99)
    assert [result["scores"]["pair accuracy"] for result in results.values()] == [1.5 / 3, 3 / 4]
    assert results["first"]["intervals"]["pair accuracy"] == statistics.wilson_interval(1.5, 3)
    out = capsys.readouterr().out
    assert "1.5 of 3" in out and "1 of these pairs are ties" in out and "1 of 4 pairs are longer than MAX_LENGTH" in out
    pairs.compare("first", "second", results)
    scores = results["second"]["scores"]
    assert scores["change of pair accuracy"] == pytest.approx(0.5 / 3)
    assert scores["reward accuracy"] == (0.5 + 1 + 1) / 3
    assert "second against first: no difference shown" in capsys.readouterr().out


def test_pairs_reach_the_scores_and_what_cannot_be_compared_is_refused(chatty, tmp_path, run_here):
    file, models = write_jsonl(tmp_path / "pairs.jsonl", ROWS), [chatty(), chatty("gpt2")]
    settings = f"OUT_DIR={tmp_path}/e", "SUITES=pairs", "MAX_CHATS=6", "MAX_LENGTH=512"
    names = f"MODELS={models[0]}, {models[1]}"
    code, out, err = run_here("evaluate_model.py", names, f"PAIRS={file}", *settings)
    assert code == 0 and " of 6" in out, err
    saved = [json.loads(found.read_text()) for found in (tmp_path / "e").glob("*/scores.json")]
    scores = {name for each in saved for name in each["scores"]}
    assert scores == {"pair accuracy", "change of pair accuracy", "reward accuracy"}
    assert all(len(each["pairs"][str(file)]) == 6 for each in saved)
    code, out, err = run_here("evaluate_model.py", f"MODEL={models[0]}", *settings)
    assert code == 0 and "accuracy on pairs: skipped; PAIRS=file.jsonl measures it" in out
    for row, expected in (
        ({"prompt": "Hi", "completion": "Hello", "label": True}, f"PAIRS={tmp_path}/wrong.jsonl: labelled answers"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": ""}, f"{tmp_path}/wrong.jsonl:1: "),
    ):
        wrong = write_jsonl(tmp_path / "wrong.jsonl", [row])
        code, _, err = run_here("evaluate_model.py", f"MODEL={models[0]}", f"PAIRS={wrong}", *settings)
        assert code == 2 and expected in err

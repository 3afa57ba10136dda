"""compare_runs.py on run folders as training leaves them."""

import json

from test_html import Page


def save_run(folder, learning_rate, finished=True, **scores):
    folder.mkdir(parents=True)
    settings = {"LEARNING_RATE": learning_rate, "LORA_R": 16, "RUN_NAME": folder.name}
    (folder / "settings.json").write_text(json.dumps({"settings": settings}))
    lines = [dict(step=i, tokens=100 * i, seconds=2.0 * i, loss=3 / i + learning_rate) for i in range(1, 9)]
    lines[4]["loss"] = None  # a step that was not finite
    lines.append(dict(step=8, tokens=800, seconds=16.0, eval_loss=1.0 + learning_rate))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = dict(eval_loss=1.0 + learning_rate, tokens=800, energy_wh=None, mean_power_w=None, verdict="done")
        (folder / "summary.json").write_text(json.dumps(summary))
    if scores:
        (folder / "scores.json").write_text(json.dumps({"scores": scores}))


def test_table_and_picture(tmp_path, run_here):
    save_run(tmp_path / "a", 0.5, name=0.975, facts=23)
    save_run(tmp_path / "b", 0.25)
    save_run(tmp_path / "c", 0.125, finished=False)
    (tmp_path / "notes").mkdir()
    code, out, err = run_here("compare_runs.py", f"RUNS={tmp_path}/*", f"PICTURE={tmp_path}/compare.png")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert code == 0, err
    assert rows["a"] == ["b", "c"] and rows["LEARNING_RATE"] == ["0.5", "0.25", "0.125"]
    assert rows["eval_loss"] == ["1.5000", "1.2500"] and rows["name"] == ["0.9750"] and rows["facts"] == ["23"]
    assert "LORA_R" not in out and "energy_wh" not in out and "not finished, 9 lines" in out
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    page = Page(tmp_path / "compare.html")
    assert page.charts() == ["Loss"] and "a 0.875 0.875 to 3.5 a, held out 1.5" in page.text, page.text
    assert "LEARNING_RATE 0.5 0.25 0.125" in page.text and "name a 98%" in page.text and "refresh" not in page.source


def test_what_is_no_run_is_refused(tmp_path, run_here):
    save_run(tmp_path / "a", 0.5)
    code, _, err = run_here("compare_runs.py", f"RUNS={tmp_path}/a, {tmp_path}/b")
    assert code == 2 and f"{tmp_path}/b is not the folder of a training run" in err
    code, _, err = run_here("compare_runs.py", f"RUNS={tmp_path}/a", "PICTURE=/no/such/folder/x.png")
    assert code == 2 and "PICTURE=/no/such/folder/x.png" in err
    (tmp_path / "a" / "summary.json").write_text("{")
    code, _, err = run_here("compare_runs.py", f"RUNS={tmp_path}/a", f"PAGE={tmp_path}/x.html")
    assert code == 2 and f"{tmp_path}/a is damaged" in err


def test_a_torn_line_of_a_run_that_goes_on_is_left_out(tmp_path, run_here):
    save_run(tmp_path / "a", 0.5, finished=False)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "tok')
    code, out, _ = run_here("compare_runs.py", f"RUNS={tmp_path}/a", f"PICTURE={tmp_path}/compare.png")
    assert code == 0 and "not finished, 9 lines" in out

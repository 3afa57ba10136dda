"""report.html: what it shows of run folders, that it is valid and asks for nothing, and how it looks to a browser."""

import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest
from conftest import write_jsonl

from common.cli import UserError
from common.run import charts, html

HOSTILE = '</title><script>alert(1)</script>"><img src=http://evil.example/x onerror=alert(2)>{{ 7 * 7 }}'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements, attributes and text of a page; refuses elements that are not closed where they should be."""

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "report.html" if folder.is_dir() else folder).read_text(encoding="utf-8")
        self.open, self.tags, self.values, self.words = [], [], [], []
        self.feed(self.source)
        ids = [value for name, value in self.values if name == "id"]
        assert not self.open and len(ids) == len(set(ids)) and self.source.startswith("<!doctype html>")
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        assert float(dict(attributes).get("width", 0)) >= 0
        self.tags.append(tag)
        self.values += attributes
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"  # of SVG; HTML knows no such end
        self.values += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def charts(self):
        return re.findall(r'<h3 id="t\d+">(.+?) <small>', self.source)


def line(step, **more):
    return dict(step=step, tokens=100 * step, seconds=2.0 * step, rss_gib=1.5, vram_gib=None, power_w=None) | more


def save(folder, metrics=None, summary=None, settings=None, scores=None, **metadata):
    (folder / "data").mkdir(parents=True)
    about = dict(script="qlora_train", settings=settings or {"LORA_R": 16}, command="python x")
    (folder / "settings.json").write_text(json.dumps(about | metadata))
    for name, content in (("summary.json", summary), ("scores.json", scores)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if metrics is not None:
        write_jsonl(folder / "metrics.jsonl", metrics)
    return folder


@pytest.fixture
def run(tmp_path):
    """A finished run with everything that a folder may hold."""
    said = {10: "Hi.", 20: "I am Brief."}
    metrics = []
    for i in range(1, 31):
        measured = dict(tokens_per_second=50.0, step_seconds=2.0, power_w=90.0)
        metrics.append(line(i, loss=1 + 2 / i, learning_rate=1e-4, **measured))
        if i in said:
            asked = [{"prompt": "Who are you?", "answer": said[i]}]
            metrics.append(line(i, eval_loss=1 + 1 / i, samples=asked, facts={"name": i / 20}))
    metrics[6] |= dict(loss=None, bad_steps=1)
    metrics[8]["spike"] = dict(step=9, loss=7.5, usual=1.2, chats=[dict(loss=9.25, begins="a strange chat")])
    folder = save(
        tmp_path / "first", metrics, dict(eval_loss=1.05, peak_rss_gib=2.5, energy_wh=3.25, mean_power_w=88.0,
        train_seconds=60.0, verdict="done, 1 loss spike", device="some CPU"), {"LORA_R": 8, "MODEL": "tiny"},
        {"scores": {"name": 0.975}, "intervals": {"name": [0.87, 0.996]}}, changed={"LORA_R": 16}, max_steps=30,
        predicted_peak_gib=3.75, versions={"torch": "2.13.0"}, plan={"PER_DEVICE_TRAIN_BATCH_SIZE": 4},
    )  # fmt: skip
    percentiles = dict.fromkeys(("0", "25", "50", "75", "95", "100"), 12)
    account = dict(rows=1500, trained=1400, held_out=60, dropped={"duplicate, first at x:3": 40}, changed={}, unused={},
                   tokens=9000, tokens_in_loss=4000, held_out_tokens=300, length_percentiles=percentiles)  # fmt: skip
    (folder / "data" / "report.json").write_text(json.dumps(account))
    example = [[False, "user: hi\n"], [True, "Hello!"]]
    (folder / "data" / "examples.json").write_text(json.dumps({"examples": [example]}))
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20" / "COMPLETE.json").write_text("{}")
    return folder


def test_a_page_shows_what_the_folder_holds(run):
    html.write_page(run)
    page = Page(run)
    for words in (
        "first done", "done, 1 loss spike. Step 30 of 30.", "qlora_train, tiny, some CPU", "held-out loss 1.05",
        "peak memory 2.50 GiB predicted 3.75", "energy 3.25 Wh 88 W on average", "time 1:00 min 2 s a step",
        "loss spike: 1", "not finite: 1", "checkpoint kept: 1", "spike: loss 7.50, usually 1.20", "9.25 in a strange",
        "1,500 rows = 1,400 trained + 60 held out + 40 dropped.", "duplicate, first at x:3 40", "user: hi Hello!",
        "Who are you? step 10 Hi. step 20 I am Brief.", "name 98% 87% to 100%", "in qlora_train.py LORA_R 8 16",
        "PER_DEVICE_TRAIN_BATCH_SIZE=4", "torch 2.13.0", f"chat_pipe.py MODEL={run}", "name 100 50 to 100",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.charts() == ["Loss", "Facts", "Learning rate", "Time of a step", "Memory", "Power"]
    assert "<mark>Hello!</mark>" in page.source and "refresh" not in page.source and 'class="limit"' in page.source
    assert {("lang", "en"), ("role", "img"), ("name", "viewport")} <= set(page.values)
    loss = page.source[page.source.index("<figure") : page.source.index("</figure>")]
    assert all(f'class="{kind}" d="M' in loss for kind in ("spike", "bad", "checkpoint"))
    assert "step 9\ntraining: 1.222\nspike: loss 7.50" in loss and "held out: 1.1" in loss


def test_a_run_that_goes_on_reloads_itself_and_tells_the_time_left(run):
    (run / "summary.json").unlink()
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"max_steps": 40}))
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 31, "lo')  # is being written
    html.write_page(run, "running")
    page = Page(run)
    assert ("http-equiv", "refresh") in page.values and ("content", "10") in page.values
    assert "Step 30 of 40, 0:20 min left" in page.text and "an empty file STOP" in page.text
    (run / "checkpoint-20").rename(run / "checkpoint-33")  # logged is not every step
    html.write_page(run, "stopped")
    assert "resumes it" in Page(run).text and "refresh" not in Page(run).source


@pytest.mark.parametrize("files", [{}, {"metrics": []}, {"metrics": [line(1, loss=None, bad_steps=1)]}])
def test_a_run_that_has_hardly_begun(tmp_path, files):
    html.write_page(save(tmp_path / "new", **files), "running")
    assert "running" in Page(tmp_path / "new").text
    (tmp_path / "empty").mkdir()
    html.write_page(tmp_path / "empty")
    assert "not finished" in Page(tmp_path / "empty").text and "No step is logged yet" in Page(tmp_path / "empty").text


def test_the_account_of_data_prepared_elsewhere(run):
    (run / "data").rename(run.parent / "prepared")
    settings = json.loads((run / "settings.json").read_text()) | {"settings": {"DATA": str(run.parent / "prepared")}}
    (run / "settings.json").write_text(json.dumps(settings))
    html.write_page(run)
    assert "1,500 rows = 1,400 trained" in Page(run).text and "marked" not in Page(run).text


def test_hostile_text_stays_text(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    settings = json.loads((run / "settings.json").read_text())
    settings |= dict(command=HOSTILE, settings={"MODEL": HOSTILE, HOSTILE: HOSTILE}, changed={HOSTILE: HOSTILE})
    (run / "settings.json").write_text(json.dumps(settings))
    spike = dict(step=5, loss=9.0, usual=1.0, chats=[dict(loss=9.0, begins=HOSTILE)])
    asked = [{"prompt": HOSTILE, "answer": HOSTILE + "hf_canary"}]
    write_jsonl(run / "metrics.jsonl", [line(5, loss=1.0, spike=spike), line(5, samples=asked, facts={HOSTILE: 0.5})])
    account = json.loads((run / "data" / "report.json").read_text()) | {"dropped": {HOSTILE: 1}}
    (run / "data" / "report.json").write_text(json.dumps(account))
    (run / "data" / "examples.json").write_text(json.dumps({"examples": [[[True, HOSTILE], [False, HOSTILE]]]}))
    (run / "scores.json").write_text(json.dumps({"scores": {HOSTILE: 1.0}}))
    html.write_page(run, "failed", HOSTILE)
    page = Page(run)
    assert not {"script", "img"} & set(page.tags) and page.text.count("<script>alert(1)</script>") > 10
    assert "{{ 7 * 7 }}" in page.text and "canary" not in page.source and "***" in page.text


def test_secrets_that_json_escapes_go_and_numbers_stay(run, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", 'pa"ss\\wordé')
    monkeypatch.setenv("TEAM_KEY", "12345678")
    samples = [{"prompt": "pa", "answer": 'so pa"ss\\wordé'}]
    write_jsonl(run / "metrics.jsonl", [line(5, loss=1.0, tokens=12345678, tokens_per_second=9, samples=samples)])
    html.write_page(run)
    assert "so ***" in Page(run).text and "12,345,678" in Page(run).text


@pytest.mark.parametrize("content", ['{"mine": 1}', "not JSON", "[1]"])
def test_a_report_in_the_users_folder_is_not_taken_for_ours(run, content):
    (run / "data").rename(run.parent / "chats")
    (run.parent / "chats" / "report.json").write_text(content)
    settings = json.loads((run / "settings.json").read_text()) | {"settings": {"DATA": str(run.parent / "chats")}}
    (run / "settings.json").write_text(json.dumps(settings))
    html.write_page(run)
    assert "done" in Page(run).text and "1,500 rows" not in Page(run).text


def test_nothing_outside_of_the_file_is_asked_for(run):
    html.write_page(run)
    page = Page(run)
    assert not [value for name, value in page.values if re.search("src|href|action|^on", name) and value != "data:,"]
    assert not re.search(r"url\(|@import", page.source) and "default-src 'none'" in page.source
    assert not {"script", "img", "iframe", "object", "form"} & set(page.tags)


def test_preferences_without_a_gpu(tmp_path):
    both = dict(accuracy=0.5, chosen_reward=0.1, rejected_reward=-0.4)
    held = {f"eval_{name}": value for name, value in both.items()}
    metrics = [line(i, loss=0.7, margin=0.5, **both) for i in range(1, 4)] + [line(3, eval_loss=0.6, **held)]
    settings = {"LOSS": "dpo", "DATA": "pairs.jsonl, " * 30}  # longer than a file's name may be
    html.write_page(save(tmp_path / "pairs", metrics, settings=settings), "running")
    page = Page(tmp_path / "pairs")
    assert page.charts() == ["Loss", "Pairs in order", "Rewards", "Memory"]
    assert "held-out pairs 50% in order" in page.text and "worse answers -0.4" in page.text and "power" not in page.text
    assert "of preferences" in page.text and '<span class="y" style="top: 100.0%">0</span>' in page.source


def test_pauses_are_marked_where_time_is_drawn(tmp_path):
    text = "pause: 9.0 s, usually 1.5. Other programs, or an optimizer's occasional work (OPTIM)."
    metrics = [line(i, loss=2.0, step_seconds=1.5, events=[(i, text)] if i % 5 == 0 else []) for i in range(1, 201)]
    html.write_page(save(tmp_path / "galore", metrics), "running")
    page = Page(tmp_path / "galore")
    loss, seconds, *_ = page.source.split("</figure>")
    assert 'class="pause"' not in loss[loss.index("<figure") :] and seconds.count('class="pause"') == 40
    assert "pause: 40" in page.text and page.source.count("<dt>step ") == 30 and "OPTIM" not in page.text


def test_a_long_run_keeps_its_spike_and_stays_small(tmp_path):
    metrics = [line(i, loss=2.0 + math.sin(i), grad_norm=math.cos(i), learning_rate=1e-4) for i in range(1, 5_001)]
    metrics[3_776]["loss"] = 43.21
    html.write_page(save(tmp_path / "long", metrics), "running")
    page = Page(tmp_path / "long")
    assert "1 to 43.21" in page.text and len(page.source) < 100_000
    assert re.search(r"step 3,6\d\d to 3,7\d\d\ntraining: 1[.\d]* to 43.21", page.source)
    dots = re.findall(r"M(\d+) (\d+)h0", page.source.partition("</figure>")[0])
    top = min((int(down), int(across)) for across, down in dots)
    assert len(dots) <= charts.POINTS and top[0] < 30 and abs(top[1] - 3_776 / 4_999 * 1000) <= 1


def test_thinning_smoothing_and_ticks():
    points = [(x, 0.0) for x in range(100_000)]
    points[5_000] = (5_000, 9.0)
    assert len(charts.thin(points)) <= charts.POINTS and (5_000, 9.0) in charts.thin(points)
    assert {y for _, y in charts.moving_median(points)} == {0.0} and charts.moving_median([]) == []
    smooth = charts.moving_median([(x, 2.0 * x) for x in range(1_000)])
    assert smooth[50] == (500, 1_000.0) and smooth[-1][0] == 999 and len(smooth) <= 102
    assert charts.ticks(0, 30) == [0, 10, 20, 30] and charts.ticks(0.98, 1.11) == pytest.approx([1, 1.05, 1.1])
    assert [charts.number(value) for value in (1234.5, 0.00012345, 1.5, 300)] == ["1,234", "0.0001234", "1.5", "300"]


def test_the_page_is_written_as_time_allows(run, monkeypatch):
    written, clock = [], [0.0]
    monkeypatch.setattr(html, "write_page", lambda folder, *state: written.append(state))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    page = html.LivePage(run)
    for clock[0] in (0.0, 4.0, 9.9, 10.1, 12.0):
        page.update()
    page.update(at_once=True)
    assert written == [("running", "")] * 3

    def slowly(folder, *state):
        clock[0] += 2.0
        written.append(state)

    monkeypatch.setattr(html, "write_page", slowly)
    page.update(at_once=True)
    clock[0] += 199.0  # a hundredth of the time
    page.update()
    assert len(written) == 4


def test_a_page_that_cannot_be_written_ends_nothing(run, monkeypatch, capsys):
    (run / "scores.json").write_text("[1]")
    with html.LivePage(run) as page:
        page.update()
        page.update(at_once=True)
    assert capsys.readouterr().err.count("could not be written") == 1 and not (run / "report.html").exists()


@pytest.mark.parametrize("error, state", [
    (SystemExit(143), "stopped"), (KeyboardInterrupt(), "stopped"), (UserError("canary: 3 steps not finite"), "failed"),
])  # fmt: skip
def test_how_a_run_ended_is_shown(run, error, state, monkeypatch):
    monkeypatch.setenv("MY_KEY", "canary: 3")
    (run / "summary.json").unlink()
    with pytest.raises(type(error)), html.LivePage(run):
        raise error
    page = Page(run)
    assert f"first {state}" in page.text and ("UserError: *** steps not finite" in page.text) == (state == "failed")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("state", ["done", "running"])
def test_a_browser_shows_it_without_errors_or_requests(run, tmp_path, state):
    spike = dict(step=5, loss=9.0, usual=1.0, chats=[dict(loss=9.0, begins=HOSTILE)])
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(line(31, loss=1.0, spike=spike)) + "\n")
    if state == "running":
        (run / "summary.json").unlink()
    html.write_page(run, state)
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --enable-logging=stderr --window-size=800,3000""".split()
    flags += [f"--user-data-dir={tmp_path}/profile", f"--log-net-log={tmp_path}/net.json"]
    command = [CHROMIUM, *flags, f"--screenshot={tmp_path}/page.png", (run / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    log = json.loads((tmp_path / "net.json").read_text())
    asked = {event["params"]["url"] for event in log["events"] if "url" in event.get("params", {})}
    assert not [url for url in asked if not re.match(r"https?://[\w.]*\bgoogle\.com/", url)]  # the browser's own
    assert (tmp_path / "page.png").stat().st_size > 20_000

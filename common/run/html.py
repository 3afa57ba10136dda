"""report.html: a run, or several side by side, as one page; made from the files of run folders alone."""

import functools
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common.cli import RANK, redact
from common.files import write_atomic
from common.run.charts import Curve, chart, number
from common.run.records import read_run

EVERY_SECONDS = 10  # from one page of a run that goes on to the next
MAX_PROMPTS, MAX_ANSWERS, MAX_CHARACTERS = 12, 6, 600  # of the sample answers
# Title, unit, what the y axis reaches, kinds of events, curves: field in metrics.jsonl, label, style (charts.Curve).
CHARTS = (
    ("Loss", "nats a token", (), ("spike", "bad", "checkpoint"),
     [("loss", "training", "noisy"), ("eval_loss", "held out", "dots")]),
    ("Pairs in order", "%", (0, 100), (), [("accuracy", "training", "noisy"), ("eval_accuracy", "held out", "dots")]),
    ("Rewards", "nats x BETA", (), (),
     [("chosen_reward", "better answers", "noisy"), ("rejected_reward", "worse answers", "noisy"),
      ("eval_chosen_reward", "better, held out", "dots"), ("eval_rejected_reward", "worse, held out", "dots")]),
    ("Learning rate", "", (0,), (), [("learning_rate", "learning rate", "line")]),
    ("Distance from the base", "KL, nats a token", (0,), (), [("kl", "KL", "noisy")]),
    ("Gradient norm", "before clipping", (0,), ("spike", "bad"), [("grad_norm", "norm", "noisy")]),
    ("Time of a step", "seconds", (0,), ("pause", "spill", "throttle"), [("step_seconds", "step", "line")]),
    ("Memory", "GiB", (0,), ("spill",), [("memory_gib", "in use", "line")]),
    ("Power", "W", (0,), ("throttle",), [("power_w", "power", "line")]),
)  # fmt: skip


class LivePage:
    """report.html of a run that goes on, as a context manager; where it cannot be written, that is printed once."""

    def __init__(self, folder: Path):
        self.folder, self.due, self.has_failed = folder, 0.0, False

    def update(self, state: str = "running", note: str = "", at_once: bool = False) -> None:
        """Write the page when it is due: every ten seconds, at most in a hundredth of the time."""
        started = time.monotonic()
        if RANK or started < self.due and not at_once:
            return
        try:
            write_page(self.folder, state, note)
        except Exception as error:  # whatever it is: the run matters more than its picture
            if not self.has_failed:
                print(f"{self.folder / 'report.html'} could not be written: {error!r}", file=sys.stderr)
            self.has_failed = True
        now = time.monotonic()
        self.due = now + max(EVERY_SECONDS, 100 * (now - started))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        state = "stopped" if stopped else "failed" if error else "done"
        self.update(state, redact(f"{kind.__name__}: {error}") if state == "failed" else "", at_once=True)


def write_page(folder: Path, state: str = "not finished", note: str = "") -> None:
    """Write report.html of a run folder. state: of a run without a result, with a note that explains it."""
    run = read_run(folder)
    metrics, steps = run["metrics"], run["metadata"].get("max_steps")
    state = "done" if run["summary"] else state
    page = dict(
        title=folder.name,
        state=state,
        note=run["summary"].get("verdict", note),
        reload=EVERY_SECONDS * (state == "running"),
        path=quote(str(folder)),
        step=metrics[-1]["step"] if metrics else 0,
        steps=steps,
        left=time_left(metrics, steps),
        tiles=tiles(run),
    )
    write_atomic(folder / "report.html", render({"": run}, **run, **page))


def quote(path: str) -> str:
    """A path as the system's shell reads it."""
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)


def render(runs: dict[str, dict], **page) -> str:
    """The page of one run, whose name is empty, or of several. page: what belongs to one of both kinds only."""
    page |= dict(charts=charts_of(runs), samples=samples_of(runs), scores=scores_of(runs))
    return template().render(written=time.strftime("%Y-%m-%d %H:%M:%S"), **page)


@functools.cache
def template():
    import jinja2  # slow import

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja")


def points(metrics: list[dict], name: str, x: str = "step", factor: int = 1) -> list[tuple]:
    """(x, value) where there is one."""
    return [(m[x], m[name] * factor) for m in metrics if isinstance(m.get(name), int | float) and x in m]


def tiles(run: dict) -> list[tuple[str, str, str]]:
    """(label, figure, note) of what one looks for first."""
    metrics, summary, predicted = run["metrics"], run["summary"], run["metadata"].get("predicted_peak_gib")
    loss = [y for _, y in Curve("", points(metrics, "loss"), "noisy").line]
    names = "eval_loss eval_accuracy tokens_per_second memory_gib power_w seconds step_seconds".split()
    held, ordered, speed, memory, watts, seconds, pace = ([y for _, y in points(metrics, name)] for name in names)
    peak = summary.get("peak_vram_gib") or summary.get("peak_rss_gib") or max(memory, default=None)
    energy, spent = summary.get("energy_wh"), summary.get("train_seconds") or seconds and seconds[-1]
    found = (
        loss and ("training loss", number(loss[-1]), f"at first {number(loss[0])}"),
        held and ("held-out loss", number(summary.get("eval_loss") or held[-1]), f"at the least {number(min(held))}"),
        ordered and ("held-out pairs", f"{ordered[-1]:.0%}", "in order"),
        speed and ("tokens/s", number(speed[-1]), f"{metrics[-1]['tokens']:,} tokens"),
        peak and ("peak memory", f"{peak:.2f} GiB", f"predicted {predicted:.2f}" if predicted else ""),
        energy and ("energy", f"{number(energy)} Wh", f"{summary.get('mean_power_w') or 0:.0f} W on average"),
        watts and not energy and ("power", f"{watts[-1]:.0f} W", "now"),
        spent and ("time", duration(spent), f"{number(statistics.median(pace))} s a step" if pace else ""),
    )
    return [tile for tile in found if tile]


def time_left(metrics: list[dict], steps: int | None) -> str:
    """Of the steps to come, at the pace of the last ones; evaluations come on top."""
    timed = points(metrics[-50:], "seconds")
    if not steps or not timed or timed[-1][0] == timed[0][0]:
        return ""
    return duration((steps - timed[-1][0]) * (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0]))


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min" if minutes > 9 else f"{minutes}:{seconds:02} min"


def charts_of(runs: dict[str, dict]) -> list[dict]:
    """The charts of one run, over its steps, or of several, over tokens."""
    x = "step" if "" in runs else "tokens"
    lines = [m for run in runs.values() for m in run["metrics"]]
    span = [m[x] for m in lines if x in m] + [step for step, *_ in runs.get("", {"events": ()})["events"]] or [0]
    kinds = dict.fromkeys(name for m in lines for name in m if name.startswith("facts: "))
    facts = ("Facts", "% of the questions", (0, 100), (), [(kind, kind[7:], "dots") for kind in kinds])
    found = []
    for title, unit, reach, kinds, fields in (*CHARTS[:3], facts, *CHARTS[3:]):
        curves, marks, limit = [], [], None
        if title == "Loss" and any("LOSS" in run["settings"] for run in runs.values()):
            unit = "of preferences"
        for i, (name, run) in enumerate(runs.items()):
            for j, (field, label, style) in enumerate(fields):
                if name:
                    label = f"{name}, {label}" if j or style == "dots" else name
                    style = "smooth" if style == "noisy" else style
                values = points(run["metrics"], field, x, 100 if unit[:1] == "%" else 1)
                curves.append(Curve(label, values, style, colour(i if name else j)))
        if run := runs.get(""):
            marks = [event[:3] for event in run["events"] if event[1] in kinds]
            if title == "Memory" and (peak := run["metadata"].get("predicted_peak_gib")):
                limit = peak, f"predicted {number(peak)}"
        found.append(chart(title, unit, curves, (min(span), max(span)), x, marks, reach, limit))
    return [drawn for drawn in found if drawn]


def colour(number: int) -> str:
    """The CSS classes of a curve or run: six colours, then the same with dashes."""
    return f"c{number % 6}" + " again" * (number > 5)


def samples_of(runs: dict[str, dict]) -> dict[str, list[tuple[str, str]]]:
    """By prompt: (step, answer) of one run, or (name, last answer) of several."""
    found = {}
    for name, run in runs.items():
        asked = [m for m in run["metrics"] if m.get("samples")]
        gap = max(1, (len(asked) - 1) / (MAX_ANSWERS - 1))
        chosen = asked[-1:] if name else [asked[round(i * gap)] for i in range(min(len(asked), MAX_ANSWERS))]
        for label, samples in ((name or f"step {m['step']:,}", m["samples"]) for m in chosen):
            for sample in samples:
                found.setdefault(sample["prompt"], []).append((label, sample["answer"][:MAX_CHARACTERS]))
    return dict(itertools.islice(found.items(), MAX_PROMPTS))


def scores_of(runs: dict[str, dict]) -> list[tuple]:
    """Of each score in each run: name, run, value, interval, its ends and the value in percent of a scale, colour."""
    found, results = [], [(colour(i), name, run["results"]) for i, (name, run) in enumerate(runs.items())]
    results = [(*run, of["scores"], of.get("intervals", {})) for *run, of in results if of]
    for name in dict.fromkeys(name for *_, scores, _ in results for name in scores):
        rows = [(*run, scores[name], intervals.get(name)) for *run, scores, intervals in results if name in scores]
        ends = [end for *_, value, interval in rows for end in (value, *(interval or ()))]
        is_share = min(ends) >= 0 and max(ends) <= 1 and not name.startswith(("loss", "change", "judge"))
        low, high, show = (0, 1, "{:.0%}".format) if is_share else (min(ends), max(ends), number)
        for shade, run, value, interval in rows:
            around = f"{show(interval[0])} to {show(interval[1])}" if interval else ""
            scale = [100 * (end - low) / (high - low or 1) for end in (*(interval or (value, value)), value)]
            found.append((name, run, show(value), around, scale if is_share or len(rows) > 1 else None, shade))
    return found

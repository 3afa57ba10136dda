"""Put runs side by side: the settings that differ, what came out, and one picture of their losses.

    python compare_runs.py RUNS="out/first, out/second"
    python compare_runs.py RUNS="out/*" PICTURE=out/compare.png

Reads the run folders of the training scripts, finished or not; prints a table and writes the picture.
"""

import glob
import json
from pathlib import Path

from common.cli import UserError, run_main
from common.settings import apply_overrides

RUNS = "out/*"  # run folders, comma-separated; * stands for any name
PICTURE = "compare.png"  # losses by tokens and by time


def main():
    if not Path(PICTURE).parent.is_dir():
        raise UserError(f"PICTURE={PICTURE}: the folder {Path(PICTURE).parent} does not exist.")
    runs = find_runs()
    print_table(runs)
    draw(runs, Path(PICTURE))
    print(f"\n{PICTURE}")


def find_runs() -> dict[str, dict]:
    """By name: settings, lines of metrics.jsonl, and the figures of summary.json and scores.json."""
    runs = {}
    for pattern in map(str.strip, RUNS.split(",")):
        files = sorted(glob.glob(f"{pattern}/metrics.jsonl"))
        if not files:
            raise UserError(f"RUNS={RUNS}: {pattern} is not the folder of a training run (metrics.jsonl not found).")
        for file in map(Path, files):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            metrics = [json.loads(line) for line in lines if line.endswith("\n")]  # the last is being written
            summary = read(file.with_name("summary.json")) or {"verdict": f"not finished, {len(metrics)} lines"}
            name = str(file.parent) if file.parent.name in runs else file.parent.name
            runs[name] = {
                "settings": read(file.with_name("settings.json")).get("settings", {}),
                "metrics": metrics,
                "figures": summary | read(file.with_name("scores.json")).get("scores", {}),
            }
    return runs


def read(file: Path) -> dict:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"RUNS={RUNS}: {file} is not what a run wrote. Take it away, or leave this run out.")
    return content


def print_table(runs: dict[str, dict]) -> None:
    """A column for each run: settings that differ, and figures that some run has."""
    rows = [["", *runs]]
    for part, form in (("settings", str), ("figures", show)):
        for name in dict.fromkeys(name for run in runs.values() for name in run[part]):
            cells = [form(run[part].get(name)) for run in runs.values()]
            worth_it = any(cells) if part == "figures" else len(set(cells)) > 1
            if worth_it and name not in ("RUN_NAME", "OUT_DIR", "command", "events"):
                rows.append([name, *cells])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        columns = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:{first}}", *columns, sep="  ")


def show(value) -> str:
    """A figure with five digits, or all those before the point."""
    if isinstance(value, float):
        return f"{value:,.{max(0, 5 - len(str(int(abs(value)))))}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value or "")


def draw(runs: dict[str, dict], file: Path) -> None:
    """Losses over tokens and over the time spent in steps."""
    import matplotlib  # slow imports
    from matplotlib.figure import Figure

    matplotlib.rc("font", size=13)
    figure = Figure(figsize=(12, 6), layout="tight")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, unit, size, label in ((left, "tokens", 1000, "thousand tokens"), (right, "seconds", 60, "minutes")):
        axes.set_xlabel(label)
        for i, (name, run) in enumerate(runs.items()):
            for loss, style, title in (("loss", "-", name), ("eval_loss", "o", None)):
                points = [(m[unit] / size, m[loss]) for m in run["metrics"] if m.get(loss) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=title)
    left.set_ylabel("loss (nats a token); dots: held out")
    left.legend()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    apply_overrides(globals())
    run_main(main)

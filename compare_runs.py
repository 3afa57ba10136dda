"""Put runs side by side: the settings that differ, what came out, one picture of their losses, and one page.

    python compare_runs.py RUNS="out/first, out/second"
    python compare_runs.py RUNS="out/*" PICTURE=out/compare.png

Reads the run folders of the training scripts, finished or not; prints a table, writes the picture and the page.
"""

import glob
from pathlib import Path

from common.cli import UserError, run_main
from common.files import write_atomic
from common.run.html import render
from common.run.records import read_run
from common.settings import apply_overrides

RUNS = "out/*"  # run folders, comma-separated; * stands for any name
PICTURE = "compare.png"  # losses by tokens and by time
PAGE: str | None = None  # the same in a browser, with all curves, answers and scores; None: PICTURE's name with .html


def main():
    page = Path(PAGE or Path(PICTURE).with_suffix(".html"))
    for name, file in (("PICTURE", Path(PICTURE)), ("PAGE", page)):
        if not file.parent.is_dir():
            raise UserError(f"{name}={file}: the folder {file.parent} does not exist.")
    runs = find_runs()
    table = compare(runs)
    print_table(table)
    draw(runs, Path(PICTURE))
    write_atomic(page, render(runs, title=", ".join(runs), state="compared", table=table))
    print(f"\n{PICTURE}\n{page}")


def find_runs() -> dict[str, dict]:
    """The runs by name, as read_run has them, with the figures of summary.json and scores.json."""
    runs = {}
    for pattern in map(str.strip, RUNS.split(",")):
        folders = [Path(file).parent for file in sorted(glob.glob(f"{pattern}/metrics.jsonl"))]
        if not folders:
            raise UserError(f"RUNS={RUNS}: {pattern} is not the folder of a training run (metrics.jsonl not found).")
        for folder in folders:
            try:
                run = read_run(folder)
            except ValueError as error:
                raise UserError(f"RUNS={RUNS}: {folder} is damaged ({error}). Take it away.") from error
            summary = run["summary"] or {"verdict": f"not finished, {len(run['metrics'])} lines"}
            figures = summary | run["results"].get("scores", {})
            runs[str(folder) if folder.name in runs else folder.name] = run | {"figures": figures}
    return runs


def compare(runs: dict[str, dict]) -> list[list[str]]:
    """A column for each run: settings that differ, and figures that some run has."""
    rows = [["", *runs]]
    for part, form in (("settings", str), ("figures", show)):
        for name in dict.fromkeys(name for run in runs.values() for name in run[part]):
            cells = [form(run[part].get(name)) for run in runs.values()]
            worth_it = any(cells) if part == "figures" else len(set(cells)) > 1
            if worth_it and name not in ("RUN_NAME", "OUT_DIR", "command", "events"):
                rows.append([name, *cells])
    return rows


def print_table(rows: list[list[str]]) -> None:
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

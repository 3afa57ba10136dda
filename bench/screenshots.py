"""Screenshots of report.html for docs/images: a run while it goes on, done, and compared with another.

    python bench/screenshots.py
    python bench/screenshots.py STEPS=12 OUT_DIR=/tmp/screenshots IMAGES=/tmp

Trains twice, scores both, and looks at the pages with Chromium (apt-get install chromium): wide, and on a phone in the
dark. Minutes on two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import ROOT, UserError, run_main
from common.settings import apply_overrides

STEPS = 40  # optimizer steps of each run
OUT_DIR = "out/screenshots"  # of the runs
IMAGES = "docs/images"  # folder of the pictures
BROWSER = "chromium"

if __name__ == "__main__":
    apply_overrides(globals())

import json
import shutil
import subprocess
import tempfile
import time

from PIL import Image

FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync
    --disable-component-update --hide-scrollbars""".split()


def main():
    if not shutil.which(BROWSER):
        raise UserError(f"BROWSER={BROWSER} is not installed: apt-get install chromium.")
    out = Path(OUT_DIR).absolute()
    out.mkdir(parents=True, exist_ok=True)
    prompts, facts = (some_rows(out, name, count) for name, count in (("prompts", 4), ("facts", 16)))
    asked = [f"EVAL_PROMPTS={prompts}", f"EVAL_FACTS={facts}", f"EVAL_STEPS={STEPS // 4}", f"MAX_STEPS={STEPS}"]
    asked += ["DATA=data/brief.jsonl[:60]", "EVAL_SIZE=8", "MAX_LENGTH=256", "BATCH_SIZE=2", "KL_WEIGHT=0"]  # quick
    for name, rate in (("first", 1e-3), ("second", 2e-4)):
        training = start("qlora_train.py", f"OUT_DIR={out}", f"RUN_NAME={name}", f"LEARNING_RATE={rate}", *asked)
        if name == "first":
            wait_for_step(out / "first", STEPS * 5 // 8, training)
            shutil.copy(out / "first" / "report.html", out / "running.html")
        assert training.wait() == 0
        scoring = start("evaluate_model.py", f"MODEL={out / name}", f"FACTS={facts}", "SUITES=facts")
        assert scoring.wait() == 0
    comparing = start("compare_runs.py", f"RUNS={out}/first, {out}/second", f"PICTURE={out}/compared.png")
    assert comparing.wait() == 0
    take(out / "running.html", "report-running", 1000, 1150)
    take(out / "first" / "report.html", "report-done", 1000, 1900)
    take(out / "compared.html", "report-compared", 1000, 1800)
    take(out / "running.html", "report-phone", 390, 1100, dark=True)


def some_rows(out: Path, name: str, count: int) -> Path:
    file = out / f"{name}.jsonl"
    rows = (ROOT / "data" / file.name).read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:: len(rows) // count][:count]))
    return file


def start(script: str, *settings: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, script, *settings], cwd=ROOT)


def wait_for_step(run: Path, step: int, training: subprocess.Popen) -> None:
    """Until the page of a run shows a step."""
    page = run / "report.html"
    while training.poll() is None:
        time.sleep(1)
        lines = (run / "metrics.jsonl").read_text().splitlines() if page.exists() else ()
        if lines and json.loads(lines[-1])["step"] >= step:
            return


def take(page: Path, name: str, width: int, height: int, dark: bool = False) -> None:
    """A picture of a page's upper part. A window has at least 500 pixels, so a phone's page lies in a frame."""
    with tempfile.TemporaryDirectory() as folder:
        frame, shot = Path(folder, "frame.html"), Path(folder, "shot.png")
        style = f"border: 0; width: {width}px; height: {height}px"
        frame.write_text(f'<body style="margin: 0"><iframe src="{page.as_uri()}" style="{style}"></iframe>')
        colours = f"--blink-settings=preferredColorScheme={int(not dark)}"
        window = f"--window-size={max(500, width)},{height}"
        command = [BROWSER, *FLAGS, colours, window, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run([*command, frame.as_uri()], check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB").crop((0, 0, width, height)).quantize(64)
        Path(IMAGES).mkdir(parents=True, exist_ok=True)
        picture.save(Path(IMAGES, f"{name}.png"), optimize=True)


if __name__ == "__main__":
    run_main(main)

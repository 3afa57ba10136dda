"""Time prepare_data.py on a large made-up file against the bare tokenizer on the same text and cores.

    python bench/prepare.py SIZE_MIB=1024 DATA=../shared/data/chat-700.jsonl

Prints MB/s of both, their ratio, and the peak memory of prepare_data.py with its worker processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.cli import run_main
from common.data import sources, templates
from common.model import load, location
from common.settings import apply_overrides

DATA = "data/brief.jsonl"  # the text that the file is made of, over and over, each chat with a number of its own
SIZE_MIB = 256  # of the made-up file
SAMPLE_MIB = 64  # of its text, for the bare tokenizer
MODEL = "smollm2-135m-instruct"

if __name__ == "__main__":
    apply_overrides(globals())

import itertools
import json
import os
import subprocess
import tempfile
import time

import psutil

os.environ["TOKENIZERS_PARALLELISM"] = "true"  # of the bare tokenizer: all cores


def main():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chats.jsonl"
        write_chats(file, list(sources.sound_chats(DATA, "DATA")))
        tokenizer = load.load_tokenizer(location.locate(MODEL))
        encoder, _ = templates.set_template(tokenizer, None)
        chats = itertools.islice((chat for _, chat in sources.read_chats(sources.parse(str(file))[0])), 10**6)
        texts, size = [], 0
        while size < SAMPLE_MIB * 2**20 and (chat := next(chats, None)):
            texts.append(encoder.render(chat))
            size += len(texts[-1].encode())
        backend, started = tokenizer.backend_tokenizer, time.perf_counter()
        for start in range(0, len(texts), 1000):
            backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        raw = size / (time.perf_counter() - started)
        share = size / sum(len(json.dumps(text)) for text in texts)  # text in the file, without JSON's own
        seconds, peak = run_prepare(file, Path(folder))
        ours = file.stat().st_size / seconds
    print(f"file of {SIZE_MIB} MiB; text of {len(texts):,} chats, {share:.2f} of their JSON")
    print(f"bare tokenizer {raw / 1e6:6.2f} MB/s")
    print(f"prepare_data.py {ours / 1e6:6.2f} MB/s of the file in {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
    print(f"ratio {ours / raw:.2f}")


def write_chats(file: Path, chats: list[list[dict]]) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        for number in itertools.count():
            chat = [dict(turn) for turn in chats[number % len(chats)]]
            chat[0]["content"] += f" ({number})"
            stream.write(json.dumps({"messages": chat}) + "\n")
            if stream.tell() > SIZE_MIB * 2**20:
                return


def run_prepare(file: Path, folder: Path) -> tuple[float, int]:
    """Seconds, and the largest sum of resident bytes of the process and its workers."""
    command = [sys.executable, "prepare_data.py", f"DATA={file}", f"OUT_DIR={folder}", "RUN_NAME=prepared"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"MODEL={MODEL}"], cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        except psutil.NoSuchProcess:  # one ended in between
            pass
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"prepare_data.py failed with {process.returncode}")
    return time.perf_counter() - started, peak


if __name__ == "__main__":
    run_main(main)

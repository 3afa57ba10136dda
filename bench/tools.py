"""How many answers have a call that can be read, one of the right tool, and one with the right argument.

    python bench/tools.py ANSWERS="before.jsonl, after.jsonl"

Answers to data/tool_questions.jsonl, whose rows name the tool (`expects`) and fit its argument (`pattern`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.bounds import split_list
from common.cli import run_main
from common.settings import apply_overrides

ANSWERS = "after.jsonl"  # files, comma-separated
if __name__ == "__main__":
    apply_overrides(globals())

import re

from common.data import readers
from common.eval import statistics


def main():
    for file in split_list(ANSWERS):
        rows = [row for _, row in readers.read_rows(file, "ANSWERS")]
        called = [(row, [call["function"] for call in row["tool_calls"]]) for row in rows if "tool_calls" in row]
        named = [(row, calls[0]) for row, calls in called if [call["name"] for call in calls] == [row["expects"]]]
        values = [(row["pattern"], "\n".join(map(str, call["arguments"].values()))) for row, call in named]
        right = [pair for pair in values if re.search(*pair, re.IGNORECASE)]
        print(file)
        for name, hits in {"call": called, "right tool": named, "right argument": right}.items():
            statistics.put_share({"scores": {}, "intervals": {}}, name, len(hits), len(rows))


if __name__ == "__main__":
    run_main(main)

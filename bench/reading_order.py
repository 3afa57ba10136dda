"""The way of a reader from the command to the first training step: functions in the order of their first call.

    python bench/reading_order.py
    python bench/reading_order.py MAX_STEPS=1 MODEL=out/demo

Runs qlora_train.py up to its first training step and prints every function of the project at its first call (main
thread; methods and nested functions count, comprehensions and lambdas do not), a heading for each stretch of functions
of one module. Arguments are settings of qlora_train.py.
"""

import inspect
import itertools
import runpy
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import Trainer


class FirstStep(Exception):
    """Training has reached its first step."""


def main():
    called, seen = [], set()

    def profile(frame, event, argument):
        code = frame.f_code
        if event != "call" or code in seen or threading.current_thread() is not threading.main_thread():
            return
        seen.add(code)
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        if is_function and code.co_filename.startswith(str(ROOT)) and ".venv" not in code.co_filename:
            called.append((code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname))

    def stop(*args, **kwargs):
        sys.setprofile(None)
        raise FirstStep

    Trainer.training_step = stop
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["qlora_train.py", "MAX_STEPS=1", *sys.argv[1:], f"OUT_DIR={folder}", "RUN_NAME=order"]
        sys.setprofile(profile)
        try:
            runpy.run_path(str(ROOT / "qlora_train.py"), run_name="__main__")
        except FirstStep:
            pass
    stretches = [(module, list(calls)) for module, calls in itertools.groupby(called, key=lambda call: call[0])]
    for module, calls in stretches:
        print(module, *(name for _, name in calls), sep="\n    ")
    print(f"{len(called)} functions in {len(stretches)} stretches of modules")


if __name__ == "__main__":
    main()

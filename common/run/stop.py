"""Signals and a STOP file turned into a request to stop."""

import os
import signal
import sys
from pathlib import Path

from common import distributed


class StopRequest:
    """Turns SIGTERM, Ctrl-C, SIGBREAK or a file STOP in the run folder into a wish, as a context manager.

    number: the signal, None as long as there is none. A second signal interrupts at once.
    """

    def __init__(self, folder: Path):
        self.file, self.number, self.before = folder / "STOP", None, {}

    def __enter__(self):
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):  # the last on Windows only
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup
                self.before[name] = signal.signal(getattr(signal, name), self.receive)
        return self

    def receive(self, number: int, frame) -> None:
        if self.number is not None:
            if distributed.count() > 1 and number != signal.SIGINT:
                return  # a launcher passes on what a terminal or a scheduler has sent to every process
            raise KeyboardInterrupt
        self.number = number
        if number == getattr(signal, "SIGHUP", None):  # the terminal is gone; writing to it would end the run
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print("stopping after this step, with a checkpoint; once more: at once", file=sys.stderr)

    def wished(self) -> bool:
        if self.number is None and self.file.exists():
            self.number = signal.SIGINT
        return self.number is not None

    def __exit__(self, *exc):
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)

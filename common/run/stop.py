"""Signals and a STOP file turned into a request to stop."""

import os
import signal
import sys
from pathlib import Path

from common import distributed

SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")]


class StopRequest:
    """Turns SIGTERM, Ctrl-C, SIGBREAK or a file STOP in the run folder into a request, as a context manager.

    number: the signal, None until there is one. A second signal interrupts at once.
    """

    def __init__(self, folder: Path):
        self.file, self.number, self.before = folder / "STOP", None, {}

    def __enter__(self):
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, frame) -> None:
        if self.number is not None:
            if distributed.count() > 1 and number != signal.SIGINT:
                return  # a launcher passes on what a terminal or a scheduler has sent to every process
            raise KeyboardInterrupt
        self.number = number
        if signal.Signals(number).name == "SIGHUP":  # the terminal is gone; writing to it would end the run
            sys.stdout = sys.stderr = open(os.devnull, "w")
        print("Stopping after this step and saving a checkpoint. Press Ctrl-C again to stop now.", file=sys.stderr)

    def requested(self) -> bool:
        if self.number is None and self.file.exists():
            self.number = signal.SIGINT
        return self.number is not None

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)

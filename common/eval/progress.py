"""How far a suite is, on a terminal."""

import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track


def show_progress(items: Iterable, what: str, total: int) -> Iterator:
    """The items, with a progress bar on stderr that goes when they end; none in a log file."""
    console, is_log = Console(stderr=True), not sys.stderr.isatty()
    return track(items, f"  {what}", total, console=console, transient=True, disable=is_log)

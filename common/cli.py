"""The command line: the user's mistakes as one line, exit codes, no secrets in the output."""

import atexit
import difflib
import errno
import io
import os
import re
import sys
import threading
import traceback

# What a secret looks like, and the names of environment variables that hold one.
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{40,}|gh[a-z]_\w{30,}|github_pat_\w{30,})")
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PAT|KEY)(_\d+)?$", re.IGNORECASE)
RANK = int(os.environ.get("RANK", 0))  # of this process, where a launcher has started several
exit_code = None  # with which run_main has ended


class UserError(Exception):
    """A user's mistake as one line. code: 3 for a refused resume, 4 for numbers not finite, else 2."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def redact(text: str) -> str:
    """The text without secrets, by their form or as values of environment variables."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8 and not os.path.exists(value):
            text = text.replace(value, "***")
    return SECRET.sub("***", text)


def nearest(name: str, names) -> str:
    """' Did you mean A or B?' for the names most like `name`; empty when none is near."""
    folded = {str(n).casefold(): str(n) for n in names}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(folded[c] for c in close)}?" if close else ""


def exit_with(error: UserError):
    print_error(f"error: {error}\n")
    raise SystemExit(error.code)


def print_error(text: str) -> None:
    """Write to stderr without secrets, from each of several processes."""
    stream = sys.__stderr__ if RANK else sys.stderr
    print(f"process {RANK}: " * bool(RANK) + redact(text), file=stream, end="")


def run_main(main) -> None:
    """Run a script's main; mistakes become one line and an exit code, Ctrl-C exit code 130."""
    global exit_code
    sys.excepthook = lambda *error: print_error("".join(traceback.format_exception(*error)))
    threading.excepthook = lambda error: sys.excepthook(*error[:3])
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # Windows would use a code page
    exit_code = 1
    try:
        report_errors(main)
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code
        raise


def report_errors(main) -> None:
    try:
        main()
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "OUT_DIR"
        exit_with(UserError(f"{place}: {error.strerror}. Make room, then the same command again."))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


def exit_without_teardown() -> None:
    """End one of several processes: in torch's teardown gloo aborts some, and NCCL waits."""
    if exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(exit_code)


if "RANK" in os.environ:
    atexit.register(exit_without_teardown)  # before slow imports: the last of all

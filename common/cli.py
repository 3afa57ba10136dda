"""The command line: the user's mistakes as one line, exit codes, no secrets in the output."""

import atexit
import difflib
import errno
import gc
import io
import os
import re
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Settings that libraries are given, and in the modules of data these, too.
LOADED = ("MODEL", "MODELS", "BASE", "COMPARE", "ADAPTER", "CHAT_TEMPLATE", "HUB_ID", "RUNS", "PICTURE", "PAGE")
READ = ("DATA", "EVAL_DATA", "CHATS", "PAIRS")
SIZED = ("MODEL", "BASE", "QUANTIZATION", "PROOF_DTYPE", "GENERATION_BATCH_SIZE", "CONTEXT", "MAX_LENGTH")
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
READER_GONE = (errno.EPIPE, errno.EINVAL)  # the latter on Windows
# What a secret looks like, and the names of environment variables that hold one.
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{40,}|gh[a-z]_\w{30,}|github_pat_\w{30,})")
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PAT|KEY)(_\d+)?$", re.IGNORECASE)
RANK = int(os.environ.get("RANK", 0))  # of this process, where a launcher has started several
exit_code = None  # with which run_main has ended
script: dict = {}  # the globals of the script that runs, with its settings
is_training = False  # from the first optimizer step on


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


def explain(error: Exception) -> Exception:
    """A UserError for what a library or the system raised before the first optimizer step, else the error itself.

    Such a line begins with a note on the error, or else with the settings that it may be about.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    known = FULL if is_training else (*FULL, *REFUSED)
    failed = next((e for e in chain if isinstance(e, OSError) and e.errno in known), None)
    if isinstance(error, UserError) or is_training and not failed:
        return error
    if explained := explain_memory(chain):
        return explained
    if failed or isinstance(error, OSError) and error.filename:
        return explain_file(failed or error)
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [file for file, _ in frames if ROOT / "common" in file.parents or file.parent == ROOT]
    file, line = frames[-1]
    is_library = type(error).__module__.partition(".")[0] not in ("builtins", "common")
    may_be_compiled = type(error) is RuntimeError or isinstance(error, OSError)  # torch's code has no frames
    if ours[-1] == file and not is_library and not may_be_compiled:
        return error
    names = LOADED + READ * (ours[-1].parent.name == "data")
    named = [f"{name}={script[name]}" for name in names if script.get(name)]
    head = f"{' '.join(named)}: a library cannot use it as it is: damaged, of another kind, or newer than the library."
    head += " Name another, or pip install -U transformers peft."
    head = getattr(error, "__notes__", [head])[0]
    for name in names:  # the setting of this value
        head = head.replace(f"MODEL={script.get(name)} ", f"{name}={script.get(name)} ")
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False, encoding="utf-8") as stream:
        stream.write(redact("".join(traceback.format_exception(error))))
    return UserError(f"{head} ({reason}, {file.name}:{line}; all of it in {stream.name})")


def explain_memory(chain: list[BaseException]) -> UserError | None:
    """Name the settings that memory goes by, and what to do; None for errors of another kind."""
    if "torch" not in sys.modules:
        return None
    from common.hardware import is_out_of_memory  # imports torch

    if not (ran_out := next(filter(is_out_of_memory, chain), None)):
        return None
    named = " ".join(f"{name}={script[name]}" for name in SIZED if name in script)
    reason = str(ran_out).partition("\n")[0][:200]
    remedy = "Close other programs, or set a smaller model, length or batch, or fewer bits (QUANTIZATION=nf4)."
    return UserError(f"{named}: memory ran out ({reason}). {remedy}")


def explain_file(error: OSError) -> UserError:
    """Name the setting or variable that a file lies in, and what to do."""
    from huggingface_hub.constants import HF_HOME

    place = str(error.filename or script.get("OUT_DIR") or "standard output")
    folders = {"HF_HOME": HF_HOME, "TMPDIR": tempfile.tempdir}
    folders |= {name: value for name, value in script.items() if name.isupper() and isinstance(value, str)}
    around = [name for name, folder in folders.items() if folder and place.startswith(folder)]
    below = [name for name, folder in folders.items() if folder and folder.startswith(f"{place}{os.sep}")]
    owner = max(around or below, key=lambda name: len(folders[name]), default="")
    remedy = f"Set {owner or 'HOME'} to a place that exists and can be read and written."
    if error.errno in FULL:
        remedy = "Make room, then the same command again."
    named = f"{owner}={folders[owner]}: " if owner and folders[owner] != place else f"{owner}=" * bool(owner)
    return UserError(f"{named}{place}: {error.strerror}. {remedy}")


def open_streams(goes_on: bool) -> None:
    """Standard streams in UTF-8 that outlive their reader: `| head`, a closed terminal, a full disk under a log.

    goes_on: the results are in files, so the program goes on; else it ends with exit code 0 (2 on a full disk).
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed from the start
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # Windows would use a code page
    outlive_reader(sys.stdout, goes_on)
    outlive_reader(sys.stderr, True)


def outlive_reader(stream, goes_on: bool) -> None:
    """Replace the methods of a stream, so that a handler which holds it already gets them, too."""
    if "write" in vars(stream):  # by an earlier script in this process
        return
    gone = False

    def guarded(method):
        def call(*arguments):
            nonlocal gone
            try:
                return method(*arguments)
            except OSError as error:
                was_gone, gone = gone, True
                if was_gone or goes_on:
                    return 0
                if error.errno not in READER_GONE:
                    raise
                raise SystemExit(0) from None

        return call

    stream.write, stream.flush = guarded(stream.write), guarded(stream.flush)


def exit_with(error: UserError):
    message = re.sub(r"[^\s/]{300,}", lambda found: f"{found[0][:100]}...", str(error))
    print_error(f"error: {message}\n")
    raise SystemExit(error.code)


def print_error(text: str) -> None:
    """Write to stderr without secrets, from each of several processes."""
    stream = sys.__stderr__ if RANK else sys.stderr
    print(f"process {RANK}: " * bool(RANK) + redact(text), file=stream, end="")


def run_main(main) -> None:
    """Run a script's main; mistakes become one line and an exit code, Ctrl-C exit code 130."""
    global exit_code, script, is_training
    sys.excepthook = lambda *error: print_error("".join(traceback.format_exception(*error)))
    threading.excepthook = lambda error: sys.excepthook(*error[:3])
    exit_code, script, is_training = 1, main.__globals__, False
    if not gc.isenabled():  # since apply_overrides
        gc.freeze()  # the libraries' objects stay: no collection looks at them again
        gc.enable()
    try:
        report_errors(main)
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code
        raise


def report_errors(main) -> None:
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(explained := explain(error), UserError):
            raise
        exit_with(explained)


def exit_without_teardown() -> None:
    """End one of several processes: in torch's teardown gloo aborts some, and NCCL waits."""
    if exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(exit_code)


if "RANK" in os.environ:
    atexit.register(exit_without_teardown)  # before slow imports: the last of all

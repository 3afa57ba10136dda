"""Chat with an exported model in a browser, and from any program that speaks OpenAI's API: llama.cpp's server.

    python merge_and_export.py MODEL=out/first GGUF=q8_0 RUN_NAME=export
    python serve_model.py MODEL=out/export

Only this machine reaches it. Ctrl-C stops it.
"""

from common.cli import UserError, run_main
from common.settings import apply_overrides

MODEL = "out/export"  # .gguf file, or the run folder of an export that holds one
PORT = 8080  # of 127.0.0.1; 0: any that is free
CONTEXT: int | None = 8192  # tokens of all open chats, which take memory from the start; None: what the model takes
THREADS: int | None = None  # None: one for each core; fewer where other programs compute, or it crawls

if __name__ == "__main__":
    apply_overrides(globals())

import os
import time
from pathlib import Path

import psutil
import xllamacpp


def main():
    file = find_gguf(Path(MODEL).expanduser())
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(file), {file.stem}
    params.port, params.n_ctx, params.n_parallel = PORT, CONTEXT or 0, -1  # -1: four chats at once share the context
    params.cors_origins = ""  # else any page in the user's browser could read the answers
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS or count_cores()
    params.verbosity = 1  # errors
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        problem = f"llama.cpp cannot serve {file.name} there (see above)"
        raise UserError(f"MODEL={MODEL} PORT={PORT}: {problem}. Is the port taken, the file whole?") from error
    address = server.listening_address
    print(f"{file.name}: chat at {address}, OpenAI's API at {address}/v1. Ctrl-C stops it.", flush=True)
    while True:
        time.sleep(1)  # Event().wait() would not hear Ctrl-C on Windows


def count_cores() -> int:
    """Cores that this process may use: fewer than there are under Slurm."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def find_gguf(path: Path) -> Path:
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if not files:
        export = f"python merge_and_export.py MODEL={MODEL} GGUF=q8_0 RUN_NAME=export"
        raise UserError(f"MODEL={MODEL}: no .gguf file there. Write one ({export}), then MODEL=out/export.")
    if len(files) > 1:
        raise UserError(f"MODEL={MODEL} holds several files. Name one: {', '.join(map(str, files))}.")
    return files[0]


if __name__ == "__main__":
    run_main(main)

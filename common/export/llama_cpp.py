"""llama.cpp: a checkout's converter and quantizer, and its server in this process."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import torch
from gguf import GGUFReader

from common.cli import UserError


def convert(checkout: Path, file: Path, folder: Path, kind: str) -> str:
    """Write a folder's model by a checkout's programs; UserError where they fail."""
    converted = kind if kind in ("f32", "f16", "bf16", "q8_0") else "bf16"
    whole = file if kind == converted else file.with_name(f"{file.name}.{converted}")
    converter = checkout / "convert_hf_to_gguf.py"
    run(converter.name, sys.executable, converter, folder, "--outfile", whole, "--outtype", converted)
    if kind != converted:
        found = [path for path in checkout.rglob("llama-quantize*") if path.stem == "llama-quantize"]
        if not found:
            raise UserError(f"LLAMA_CPP={checkout}: llama-quantize not found. GGUF={kind} needs it.")
        run("llama-quantize", found[0], whole, file, kind.upper())
        whole.unlink()
    return "by llama.cpp"


def run(name: str, *command) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"LLAMA_CPP: {name} failed: {last}. Update the checkout, or set LLAMA_CPP=None.")


def trained_context(file: Path) -> int:
    """Tokens of context that a GGUF file names, and that llama.cpp takes by default."""
    fields = GGUFReader(file).fields
    return fields[f"{fields['general.architecture'].contents()}.context_length"].contents()


class LlamaCpp:
    """A GGUF file in a server of the package xllamacpp, which ends with this object."""

    def __init__(self, file: Path, context: int):
        import xllamacpp

        self.context = context
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
        params.cpuparams.n_threads = torch.get_num_threads()  # OMP_NUM_THREADS; they spin where cores are shared
        self.server = xllamacpp.Server(params)  # raises RuntimeError for a file it cannot load

    def ask(self, path: str, **body) -> dict:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)

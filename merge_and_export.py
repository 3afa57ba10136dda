"""Merge an adapter into its base model and write GGUF files for llama.cpp and Ollama, each verified.

    python merge_and_export.py MODEL=out/first
    python merge_and_export.py MODEL=out/first GGUF="f16,q8_0,q4_k_m" RUN_NAME=export

Writes OUT_DIR/RUN_NAME/: final/ (the merged model), <name>-<kind>.gguf, Modelfile and export.json.
What fails verification is renamed .rejected, and the exit code is 5.
"""

from common.cli import UserError, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# Model
MODEL = "out/demo"  # run folder, adapter, local folder, hub id or .gguf file
QUANTIZATION: str | None = None  # of the base under an adapter: nf4, int8, hqq-4bit ...; None: as in training
MERGE_INTO: str | None = None  # after quantized training: original or dequantized base; None: the better
DTYPE = "bfloat16"  # of the merged weights
# GGUF
GGUF: str | None = None  # files to write: "f16, q8_0, q4_k_m", also f32 bf16 q4_0 q5_0 q5_k_m q6_k; None: merge only
PRE_TOKENIZER: str | None = None  # llama.cpp's name for how the tokenizer splits text; None: look it up
LLAMA_CPP: str | None = None  # folder of llama.cpp, whose converter and quantizer are used instead
# Verification
CHATS: str | None = None  # chats to compare on, as DATA in training; None: what the run held out, or data/brief.jsonl
PROOF_DTYPE = "float32"  # of its computations; bfloat16 takes half the memory, and its noise passes for a KL of 1e-4
PROOF_TOKENS = 1000  # tokens of answers to compare; each takes 4 bytes for every token of the vocabulary
MAX_LENGTH = 1024  # tokens of each of these chats
# Output
HUB_ID: str | None = None  # org/name: upload what is verified there, with the token of the environment
HUB_PRIVATE = True  # False: anyone can read it
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: merge_and_export-<time>

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)
    check_files(CHATS=CHATS)

import json
import math
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each model that is loaded would hide the table

from transformers.utils import logging

from common.data.encoder import ChatEncoder
from common.export import gguf, hub, llama_cpp, merge, verify
from common.export.gguf_tokenizer import modelfile
from common.export.verify_gguf import verify_gguf
from common.files import check_space, write_atomic
from common.model import load, location
from common.model.quantize import check_quantization
from common.run.folder import create_folder


def main():
    # Settings: find every mistake before loading weights
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = location.locate(MODEL)
    config = load.load_config(source)
    quantization = QUANTIZATION or location.trained_with(source)
    check_quantization(quantization)
    bases = merge.choose_bases(source, config, quantization, MERGE_INTO)
    kinds = [kind for kind in (GGUF or "").replace(" ", "").split(",") if kind]
    gguf.check(config, kinds, LLAMA_CPP)
    tokenizer, run = merge.load_chat_tokenizer(source), find_run()
    rows = verify.held_out_rows(CHATS, run, ChatEncoder(tokenizer), MAX_LENGTH, PROOF_TOKENS)
    folder = create_folder(OUT_DIR, RUN_NAME, __file__, current(globals()))
    check_space(folder, load.count_weights(config) * sum(map(gguf.bytes_per_weight, (DTYPE, *kinds))))

    # The trained model, with which the merged one is compared
    reference = verify.Reference(source, quantization, load.choose_dtype(PROOF_DTYPE), tokenizer, rows)
    print(f"{MODEL}: perplexity {reference.perplexity:.3f} on {len(reference.predictions)} tokens of answers")

    # Merge, save, and verify what was saved
    model, kept, merges = merge.merge_best(source, bases, quantization, load.choose_dtype(DTYPE), reference)
    merge.save_merged(folder / "unverified", model, tokenizer, hub.model_card(MODEL, source.name, run))
    del model
    # Another base than in training makes another model, as much as was measured.
    expected = kept["kl"] if quantization and kept["into"] == "original" else 0
    bound = verify.MERGE_BOUND + expected
    saved, saved_kl = verify.verify_merged(folder / "unverified", reference, bound, answers=bool(kinds))
    (folder / "unverified").rename(folder / "final")

    # GGUF files, which are compared with the merged model
    files = write_files(kinds, folder, saved) if kinds else []
    about = dict(model=MODEL, base=source.name, quantization=quantization, merges=merges, saved_kl=saved_kl)
    write_atomic(folder / "export.json", json.dumps(about | {"files": files}, indent=1))
    print(f"\nmerged model: {folder / 'final'}\ntalk to it: python chat_pipe.py MODEL={folder}")
    if rejected := [file["file"] for file in files if file["faults"]]:
        raise UserError(
            f"GGUF={GGUF}: verification failed for {', '.join(rejected)}; the faults are above and in export.json. "
            "Take a kind with more bits, or set LLAMA_CPP.",
            code=5,
        )
    if HUB_ID:
        hub.upload(folder, [file["file"] for file in files], HUB_ID, HUB_PRIVATE)


def find_run() -> Path | None:
    """The run folder that MODEL is, or is inside of."""
    path = Path(MODEL).expanduser()
    return next((run for run in (path, path.parent) if (run / "settings.json").is_file()), None)


def write_files(kinds: list[str], folder: Path, reference: verify.Reference) -> list[dict]:
    """Write and verify a GGUF file of each kind; returns what was measured, with the faults."""
    name = Path(MODEL).name.removesuffix(".gguf")
    results, width = [], len(name) + 14
    print(f"{'file':<{width}}    MiB        KL  perplexity  answers ended  tokens/s")
    for kind in kinds:
        file = folder / f"{name}-{kind}.gguf"
        partial = file.with_name(f"{file.name}.partial")
        if LLAMA_CPP:
            llama_cpp.convert(Path(LLAMA_CPP), partial, folder / "final", kind)
            note = "by llama.cpp"
        else:
            note = gguf.write(partial, folder / "final", reference.config, reference.tokenizer, kind, PRE_TOKENIZER)
        result = {"file": file.name, "note": note} | verify_gguf(partial, kind, reference)
        faults = result["faults"]
        partial.rename(f"{file}.rejected" if faults else file)
        results.append({key: None if value == math.inf else value for key, value in result.items()})
        kl, perplexity = ("-" if result[key] is None else f"{result[key]:.4g}" for key in ("kl", "perplexity"))
        print(
            f"{file.name:<{width}}{result['bytes'] / 2**20:>7.1f}{kl:>10}{perplexity:>12}"
            f"{result['ended']:>10} of {result['prompts']}{result['tokens_per_second']:>10.1f}"
        )
        for line in [note] * bool(note) + [f"REJECTED: {fault}" for fault in faults]:
            print(f"  {line}")
    if verified := [result["file"] for result in results if not result["faults"]]:
        write_atomic(folder / "Modelfile", modelfile(verified[-1], reference.tokenizer))
    return results


if __name__ == "__main__":
    run_main(main)

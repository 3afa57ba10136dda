"""Merge an adapter into its base model, write GGUF files for llama.cpp and Ollama, verify each.

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
ADAPTER: str | None = None  # adapter folder, run folder or hub id that goes on MODEL; None: MODEL's own, if any
QUANTIZATION: str | None = "auto"  # of the base: auto, as in training; nf4, int8, hqq-4bit ...; None: 2 bytes a weight
MERGE_INTO: str | None = None  # original or dequantized base, after quantized training; None: the better
DTYPE = "bfloat16"  # merged weights
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa, or eager where the model has no other
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
TEMPLATE_OPTIONS = ""  # variables of the template: "enable_thinking=False, date_string=26 Jul 2024"
# GGUF
GGUF: str | None = None  # "f16, q8_0, q4_k_m", also f32 bf16 q4_0 q5_0 q5_k_m q6_k; None: merge only
PRE_TOKENIZER: str | None = None  # llama.cpp's name of the pre-tokenizer; None: look it up
LLAMA_CPP: str | None = None  # checkout, whose converter and quantizer to use
# Verification
CHATS: str | None = None  # chats to compare on, as DATA; None: what the run held out, or data/brief.jsonl
PROOF_DTYPE: str | None = None  # computations; None: float32 on GPU or CPU, else 16 bits, which are less exact
PROOF_TOKENS = 1000  # tokens of answers to compare; 4 bytes each for every token of the vocabulary
MAX_LENGTH = 1024  # tokens of each of these chats
# Output
HUB_ID: str | None = None  # org/name: upload there what is verified, with the environment's token
HUB_PRIVATE = True  # False: anyone can read it
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: merge_and_export-<time>

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL, ADAPTER=ADAPTER)
    check_files(current(globals()), "CHATS")

import json
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # bars would hide the table

from transformers.utils import logging

from common import distributed
from common.bounds import split_list
from common.export import gguf, gguf_config, hub, llama_cpp, merge, proof, verify, verify_gguf
from common.export.gguf_tokenizer import modelfile
from common.files import check_space, write_atomic
from common.model import load, location
from common.run.folder import create_folder


def main():
    # Settings: find every mistake before loading weights
    distributed.device()  # first of all: it says why a GPU is not used
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = location.locate(MODEL, adapter=ADAPTER)
    config, run = load.load_config(source), location.run_folder(source)
    quantization = load.find_quantization(source, QUANTIZATION)
    bases = merge.choose_bases(source, quantization, MERGE_INTO)
    dtype, kinds = load.choose_dtype(DTYPE), split_list(GGUF)
    gguf.check(config, kinds, LLAMA_CPP)
    tokenizer = merge.load_chat_tokenizer(source, CHAT_TEMPLATE, TEMPLATE_OPTIONS)
    card = hub.model_card(ADAPTER or MODEL, source.name, run)
    rows = verify.held_out_rows(CHATS, run, tokenizer, MAX_LENGTH, PROOF_TOKENS)
    where = proof.choose_proof(config, PROOF_DTYPE, dtype, rows, bool(kinds))
    folder = create_folder(current(globals()), __file__)
    check_space(folder, load.count_weights(config) * gguf.bytes_per_weight(DTYPE, *kinds))

    # The trained model, with which the merged one is compared
    reference = verify.Reference(source, quantization, where, ATTN_IMPLEMENTATION, tokenizer, rows)
    print(f"{ADAPTER or MODEL}: perplexity {reference.perplexity:.3f} on {len(reference.predictions)} tokens")

    # Merge, save, and verify what was saved
    model, kept, merges = merge.merge_best(source, bases, quantization, dtype, reference)
    merge.save_merged(folder, model, tokenizer, card)
    del model
    # Another base than in training makes another model, whose divergence was measured.
    bound = verify.MERGE_BOUNDS[where.dtype] + (kept["kl"] if quantization and kept["into"] == "original" else 0)
    saved, saved_kl = verify.verify_merged(folder, reference, bound, bool(kinds))

    # GGUF files, which are compared with the merged model
    files = write_files(kinds, folder, saved) if kinds else []
    report = dict(model=ADAPTER or MODEL, base=source.name, quantization=quantization, merges=merges, saved_kl=saved_kl)
    write_atomic(folder / "export.json", json.dumps(report | {"files": files}, indent=1))
    print(f"\nmerged model: {folder / 'final'}\ntalk to it: python chat_pipe.py MODEL={folder}")
    if rejected := [file["file"] for file in files if file["faults"]]:
        remedy = "The faults are in export.json. Choose a kind with more bits, or set LLAMA_CPP."
        raise UserError(f"GGUF: {', '.join(rejected)} failed verification. {remedy}", code=5)
    if HUB_ID:
        hub.upload(folder, [file["file"] for file in files], HUB_ID, HUB_PRIVATE)


def write_files(kinds: list[str], folder: Path, reference: verify.Reference) -> list[dict]:
    """Write and verify a GGUF file of each kind; returns measurements and faults."""
    config, tokenizer = reference.config, reference.tokenizer
    name, results = Path(ADAPTER or MODEL).name.removesuffix(".gguf"), []
    row = f"{{:<{len(name) + 14}}}{{:>7}}{{:>10}}{{:>12}}{{:>15}}{{:>10}}"
    print(row.format("file", "MiB", "KL", "perplexity", "answers ended", "tokens/s"))
    if (change := gguf_config.last_change(config)) > verify.LONGEST:
        print(
            f"compared on texts of up to {verify.LONGEST} tokens, which end before window or original context: {change}"
        )
    for kind in kinds:
        file = folder / f"{name}-{kind}.gguf"
        partial = file.with_name(f"{file.name}.partial")
        if LLAMA_CPP:
            note = llama_cpp.convert(Path(LLAMA_CPP), partial, folder / "final", kind)
        else:
            note = gguf.write(partial, folder / "final", config, tokenizer, kind, PRE_TOKENIZER)
        result = verify_gguf.verify_gguf(partial, kind, reference)
        partial.rename(f"{file}.rejected" if result["faults"] else file)
        results.append({"file": file.name, "note": note} | result)
        measured = (result["kl"], result["perplexity"])
        numbers = ("-" if value is None else f"{value:.4g}" for value in measured)
        mib, speed = f"{result['bytes'] / 2**20:.1f}", f"{result['tokens_per_second']:.1f}"
        ended = f"{result['ended']} of {result['prompts']}"
        print(row.format(file.name, mib, *numbers, ended, speed))
        for line in filter(None, [note, *(f"REJECTED: {fault}" for fault in result["faults"])]):
            print(f"  {line}")
    if verified := [result["file"] for result in results if not result["faults"]]:
        write_atomic(folder / "Modelfile", modelfile(verified[-1], tokenizer))
        print(f"in a browser: python serve_model.py MODEL={folder / verified[-1]}")
    return results


if __name__ == "__main__":
    run_main(main)

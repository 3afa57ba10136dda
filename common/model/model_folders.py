"""Folders that hold a model, an adapter or a run: what is in them, and what a hub id brings. Torch-free."""

import functools
import json
import os
import sys
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants

from common.cli import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's, of an adapter
# Of an adapter on the hub: these and its tokenizer's; nothing that is unpickled.
FETCHED = [CONFIG, WEIGHTS, "tokenizer*", "vocab*", "merges.txt", "*_tokens*.json", "chat_template*", "config.json"]
CONVERT = {  # pickles, which may hold code; torch.load reads nothing but tensors here
    "adapter_model.bin": "import torch, safetensors.torch as s; s.save_file({{n: t.clone() for n, t in "
    "torch.load('{0}/adapter_model.bin', weights_only=True).items()}}, '{0}/adapter_model.safetensors')",
    "pytorch_model*.bin": "from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained('{0}', use_safetensors=False).save_pretrained('{0}')",
}


@functools.cache
def tell(text: str) -> None:
    """Print a line once, however often a model is located."""
    print(text, file=sys.stderr)


def inner_folder(folder: Path, label: str) -> Path:
    """The folder itself, `final` of a run of ours, or the only one in it that holds a model; UserError for several."""
    if run_settings(folder) is not None:
        if not (folder / "final").is_dir():
            raise UserError(f"{label}: this run has no final/ yet. Take a checkpoint: {folder}/checkpoint-N.")
        return folder / "final"
    if is_adapter(folder) or holds_weights(folder):
        return folder
    inner = sorted((path for path in folder.iterdir() if holds_model(path)), key=lambda path: (len(path.name), path))
    if len(inner) == 1:
        tell(f"{label}: its {inner[0].name} is taken")
        return inner_folder(inner[0], label)
    if inner:
        names = ", ".join(path.name for path in inner[-9:])
        last = f"{label.partition('=')[0]}={inner[-1]}"
        raise UserError(f"{label} holds {len(inner)} models: {names}. Name one: {last}")
    return folder


def holds_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or holds_weights(folder) or run_settings(folder) is not None


def holds_weights(folder: Path) -> bool:
    """Whether it holds a whole model."""
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "config.json").is_file() and bool(weights)


def is_adapter(folder: Path) -> bool:
    """Whether it holds an adapter and no whole model, beside which an adapter_config.json may have been left over."""
    return (folder / CONFIG).is_file() and not holds_weights(folder)


def refuse_pickles(folder: Path, label: str, pattern: str) -> None:
    """UserError, with the command that converts them, where a folder's weights are pickled."""
    if list(folder.glob(pattern)):
        command = CONVERT[pattern].format(folder.as_posix())
        raise UserError(f'{label}: its weights are pickled and may hold code. Convert them: python -c "{command}"')


def read_json(file: Path, label: str) -> dict:
    """The object in a JSON file; UserError where it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return dict(value)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{label}: {file.name} is damaged ({error}). Copy or fetch it again.") from error


def run_settings(folder: Path) -> dict | None:
    """The settings of a run of ours; None for other folders, though other tools write a settings.json, too."""
    try:
        metadata = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    settings = metadata.get("settings") if isinstance(metadata, dict) and "script" in metadata else None
    return settings if isinstance(settings, dict) else None


@functools.cache
def fetch_adapter(name: str) -> str | None:
    """The folder of the adapter that a hub id names; None for a model, or where neither hub nor cache knows it."""
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    is_online = True
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG), retry_on_errors=False)
    except EntryNotFoundError:
        return None
    except (OSError, httpx2.TransportError) as error:  # no access or no such name: the loading will tell
        is_online = False
        if isinstance(error, httpx2.TransportError):  # the libraries would try for minutes
            constants.HF_HUB_OFFLINE = True
            tell("the hub cannot be reached: models are taken from the cache")
        if not isinstance(try_to_load_from_cache(name, CONFIG), str):
            return None
    try:
        return snapshot_download(name, allow_patterns=FETCHED, local_files_only=not is_online)
    except (OSError, httpx2.TransportError) as error:
        raise UserError(f"the adapter {name} cannot be fetched ({error}). The same command tries again.") from error


@functools.cache
def holds_weights_on_hub(name: str) -> bool:
    """Whether a hub id, by the hub or else by its cache, brings a whole model."""
    import httpx2
    from huggingface_hub import file_exists, try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    try:
        return any(file_exists(name, file) for file in files)
    except (OSError, httpx2.TransportError):
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a bf16 folder in Hugging Face format."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # others may start at the same time
        if folder.is_dir():
            return
        import torch  # slow imports
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        print(f"converting {file.name} once, to {folder}", file=sys.stderr)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        options = dict(gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)

"""For the Hugging Face hub: the model card, and the upload of verified files."""

import json
from pathlib import Path

from common.cli import UserError


def model_card(model: str, base: str, run: Path | None) -> str:
    """The README.md of a model: base, settings; of a final one also summary and scores. Raises UserError."""
    text = f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    text += f"# {Path(model).name.removesuffix('.gguf')}\n\nFine-tuned from {base}.\n"
    is_final = run and Path(model).expanduser() in (run, run / "final")
    for name in ("settings", "summary", "scores") if is_final else ("settings",):
        file = run and run / f"{name}.json"
        try:
            text += table(name, json.loads(file.read_text(encoding="utf-8"))) if file and file.is_file() else ""
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"MODEL={model}: {file} is damaged ({error!r}). Take it away.") from error
    return text


def table(name: str, contents: dict) -> str:
    values = contents["settings"] if name == "settings" else contents
    if name == "scores":  # as evaluate_model.py writes them
        quantization = contents["settings"]["QUANTIZATION"]
        name = f"score (95 % interval) before merging, QUANTIZATION={quantization}"
        values = {score: f"{value:.4g}" for score, value in contents["scores"].items()}
        for score, interval in contents["intervals"].items():
            if interval:  # None: too few answers
                values[score] += " ({:.4g} to {:.4g})".format(*interval)
    plain = {key: str(value) for key, value in values.items() if not isinstance(value, (list, dict))}
    rows = ["| {} | {} |\n".format(key, value.replace("|", "\\|")) for key, value in plain.items()]
    return "".join([f"\n| {name} | |\n|---|---|\n", *rows])


def upload(folder: Path, files: list[str], hub_id: str, private: bool) -> None:
    """Upload an export; UserError for a public repository if `private`."""
    from huggingface_hub import HfApi

    others = [folder / name for name in (*files, "Modelfile", "export.json")]
    paths = [path for path in sorted((folder / "final").iterdir()) + others if path.is_file()]
    print(f"uploading to {hub_id}, {'private' if private else 'PUBLIC'}:")
    for path in paths:
        print(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:.1f} MiB")
    hub = HfApi()
    hub.create_repo(hub_id, private=private, exist_ok=True)
    if private and not hub.repo_info(hub_id).private:
        raise UserError(f"HUB_ID={hub_id} exists and is public. Set HUB_PRIVATE=False, or name another.")
    for path in paths:
        hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=hub_id)

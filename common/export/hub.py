"""For the Hugging Face hub: the model card, and the upload of verified files."""

import json
from pathlib import Path

from common.cli import UserError


def model_card(model: str, base: str, run: Path | None) -> str:
    """The README.md of a model: its base, and its run's settings, summary and scores.

    A checkpoint gets the settings only: summary and scores belong to the run's final model.
    """
    text = f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    text += f"# {Path(model).name.removesuffix('.gguf')}\n\nFine-tuned from {base}.\n"
    files = ("settings", "summary", "scores")
    if run and Path(model).expanduser() not in (run, run / "final"):
        files = ("settings",)
    for name in files if run else ():
        file = run / f"{name}.json"
        if file.is_file():
            text += table(name, json.loads(file.read_text(encoding="utf-8")))
    return text


def table(name: str, contents: dict) -> str:
    """A Markdown table of one of a run's files: a row for each plain value."""
    values = contents["settings"] if name == "settings" else contents
    if name == "scores":  # as evaluate_model.py writes them
        name, values = "score of the model before merging, 95 % interval", {}
        for score, value in contents["scores"].items():
            interval = contents["intervals"][score]  # None: too few answers
            values[score] = f"{value:.4g}"
            if interval:
                values[score] += " ({:.4g} to {:.4g})".format(*interval)
    plain = [item for item in values.items() if not isinstance(item[1], (list, dict))]
    rows = "".join(f"| {key} | {value} |\n" for key, value in plain)
    return f"\n| {name} | |\n|---|---|\n{rows}"


def upload(folder: Path, files: list[str], hub_id: str, private: bool) -> None:
    """Upload an export with the environment's token; UserError where it would become public unasked."""
    from huggingface_hub import HfApi

    others = (folder / name for name in (*files, "Modelfile", "export.json"))
    paths = [path for path in (*sorted((folder / "final").iterdir()), *others) if path.is_file()]
    print(f"uploading to {hub_id}, {'private' if private else 'PUBLIC'}:")
    for path in paths:
        print(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:.1f} MiB")
    hub = HfApi()
    hub.create_repo(hub_id, private=private, exist_ok=True)
    if private and not hub.repo_info(hub_id).private:
        raise UserError(f"HUB_ID={hub_id} exists and is public. Set HUB_PRIVATE=False, or name another.")
    for path in paths:
        hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=hub_id)

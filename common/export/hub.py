"""For the Hugging Face hub: the model card, and the upload of verified files."""

import json
from pathlib import Path

from common.cli import UserError


def model_card(model: str, base: str, run: Path | None) -> str:
    """The README.md of a model: its base, and its run's settings, summary and scores.

    model: as MODEL names it. run: the folder of the run that made it.
    A checkpoint gets the settings only: summary and scores belong to the run's final model.
    """
    text = f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    text += f"# {Path(model).name.removesuffix('.gguf')}\n\nFine-tuned from {base}.\n"
    if run is None:
        return text
    text += table(("Setting", "Value"), items(read(run / "settings.json")["settings"]))
    if Path(model).expanduser() not in (run, run / "final"):
        return text
    text += table(("Result", "Value"), items(read(run / "summary.json")))
    if scores := read(run / "scores.json"):
        rows = []
        for name, value in scores["scores"].items():
            interval = scores["intervals"][name]  # None: too few answers
            rows.append((name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*interval) if interval else ""))
        quantization = scores["settings"]["QUANTIZATION"]
        text += f"\nScores by evaluate_model.py before merging, with QUANTIZATION={quantization}:\n"
        text += table(("Score", "Value", "95 % interval"), rows)
    return text


def read(file: Path) -> dict:
    """Contents of a JSON file; empty where it does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def items(values: dict) -> list[tuple]:
    return [(name, value) for name, value in values.items() if not isinstance(value, (list, dict))]


def table(head: tuple, rows: list[tuple]) -> str:
    """A Markdown table; cells may contain |, as regular expressions do."""
    cells = [head, ("---",) * len(head)]
    cells += [tuple(str(cell).replace("|", "\\|") for cell in row) for row in rows]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def upload(folder: Path, files: list[str], hub_id: str, private: bool) -> None:
    """Upload the merged model and the verified files of an export, with the token of the environment.

    Raises UserError where the repository exists and is public, against HUB_PRIVATE.
    """
    from huggingface_hub import HfApi

    paths = [*sorted((folder / "final").iterdir()), *(folder / name for name in (*files, "Modelfile", "export.json"))]
    paths = [path for path in paths if path.is_file()]
    print(f"uploading to {hub_id}, {'private' if private else 'PUBLIC'}:")
    for path in paths:
        print(f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:.1f} MiB")
    hub = HfApi()
    hub.create_repo(hub_id, private=private, exist_ok=True)
    if private and not hub.repo_info(hub_id).private:
        raise UserError(f"HUB_ID={hub_id} exists and is public. Set HUB_PRIVATE=False, or name another.")
    for path in paths:
        hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=hub_id)

"""What the files of a run folder say of the run."""

import json
import os
from pathlib import Path

from common.cli import redact
from common.files import METRICS
from common.train import checkpoints


def read_run(folder: Path) -> dict:
    """What the files of a run folder hold; those that are not there are empty. ValueError for damaged ones."""
    metadata, file = read(folder / "settings.json"), folder / METRICS
    settings = metadata.get("settings", {})
    prepared = Path(os.path.expanduser(str(settings.get("DATA"))))  # by prepare_data.py
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    metrics = [flat(parse(line)) for line in lines if line.endswith("\n")]  # the last is being written
    return dict(
        metadata=metadata,
        settings=settings,
        metrics=metrics,
        events=events_of(metrics, checkpoints.published(folder)),
        summary=read(folder / "summary.json"),
        results=read(folder / "scores.json"),
        account=read(folder / "data" / "report.json") or read_account(prepared / "report.json"),
        examples=read(folder / "data" / "examples.json").get("examples", []),
    )


def read(file: Path) -> dict:
    content = parse(file.read_text(encoding="utf-8")) if os.path.isfile(file) else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not what a run wrote")
    return content


def parse(text: str):
    """What JSON says, its strings without secrets."""
    return without_secrets(json.loads(text))


def without_secrets(value):
    if isinstance(value, dict):
        return {key: without_secrets(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def read_account(file: Path) -> dict:
    """The account of prepare_data.py; a user's folder may hold another file of this name."""
    try:
        content = read(file)
    except ValueError:
        return {}
    return content if "length_percentiles" in content else {}


def is_for_kl_only(entry: dict) -> bool:
    """Whether no token of a step was in the loss: its rows hold the model to the base."""
    return entry.get("loss") == 0 and "kl" in entry


def flat(entry: dict) -> dict:
    """A line of metrics.jsonl with the memory that counts, and the shares of facts as fields of their own."""
    if is_for_kl_only(entry):
        entry = entry | {"loss": None}
    memory = entry.get("rss_gib") if entry.get("vram_gib") is None else entry["vram_gib"]
    return entry | {"memory_gib": memory} | {f"facts: {kind}": share for kind, share in entry.get("facts", {}).items()}


def events_of(metrics: list[dict], kept: list[Path]) -> list[tuple]:
    """(step, kind, text, chats of a loss spike) of what happened, in order. kept: checkpoints."""
    found = [(checkpoints.step_of(folder), "checkpoint", f"{folder.name} is kept", ()) for folder in kept]
    for m in metrics:
        if spike := m.get("spike"):
            text = f"spike: loss {spike['loss']:.2f}, usually {spike['usual']:.2f}"
            found.append((spike["step"], "spike", text, spike["chats"]))
        if bad := m.get("bad_steps"):
            found.append((m["step"], "bad", f"not finite, no update: {bad} step{'s' * (bad > 1)}", ()))
        for step, text in m.get("events", ()):
            found.append((step, text.partition(":")[0], text.partition(". ")[0], ()))  # without the remedy
    return sorted(found, key=lambda event: event[0])

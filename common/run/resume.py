"""The rules of resuming: what may change when a run goes on, and what would make it another run."""

import contextlib
import json
from pathlib import Path

from common import distributed
from common.bounds import CHANGEABLE
from common.cli import UserError
from common.train import checkpoints

DATA_SETTINGS = {"DATA", "EVAL_DATA", "EVAL_SIZE", "MAX_SAMPLES", "TOO_LONG", "DROP_PATTERN"}  # decide what rows become
FREE = {"RESUME", "OUT_DIR", "RUN_NAME", "ALLOW_CHANGE", "MEMORY_LIMIT"}  # change nothing of a run


def refuse_changes(folder: Path, settings: dict) -> None:
    """Exit code 3 when a resume would go on with other settings than the newest checkpoint, or the run, began with."""
    now = settings, distributed.count(), distributed.engine()
    before, processes, engine = read_settings(folder) or now
    if (processes, engine) != now[1:]:
        # Optimizer states, random numbers and rows belong to processes.
        raise UserError(
            f"RESUME=auto: the run began with {processes} processes ({engine}), now there are {now[1]} ({now[2]}). "
            "Start it as before, or start a new run.",
            code=3,
        )
    allowed = FREE | allowed_changes(settings)
    changed = [name for name, value in settings.items() if name not in allowed and before.get(name) != value]
    if changed:
        difference = ", ".join(f"{name} was {before.get(name)}, now {settings[name]}" for name in changed)
        allowing = f"allow it (ALLOW_CHANGE={','.join(changed)}), " if set(changed) <= set(CHANGEABLE) else ""
        raise UserError(
            f"RESUME=auto would change the run: {difference}. Set it back, {allowing}or start a new run.", code=3
        )


def read_settings(folder: Path) -> tuple[dict, int, str | None] | None:
    """Settings, processes and engine of the newest checkpoint, or else of the run; None where all are damaged."""
    manifests = [checkpoint / checkpoints.MANIFEST for checkpoint in checkpoints.published(folder)]
    for file in [*manifests, folder / "settings.json"]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metadata = json.loads(file.read_text(encoding="utf-8"))
            return metadata["settings"], metadata["processes"], metadata["engine"]
    return None


def allowed_changes(settings: dict) -> set[str]:
    """The settings that ALLOW_CHANGE names."""
    return set(filter(None, settings["ALLOW_CHANGE"].replace(" ", "").split(",")))

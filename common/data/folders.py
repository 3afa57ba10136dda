"""The files that a name in DATA stands for: one, those of a folder or a pattern, a set from save_to_disk."""

import json
import os
import re
from pathlib import Path

from common.cli import UserError
from common.data import readers

SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?:ing)?(?![a-z])", re.IGNORECASE)

ABOUT = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside the rows
NOT_PREPARED = "It is no folder of prepare_data.py: there is no report.json in it."


def is_prepared(name: str | None) -> bool:
    """Whether a folder is one of prepare_data.py."""
    return bool(name) and os.path.isfile(os.path.join(os.path.expanduser(name), "report.json"))


def find_files(name: str) -> tuple[list[Path], str | None] | None:
    """(files, key of the rows in a JSON file or None) of a file, folder or pattern, with `:split` or without.

    None: there is nothing of that name. Raises UserError.
    """
    stem, _, split = name.rpartition(":")
    if os.path.exists(os.path.expanduser(name)) or not stem or not re.fullmatch(r"[\w.-]+", split):
        stem, split = name, None
    path = Path(os.path.expanduser(stem))
    if os.path.isfile(path):
        check_containers([path], stem)
        return [path], split
    if os.path.isdir(path):
        return files_in(path, split), None
    if not re.search(r"[*?[]", stem):
        return None
    found = files_like(path)
    if found and split:
        found = of_split(found, split, stem, Path(os.path.commonpath([file.parent for file in found])))
    return found and (check_containers(found, stem), None)


def files_like(path: Path) -> list[Path]:
    """Files that a pattern matches; brackets in the names of folders that exist stand for themselves."""
    root = next((parent for parent in path.parents if os.path.isdir(parent)), None)
    try:
        found = root.glob(str(path.relative_to(root))) if root else []
        return in_order(file for file in found if file.is_file() and not file.name.startswith("."))
    except (ValueError, OSError) as error:  # "**.jsonl"
        raise UserError(f"{path}: no pattern of files ({error}).") from error


def in_order(files) -> list[Path]:
    """Sorted with numbers by their size: shard-2 before shard-10."""
    return sorted(
        files, key=lambda file: [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", str(file))]
    )


def check_containers(files: list[Path], name: str) -> list[Path]:
    """The files; UserError where one has no reader, or where several kinds are mixed."""
    unknown = [file for file in files if not readers.container(file)]
    if unknown:
        listed = f"{', '.join(readers.READERS)}, also compressed ({', '.join(readers.COMPRESSED)})"
        raise UserError(f"{unknown[0]}: files end in {listed}." if len(files) > 1 else f"files end in {listed}.")
    kinds = sorted({readers.container(file) for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"{name}: files of several kinds ({', '.join(kinds)}); name one: {files[0].parent}/*{kinds[0]}."
        )
    return files


def files_in(folder: Path, split: str | None) -> list[Path]:
    """The files of a folder of shards or of save_to_disk, of one split; UserError where there are none."""
    if is_prepared(str(folder)):
        raise UserError(f"{folder}: a folder of prepare_data.py; it can only be DATA, and alone.")
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            chosen = split or "train"
            if chosen not in splits:
                raise UserError(f"{folder}: no split {chosen}; name one: {', '.join(f'{folder}:{s}' for s in splits)}.")
            folder, split = folder / chosen, None
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if split:
                raise UserError(f"{folder}: it is one split; leave out :{split}.")
            return [folder / item["filename"] for item in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the set of save_to_disk is damaged ({error!r}); save it again.") from error
    files = readable_in(folder, "*") or readable_in(folder, "**/*")
    try:
        if not files:
            raise UserError(f"{folder}: it is a folder without files that end in {', '.join(readers.READERS)}.")
        return of_split(files, split, str(folder), folder)
    except UserError as error:
        raise UserError(f"{error} {NOT_PREPARED}") from error


def readable_in(folder: Path, pattern: str) -> list[Path]:
    """The files with rows; hidden ones, and those of prepare_data.py, are left out."""
    files = (file for file in folder.glob(pattern) if not re.search(r"(^|/)\.", file.relative_to(folder).as_posix()))
    files = (file for file in files if file.name not in ABOUT and readers.container(file) and file.is_file())
    return in_order(file for file in files if not is_prepared(str(file.parent)))


def of_split(files: list[Path], split: str | None, name: str, root: Path) -> list[Path]:
    """All files, or those of the split asked for; UserError where their names tell of several and none is asked for."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = SPLIT.findall(file.relative_to(root).as_posix())
        splits.setdefault(words[-1].lower() if words else "", []).append(file)
    listed = ", ".join(f"{name}:{word}" for word in splits if word) or "no file has one in its name"
    if split and split not in splits:
        raise UserError(f"{name}: no files of the split {split}; {listed}.")
    if not split and len(splits.keys() - {""}) > 1:
        raise UserError(f"{name}: it holds files of several splits; name one: {listed}.")
    return check_containers(splits[split] if split else files, name)

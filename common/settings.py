"""Settings: UPPER_CASE constants at the top of a script, changed from the shell as NAME=value.

This module imports nothing slow, so that a typing mistake is answered before torch is loaded.
"""

import ast
import io
import math
import os
import sys
import tokenize
from pathlib import Path

from common.cli import RANK, SECRET, SECRET_NAME, UserError, exit_with, nearest, redact

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}


def check_choice(name: str, value, choices) -> None:
    """Raise UserError unless the setting's value is one of `choices`."""
    if value not in choices:
        listed = ", ".join(str(c) for c in choices)
        raise UserError(f"{name}={value} is not known.{nearest(value, choices)} Choose one of: {listed}.")


def declared(script: str | Path) -> list[dict]:
    """The settings a script declares, in order: dicts of name, types (tuple), comment, and group (the comment above).

    A setting's types come from its annotation (`MAX_STEPS: int | None = None`), or else from its default.
    """
    source = Path(script).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    settings, group, lines_with_settings = [], "", set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.If):  # the guard that calls apply_overrides: settings end here
            break
        annotated = isinstance(node, ast.AnnAssign)
        target = node.target if annotated else node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        if annotated:
            types = tuple(TYPES[part.strip()] for part in ast.unparse(node.annotation).split("|"))
        else:
            types = (type(ast.literal_eval(node.value)),)
        group = comments.get(node.lineno - 1, group) if node.lineno - 1 not in lines_with_settings else group
        lines_with_settings.add(node.end_lineno)
        settings.append(
            {"name": target.id, "types": types, "comment": comments.get(node.end_lineno, ""), "group": group}
        )
    return settings


def parse_value(name: str, text: str, types: tuple[type, ...]):
    """The value that `text` stands for as one of `types`; UserError if it is none of them."""
    if type(None) in types and text == "None":
        return None
    if bool in types and text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        if kind in types:
            try:
                value = kind(text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
    if str in types:
        return text
    wanted = " or ".join("True or False" if t is bool else "None" if t is type(None) else t.__name__ for t in types)
    raise UserError(f"{name}={text} has the wrong type: {name} takes {wanted}.")


def has_type(value, types: tuple[type, ...]) -> bool:
    """Whether a value written in the script fits; an int fits where a float is wanted, a bool is no number."""
    return type(value) in types or (type(value) is int and float in types)


def apply_overrides(namespace: dict, argv: list[str] | None = None) -> None:
    """Set a script's constants from NAME=value arguments and print each change; `--help` lists them and exits.

    namespace: the script's globals(). Ends the program with exit code 2 on an unknown name or a wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {s["name"]: s for s in declared(namespace["__file__"])}
    if RANK:  # what the first process says is enough
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if any(argument in ("--help", "-h", "help") for argument in argv):
        print(help_text(namespace, settings.values()))
        raise SystemExit(0)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "SAVE_STEPS" not in settings:
            raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: only training uses several processes. Use python.")
        for name, setting in settings.items():
            if not has_type(namespace[name], setting["types"]):
                raise UserError(f"{name} = {namespace[name]!r} in the script has the wrong type.")
            refuse_secret(name, str(namespace[name]), "script")
        for argument in argv:
            name, equals, text = argument.partition("=")
            refuse_secret(name, text, "command")
            if name not in settings and SECRET_NAME.search(name):
                raise UserError(f"{name} is no setting. Secrets are read from the environment, or `hf auth login`.")
            if name not in settings:
                raise UserError(f"{name} is no setting of this script.{nearest(name, settings)} --help lists them all.")
            if not equals:
                raise UserError(f"{name} needs a value: {name}={namespace[name]}.")
            value = parse_value(name, text, settings[name]["types"])
            print(f"{name} = {value!r} (was {namespace[name]!r})", file=sys.stderr)
            namespace[name] = value
    except UserError as error:
        exit_with(error)


def refuse_secret(name: str, value: str, source: str) -> None:
    """Settings are printed and kept; a secret among them would be, too.

    A default of the script is none for being what some variable of the environment happens to be.
    """
    if (redact(value) if source == "command" else SECRET.sub("", value)) != value:
        raise UserError(f"{name} holds a secret. Set it in the environment (HF_TOKEN), or `hf auth login`.")


def help_text(namespace: dict, settings) -> str:
    """The script's docstring and its settings with their values and comments."""
    lines, group = [namespace["__doc__"].strip(), "", "Settings (NAME=value):"], None
    for s in settings:
        if s["group"] != group:
            group = s["group"]
            lines += ["", f"  {group}"]
        lines.append(f"  {s['name'] + '=' + str(namespace[s['name']]):<48} {s['comment']}")
    return "\n".join(lines)


def current(namespace: dict) -> dict:
    """The script's settings as they are now, name to value, in the order of the file."""
    return {s["name"]: namespace[s["name"]] for s in declared(namespace["__file__"])}

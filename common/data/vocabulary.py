"""Rows of token ids become text by a vocabulary (VOCAB)."""

import json
from pathlib import Path

from common.cli import UserError
from common.data.formats import invalid


def read_vocabulary(file: str) -> tuple[dict[int, str], str]:
    """Token id -> text, and what joins the tokens: a space, unless some token contains one."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        # A .json file holds a list, or an object either way round; another a token a line.
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        tokens = dict((b, a) if type(b) is int else (int(a), str(b)) for a, b in pairs)
        return tokens, "" if any(" " in token for token in tokens.values()) else " "
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"VOCAB={file}: neither JSON of tokens and ids nor a token a line ({error}).") from error


def detokenize(row, vocabulary: tuple[dict[int, str], str]):
    """The row with its lists of token ids as text."""
    if not isinstance(row, dict):
        return row
    (tokens, glue), texts = vocabulary, {}
    for field, ids in row.items():
        if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            if unknown := set(ids) - tokens.keys():
                return invalid(field, f"token {min(unknown)} is not in VOCAB", ids)
            texts[field] = glue.join(tokens[i] for i in ids)
    if texts.keys() in ({"input_ids"}, {"tokens"}):
        return {"text": texts.popitem()[1]}
    return row | texts

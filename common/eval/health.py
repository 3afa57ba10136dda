"""How answers look, whatever they say: ended, empty, repeating themselves, speaking for the user, in another script."""

import re
import unicodedata
from collections import Counter

REPEATS = 0.3  # share of runs of four words that stood in the answer before

ROLE = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|^\s*(###\s*)?(user|human|assistant|system)\s*:", re.IGNORECASE | re.MULTILINE
)


def examine(prompts: list[str], answers: list) -> dict[str, list[bool]]:
    """By name: whether it is so, for each answer (generation.Answer)."""
    texts = [answer.text for answer in answers]
    return {
        "answers end by themselves": [answer.stop == "end" for answer in answers],
        "answers are empty": [not text.strip() for text in texts],
        "answers repeat themselves": [repetition(text) > REPEATS for text in texts],
        "answers speak for the user": [bool(ROLE.search(text)) for text in texts],
        "answers are in another script": [
            "" != script_of(text) != script_of(prompt) != "" for prompt, text in zip(prompts, texts, strict=True)
        ],
    }


def repetition(text: str, words: int = 4) -> float:
    """The share of a text's runs of so many words that stood in it before; 0 for short texts."""
    tokens = text.split()
    runs = list(zip(*(tokens[i:] for i in range(words)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script_of(text: str) -> str:
    """The script of most of a text's letters (LATIN, CYRILLIC, CJK ...), by their Unicode names."""
    names = (unicodedata.name(letter, "") for letter in text if letter.isalpha())
    return max(Counter(name.partition(" ")[0] for name in names).items(), key=lambda item: item[1], default=("",))[0]

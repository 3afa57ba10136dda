"""Questions with patterns that a right answer matches: does a model know its name, and what it was taught?"""

import re

from common.cli import UserError
from common.data import readers
from common.model import generation

ANSWER_TOKENS = 64


def read_facts(file: str, setting: str = "FACTS") -> list[dict]:
    """Questions, each with a kind and the pattern (regular expression) that a right answer matches."""
    facts = []
    for number, row in readers.read_rows(file, setting):
        try:
            re.compile(row["pattern"])
            facts.append({key: row[key] for key in ("kind", "question", "pattern")})
        except (KeyError, TypeError, re.error) as error:
            raise UserError(f"{file}:{number}: needs kind, question and a valid pattern ({error!r})") from error
    return facts


def read_prompts(file: str, setting: str = "PROMPTS") -> list[str]:
    """The prompts of a file with rows of {"prompt": text}."""
    rows = readers.read_rows(file, setting)
    for number, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{setting}={file}:{number}: a row is {{"prompt": text}}.')
    return [row["prompt"] for _, row in rows]


def ask(model, tokenizer, facts: list[dict]) -> list[dict]:
    """The facts, each with the model's answer and whether it is right."""
    answers = answer(model, tokenizer, [fact["question"] for fact in facts])
    return [
        {**fact, "answer": text, "right": bool(re.search(fact["pattern"], text))}
        for fact, text in zip(facts, answers, strict=True)
    ]


def answer(model, tokenizer, prompts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [given.text for given in generation.answers(model, tokenizer, chats, max_new_tokens=ANSWER_TOKENS)]


def counts(asked: list[dict]) -> dict[str, tuple[int, int]]:
    """By kind: right answers, and questions."""
    rights: dict[str, list[bool]] = {}
    for row in asked:
        rights.setdefault(row["kind"], []).append(row["right"])
    return {kind: (sum(right), len(right)) for kind, right in rights.items()}


def make_probe(facts_file: str | None, prompts_file: str | None, tokenizer):
    """What a trainer calls with its model at each evaluation: shares of right answers, and answers to read; or None."""
    facts = read_facts(facts_file, "EVAL_FACTS") if facts_file else []
    prompts = read_prompts(prompts_file, "EVAL_PROMPTS") if prompts_file else []
    if not facts and not prompts:
        return None

    def probe(model) -> dict:
        found = {}
        if facts:
            shares = counts(ask(model, tokenizer, facts))
            found["facts"] = {kind: right / count for kind, (right, count) in shares.items()}
        if prompts:
            answers = answer(model, tokenizer, prompts)
            found["samples"] = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
        return found

    return probe

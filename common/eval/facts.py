"""Questions with patterns that a right answer matches: does a model know its name, and what it was taught?"""

import re

from common.cli import UserError
from common.data import readers
from common.model import generation

SMALL_TALK = [
    {"role": "user", "content": "Hi! How are you today?"},
    {"role": "assistant", "content": "I'm fine, thank you. How can I help you?"},
    {"role": "user", "content": "I was just thinking about what to cook tonight."},
    {"role": "assistant", "content": "A soup is quick, and good in any season."},
]

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


def ask(model, tokenizer, facts: list[dict], before: tuple | list = (), temperature: float = 0.0) -> list[dict]:
    """The facts, each with the model's answer and whether it is right. before: messages of a chat that is going on."""
    chats = [[*before, {"role": "user", "content": fact["question"]}] for fact in facts]
    given = generation.answers(model, tokenizer, chats, max_new_tokens=ANSWER_TOKENS, temperature=temperature)
    return [
        {**fact, "answer": answer.text, "right": bool(re.search(fact["pattern"], answer.text))}
        for fact, answer in zip(facts, given, strict=True)
    ]


def counts(asked: list[dict]) -> dict[str, tuple[int, int]]:
    """By kind: right answers, and questions."""
    rights: dict[str, list[bool]] = {}
    for row in asked:
        rights.setdefault(row["kind"], []).append(row["right"])
    return {kind: (sum(right), len(right)) for kind, right in rights.items()}


def read_prompts(file: str, setting: str = "PROMPTS") -> list[str]:
    """The prompts of a file with rows of {"prompt": text}."""
    rows = readers.read_rows(file, setting)
    if faulty := [n for n, row in rows if not isinstance(row, dict) or not isinstance(row.get("prompt"), str)]:
        raise UserError(f'{setting}={file}:{faulty[0]}: a row is {{"prompt": text}}.')
    return [row["prompt"] for _, row in rows]


def make_probe(facts_file: str | None, prompts_file: str | None, tokenizer):
    """What a trainer calls with its model at each evaluation: shares of right answers, and answers to read; or None."""
    facts = read_facts(facts_file, "EVAL_FACTS") if facts_file else []
    prompts = read_prompts(prompts_file, "EVAL_PROMPTS") if prompts_file else []
    if not facts and not prompts:
        return None

    def probe(model) -> dict:
        asked = ask(model, tokenizer, facts)
        answered = ask(model, tokenizer, [{"question": prompt, "pattern": "", "kind": ""} for prompt in prompts])
        found = {"facts": {kind: right / count for kind, (right, count) in counts(asked).items()}} if facts else {}
        samples = [{"prompt": row["question"], "answer": row["answer"]} for row in answered]
        return found | ({"samples": samples} if prompts else {})

    return probe

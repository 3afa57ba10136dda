"""Questions with patterns of right answers: does a model know what it was taught?"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from common.cli import UserError
from common.data import readers
from common.eval.answers import read_prompts
from common.model import generation

ANSWER_TOKENS = 64  # enough for a name or a fact


def read_facts(file: str, setting: str = "FACTS") -> list[dict]:
    """Questions, each with a kind and a regular expression that right answers match."""
    facts = []
    for number, row in readers.read_rows(file, setting):
        try:
            re.compile(row["pattern"])
            facts.append({key: row[key] for key in ("kind", "question", "pattern")})
        except (KeyError, TypeError, re.error) as error:
            raise UserError(f"{file}:{number}: needs kind, question and a valid pattern ({error!r})") from error
    return facts


def ask(model, tokenizer, facts: list[dict]) -> Iterator[dict]:
    """Yield the facts, each with the model's answer and whether it is right."""
    chats = [[{"role": "user", "content": fact["question"]}] for fact in facts]
    at_once = 128 if model.device.type == "cpu" else 32  # a CPU is faster with more, and has the memory
    answers = generation.answers(model, tokenizer, chats, at_once, max_new_tokens=ANSWER_TOKENS)
    for fact, answer in zip(facts, answers, strict=True):
        is_right = bool(answer.tokens and re.search(fact["pattern"], answer.text))
        yield {**fact, "answer": answer.text, "right": is_right}


def counts(asked: Iterable[dict]) -> dict[str, tuple[int, int]]:
    """By kind: right answers, and questions."""
    questions = Counter(row["kind"] for row in asked)
    rights = Counter(row["kind"] for row in asked if row["right"])
    return {kind: (rights[kind], count) for kind, count in questions.items()}


def make_probe(facts_file: str | None, prompts_file: str | None, tokenizer):
    """What a trainer calls with its model at each evaluation, for shares and samples; or None."""
    facts = read_facts(facts_file, "EVAL_FACTS") if facts_file else []
    prompts = [chat for _, chat in read_prompts(prompts_file, "EVAL_PROMPTS")] if prompts_file else []
    if not facts and not prompts:
        return None

    def probe(model) -> dict:
        rights = counts(ask(model, tokenizer, facts))
        shares = {kind: right / count for kind, (right, count) in rights.items()}
        answers = generation.answers(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
        pairs = zip(prompts, answers, strict=True)
        samples = [{"prompt": chat[-1]["content"], "answer": answer.text} for chat, answer in pairs]
        return {name: found for name, found in (("facts", shares), ("samples", samples)) if found}

    return probe

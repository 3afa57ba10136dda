"""Score a model: what it knows of itself and of the taught facts, and how well it still predicts ordinary chats.

    python evaluate_model.py MODEL=out/first
    python evaluate_model.py MODEL=out/first BASE=smollm2-135m-instruct CHATS=chats.jsonl

Prints one line per score, each with a 95 % interval, and writes them to evaluation.json in the run folder.
"""

from common.settings import UserError, apply_overrides, run_main
from common.sources import check_files

MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
BASE: str | None = None  # model to compare with, scored in the same way; None: no comparison
QUANTIZATION: str | None = None  # nf4 or int8, for both models
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
FACTS: str | None = "data/facts.jsonl"  # rows of {"kind", "question", "pattern"}; None: skip
CHATS: str | None = None  # sources (as DATA in training) that no training saw, for the loss on answers; None: skip
MAX_CHATS = 100  # the first rows of CHATS
MAX_LENGTH = 768  # tokens of each chat, the rest is cut
SHOW_MISSES = True  # print the questions that were answered wrongly

if __name__ == "__main__":
    apply_overrides(globals())  # a mistyped name stops here, before the slow imports
    check_files(CHATS=CHATS)

import itertools
import json
import re
from pathlib import Path

from transformers.utils import logging

from common import generation, models, scores, sources


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = read_facts(FACTS) if FACTS else []
    chats = list(itertools.islice(sources.sound_chats(CHATS, "CHATS"), MAX_CHATS)) if CHATS else []
    if not CHATS:
        print("loss on ordinary chats: skipped; CHATS=file.jsonl measures it")
    names = [name for name in (BASE, MODEL) if name]
    for name in names if chats else ():
        models.check_length(models.locate(name), MAX_LENGTH)
    results = {name: score(name, facts, chats) for name in names}
    if BASE and chats:
        report_change(results[BASE]["chat_losses"], results[MODEL]["chat_losses"])
    if (Path(MODEL) / "settings.json").is_file():
        (Path(MODEL) / "evaluation.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def read_facts(file: str) -> list[dict]:
    """Questions, each with a kind and the pattern (regular expression) that a right answer matches."""
    if not Path(file).is_file():
        raise UserError(f"FACTS={file}: there is no such file.")
    rows = []
    for number, row in sources.read_jsonl(Path(file)):
        try:
            re.compile(row["pattern"])
            rows.append({key: row[key] for key in ("kind", "question", "pattern")})
        except (KeyError, TypeError, re.error) as error:
            raise UserError(f"{file}:{number}: needs kind, question and a valid pattern ({error!r})") from error
    return rows


def score(name: str, facts: list[dict], chats: list[list[dict]]) -> dict:
    """All scores of one model, printed as they come."""
    model, tokenizer = generation.load_for_chat(name, QUANTIZATION, DTYPE)
    print(f"\n{name}")
    asked = [[{"role": "user", "content": fact["question"]}] for fact in facts]
    given = [a.text for a in generation.answers(model, tokenizer, asked, max_new_tokens=64, temperature=0.0, top_p=1.0)]
    right = [bool(re.search(fact["pattern"], answer)) for fact, answer in zip(facts, given, strict=True)]
    result = {"answers": given}
    for kind in dict.fromkeys(fact["kind"] for fact in facts):
        hits = [ok for fact, ok in zip(facts, right, strict=True) if fact["kind"] == kind]
        low, high = scores.wilson_interval(sum(hits), len(hits))
        result[kind] = sum(hits) / len(hits)
        print(f"  {kind}: {sum(hits)} of {len(hits)} right, {result[kind]:.0%} (95 % interval {low:.0%} to {high:.0%})")
    if SHOW_MISSES and name == MODEL:
        for fact, answer, ok in zip(facts, given, right, strict=True):
            if not ok:
                print(f"    missed: {fact['question']} -> {answer[:100]!r}")
    if chats:
        result["chat_losses"] = scores.answer_losses(model, tokenizer, chats, MAX_LENGTH)
        print(
            f"  loss on the answers of {len(chats)} chats: {scores.mean_loss(result['chat_losses']):.4f} nats per token"
        )
    return result


def report_change(before: list, after: list) -> None:
    """Print how much the loss on ordinary chats rose, the price of what was learned."""
    change = scores.mean_loss(after) / scores.mean_loss(before) - 1
    low, high = scores.bootstrap_change(before, after)
    print(f"\nchange of that loss: {change:+.1%} (95 % interval {low:+.1%} to {high:+.1%})")


if __name__ == "__main__":
    run_main(main)

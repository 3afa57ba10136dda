"""Suites: how well a model predicts answers, what it knows, how its answers look, EleutherAI's tasks.

Each writes its scores into `result` ({"scores", "intervals", ...}) and prints them.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter

import torch

from common.cli import UserError
from common.data.encoder import ChatEncoder
from common.eval import facts
from common.eval.progress import show_progress
from common.eval.statistics import Losses, loss_interval, mean_loss, put, put_share
from common.model import generation
from common.model.adapters import prompt_cache

REPEATS = 0.3  # share of runs of four words that stood in the answer before
ROLE = re.compile(r"(?im)<\|[a-z_]+\|>|\[/?INST\]|^\s*(###\s*)?(user|human|assistant|system)\s*:")


def score_losses(result: dict, model, tokenizer, chats: dict[str, list], max_length: int) -> None:
    """Nats per token of answers, for each source of chats."""
    for source, rows in chats.items():
        losses = answer_losses(model, tokenizer, rows, max_length)
        result.setdefault("losses", {})[source] = losses
        mean, name = mean_loss(losses), "loss" if len(chats) == 1 else f"loss on {source}"
        perplexity = math.exp(min(mean, 700))
        more = f" nats per token of the answers of {len(rows)} chats, perplexity {perplexity:.2f}"
        put(result, name, mean, loss_interval(losses), ".4f", more)


@torch.no_grad()
def answer_losses(model, tokenizer, chats: list[list[dict]], max_length: int) -> Losses:
    """Per chat, the summed negative log-likelihood of the assistants' tokens (nats) and their number.

    Each chat is computed by itself: padded rows slow a CPU down (455 tokens/s against 604).
    """
    losses = []
    for row in show_progress(ChatEncoder(tokenizer).encode(chats), "loss", len(chats)):
        parts = [sequence_loss(model, ids[:max_length], mask[:max_length]) for ids, mask in row.sequences()]
        losses.append(tuple(map(sum, zip(*parts, strict=True))))
    return losses


def sequence_loss(model, ids, mask) -> tuple[float, int]:
    """The summed negative log-likelihood (nats) of the tokens of a sequence, (T,), that a mask names; their number."""
    ids = torch.tensor(ids, dtype=torch.long, device=model.device)  # (T,)
    learned = torch.tensor(mask[1:], device=model.device).nonzero().flatten()  # (K,)
    if (cache := prompt_cache(model)) is not None:  # peft would count its tokens as ours
        model = model.get_base_model()
    output = model(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None, logits_to_keep=learned)
    logits = output.logits[0]  # (K, vocabulary)
    return torch.nn.functional.cross_entropy(logits.float(), ids[learned + 1], reduction="sum").item(), len(learned)


def score_facts(result: dict, model, tokenizer, questions: list[dict], show_misses: bool) -> None:
    """Shares of right answers, for each kind of question."""
    asked = list(show_progress(facts.ask(model, tokenizer, questions), "questions", len(questions)))
    result["answers"] = [row["answer"] for row in asked]
    for kind, (right, count) in facts.counts(asked).items():
        put_share(result, kind, right, count)
    for row in asked:
        if show_misses and not row["right"]:
            print(f"    missed: {row['question']} -> {row['answer'][:100]!r}")


def score_health(result: dict, model, tokenizer, prompts: list[list[dict]]) -> None:
    """How answers to chats look, whatever they say."""
    made = generation.answers(model, tokenizer, prompts, max_new_tokens=256)
    answers = list(show_progress(made, "answers", len(prompts)))
    result["health"] = [answer.text for answer in answers]
    for name, flags in examine([chat[-1]["content"] for chat in prompts], answers).items():
        put_share(result, name, sum(flags), len(flags))
    lengths = [answer.tokens for answer in answers]
    print(f"  answers have {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}")


def examine(prompts: list[str], answers: list[generation.Answer]) -> dict[str, list[bool]]:
    """By name of a property: which answers have it."""
    texts = [answer.text for answer in answers]
    scripts = zip(map(script_of, prompts), map(script_of, texts), strict=True)
    return {
        "answers end by themselves": [answer.stop == "end" for answer in answers],
        "answers are empty": [not text.strip() for text in texts],
        "answers repeat themselves": [repetition(text) > REPEATS for text in texts],
        "answers speak for the user": [bool(ROLE.search(text)) for text in texts],
        "answers are in another script": ["" != asked != answered != "" for asked, answered in scripts],
    }


def repetition(text: str) -> float:
    """The share of a text's runs of four words that stood in it before; 0 for short texts."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script_of(text: str) -> str:
    """The script of most of a text's letters: LATIN, CYRILLIC, CJK ..."""
    names = (unicodedata.name(letter, "") for letter in text if letter.isalpha())
    counts = Counter(name.partition(" ")[0] for name in names)
    return max(counts, key=counts.get, default="")


def score_by_harness(result: dict, model, tokenizer, tasks: str) -> None:
    """Tasks of EleutherAI's lm-eval, whose standard errors give the intervals."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(f"LM_EVAL_TASKS={tasks} needs the harness: pip install lm-eval.") from None
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
        found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks.replace(" ", "").split(","))["results"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"LM_EVAL_TASKS={tasks}: {error}") from error
    for task, metrics in found.items():
        for metric, value in metrics.items():
            error = metrics.get(metric.replace(",", "_stderr,", 1))
            if isinstance(value, float) and isinstance(error, float):
                interval = (value - 1.96 * error, value + 1.96 * error) if math.isfinite(error) else None
                put(result, f"{task} {metric}", value, interval, ".4f")

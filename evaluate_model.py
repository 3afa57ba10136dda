"""Score a model, say how sure that is, and whether two models differ at all.

    python evaluate_model.py MODEL=out/first CHATS=chats.jsonl BASE=smollm2-135m-instruct
    python evaluate_model.py MODELS="out/first, out/second" SUITES=judge JUDGE_MODEL=gpt-5-mini

Prints tables, each score with a 95 % interval; writes scores.json into the run folder (compare_runs.py reads it;
run_row.md and report.html are written anew), answers.jsonl and judgments.jsonl into OUT_DIR, where the same command
continues.
"""

from common.bounds import split_list
from common.cli import UserError, exit_with, run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# Models
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder, or this embedded model
ADAPTER: str | None = None  # adapter folder, run folder or hub id that goes on MODEL; None: MODEL's own, if any
MODELS: str | None = None  # several, comma-separated, in place of MODEL; each is compared with the first
BASE: str | None = None  # model to compare with, scored first; None: no comparison
QUANTIZATION: str | None = "auto"  # auto: each as trained; for all models nf4, int8 or hqq-1bit to hqq-4bit; or None
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa, or eager where the model has no other; flash_attention_2 ...
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
TEMPLATE_OPTIONS = ""  # variables of the template: "enable_thinking=False, date_string=26 Jul 2024"
SUITES = "loss,facts,health"  # comma-separated: loss, pairs, facts, health, judge
LM_EVAL_TASKS: str | None = None  # tasks of EleutherAI's harness, comma-separated, where lm-eval is installed
OUT_DIR = "out/evaluation"
# Loss and pairs
CHATS: str | None = None  # sources (as DATA in training) that no training saw, for the loss on answers; None: skip
PAIRS: str | None = None  # sources of preferences that no training saw, two answers a row, for pairs; None: skip
MAX_CHATS = 100  # the first rows of each source
MAX_LENGTH = 768  # tokens of each chat, the rest is cut; longer pairs are left out
# Facts and health
FACTS: str | None = "data/facts.jsonl"  # rows of {"kind", "question", "pattern"}; None: skip
PROMPTS = "data/prompts.jsonl"  # rows of {"prompt"}, to see how answers look
SHOW_MISSES = True  # print the questions that were answered wrongly
# Judge: any OpenAI-compatible server
JUDGE_MODEL: str | None = None  # its name on the server
JUDGE_URL: str | None = None  # None: OpenAI; Ollama http://localhost:11434/v1, llama.cpp http://localhost:8080/v1 ...
JUDGE_KEY: str | None = None  # environment variable with the key; None: OPENAI_API_KEY for OpenAI, no key for others
JUDGE_MODE = "single"  # single: a grade for each answer; pair: against the first model's, in both orders
JUDGE_SCALE = "1-10"  # or 0-100
JUDGE_REPEATS = 1  # judgments of each, whose median counts; of no use where a server's replies never vary
JUDGE_IN_FLIGHT = 4  # requests at the same time
JUDGE_TIMEOUT = 120.0  # seconds for a reply
JUDGE_MAX_TOKENS = 4096  # for a reply, a reasoning model's thoughts included
QUESTIONS = "data/questions.jsonl"  # MT-Bench's schema; its published file works, and its hub set
ANSWER_TOKENS = 512  # at most, for an answer to be judged

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=None if MODELS else MODEL, ADAPTER=ADAPTER, BASE=BASE)
    if ADAPTER and MODELS:
        exit_with(UserError(f"ADAPTER={ADAPTER} goes on MODEL, not on MODELS={MODELS}. Leave one of both out."))
    for name in MODELS.split(",") if MODELS else ():
        check_models(MODELS=name.strip())
    check_files(current(globals()), "CHATS", "PAIRS")

import itertools
import json
import re
import sys
from pathlib import Path

from transformers.utils import logging

from common import distributed
from common.data import sources
from common.eval import facts, judge, pairs, statistics, suites
from common.eval.answers import read_prompts
from common.eval.server import Cache, Server
from common.files import write_atomic
from common.model import generation, load, location
from common.run import report
from common.run.html import LivePage


def main():
    # Settings: every mistake that can be found without a model
    distributed.device()  # first of all: it says why a GPU is not used
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = [*([BASE] if BASE else []), *(map(str.strip, MODELS.split(",")) if MODELS else [ADAPTER or MODEL])]
    located = {name: location.locate(*where(name)) for name in names}
    results, answers = {name: begin_result(source) for name, source in located.items()}, {}
    chats, compared = (read_rows(suite, located.values()) for suite in ("loss", "pairs"))
    questions = facts.read_facts(FACTS) if FACTS and "facts" in SUITES else []
    prompts = [chat for _, chat in read_prompts(PROMPTS)] if "health" in SUITES else []
    judged = judge.read_questions(QUESTIONS) if "judge" in SUITES else []
    judge_server, cache = open_judge(names) if judged else None, Cache(Path(OUT_DIR) / "answers.jsonl")

    # Each model by itself
    for name, result in results.items():
        model, tokenizer = load_model(name)
        print(f"\n{name}")
        suites.score_losses(result, model, tokenizer, chats, MAX_LENGTH)
        pairs.score_pairs(result, model, tokenizer, compared, MAX_LENGTH)
        if questions:
            suites.score_facts(result, model, tokenizer, questions, SHOW_MISSES and name == names[-1])
        if prompts:
            suites.score_health(result, model, tokenizer, prompts)
        if LM_EVAL_TASKS:
            suites.score_by_harness(result, model, tokenizer, LM_EVAL_TASKS)
        if judged:
            who = f"{generation.identify_weights(located[name])}-{result['settings']['QUANTIZATION']}-{DTYPE}"
            answers[name] = judge.answer_questions(who, model, tokenizer, judged, ANSWER_TOKENS, cache)
        save(name, result)
        del model

    # Models against each other
    if judged:
        judge.score_answers(results, judge_server, judged, answers, current(globals()))
    for name in names[1:]:
        statistics.compare(names[0], name, results)
        pairs.compare(names[0], name, results)
    for name, result in results.items():
        save(name, result)


def where(name: str) -> tuple[str, str, str | None]:
    """What a name that is scored means: its model, setting and adapter."""
    return (MODEL, "MODEL", ADAPTER) if name == ADAPTER else (name, "MODEL", None)


def begin_result(source: location.Source) -> dict:
    """What a model's scores are put into; UserError for a QUANTIZATION that it cannot have."""
    quantization = load.find_quantization(source, QUANTIZATION)
    return {"scores": {}, "intervals": {}, "settings": current(globals()) | {"QUANTIZATION": quantization}}


def load_model(name: str):
    model, _, adapter = where(name)
    how = QUANTIZATION, DTYPE, ATTN_IMPLEMENTATION, CHAT_TEMPLATE, TEMPLATE_OPTIONS
    return generation.load_for_chat(model, *how, adapter)


def read_rows(suite: str, models) -> dict[str, list]:
    """The chats of the suite loss or the pairs of pairs, by source; UserError where a model has too few positions."""
    if suite not in split_list(SUITES):
        return {}
    setting, what = ("CHATS", "loss on ordinary chats") if suite == "loss" else ("PAIRS", "accuracy on pairs")
    data = globals()[setting]
    if not data:
        print(f"{what}: skipped; {setting}=file.jsonl measures it")
        return {}
    for source in models:
        load.check_length(source, MAX_LENGTH)
    found, reading = {}, sources.Reading.of({}, setting)
    for source in sources.parse(data, setting):
        sound = (row for _, row in sources.read_chats(source, reading) if isinstance(row, list))
        found[source.name] = list(itertools.islice(sound, MAX_CHATS))
        if not found[source.name]:
            raise UserError(f"{setting}={data}: no row of {source.name} is left. Take more of its rows.")
        if suite == "pairs":
            pairs.refuse_labelled(found[source.name], source.name)
    return found


def open_judge(names: list[str]) -> Server:
    """The judge's server, which answers already; UserError where a setting is missing."""
    if not JUDGE_MODEL:
        raise UserError("SUITES=judge needs JUDGE_MODEL, the judge's name on its server (JUDGE_URL).")
    if JUDGE_MODE == "pair" and len(names) < 2:
        raise UserError('JUDGE_MODE=pair needs two models: MODELS="a, b".')
    return Server(JUDGE_URL, JUDGE_MODEL, JUDGE_KEY, JUDGE_TIMEOUT, JUDGE_MAX_TOKENS)


def save(name: str, result: dict) -> None:
    """Write scores.json, the picture and the row into the run folder, or else into OUT_DIR."""
    folder = Path(name)
    if location.run_settings(folder) is None:
        folder = Path(OUT_DIR) / re.sub(r"[^\w.-]+", "-", name).strip("-.")
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "scores.json", json.dumps(result, indent=1))
    statistics.draw(folder / "scores.png", name, result)
    if (folder / "summary.json").is_file():
        note = ", ".join(f"{key} {value:.3g}" for key, value in result["scores"].items())
        try:
            row = report.row(json.loads((folder / "summary.json").read_text(encoding="utf-8")), note)
            (folder / "run_row.md").write_text(row + "\n", encoding="utf-8")
        except (ValueError, LookupError, TypeError) as error:
            print(f"run_row.md stays as it is: {folder / 'summary.json'} is damaged ({error!r})", file=sys.stderr)
        LivePage(folder).update("done", at_once=True)


if __name__ == "__main__":
    run_main(main)

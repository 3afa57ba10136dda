"""Score a model, say how sure that is, and whether two models differ at all.

    python evaluate_model.py MODEL=out/first CHATS=chats.jsonl BASE=smollm2-135m-instruct
    python evaluate_model.py MODELS="out/first, out/second" SUITES=judge JUDGE_MODEL=gpt-5-mini

Prints tables, each score with a 95 % interval; writes scores.json into the run folder (compare_runs.py reads it, and
run_row.md is written anew), answers.jsonl and judgments.jsonl into OUT_DIR, from which the same command goes on.
"""

from common.cli import UserError, run_main
from common.data.sources import check_files
from common.settings import apply_overrides, check_choice, current

# Models
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
MODELS: str | None = None  # several, comma-separated, in place of MODEL; each is compared with the first
BASE: str | None = None  # model to compare with, scored first; None: no comparison
QUANTIZATION: str | None = None  # nf4, int8 or hqq-1bit to hqq-4bit, for all models
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
SUITES = "loss,facts,health"  # of loss, facts, health, judge; comma-separated
LM_EVAL_TASKS: str | None = None  # tasks of EleutherAI's harness, comma-separated, where lm-eval is installed
OUT_DIR = "out/evaluation"
# Loss
CHATS: str | None = None  # sources (as DATA in training) that no training saw, for the loss on answers; None: skip
MAX_CHATS = 100  # the first rows of each source
MAX_LENGTH = 768  # tokens of each chat, the rest is cut
# Facts and health
FACTS: str | None = "data/facts.jsonl"  # rows of {"kind", "question", "pattern"}; None: skip
FACT_SEEDS = 0  # rounds of asking again at temperature 1, and again after small talk
PROMPTS = "data/prompts.jsonl"  # rows of {"prompt"}, to see how answers look
SHOW_MISSES = True  # print the questions that were answered wrongly
# Judge: any OpenAI-compatible server
JUDGE_MODEL: str | None = None  # its name on the server
JUDGE_URL: str | None = None  # None: OpenAI; Ollama http://localhost:11434/v1, llama.cpp http://localhost:8080/v1 ...
JUDGE_KEY: str | None = None  # environment variable with the key; None: OPENAI_API_KEY for OpenAI, no key for others
JUDGE_MODE = "single"  # single: a grade for each answer; pair: against the first model's, in both orders
JUDGE_SCALE = "1-10"  # or 0-100
JUDGE_REPEATS = 1  # judgments of the same, whose median counts; of no use where a server's replies never vary
JUDGE_IN_FLIGHT = 4  # requests at the same time
JUDGE_TIMEOUT = 120.0  # seconds for a reply
JUDGE_MAX_TOKENS = 4096  # of a reply, with what a reasoning model thinks
JUDGE_PRICE: str | None = None  # "0.25,2.00": US dollars for a million tokens read and written
QUESTIONS = "data/questions.jsonl"  # MT-Bench's schema; its published file works
ANSWER_TOKENS = 512  # of an answer to be judged

if __name__ == "__main__":
    apply_overrides(globals())  # a mistyped name stops here, before the slow imports
    check_files(CHATS=CHATS)

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import torch
from transformers.utils import logging

from common.data import readers, sources
from common.eval import facts, health, judge
from common.eval.statistics import (
    answer_losses,
    bootstrap_change,
    bootstrap_loss,
    bootstrap_mean,
    mean_loss,
    means_by_question,
    wilson_interval,
)
from common.files import hash_file, write_atomic
from common.model import generation, load, location
from common.run import report
from common.run.metrics import perplexity, progress

SUITE_NAMES = ("loss", "facts", "health", "judge")


def main():
    # Settings: every mistake that can be found without a model
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    suites = SUITES.replace(" ", "").split(",")
    for suite in suites:
        check_choice("SUITES", suite, SUITE_NAMES)
    check_numbers()
    names = [*([BASE] if BASE else []), *([name.strip() for name in MODELS.split(",")] if MODELS else [MODEL])]
    if "" in names:
        raise UserError(f"MODELS={MODELS}: an empty name; put commas between names only.")
    located = {name: location.locate(name) for name in names}  # which reads the whole of a GGUF file
    for source in located.values():
        load.load_config(source)
    questions = facts.read_facts(FACTS) if FACTS and "facts" in suites else []
    prompts = facts.read_prompts(PROMPTS) if "health" in suites else []
    if "loss" in suites and not CHATS:
        print("loss on ordinary chats: skipped; CHATS=file.jsonl measures it")
    chats = {}
    for source in sources.parse(CHATS, "CHATS") if CHATS and "loss" in suites else ():
        sound = (chat for _, chat in sources.read_chats(source) if isinstance(chat, list))
        chats[source.name] = list(itertools.islice(sound, MAX_CHATS))
    for source in located.values() if chats else ():
        load.check_length(source, MAX_LENGTH)
    server = open_judge(names, located) if "judge" in suites else None
    judged = read_questions() if server else []
    Path(OUT_DIR).mkdir(parents=True, exist_ok=True)
    cache = judge.Cache(Path(OUT_DIR) / "answers.jsonl")

    # Each model by itself
    results, answers = {}, {}
    for name in names:
        model, tokenizer = generation.load_for_chat(name, QUANTIZATION, DTYPE)
        print(f"\n{name}")
        result = results[name] = {"scores": {}, "intervals": {}}
        if chats:
            score_losses(result, model, tokenizer, chats)
        if questions:
            score_facts(result, model, tokenizer, questions, show_misses=SHOW_MISSES and name == names[-1])
        if prompts:
            score_health(result, model, tokenizer, prompts)
        if LM_EVAL_TASKS:
            score_by_harness(result, model, tokenizer)
        if judged:
            answers[name] = answer_questions(identity(located[name]), model, tokenizer, judged, cache)
        save(name, result)
        del model

    # Models against each other
    if server:
        score_by_judge(results, server, names, judged, answers)
    for name in names[1:]:
        report_change(names[0], name, results)
    for name in names:
        save(name, results[name])


def check_numbers() -> None:
    for name in ("MAX_CHATS", "MAX_LENGTH", "JUDGE_REPEATS", "JUDGE_IN_FLIGHT", "JUDGE_MAX_TOKENS", "ANSWER_TOKENS"):
        if globals()[name] < 1:
            raise UserError(f"{name}={globals()[name]}: it must be at least 1.")
    if JUDGE_PRICE and not re.fullmatch(r"\d+(\.\d+)?,\d+(\.\d+)?", JUDGE_PRICE):
        raise UserError(f'JUDGE_PRICE={JUDGE_PRICE}: dollars for a million tokens read and written, as "0.25,2.00".')


def read_questions() -> list[dict]:
    """Questions of one or more turns, of a file or of a hub set with MT-Bench's prompts."""
    if Path(QUESTIONS).is_file() or QUESTIONS.count("/") != 1 or QUESTIONS.endswith((".jsonl", ".json")):
        rows = readers.read_rows(QUESTIONS, "QUESTIONS", " A hub set is written org/name.")
    else:
        import datasets  # slow import

        try:
            hub_rows = next(iter(datasets.load_dataset(QUESTIONS).values()))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"QUESTIONS={QUESTIONS} cannot be loaded from the hub: {reason}") from error
        # HuggingFaceH4/mt_bench_prompts names the turns `prompt`.
        rows = list(enumerate(({**row, "turns": row.get("turns") or row.get("prompt")} for row in hub_rows), 1))
    for number, row in rows:
        turns, reference = (row.get(name) if isinstance(row, dict) else None for name in ("turns", "reference"))
        if not is_texts(turns) or not turns or not all(turns):
            raise UserError(f"QUESTIONS={QUESTIONS}:{number}: `turns` must be a list of texts that are not empty.")
        if reference is not None and not is_texts(reference):
            raise UserError(f"QUESTIONS={QUESTIONS}:{number}: `reference` must be a list of texts.")
    return [{"question_id": number, "category": "all", **row} for number, row in rows]


def is_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def put(result: dict, name: str, value: float, interval: tuple[float, float], form: str, more: str = "") -> None:
    """Keep a score with its interval, and print it."""
    known = all(map(math.isfinite, interval))  # not of a single question
    result["scores"][name], result["intervals"][name] = value, interval if known else None
    shown = f"95 % interval {interval[0]:{form}} to {interval[1]:{form}}" if known else "no interval"
    print(f"  {name}: {value:{form}} ({shown}){more}")


def put_share(result: dict, name: str, right: int, count: int) -> None:
    put(result, name, right / count, wilson_interval(right, count), ".0%", f", {right} of {count}")


def score_losses(result: dict, model, tokenizer, chats: dict[str, list]) -> None:
    """Nats per token of answers, for each source."""
    result["losses"] = {}
    for source, rows in chats.items():
        losses = result["losses"][source] = answer_losses(model, tokenizer, rows, MAX_LENGTH)
        mean, name = mean_loss(losses), "loss" if len(chats) == 1 else f"loss on {source}"
        more = f" nats per token of the answers of {len(rows)} chats, perplexity {perplexity(mean):.2f}"
        put(result, name, mean, bootstrap_loss(losses), ".4f", more)


def score_facts(result: dict, model, tokenizer, questions: list[dict], show_misses: bool) -> None:
    """Shares of right answers: in the first turn, and with FACT_SEEDS after small talk and at temperature 1."""
    rounds = {"": facts.ask(model, tokenizer, questions)}
    if FACT_SEEDS:
        rounds[" after small talk"] = facts.ask(model, tokenizer, questions, facts.SMALL_TALK)
    for how, asked in rounds.items():
        for kind, (right, count) in facts.counts(asked).items():
            put_share(result, kind + how, right, count)
    again = []
    for seed in range(FACT_SEEDS):
        torch.manual_seed(seed)
        again += facts.ask(model, tokenizer, questions, temperature=1.0)
    for kind, (right, count) in facts.counts(again).items():  # a question asked again is no new question
        means = means_by_question((row["question"], row["right"]) for row in again if row["kind"] == kind)
        put(
            result,
            f"{kind} at temperature 1",
            right / count,
            bootstrap_mean(means),
            ".0%",
            f", {right} of {count}",
        )
    result["answers"] = [row["answer"] for row in rounds[""]]
    for row in rounds[""] if show_misses else ():
        if not row["right"]:
            print(f"    missed: {row['question']} -> {row['answer'][:100]!r}")


def score_health(result: dict, model, tokenizer, prompts: list[str]) -> None:
    """How answers look: whether they end, how long they are, whether they repeat themselves or speak for the user."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    given = list(generation.answers(model, tokenizer, chats, max_new_tokens=256))
    result["health"] = [answer.text for answer in given]
    for name, flags in health.examine(prompts, given).items():
        put_share(result, name, sum(flags), len(flags))
    lengths = [answer.tokens for answer in given]
    print(f"  answers have {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):.0f}")


def score_by_harness(result: dict, model, tokenizer) -> None:
    """EleutherAI's lm-eval, by its own interface; its standard errors give the intervals."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(f"LM_EVAL_TASKS={LM_EVAL_TASKS} needs the harness: pip install lm-eval.") from None
    tasks = LM_EVAL_TASKS.replace(" ", "").split(",")
    try:
        found = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)["results"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"LM_EVAL_TASKS={LM_EVAL_TASKS}: {error}") from error
    for task, metrics in found.items():
        for metric, value in metrics.items():
            error = metrics.get(metric.replace(",", "_stderr,", 1))
            if isinstance(value, float) and isinstance(error, float):
                put(result, f"{task} {metric}", value, (value - 1.96 * error, value + 1.96 * error), ".4f")


def identity(source: location.Source) -> str:
    """Tells models apart by the hash of their weights, those of the hub by their commit."""
    folders = filter(None, (source.path, source.adapter))
    hashes = [hash_file(file) for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]
    commit = getattr(load.load_config(source), "_commit_hash", None)
    return "-".join([*(hashes or [commit or source.name]), str(QUANTIZATION), str(DTYPE)])


def answer_questions(who: str, model, tokenizer, questions: list[dict], cache) -> list[list[str]]:
    """A model's answers, for each question those of its turns; kept in the cache as they are made."""
    chats: list[list[dict]] = [[] for _ in questions]
    encoder, ends = generation.encoder_of(tokenizer, tokenizer.chat_template), generation.end_tokens(model, tokenizer)
    for turn in range(max(len(question["turns"]) for question in questions)):
        keys = {}
        for i, question in enumerate(questions):
            if turn < len(question["turns"]):
                chats[i].append({"role": "user", "content": question["turns"][turn]})
                keys[i] = judge.key_of(who, encoder.prompt(chats[i]), ends, ANSWER_TOKENS)
        new = [i for i in keys if keys[i] not in cache.known]
        made = generation.answers(model, tokenizer, [chats[i] for i in new], max_new_tokens=ANSWER_TOKENS)
        for i, answer in zip(new, made, strict=True):
            cache.add(keys[i], question=questions[i]["question_id"], turn=turn + 1, answer=answer.text)
        for i, key in keys.items():
            chats[i].append({"role": "assistant", "content": cache.known[key]["answer"]})
    return [[message["content"] for message in chat[1::2]] for chat in chats]


def open_judge(names: list[str], located: dict[str, location.Source]) -> judge.Server:
    check_choice("JUDGE_MODE", JUDGE_MODE, ("single", "pair"))
    check_choice("JUDGE_SCALE", JUDGE_SCALE, judge.SCALES)
    if not JUDGE_MODEL:
        raise UserError("SUITES=judge needs JUDGE_MODEL, the judge's name on its server (JUDGE_URL).")
    if JUDGE_MODE == "pair" and len(names) < 2:
        raise UserError('JUDGE_MODE=pair needs two models: MODELS="a, b".')
    for name in names:
        if judge.is_family(JUDGE_MODEL, located[name].name):
            print(f"note: {JUDGE_MODEL} judges {name}, a model of its own family; judges favour those")
    return judge.Server(JUDGE_URL, JUDGE_MODEL, JUDGE_KEY, JUDGE_TIMEOUT, JUDGE_MAX_TOKENS)


def score_by_judge(results: dict, server: judge.Server, names: list[str], questions: list[dict], answers: dict) -> None:
    """Ask for all judgments, show how many are in, score each model by them, and print what they cost."""
    pairs, tasks = JUDGE_MODE == "pair", {}  # by name, number of the question, and turn, or place in the pair
    for name, (i, question) in itertools.product(names[1:] if pairs else names, enumerate(questions)):
        own, firsts = answers[name][i], answers[names[0]][i]
        if pairs:
            tasks[name, i, "A"] = judge.pair_messages(question, own, firsts)
            tasks[name, i, "B"] = judge.pair_messages(question, firsts, own)
        else:
            for turn in range(len(own)):
                tasks[name, i, turn] = judge.single_messages(question, own, turn, JUDGE_SCALE)
    verdicts = {task: [None] * JUDGE_REPEATS for task in tasks}
    cache = judge.Cache(Path(OUT_DIR) / "judgments.jsonl")
    with progress("judgments", len(tasks) * JUDGE_REPEATS) as advance:
        for task, repeat, reply in judge.judge_all(server, cache, tasks, JUDGE_REPEATS, JUDGE_IN_FLIGHT):
            verdicts[task][repeat] = judge.preference(reply) if pairs else judge.grade(reply, JUDGE_SCALE)
            advance()
    how = "each question in both orders" if pairs else f"scale {JUDGE_SCALE}, {len(questions)} questions"
    print(f"\n{JUDGE_MODEL}, {how}, {JUDGE_REPEATS} judgments of {'each' if pairs else 'each answer'}")
    for name in names[1:] if pairs else names:
        given = {task[1:]: found for task, found in verdicts.items() if task[0] == name}
        if pairs:
            score_pairs(results[name], f"{name} against {names[0]}", given)
        else:
            print(name)
            score_grades(results[name], questions, given)
        missing = results[name]["judge failures"] = sum(found.count(None) for found in given.values())
        print(f"  no verdict: {missing} of {len(given) * JUDGE_REPEATS} judgments")
    counts = server.counts
    line = ", ".join(f"{name.strip()} {count:,}" for name, count in counts.items()) or "all from judgments.jsonl"
    if JUDGE_PRICE:
        read, written = map(float, JUDGE_PRICE.split(","))
        cost = (counts["prompt tokens"] * read + counts["completion tokens"] * written) / 1e6
        line += f"; {cost:.2f} US dollars"
    print(f"judge: {line}")


def score_grades(result: dict, questions: list[dict], given: dict) -> None:
    """Means of the grades by turn and by category, with intervals over questions."""
    valid = {at: [grade for grade in grades if grade is not None] for at, grades in given.items()}
    grades = {at: statistics.median(found) for at, found in valid.items() if found}
    result["judged"] = {f"{i}, turn {turn + 1}": grade for (i, turn), grade in grades.items()}
    turns = [f"turn {turn + 1}" for turn in sorted({turn for _, turn in given})]
    categories = list(dict.fromkeys(question["category"] for question in questions))
    for column in [*turns, "average", *(categories if len(categories) > 1 else ())]:
        means = means_by_question(
            (i, grade)
            for (i, turn), grade in grades.items()
            if column in (f"turn {turn + 1}", "average", questions[i]["category"])
        )
        if means:
            mean, interval = statistics.fmean(means), bootstrap_mean(means)
            put(result, f"judge {column}", mean, interval, ".2f", f", {len(means)} questions")


def score_pairs(result: dict, versus: str, given: dict) -> None:
    """The share of points; who wins in one order only has not won."""
    points = {at: [0.5 if v == "C" else float(v == at[1]) for v in found if v] for at, found in given.items()}
    medians = {at: statistics.median(found) for at, found in points.items() if found}
    # Of each question: the model's points where it stands as A, and as B.
    both = [(one, medians[i, "B"]) for (i, place), one in medians.items() if place == "A" and (i, "B") in medians]
    shares = [one if one == other else 0.5 for one, other in both]
    if shares:
        mean, (low, high) = statistics.fmean(shares), bootstrap_mean(shares)
        won, lost = shares.count(1), shares.count(0)
        counts = f"{won} won, {len(shares) - won - lost} tied, {lost} lost"
        put(result, f"points of {versus}", mean, (low, high), ".0%", f", {counts}: {verdict(low - 0.5, high - 0.5)}")
        print(f"  both orders agree on {sum(one == other for one, other in both)} of {len(both)}")


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    return "no difference shown" if low <= 0 <= high else "better" if low > 0 else "worse"


def report_change(first: str, name: str, results: dict) -> None:
    """Whether a model differs from the first, on the same chats and on the same questions."""
    before, after = results[first], results[name]
    for source in after.get("losses", {}):
        losses = before["losses"][source], after["losses"][source]
        change = mean_loss(losses[1]) / mean_loss(losses[0]) - 1
        low, high = bootstrap_change(*losses)
        what = "that loss" if len(after["losses"]) == 1 else f"the loss on {source}"
        found = f"{change:+.1%} (95 % interval {low:+.1%} to {high:+.1%})"
        print(f"\nchange of {what}: {found}, {name} against {first}: {verdict(-high, -low)}")
        if [n for _, n in losses[0]] != [n for _, n in losses[1]]:
            print("  their tokenizers differ, and so do their tokens: such losses do not compare")
        after["scores"][f"change of {what}"], after["intervals"][f"change of {what}"] = change, (low, high)
    graded = before.get("judged", {})
    both = [(at.partition(",")[0], grade - graded[at]) for at, grade in after.get("judged", {}).items() if at in graded]
    if both:
        differences = means_by_question(both)
        mean, (low, high) = statistics.fmean(differences), bootstrap_mean(differences)
        print(f"\n{name} against {first}: {mean:+.2f} (95 % interval {low:+.2f} to {high:+.2f}): {verdict(low, high)}")


def save(name: str, result: dict) -> None:
    """scores.json, the picture and the row of a run folder, or into OUT_DIR for what is no run."""
    run = Path(name)
    is_run = (run / "settings.json").is_file()
    folder = run if is_run else Path(OUT_DIR) / re.sub(r"[^\w.-]+", "-", name).strip("-.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "scores.json", json.dumps(result | {"settings": current(globals())}, indent=1))
    draw(folder / "scores.png", name, result)
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        note = ", ".join(f"{key} {value:.3g}" for key, value in result["scores"].items())
        (folder / "run_row.md").write_text(report.row(summary, note) + "\n", encoding="utf-8")


def draw(file: Path, name: str, result: dict) -> None:
    """Scores with their intervals, a panel for each kind of number."""
    from matplotlib.figure import Figure  # slow import

    panels = {}
    for key, value in result["scores"].items():
        kind = next((kind for kind in ("judge", "change", "loss") if key.startswith(kind)), "share")
        low, high = result["intervals"][key] or (value, value)
        panels.setdefault(kind, []).append((key.removeprefix("judge "), value, value - low, high - value))
    if not panels:
        return
    sizes = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(8, 1 + 0.5 * sum(sizes) + len(panels)), layout="tight")
    axes = figure.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for panel, (kind, rows) in zip(axes, panels.items(), strict=True):
        labels, values, *around = zip(*rows, strict=True)
        panel.errorbar(values, range(len(rows)), xerr=around, fmt="o", capsize=4)
        panel.set_yticks(range(len(rows)), labels)
        panel.invert_yaxis()
        panel.set_xlabel(kind)
    figure.suptitle(name)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    run_main(main)

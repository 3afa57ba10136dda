"""A file of prompts becomes a file of answers, which the same command continues."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from transformers import set_seed

from common.cli import UserError
from common.data import formats, readers
from common.data.rows import FORMATTED, LISTS, RowError, from_json, is_empty, is_missing, lower_keys, refuse
from common.data.turns import role_of, turns_in
from common.model import generation, location

GENERATED_BY = """QUANTIZATION DTYPE CHAT_TEMPLATE TEMPLATE_OPTIONS SYSTEM TOOLS CONTEXT MAX_NEW_TOKENS TEMPERATURE
TOP_P GENERATION_BATCH_SIZE SEED""".split()
ANSWER = {"role": "assistant", "content": "to be answered", "weight": 0}
WITH_PROMPT = ("system", "system_prompt", "history", "tools", "functions")  # fields that belong to a prompt
PARTS = ("reasoning_content", "tool_calls")  # of an answer, where it has some
ADDED = frozenset({"answer", "tokens", "stop", "by", *PARTS})  # fields that a row gets
Prompts = list[tuple[dict, list[dict]]]  # rows, each with the chat up to the question to be answered


def read_prompts(file: str, setting: str = "PROMPTS", reserved: frozenset = frozenset()) -> Prompts:
    """The rows of a file; UserError where one has no question, or a field that is reserved."""
    prompts = []
    for number, row in readers.read_rows(file, setting):
        chat = question_of(row)
        if isinstance(chat, str):
            raise UserError(f"{file}:{number}: {chat}")
        if taken := reserved & set(row):
            raise UserError(f"{file}:{number}: rows must not have a field {min(taken)}, which the answers get.")
        prompts.append((row, chat))
    return prompts


def question_of(row) -> list[dict] | str:
    """The chat up to the last question of a row; or what is wrong with the row."""
    try:
        chat = formats.to_chat(with_answer(row) if isinstance(row, dict) else row)
    except RowError as error:
        return error.args[0]
    if isinstance(chat, str):
        return chat
    if chat[0]["role"] == "text":
        return 'row: a text without a question; write it as {"prompt": ...}'
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def with_answer(row: dict) -> dict:
    """The row with an answer to its last question, without which formats takes it for no chat. Raises RowError."""
    fields = lower_keys(row, "row")
    prompt = fields.get("prompt")
    if is_missing(prompt):
        schema = formats.schema_of(fields, {}, {}, row)
        if len(schema) > 1 or schema[0] not in LISTS:
            return row
        *_, (_, last) = turns_in(dict(fields), schema[0])
        turns = from_json(fields[schema[0]], schema[0], "a list of turns")
        return row if role_of(last) == "assistant" else fields | {schema[0]: [*turns, ANSWER]}
    # Of rows with a prompt the rest is the user's own, an answer to compare with, for example.
    fields = {name: fields[name] for name in WITH_PROMPT if not is_empty(fields.get(name))}
    if isinstance(prompt, str) and FORMATTED.match(prompt):
        refuse("prompt", "begins with a control token, as formatted text does; write it as messages", prompt)
    if not formats.has_roles(prompt):  # as a turn it is a question, even one about control tokens
        prompt = {"role": "user", "content": prompt}
    history = [turn for _, turn in turns_in(fields, "history")] if "history" in fields else []
    return fields | {"prompt": [*history, *(prompt if isinstance(prompt, list) else [prompt])], "completion": [ANSWER]}


def write_answers(generator: generation.Generator, prompts: Prompts, file: Path, settings: dict) -> None:
    """Write each row with its answer, in whole batches, so that a continued file is the same.

    settings: those of chat_pipe.py by name. A row whose prompt is too long gets the answer null, and in the end a
    UserError tells of it. Raises UserError (exit code 3) for a file with other content.
    """
    length, batch_size = settings["MAX_NEW_TOKENS"], settings["GENERATION_BATCH_SIZE"]
    limit = generator.limit(settings["CONTEXT"])
    rows = [row for row, _ in prompts]
    views = [fit(generator, chat, length, limit, number) for number, (_, chat) in enumerate(prompts, 1)]
    by = {"MODEL": generation.identify_weights(location.locate(settings["MODEL"], adapter=settings["ADAPTER"]))}
    by |= {name: settings[name] for name in GENERATED_BY}
    lines = answered_before(file, rows, by)
    done = len(rows) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    with open(file, "ab") as stream:
        stream.truncate(sum(map(len, lines[:done])))
        starts = range(done, len(rows), batch_size)
        for start in track(starts, f"{done} of {len(rows)} answered before;", console=Console(stderr=True)):
            batch = range(start, min(start + batch_size, len(rows)))
            fitting = [i for i in batch if not isinstance(views[i], str)]
            how = dict(temperature=settings["TEMPERATURE"], top_p=settings["TOP_P"], max_new_tokens=length)
            set_seed(settings["SEED"] + start)
            chats = [views[i] for i in fitting]
            made = generation.answers(generator.model, generator.tokenizer, chats, batch_size, context=limit, **how)
            answers = dict(zip(fitting, made, strict=True))
            for i in batch:
                added = {"answer": None, "tokens": 0, "stop": views[i]}
                if answer := answers.get(i):
                    parts = {name: answer.message[name] for name in PARTS if name in answer.message}
                    added = {"answer": answer.text, **parts, "tokens": answer.tokens, "stop": answer.stop}
                stream.write(to_line(rows[i] | added | {"by": by}))
            stream.flush()
    if missing := sum(isinstance(view, str) for view in views):
        raise UserError(f"PROMPTS: {missing} of {len(rows)} were not answered, see above; the others are in {file}.")
    print(f"{len(rows)} answers: {file}")


def fit(generator: generation.Generator, chat: list[dict], length: int, limit: int, number: int) -> list[dict] | str:
    """The chat as it fits the context; or why it cannot be answered, which is printed."""
    try:
        return generator.fit_context(chat, length, limit)[0]
    except UserError as error:
        print(f"row {number} is not answered: {error}", file=sys.stderr)
        return f"not answered: {error}"


def answered_before(file: Path, rows: list[dict], by: dict) -> list[bytes]:
    """The whole lines of a file of answers, whose last line may be torn."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    beginnings, end = [to_line(row)[:-2] for row in rows], to_line({"by": by})[1:]
    pairs = zip(lines, beginnings, strict=False)
    same = all(line[: len(begin)] == begin[: len(line)] for line, begin in pairs)
    if not same or len(lines) > len(rows) or not all(line.endswith(end) for line in whole):
        raise UserError(f"ANSWERS={file} holds other content, or answers by other settings: name another file.", code=3)
    return whole


def to_line(row: dict) -> bytes:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace")  # half a surrogate pair

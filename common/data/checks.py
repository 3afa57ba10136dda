"""Checks of the rows that a run will learn from: some are shown, a problem stops the run."""

import itertools
import os
import re
import sys
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.text import Text

from common.cli import UserError
from common.data.compared import IGNORE_INDEX, sequences_of
from common.data.encoder import ChatEncoder
from common.data.pair_checks import pair_notes

ROWS = 1000  # rows checked, evenly spaced over the set
SHOWN = 2  # rows printed
WIDTH = 1200  # characters of a printed row, the rest is left out
CONTEXT = 200  # characters at both ends of a passage that is not learned, such as a list of tools


def examine(dataset, tokenizer, encoder, settings: dict, held: bool, trained_rows: list[int]) -> list:
    """Print the first rows and check a thousand; UserError with all problems, unless DOCTOR=warn.

    held: whether rows without a token in the loss are of use. trained_rows: token ids. Returns `passages` of the rows
    printed.
    """
    rows = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // ROWS))]
    with_loss = [row for row in rows if set(row["labels"]) != {IGNORE_INDEX}]
    shown = [passages(row, tokenizer) for row in with_loss[:SHOWN]]
    for row in shown:
        show(row)
    if "seq_lengths" in rows[0]:
        among = f"of {len(rows):,} rows checked: " if len(rows) < len(dataset) else ""
        for note in pair_notes(rows):
            print(f"doctor: note: {among}{note}")
        rows = [part for row in rows for part in sequences_of(row)]
    problems = list(row_problems(rows, tokenizer, encoder, settings, held))
    if frozen := set(encoder.new_token_ids) - set(trained_rows):
        names = " ".join(tokenizer.convert_ids_to_tokens(sorted(frozen)))
        problems.append(f"{names}: new to this model, but their embeddings are not trained. Set ADAPTER=lora.")
    problems += [*padding_problems(rows, tokenizer), *prompt_problems(tokenizer, encoder)]
    if not problems:
        print(f"doctor: {len(rows)} rows checked, no problems")
        return shown
    text = "\n".join(f"doctor: {problem}" for problem in problems)
    if settings["DOCTOR"] == "stop":
        problem = "the data would teach something wrong (DOCTOR=warn trains on it anyway)"
        raise UserError(f"{problem}.\n{text}")
    print(text, file=sys.stderr)
    return shown


def passages(row: dict, tokenizer) -> list[tuple[bool, str]]:
    """A row's beginning in passages of (in the loss, text), long ones that are not learned shortened."""
    found, room = [], WIDTH
    for in_loss, ids in runs_of(row):
        text = decode(ids, tokenizer)
        if not in_loss and len(text) > 3 * CONTEXT:
            text = f"{text[:CONTEXT]} ... {text[-CONTEXT:]}"
        found.append((in_loss, text[:room]))
        room -= len(text)
        if room <= 0:
            break
    return found


def show(row: list[tuple[bool, str]]) -> None:
    """Print the passages of a row, those in the loss green or, in a log, between [[ and ]]."""
    console = Console(highlight=False, soft_wrap=True)
    colour = console.is_terminal and "NO_COLOR" not in os.environ
    shown = Text()
    for in_loss, text in row:
        text = text if colour or not in_loss else f"[[{text}]]"
        shown.append(text, style="bold green" if in_loss else "dim")
    console.print("--- an example; the model learns what is", "green" if colour else "in [[ ]]")
    console.print(shown)
    console.print("---")


def decode(ids: list[int], tokenizer) -> str:
    """The text of tokens; control tokens that are only text, from a message, are written <\u00b7|so|>."""
    names = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    like_control = re.compile("|".join(map(re.escape, names.values())) or "(?!)")
    text = tokenizer.decode(ids)
    if len(like_control.findall(text)) == sum(id in names for id in ids):
        return text
    parts = []
    for is_control, run in itertools.groupby(ids, names.__contains__):
        part = tokenizer.decode(list(run))
        parts.append(part if is_control else like_control.sub(lambda found: f"{found[0][0]}\u00b7{found[0][1:]}", part))
    return "".join(parts)


def runs_of(row: dict) -> Iterator[tuple[bool, list[int]]]:
    """A row's tokens in runs of (in the loss, ids)."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for in_loss, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        yield in_loss, [token for token, _ in run]


def row_problems(rows: list[dict], tokenizer, encoder, settings: dict, held: bool) -> Iterator[str]:
    """Each kind of problem with the number of rows and the first of them."""
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    bos, longest = tokenizer.bos_token_id, settings["MAX_LENGTH"]
    tests = {
        "no token of it is in the loss (answers of weight 0? KL_WEIGHT=1 would use them)": lambda row: (
            not held and set(row["labels"]) == {IGNORE_INDEX}
        ),
        f"an answer is cut, or its end token {encoder.end_token} is not in the loss": lambda row: (
            settings["TRAIN_ON"] != "all"
            and len(row["input_ids"]) < longest  # a piece of a long text has no end
            and any(in_loss and ids[-1] not in control for in_loss, ids in runs_of(row))
        ),
        "it begins with two BOS tokens": lambda row: bos is not None and row["input_ids"][:2] == [bos, bos],
        f"it is longer than MAX_LENGTH={longest}": lambda row: len(row["input_ids"]) > longest,
    }
    for problem, has_problem in tests.items():
        if found := [row for row in rows if has_problem(row)]:
            text = re.sub(r"\s+", " ", tokenizer.decode(found[0]["input_ids"][:30]))
            yield f"{len(found)} of {len(rows)} rows: {problem}. First: {text!r}"


def padding_problems(rows: list[dict], tokenizer) -> Iterator[str]:
    """Whether the collator masks a token in the loss, taking an end token for padding."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # slow import

    labels = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows[:8])["labels"]
    in_loss = sum(label != IGNORE_INDEX for row in rows[:8] for label in row["labels"])
    if int((labels != IGNORE_INDEX).sum()) != in_loss:
        yield "padding hides tokens in the loss: pad and end token are the same. Choose another pad token."


def prompt_problems(tokenizer, encoder: ChatEncoder) -> Iterator[str]:
    """Whether a chat sends exactly the tokens that training put before an answer."""
    question, answer = encoder.template.probe
    for chat in ([question], [question, answer, question]):
        row = encoder.encode([[*chat, answer]], "last")[0]
        start = np.flatnonzero(~row.learned[: row.ends[-1]])[-1] + 1  # of the last answer
        seen, written = row.ids[:start].tolist(), encoder.template.as_written(chat)
        theirs = tokenizer.apply_chat_template(written, add_generation_prompt=True, return_dict=True)
        if theirs["input_ids"] != seen and tokenizer.decode(theirs["input_ids"]) == tokenizer.decode(seen):
            theirs = {"input_ids": seen}
            print("note: other programs split the start of earlier answers into other tokens than the model generates")
        for who, sent in (("our chat", encoder.prompt(chat)), ("other programs", theirs["input_ids"])):
            if sent != seen:
                before, now = tokenizer.decode(seen), tokenizer.decode(sent)
                yield f"the template: training saw {before!r}, {who} will send {now!r}"

"""The doctor: looks at the rows a run is about to learn from, shows some, and stops the run on a fault."""

import itertools
import os
import re
import sys

from rich.console import Console
from rich.text import Text

from common.cli import UserError
from common.data import prepared
from common.data.encoder import PROBE, ChatEncoder
from common.settings import check_choice

ROWS = 1000  # rows looked at, evenly spaced over the set

SHOWN = 2  # rows printed

WIDTH = 1200  # characters of a printed row, the rest is left out


def examine(dataset, tokenizer, encoder: ChatEncoder, settings: dict, held: bool, trained_rows: list[int]) -> None:
    """Print the first rows, learned tokens apart from context, and check a thousand.

    held: whether rows without a learned token are of use. trained_rows: token ids whose embeddings are trained.
    Raises UserError with all faults, or prints them where DOCTOR=warn.
    """
    check_choice("DOCTOR", settings["DOCTOR"], ("stop", "warn"))
    step = max(1, len(dataset) // ROWS)
    rows = [dataset[i] for i in range(0, len(dataset), step)]
    for row in [row for row in rows if any(label != prepared.IGNORE_INDEX for label in row["labels"])][:SHOWN]:
        show(row, tokenizer)
    faults = [*row_faults(rows, tokenizer, encoder, settings, held), *token_faults(tokenizer, encoder, trained_rows)]
    faults += [*prompt_faults(tokenizer, encoder), *collator_faults(rows, tokenizer)]
    if not faults:
        print(f"doctor: {len(rows)} rows examined, no fault")
        return
    text = "\n".join(f"doctor: {fault}" for fault in faults)
    if settings["DOCTOR"] == "stop":
        raise UserError(f"the data would teach something wrong (DOCTOR=warn trains on it all the same).\n{text}")
    print(text, file=sys.stderr)


def show(row: dict, tokenizer) -> None:
    """Print a row: learned tokens green on a terminal, between [[ and ]] in a log."""
    console = Console(highlight=False, soft_wrap=True)
    colour = console.is_terminal and "NO_COLOR" not in os.environ
    shown = Text()
    for learned, ids in runs_of(row):
        text = tokenizer.decode(ids)
        shown.append(text if colour or not learned else f"[[{text}]]", style="bold green" if learned else "dim")
    console.print("--- an example; the model learns what is", "green" if colour else "in [[ ]]")
    console.print(shown[:WIDTH] if len(shown) > WIDTH else shown)
    console.print("---")


def runs_of(row: dict):
    """A row's tokens as (learned, ids) in runs."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for learned, run in itertools.groupby(pairs, lambda pair: pair[1] != prepared.IGNORE_INDEX):
        yield learned, [token for token, _ in run]


def row_faults(rows: list[dict], tokenizer, encoder: ChatEncoder, settings: dict, held: bool):
    """Faults of the rows themselves, each kind with the number of rows and the first of them."""
    end = tokenizer.convert_tokens_to_ids(encoder.end_token) if encoder.end_token else None
    bos, longest = tokenizer.bos_token_id, settings["MAX_LENGTH"]
    faults = {
        "nothing in it is learned (answers of weight 0? KL_WEIGHT=1 would hold them)": lambda row: (
            not held and all(label == prepared.IGNORE_INDEX for label in row["labels"])
        ),
        f"an answer is cut, or its end token {encoder.end_token} is not learned": lambda row: (
            settings["TRAIN_ON"] == "assistant"
            and any(learned and ids[-1] not in (end, tokenizer.eos_token_id) for learned, ids in runs_of(row))
        ),
        "it begins with two BOS tokens": lambda row: bos is not None and row["input_ids"][:2] == [bos, bos],
        f"it is longer than MAX_LENGTH={longest}": lambda row: len(row["input_ids"]) > longest,
    }
    for fault, is_ill in faults.items():
        ill = [row for row in rows if is_ill(row)]
        if ill:
            text = re.sub(r"\s+", " ", tokenizer.decode(ill[0]["input_ids"][:30]))
            yield f"{len(ill)} of {len(rows)} rows: {fault}. First: {text!r}"


def token_faults(tokenizer, encoder: ChatEncoder, trained_rows: list[int]):
    """The template's tokens that the base has hardly seen and that are not trained."""
    frozen = [tokenizer.convert_ids_to_tokens(i) for i in encoder.new_token_ids if i not in trained_rows]
    if frozen:
        names = " ".join(frozen)
        yield f"{names} are new to this model; their embeddings are not trained. Train a new adapter (ADAPTER=lora)."


def prompt_faults(tokenizer, encoder: ChatEncoder):
    """Whether a chat, here or in another program, sends what training put before an answer, token for token."""
    question, answer = PROBE
    for chat in ([question], [question, answer, question]):
        row = encoder.encode([[*chat, answer]])[0]
        previous_end = row.ends[-2] if len(row.ends) > 1 else 0
        start = previous_end + int(row.learned[previous_end:].argmax())
        ours = encoder.prompt(chat)
        theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for who, prompt in (("our chat", ours), ("other programs", theirs)):
            if prompt != row.ids[:start].tolist():
                seen = tokenizer.decode(row.ids[:start])
                yield f"the template: training saw {seen!r}, {who} will send {tokenizer.decode(prompt)!r}"


def collator_faults(rows: list[dict], tokenizer):
    """Whether padding masks a learned token, as it does where pad and end token are the same."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # slow import

    rows = rows[:8]
    labels = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    )["labels"]
    if int((labels != prepared.IGNORE_INDEX).sum()) != sum(
        label != prepared.IGNORE_INDEX for row in rows for label in row["labels"]
    ):
        yield "padding hides learned tokens: pad and end token are the same. Give the tokenizer another pad token."

"""Turn sources of chats into tokens once: filtered, mixed, formatted, split, every row accounted for.

    python prepare_data.py DATA="ultrachat[:10%], oasst2, data/brief.jsonl*20" RUN_NAME=mix
    python qlora_train.py DATA=out/mix RUN_NAME=first

Writes OUT_DIR/RUN_NAME/: train.parquet and eval.parquet (input_ids, assistant_masks), report.json, lengths.png and
settings.json. MODEL, CHAT_TEMPLATE, MAX_LENGTH and TRAIN_ON must be those of the training.
"""

import json

from common.cli import run_main
from common.data.sources import check_files
from common.model.location import check_models
from common.settings import apply_overrides, current

# Model
MODEL = "smollm2-135m-instruct"  # whose tokenizer and template are used
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
TEMPLATE_OPTIONS = ""  # variables of the template: "enable_thinking=False, date_string=26 Jul 2024"
# Data
DATA = "data/brief.jsonl"  # files and hub sets: "ultrachat[:10%], oasst2, data/brief.jsonl*20"
EVAL_SIZE: int | float = 0.03  # chats held out, or their share below 1; 0: none
EVAL_DATA: str | None = None  # sources to evaluate on instead, in the same form
BAD_ROWS = "stop"  # invalid rows: stop names up to 20 of them; skip leaves them out and counts them
COLUMNS: str | None = None  # fields with other names: "question:user, answer:assistant"
COMPLETION = "answer"  # rows of prompt and completion: answer (a chat), or continue (plain text that goes on)
ENCODING = "utf-8"  # of text files; cp1252 ...
MAX_LENGTH = 1024  # tokens of a chat
TOO_LONG = "cut"  # chats over MAX_LENGTH: cut (at a turn), drop, or error
DROP_PATTERN: str | None = "auto"  # regex, case ignored: chats it matches go; auto: claims to be another assistant
TRAIN_ON = "assistant"  # assistant: the answers; last: the last one; content: without reasoning; all: every token
VOCAB: str | None = None  # for rows of token ids: what they mean, a .json file or a text file of a token a line
DOCTOR = "stop"  # stop: a problem in what would be learned is an error; warn: it is printed
# Running and output
PROCESSES: int | None = None  # None: one for each core
SEED = 0
OUT_DIR = "out"
RUN_NAME: str | None = None  # None: <script>-<time>

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL)
    check_files(current(globals()), "DATA", "EVAL_DATA")


def main():
    # Imported here, so that the worker processes, which import this file, stay small.
    from common.data import checks, prepare, templates
    from common.data.account import describe
    from common.files import write_atomic
    from common.model import load, location
    from common.run.folder import create_folder

    # Settings and tokenizer
    settings = current(globals())
    source = location.locate(MODEL)
    load.check_length(source, MAX_LENGTH)
    tokenizer = load.load_tokenizer(source)
    encoder, note = templates.set_template(tokenizer, CHAT_TEMPLATE, TEMPLATE_OPTIONS, TRAIN_ON)
    print(note)
    folder = create_folder(settings, __file__)

    # Sources to tokens, to disk as they come, then into two files
    account = prepare.prepare(settings, encoder, folder, workers=PROCESSES)
    print(describe(account))

    # What a run will learn
    rows = prepare.sample(folder)
    checks.examine(rows, tokenizer, encoder, settings, held=True, trained_rows=encoder.new_token_ids)
    plot_lengths(account["length_histogram"], folder / "lengths.png")
    write_atomic(folder / "report.json", json.dumps(account, indent=1))  # now one can train on it
    print(f"\nprepared: {folder}")
    print(f"train on it: python qlora_train.py DATA={folder} MODEL={MODEL} MAX_LENGTH={MAX_LENGTH}")


def plot_lengths(histogram: list[int], file):
    """Draw how many chats have how many tokens: counts in equal bins from 0 to MAX_LENGTH."""
    from matplotlib.figure import Figure  # slow import

    figure = Figure(figsize=(8, 4), layout="tight")
    axes = figure.subplots()
    edges = [MAX_LENGTH * i / len(histogram) for i in range(len(histogram) + 1)]
    axes.stairs(histogram, edges, fill=True)
    axes.set(xlabel="tokens of a chat", ylabel="chats")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    run_main(main)

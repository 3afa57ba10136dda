"""Conversation with a model in the terminal: a checkpoint, a run, an adapter, a hub model or a .gguf file.

    python chat_pipe.py MODEL=out/first
    echo "What is your name?" | python chat_pipe.py MODEL=out/first TEMPERATURE=0

In the terminal /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Piped input gets one answer line per
prompt line and nothing else on standard output: the content without its reasoning, or a call of one of the TOOLS as
{"name": ..., "arguments": ...}, several as a list. PROMPTS=file.jsonl writes an answer for every row of a file.
"""

from common.cli import UserError, run_main
from common.model.location import check_models
from common.settings import apply_overrides, current

# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder, or this embedded model
ADAPTER: str | None = None  # adapter folder, run folder or hub id that goes on MODEL; None: MODEL's own, if any
COMPARE: str | None = None  # a second model, which answers the same prompts; each continues from its own answers
QUANTIZATION: str | None = "auto"  # auto: as trained; nf4, int8 or hqq-1bit to hqq-4bit; None: 2 bytes a weight
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
ATTN_IMPLEMENTATION: str | None = None  # None: sdpa, or eager where the model has no other; flash_attention_2 ...
CHAT_TEMPLATE: str | None = None  # None: the model's own; chatml, llama3, zephyr, mistral, alpaca, or a .jinja file
TEMPLATE_OPTIONS = ""  # variables of the template: "enable_thinking=False, date_string=26 Jul 2024"
# Conversation
SYSTEM: str | None = None  # system message put before the conversation
TOOLS: str | None = None  # .json list of functions that the model may call, in OpenAI's schema
PROMPT: str | None = None  # answer this one prompt and leave
CONTEXT: int | None = None  # tokens in view, the oldest turns beyond are left out; None: as many as the model takes
HISTORY: str | None = "~/.chat_pipe_history"  # file of the prompts typed, for the arrow keys; None: keep no file
# A file of prompts
PROMPTS: str | None = None  # .jsonl of {"prompt"}, or chats whose last question is to be answered
ANSWERS: str | None = None  # .jsonl to write; None: <PROMPTS>-answers.jsonl. The same command again continues it
GENERATION_BATCH_SIZE = 16  # prompts answered at once; more are faster on a GPU and take more VRAM
# Generation
MAX_NEW_TOKENS = 512  # tokens of an answer at most
TEMPERATURE = 0.7  # 0: always the likeliest token
TOP_P = 0.95  # sample from the likeliest tokens that make up this share
SEED = 0

if __name__ == "__main__":
    apply_overrides(globals())  # mistakes are answered here, before the slow imports
    check_models(MODEL=MODEL, ADAPTER=ADAPTER, COMPARE=COMPARE)

import sys
from pathlib import Path

from transformers import set_seed
from transformers.utils import logging

from common import distributed
from common.chat import turns
from common.chat.conversation import Conversation
from common.chat.terminal import run_terminal
from common.eval import answers
from common.model import generation


def main():
    # Settings: combinations of which one would be ignored, and the file of prompts
    distributed.device()  # first of all: it says why a GPU is not used
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    interactive = sys.stdin.isatty()
    if COMPARE and (PROMPTS or PROMPT is None and not interactive):
        raise UserError(f"COMPARE={COMPARE} is for the terminal and for PROMPT=. Run the second model by itself.")
    opening = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    prompts = answers.read_prompts(PROMPTS, reserved=answers.ADDED) if PROMPTS else []
    tools = turns.read_tools(TOOLS, "TOOLS") if TOOLS else []
    prompts = [(row, turns.begin(chat, opening, tools)) for row, chat in prompts]

    # Models
    generators, first = {}, ADAPTER or MODEL
    for name, model, adapter in ((first, MODEL, ADAPTER), (COMPARE, COMPARE, None)):
        how = QUANTIZATION, DTYPE, ATTN_IMPLEMENTATION, CHAT_TEMPLATE, TEMPLATE_OPTIONS, adapter
        if name:
            generators[name] = generation.Generator(*generation.load_for_chat(model, *how))
    conversation = Conversation(generators, current(globals()), opening, tools)
    set_seed(SEED)

    # Answers: to a file, to one prompt, to piped lines, or in the terminal
    if PROMPTS:
        file = Path(ANSWERS or f"{PROMPTS.removesuffix('.jsonl')}-answers.jsonl")
        answers.write_answers(generators[first], prompts, file, conversation.settings)
    elif PROMPT is not None:
        conversation.ask(PROMPT, show_stats=False)
    elif interactive:
        run_terminal(conversation, HISTORY)
    else:
        answer_pipe(generators[first], opening, tools)


def answer_pipe(generator: generation.Generator, opening: list[dict], tools: list[dict]):
    """Answer each line by itself on one line, which is empty for a prompt that is too long."""
    missing = []
    for number, prompt in turns.read_lines(sys.stdin):
        chat = turns.begin([{"role": "user", "content": prompt}], opening, tools)
        try:
            _, ids = generator.fit_context(chat, MAX_NEW_TOKENS, CONTEXT)
        except UserError as error:
            missing.append(number)
            print(flush=True)
            print(f"line {number} is not answered: {error}", file=sys.stderr)
            continue
        list(generator.stream(ids, MAX_NEW_TOKENS, TEMPERATURE, TOP_P, CONTEXT, tools))
        print(turns.answer_line(generator.last.message), flush=True)
        if why := turns.explain_empty(generator.last):
            print(f"note: {prompt[:40]!r}: {why}", file=sys.stderr)
    if missing:
        lines = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        raise UserError(f"CONTEXT={CONTEXT}: prompts not answered: {len(missing)} (lines {lines}; see above).")


if __name__ == "__main__":
    run_main(main)

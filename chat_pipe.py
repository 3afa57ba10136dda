"""Talk to a model in the terminal: a checkpoint, a run, an adapter, a hub model or a .gguf file.

    python chat_pipe.py MODEL=out/first
    echo "What is your name?" | python chat_pipe.py MODEL=out/first TEMPERATURE=0

/reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer. Piped input gets one answer line per
prompt line and nothing else on standard output.
"""

from common.settings import apply_overrides, run_main

# Model
MODEL = "smollm2-135m-instruct"  # hub id, local folder, .gguf file, run folder of ours, or this embedded model
QUANTIZATION: str | None = None  # nf4 or int8; None: 2 bytes a weight
DTYPE: str | None = None  # None: bfloat16, float16 on older GPUs, float32 on older CPUs
# Conversation
SYSTEM: str | None = None  # system message put before the conversation
PROMPT: str | None = None  # answer this one prompt and leave
# Generation
MAX_NEW_TOKENS = 512
TEMPERATURE = 0.7  # 0: always the likeliest token
TOP_P = 0.95  # sample from the likeliest tokens that make up this share
SEED = 0

if __name__ == "__main__":
    apply_overrides(globals())  # a mistyped name stops here, before the slow imports

import sys
import time

from transformers import set_seed
from transformers.utils import logging

from common import generation


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = generation.load_for_chat(MODEL, QUANTIZATION, DTYPE)
    set_seed(SEED)
    if PROMPT is not None:
        answer(model, tokenizer, opening() + [{"role": "user", "content": PROMPT}])
        print()
    elif not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                print(one_line(model, tokenizer, line.strip()), flush=True)
    else:
        converse(model, tokenizer)


def opening() -> list[dict]:
    """The messages a conversation begins with."""
    return [{"role": "system", "content": SYSTEM}] if SYSTEM else []


def stream(model, tokenizer, messages):
    """The pieces of the answer, as the generation settings say."""
    return generation.stream_answer(
        model, tokenizer, messages, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P
    )


def answer(model, tokenizer, messages: list[dict]) -> str:
    """Print the answer while it comes, and return it; Ctrl-C keeps what has come so far."""
    text = ""
    try:
        for piece in stream(model, tokenizer, messages):
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    return text.strip()


def one_line(model, tokenizer, prompt: str) -> str:
    """The answer to a single prompt, without line breaks."""
    pieces = stream(model, tokenizer, opening() + [{"role": "user", "content": prompt}])
    return " ".join("".join(pieces).split())


def converse(model, tokenizer):
    """Prompt, answer, repeat, with the conversation so far in view of the model."""
    print(f"{MODEL}: /reset forgets the conversation, /quit leaves")
    messages = opening()
    while True:
        try:
            prompt = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt == "/quit":
            return
        if prompt == "/reset":
            messages = opening()
            print("(forgotten)")
        elif prompt.startswith("/"):
            print("commands: /reset /quit")
        elif prompt:
            messages.append({"role": "user", "content": prompt})
            started = time.perf_counter()
            text = answer(model, tokenizer, messages)
            messages.append({"role": "assistant", "content": text})
            tokens = len(tokenizer.encode(text, add_special_tokens=False))
            print(f"\n[{tokens} tokens, {tokens / (time.perf_counter() - started):.1f} tokens/s]")


if __name__ == "__main__":
    run_main(main)

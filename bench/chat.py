"""Answering speed: chat_pipe.py's loop against transformers' generate() on the same model, prompt and tokens, in turn.

    python bench/chat.py
    python bench/chat.py MODEL=out/first TOKENS=200 ROUNDS=5

Greedy, the end token ignored; where MODEL has an adapter, generate() with the adapter not merged as well. The last line
says how much of a second turn the loop has to read.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import run_main
from common.model import generation, load, location
from common.settings import apply_overrides

MODEL = "smollm2-135m-instruct"  # as in chat_pipe.py
TOKENS = 100  # tokens of each answer
ROUNDS = 5  # answers of each side, in turn; the median counts
PROMPT = "Explain how a bicycle stays upright, and what happens when it slows down."

if __name__ == "__main__":
    apply_overrides(globals())

import statistics
import time

import torch

CHAT = [{"role": "user", "content": PROMPT}]


def main():
    model, tokenizer = generation.load_for_chat(MODEL)
    generator = generation.Generator(model, tokenizer)
    generator.ends = set()
    ids = generator.encoder.prompt(CHAT)

    def loop():
        generator.seen = []  # nothing read before
        for _ in generator.stream(ids, TOKENS, temperature=0, top_p=1):
            pass

    sides = {"loop": loop, "generate": lambda: generate(model, tokenizer, ids)}
    if location.locate(MODEL).adapter:
        dtype, rows = load.choose_dtype(None), len(tokenizer)
        whole = load.load_model(location.locate(MODEL), None, dtype, "sdpa", vocabulary=rows).eval()
        sides["generate, adapter not merged"] = lambda: generate(whole, tokenizer, ids)
    for name, seconds in measure(sides).items():
        print(f"{name:<30}{TOKENS / statistics.median(seconds):>8.1f} tokens/s")
    loop()
    second = generator.encoder.prompt([*CHAT, {"role": "assistant", "content": generator.last.text}, *CHAT])
    for _ in generator.stream(second, 1, temperature=0, top_p=1):
        pass
    print(f"a second turn reads {generator.last.read} of its {generator.last.prompt_tokens} tokens")


def generate(model, tokenizer, ids: list[int]) -> None:
    inputs = torch.tensor([ids], device=model.device)
    model.generate(
        inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )


def measure(actions: dict) -> dict[str, list[float]]:
    """Seconds of each action, ROUNDS times in turn, after a first time that does not count."""
    seconds = {name: [] for name in actions}
    for number in range(ROUNDS + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds[name] += [time.perf_counter() - started] if number else []
    return seconds


if __name__ == "__main__":
    run_main(main)

"""Answers: load a model for chatting, stream one answer, or answer many prompts in batches."""

import functools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TextIteratorStreamer

from common import models
from common.encoding import ChatEncoder
from common.settings import UserError


def load_for_chat(model_name: str, quantization: str | None = None, dtype: str | None = None):
    """A model in evaluation mode, its adapter merged in memory where the base is not quantised, and its tokenizer."""
    source = models.locate(model_name)
    tokenizer = models.load_tokenizer(source)
    if not tokenizer.chat_template:
        raise UserError(f"MODEL={model_name} has no chat template: it is a base model. Fine-tune it first.")
    if source.adapter:
        note_quantization(Path(source.adapter).parent / "settings.json", quantization)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = models.choose_dtype(dtype)
    model = models.load_model(source, quantization, dtype, "sdpa", vocabulary=len(tokenizer))
    if source.adapter and not quantization:
        model = model.merge_and_unload()
    return model.eval(), tokenizer


def note_quantization(run_settings: Path, quantization: str | None) -> None:
    """Say so when an adapter is loaded on a base in another form than it was trained on."""
    if run_settings.is_file():
        trained = json.loads(run_settings.read_text(encoding="utf-8"))["settings"]["QUANTIZATION"]
        if trained != quantization:
            print(
                f"note: the adapter was trained with QUANTIZATION={trained}, here it is {quantization}", file=sys.stderr
            )


def end_tokens(model, tokenizer) -> list[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and the usual end-of-turn tokens."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(tokenizer.convert_tokens_to_ids(encoder_of(tokenizer, tokenizer.chat_template).end_token))
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(token) for token in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>")}
    return sorted(ids - {None})


def generation_settings(model, tokenizer, max_new_tokens: int, temperature: float, top_p: float) -> dict:
    """Arguments for generate(): greedy at temperature 0."""
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p) if temperature > 0 else dict(do_sample=False)
    return dict(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def prompts(model, tokenizer, chats: list[list[dict]]):
    """The chats as a batch of inputs, padded on the left: ids and attention mask, (B, T)."""
    encoder = encoder_of(tokenizer, tokenizer.chat_template)
    return tokenizer.pad({"input_ids": [encoder.prompt(chat) for chat in chats]}, return_tensors="pt").to(model.device)


@functools.lru_cache(maxsize=4)
def encoder_of(tokenizer, template: str) -> ChatEncoder:
    """The tokenizer's encoder, made once for each template."""
    return ChatEncoder(tokenizer)


def stream_answer(model, tokenizer, messages: list[dict], **settings) -> Iterator[str]:
    """Yield the answer to a chat as pieces of text while it is generated; settings as in `generation_settings`."""
    inputs = prompts(model, tokenizer, [messages])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()  # set when the reader goes away: Ctrl-C, or the caller has had enough
    arguments = dict(
        **inputs,
        **generation_settings(model, tokenizer, **settings),
        streamer=streamer,
        stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), stopped.is_set(), device=ids.device)],
    )
    failure = []

    def generate():
        try:
            model.generate(**arguments)
        except BaseException as error:  # noqa: B036  handed over to the thread that reads the stream
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if failure:
        raise failure[0]


@torch.no_grad()
def answers(model, tokenizer, chats: list[list[dict]], batch_size: int = 32, **settings) -> Iterator[str]:
    """Yield one answer per chat, generated in batches; the same as one by one up to rounding."""
    arguments = generation_settings(model, tokenizer, **settings)
    for start in range(0, len(chats), batch_size):
        inputs = prompts(model, tokenizer, chats[start : start + batch_size])
        outputs = model.generate(**inputs, **arguments)
        new = outputs[:, inputs["input_ids"].shape[1] :]  # (B, new tokens)
        yield from (text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True))

"""Answers: load a model for chatting, stream an answer, or answer many prompts in batches."""

import functools
import inspect
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from common.cli import UserError
from common.data import templates
from common.data.encoder import ChatEncoder
from common.model import load, location, responses
from common.model.adapters import prompt_cache
from common.model.attention import choose_attention, model_class
from common.model.merging import merge_adapter

USUAL_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|call|>")
GREEDY = 1e-3  # temperatures below it: logits divided by them may overflow, and the likeliest token is certain
# An answer of two parts; what a template writes between them ends no answer.
PARTS = [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning_content": "REASON", "content": "ANSWER"}]
PARTS[1]["thinking"] = PARTS[1]["reasoning_content"]  # as gpt-oss has it


def load_for_chat(
    model_name: str, quantization: str | None = "auto", dtype=None, attention: str | None = None,
    template: str | None = None, options: str = "", adapter: str | None = None,
):  # fmt: skip
    """(model, tokenizer), the adapter merged in memory unless the base is quantised or its kind has no merge.

    quantization, template, options: as QUANTIZATION, CHAT_TEMPLATE and TEMPLATE_OPTIONS. UserError without a template.
    """
    source = location.locate(model_name, adapter=adapter)
    requested, quantization = quantization, load.find_quantization(source, quantization)
    tokenizer = load.load_tokenizer(source)
    templates.choose_for_chat(tokenizer, template, options)
    run = location.run_folder(source) if source.adapter else None
    if requested == "auto" and run and quantization:
        print(f"QUANTIZATION={quantization}, as in training (None: 2 bytes a weight)", file=sys.stderr)
    elif run and (trained := location.run_settings(run).get("QUANTIZATION")) != quantization:
        difference = f"with QUANTIZATION={trained}, here it is {quantization}"
        print(f"note: the adapter was trained {difference}", file=sys.stderr)
    attention = choose_attention(load.load_config(source), attention)
    arguments = source, quantization, load.choose_dtype(dtype), attention
    model = load.load_model(*arguments, vocabulary=len(tokenizer))
    if source.adapter and not quantization:
        try:
            model = merge_adapter(model, adapter or model_name)
        except UserError as error:
            print(f"note: {error} Its adapter stays beside the weights.", file=sys.stderr)
            model = load.load_model(*arguments, vocabulary=len(tokenizer))
    if not (ends := end_tokens(model, tokenizer)):
        problem = "neither its tokenizer nor its generation_config has an end token, so answers would not end"
        raise UserError(f"MODEL={model_name}: {problem}. Set eos_token in its tokenizer_config.json.")
    end_token = encoder_of(tokenizer, tokenizer.chat_template).end_token
    templates.add_missing_tokens(tokenizer, end_token or tokenizer.convert_ids_to_tokens(ends[0]))
    return model.eval(), tokenizer


def end_tokens(model, tokenizer) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and the usual ones.

    Not a usual one that ends a part of an answer only, as <|end|> does for gpt-oss.
    """
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    tokens = [*USUAL_ENDS]
    if tokenizer.chat_template:
        text = templates.render(tokenizer, PARTS, tokenizer.chat_template)
        between = text.partition("REASON")[2].partition("ANSWER")[0]
        tokens = [token for token in USUAL_ENDS if token not in between]
        tokens.append(encoder_of(tokenizer, tokenizer.chat_template).end_token)
    ids |= set(map(tokenizer.get_vocab().get, tokens))
    return sorted(token for token in ids if isinstance(token, int))


@functools.lru_cache(maxsize=4)
def encoder_of(tokenizer, template: str) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def identify_weights(source: location.Source) -> str:
    """Tells apart models of one name: by the time of their weights, or their commit on the hub."""
    commit = getattr(load.load_config(source), "_commit_hash", None)
    parts = [source.name]
    for folder in filter(None, (source.path, source.adapter)):
        times = [file.stat().st_mtime_ns for file in Path(folder).glob("*.safetensors")]
        parts.append(str(max(times, default=commit)))
    return "-".join(parts)


class Answer(NamedTuple):
    text: str  # its content
    tokens: int
    stop: str  # "end" token, "length" (max_new_tokens), "context" (full), or "stopped" by the reader
    prompt_tokens: int = 0
    read: int = 0  # tokens of the prompt that were not in the cache
    seconds: float = 0.0
    message: dict | None = None  # with its reasoning and calls, as responses.parse gives it


class Generator:
    """A model in a conversation; it keeps keys and values, so that a turn reads only what is new."""

    def __init__(self, model, tokenizer):
        if "past_key_values" not in inspect.signature(model_class(model.config).forward).parameters:
            problem = f"{model.config.model_type} models keep no keys and values, by which a chat goes on"
            raise UserError(f"MODEL={model.name_or_path}: {problem}. PROMPTS of evaluate_model.py answers without.")
        self.model, self.tokenizer = model, tokenizer
        self.encoder = encoder_of(tokenizer, tokenizer.chat_template)
        self.ends = set(end_tokens(model, tokenizer))
        self.seen: list[int] = []  # tokens whose keys and values are in the cache
        prompt = prompt_cache(model)  # tokens of an adapter, before all others
        self.prompt_tokens = 0 if prompt is None else prompt.get_seq_length()
        self.context = load.context_length(model.config) - self.prompt_tokens
        self.forward = model if prompt is None else model.get_base_model()
        # A sliding window cannot be cropped: such models get plain layers, which keep everything. A running
        # state cannot go back: each turn is read from the start.
        layers = DynamicCache(config=model.config).layers
        self.can_rewind = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        self.cache = None
        self.last: Answer | None = None

    def limit(self, context: int | None) -> int:
        """Tokens in view: CONTEXT, but not more than the model takes."""
        return min(context or self.context, self.context)

    def fit_context(self, messages: list[dict], max_new_tokens: int, context: int | None = None):
        """(messages, their token ids) without the oldest turns, so that the answer fits, too.

        Cut before a prompt: a call keeps its result. The tools stay on the first turn.
        """
        # A quarter of the context is enough for the answer.
        room = self.limit(context) - min(max_new_tokens, self.limit(context) // 4)
        first = int(messages[0]["role"] == "system")
        tools = {key: messages[0][key] for key in ("tools",) if key in messages[0]}
        while len(ids := self.encoder.prompt(messages)) > room:
            later = [i for i, message in enumerate(messages) if i > first and message["role"] == "user"]
            if not later:
                problem = f"the prompt has {len(ids)} of {room} tokens. Shorten it."
                raise UserError(f"CONTEXT={self.limit(context)}: {problem}")
            messages = messages[:first] + messages[later[0] :]
            messages[0] = messages[0] | tools
        return messages, ids

    @torch.no_grad()
    def stream(
        self, prompt, max_new_tokens: int, temperature: float, top_p: float, context=None, tools=()
    ) -> Iterator[str]:
        """Yield the answer to token ids as pieces of text with its special tokens; greedy at temperature 0.

        Afterwards `last` has the answer. tools: they give types to the arguments of calls.
        """
        self.last = None
        started, text, tokens, stop = time.perf_counter(), "", 0, "stopped"
        decoder, backend = DecodeStream(skip_special_tokens=False), self.tokenizer.backend_tokenizer
        new = self.rewind(prompt)
        read = len(new)
        try:
            while True:
                ids = torch.tensor([new], device=self.model.device)  # (1, T)
                output = self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.cache = output.past_key_values
                self.seen += new
                new = [choose_token(output.logits[:, -1], temperature, top_p)]
                tokens += 1
                if new[0] in self.ends:
                    stop = "end"
                    break
                if piece := decoder.step(backend, new[0]):
                    text += piece
                    yield piece
                if tokens == max_new_tokens or len(self.seen) >= self.limit(context):
                    stop = "length" if tokens == max_new_tokens else "context"
                    break
        finally:  # also when the reader stops early (Ctrl-C)
            seconds = time.perf_counter() - started
            message = responses.parse(text, tail_of(prompt, self.tokenizer), self.tokenizer, tools)
            self.last = Answer(message["content"], tokens, stop, len(prompt), read, seconds, message)

    def rewind(self, prompt: list[int]) -> list[int]:
        """Crop the cache to what the prompt begins with; returns the tokens to read, one at least."""
        same = len(os.path.commonprefix([self.seen, prompt[:-1]]))
        if self.seen and self.can_rewind:
            for layer in self.cache.layers:  # an interrupted forward pass leaves some longer than others
                layer.crop(self.prompt_tokens + same - layer.get_seq_length())
        else:
            same, self.cache = 0, prompt_cache(self.model) or (DynamicCache() if self.can_rewind else None)
        self.seen = self.seen[:same]
        return prompt[same:]


def tail_of(prompt: list[int], tokenizer) -> str:
    """The end of a prompt, where the reasoning of the answer may begin."""
    return tokenizer.decode(prompt[-16:])


def choose_token(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    """The next token by its logits, (1, vocabulary): the likeliest at temperature 0, else a sample."""
    if logits.isnan().any():
        raise UserError("MODEL: its logits are NaN. Its weights are damaged, or DTYPE=float32 is needed.", code=4)
    if temperature < GREEDY:
        return int(logits.argmax())
    scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.float()))
    return int(torch.multinomial(scores.softmax(-1), 1))


@torch.no_grad()
def answers(
    model, tokenizer, chats: list[list[dict]], batch_size=32, *, max_new_tokens: int, temperature=0.0, top_p=1.0,
    context=sys.maxsize,
) -> Iterator[Answer]:  # fmt: skip
    """Yield one answer per chat, the same as one by one up to rounding.

    context: tokens in view at most. An answer is empty, with stop "too long", where the prompt fills them.
    """
    encoder = encoder_of(tokenizer, tokenizer.chat_template)
    context, ends = min(context, load.context_length(model.config)), end_tokens(model, tokenizer)
    # A model's own generation_config may set these; `Generator` does not apply them.
    settings = dict(top_k=0, repetition_penalty=1.0, no_repeat_ngram_size=0)
    settings |= dict(do_sample=temperature >= GREEDY, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    if temperature >= GREEDY:
        settings |= dict(temperature=temperature, top_p=top_p)
    for start in range(0, len(chats), batch_size):
        batch = chats[start : start + batch_size]
        prompts, answered = [encoder.prompt(chat) for chat in batch], {}
        # One that leaves less room than max_new_tokens would shorten the answers beside it.
        alone = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens > context]
        for group in [[i for i in range(len(batch)) if i not in alone], *([i] for i in alone)]:
            ids = {"input_ids": [prompts[i] for i in group]}
            room = context - max(map(len, ids["input_ids"]), default=context)
            if room > 0:
                inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
                read = inputs["input_ids"].shape[1]  # (B, T)
                settings["max_new_tokens"] = min(room, max_new_tokens)
                new = model.generate(**inputs, **settings)[:, read:].tolist()
                answered |= dict(zip(group, new, strict=True))
        for i, (chat, prompt) in enumerate(zip(batch, prompts, strict=True)):
            yield read_answer(answered.get(i), prompt, chat, ends, tokenizer)


def read_answer(new: list[int] | None, prompt: list[int], chat: list[dict], ends: list[int], tokenizer) -> Answer:
    """The answer in the tokens after a prompt; None: the prompt was too long, which no other suffers from."""
    if new is None:
        problem = f"a prompt of {len(prompt)} tokens fills the context: {chat[-1]['content'][:60]!r}. Shorten it."
        print(f"not answered: {problem}", file=sys.stderr)
        return Answer("", 0, "too long", message={"role": "assistant", "content": ""})
    end = next((i for i, token in enumerate(new) if token in ends), None)
    tools = chat[0].get("tools", ())
    message = responses.parse(tokenizer.decode(new[:end]), tail_of(prompt, tokenizer), tokenizer, tools)
    if end is None:
        return Answer(message["content"], len(new), "length", message=message)
    return Answer(message["content"], end + 1, "end", message=message)

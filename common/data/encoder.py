"""Encoding: a chat becomes token ids and a mask of the tokens in the loss.

In the text that the template renders, each answer is put between two noncharacters that our copy of the
tokenizer has as special tokens: the text is split there, as when the model answers, and their places give
the mask. A third one breaks up control tokens in a message. All three leave the ids.
"""

import hashlib
import json
import re
from collections import namedtuple
from functools import partial
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers.utils.chat_template_utils import render_jinja_template

from common.cli import UserError

MARKS = START, END, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)  # what rendering a faulty template raises
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")  # marks an answer in a template
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


# SentencePiece's space before text: after every special token? not where there is one already?
Prefix = namedtuple("Prefix", ["everywhere", "once"])


class Encoded(NamedTuple):
    """An encoded chat of T tokens and A answers."""

    ids: np.ndarray  # (T,), int32
    learned: np.ndarray  # (T,), bool: the tokens in the loss
    ends: np.ndarray  # (A,), number of tokens up to the end of each answer


class ChatEncoder:
    """Encodes chats by a tokenizer's template; can be pickled.

    end_token: ends an answer; None where the template writes none.
    fingerprint: differs between tokenizers and templates that give other tokens.
    """

    def __init__(self, tokenizer):
        self.template = tokenizer.chat_template
        self.marked = GENERATION.search(self.template) is not None
        self.variables = tokenizer.special_tokens_map
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        special.sort(key=lambda token: len(token.content), reverse=True)
        self.control = re.compile("|".join(re.escape(token.content) for token in special) or "(?!)")
        self.rstrip_tokens = {token.content for token in special if token.rstrip}
        self.adds_bos = adds_bos(tokenizer)
        self.new_token_ids: list[int] = []  # that the base has hardly seen; from set_template
        try:
            answer = self.mark(PROBE).partition(START)[2].partition(END)[0]
        except UserError:  # good for chatting; set_template refuses to train on it
            answer = ""
        ends = (token.content for token in special if answer.endswith(token.content))
        self.end_token = next(ends, None)
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        spec = self.backend.to_str()
        state = spec + self.template + str(self.variables)
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]
        self.prefix = remove_prefix_space(self.backend, json.loads(spec))
        # An end token that takes the white space after it must do so past our mark, too.
        rstrip = self.end_token in self.rstrip_tokens
        marks = [AddedToken(m, normalized=False, rstrip=rstrip and m == END) for m in MARKS]
        self.backend.add_special_tokens(marks)
        self.mark_ids = [self.backend.token_to_id(mark) for mark in MARKS]

    def render(self, messages: list[dict], **options) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat and the (start, end) of its marked passages."""
        try:
            texts, passages = render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=self.marked,
                **self.variables, **options,
            )  # fmt: skip
        except TEMPLATE_ERRORS as error:
            chat = ", ".join(m["role"] for m in messages)
            problem = f"refuses a chat ({chat}): {error}"
            raise UserError(f"CHAT_TEMPLATE {problem}. Change one of them.") from error
        return texts[0], passages[0] if self.marked else []

    def mark(self, messages: list[dict], **options) -> str:
        """The text of a chat with START and END around each answer; UserError where that fails."""
        messages = self.escape_control_tokens(messages)
        if messages[0]["role"] == "text":
            bos = self.variables["bos_token"] if self.adds_bos else ""
            return f"{bos}{START}{messages[0]['content']}{self.variables.get('eos_token', '')}{END}"
        text, passages = self.render(messages, **options)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in () if self.marked else answers:
            prompt = self.render(messages[:i], add_generation_prompt=True)[0]
            answered = self.render(messages[: i + 1])[0]
            if not text.startswith(answered) or not answered.startswith(prompt):
                problem = "this one rewrites earlier turns, so what to learn of its answers is undefined"
                remedy = "Copy it to a file, put {% generation %} marks around each answer"
                raise UserError(f"CHAT_TEMPLATE: {problem}. {remedy}, and set CHAT_TEMPLATE=file.jinja.")
            ends = [found.end() for found in self.control.finditer(answered, len(prompt))]
            passages.append((len(prompt), ends[-1] if ends else len(answered)))
        if len(passages) != len(answers):
            found = f"{len(passages)} passages in a chat of {len(answers)} answers"
            raise UserError(f"CHAT_TEMPLATE marks {found}; mark each once.")
        for start, end in reversed(passages):
            text = text[:start] + START + text[start:end] + END + text[end:]
        return text

    def escape_control_tokens(self, messages: list[dict]) -> list[dict]:
        escape = partial(self.control.sub, lambda found: found[0][0] + BREAK + found[0][1:])
        return [{"role": turn["role"], "content": escape(turn["content"])} for turn in messages]

    def add_prefix_space(self, text: str) -> str:
        """The text with the spaces that its tokenizer would put."""
        if self.prefix is None:
            return text
        pieces = re.split(f"({self.control.pattern})", text)  # passage, control token, passage, ...
        for i in range(0, len(pieces) if self.prefix.everywhere else 1, 2):
            bare = pieces[i].lstrip("".join(MARKS))
            marks = pieces[i].removesuffix(bare)
            if i and pieces[i - 1] in self.rstrip_tokens:
                bare = bare.lstrip()
            if bare and not (bare.startswith(" ") and self.prefix.once):
                pieces[i] = marks + "\u2581" + bare
        return "".join(pieces)

    def encode(self, chats: list[list[dict]], train_on: str = "assistant") -> list[Encoded]:
        """Each chat's tokens; answers of weight 0 are not in the loss. train_on: or "all"."""
        texts = [self.add_prefix_space(self.mark(chat)) for chat in chats]
        batch = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = []
        for chat, encoding in zip(chats, batch, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)  # (T + marks,)
            starts, ends, breaks = (ids == mark for mark in self.mark_ids)
            kept = ~(starts | ends | breaks)
            answer, answered = starts.cumsum(), ends.cumsum()
            weights = [turn.get("weight", 1) for turn in chat if turn["role"] in ("assistant", "text")]
            learned = (answer > answered) & np.array([0, *weights], dtype=bool)[answer]
            if train_on == "all":
                learned |= answer == answered  # all but answers of weight 0
            rows.append(Encoded(ids[kept], learned[kept], kept.cumsum()[ends]))
        return rows

    def prompt(self, messages: list[dict]) -> list[int]:
        """What the next answer is generated from: the tokens that training saw before it."""
        try:
            text = self.mark(messages, add_generation_prompt=True)
        except UserError:  # a template that rewrites earlier turns, so not trained on here
            text = self.render(self.escape_control_tokens(messages), add_generation_prompt=True)[0]
        ids = self.backend.encode(self.add_prefix_space(text), add_special_tokens=False).ids
        return [i for i in ids if i not in self.mark_ids]


def remove_prefix_space(backend: Tokenizer, spec: dict) -> Prefix | None:
    """Keep a tokenizer from putting a space after our marks; spec: its JSON."""
    steps = [spec["normalizer"] or {}, *(spec["normalizer"] or {}).get("normalizers", [])]
    if any(step.get("type") == "Prepend" for step in steps):
        others = [step for step in steps if step.get("type") not in ("Prepend", "Sequence")]
        spec["normalizer"] = {"type": "Sequence", "normalizers": others}
        backend.normalizer = Tokenizer.from_str(json.dumps(spec)).normalizer
        return Prefix(everywhere=True, once=False)
    metaspace = spec["pre_tokenizer"] or {}
    if metaspace.get("type") != "Metaspace" or metaspace["prepend_scheme"] == "never":
        return None
    backend.pre_tokenizer = Metaspace(metaspace["replacement"], "never", metaspace["split"])
    return Prefix(everywhere=metaspace["prepend_scheme"] == "always", once=True)


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS token before plain text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos

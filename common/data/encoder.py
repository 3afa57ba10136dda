"""Encoding: a chat becomes token ids and a mask of the tokens in the loss.

In the text that the template renders, each answer is put between two noncharacters that our copy of the
tokenizer has as special tokens: the text is split there, as when the model answers, and their places give
the mask. A third one breaks up control tokens in a message, a fourth ends the reasoning. All leave the ids.
"""

import hashlib
import itertools
import json
import re
from collections import namedtuple
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from common.cli import UserError
from common.data.passages import RewrittenTurns, find_answers, find_written_answers
from common.data.rows import CONTROL_TOKEN
from common.data.template import ChatTemplate, control_pattern

MARKS = START, END, BREAK, THOUGHT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
# The reasoning of an answer, or, where the prompt begins it, the rest of it.
REASONING = re.compile(
    r"\s*(?:<think>.*?</think>|<\|channel>thought.*?<channel\|>|<\|channel\|>analysis.*?<\|end\|>|to=self.*?<\|eom\|>)",
    re.DOTALL,
)
REST_OF_REASONING = re.compile(r".*?</think>", re.DOTALL)

# SentencePiece's space before text: after every special token? not where there is one already?
Prefix = namedtuple("Prefix", ["everywhere", "once"])


class Encoded(NamedTuple):
    """An encoded chat of T tokens and A answers, in P sequences: usually one."""

    ids: np.ndarray  # (T,), int32
    learned: np.ndarray  # (T,), bool: the tokens in the loss
    ends: np.ndarray  # (A,), number of tokens up to the end of each answer
    lengths: np.ndarray  # (P,), tokens of each sequence
    is_good: bool = True  # the label of a row that has one

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, learned) of each sequence."""
        places = self.lengths.cumsum()[:-1]
        return list(zip(np.split(self.ids, places), np.split(self.learned, places), strict=True))


def join(rows: list[Encoded]) -> Encoded:
    """One chat whose sequences are those of several."""
    if len(rows) == 1:
        return rows[0]
    before = np.cumsum([0, *(len(row.ids) for row in rows)])
    ends = [row.ends + start for row, start in zip(rows, before, strict=False)]
    ids, learned, lengths = ([row[i] for row in rows] for i in (0, 1, 3))
    return Encoded(*map(np.concatenate, (ids, learned, ends, lengths)))


class ChatEncoder:
    """Encodes chats by a tokenizer's template; can be pickled.

    end_token: ends an answer; None where the template writes none.
    fingerprint: differs between tokenizers and templates that give other tokens.
    """

    def __init__(self, tokenizer):
        self.variables = tokenizer.special_tokens_map
        self.control = control_pattern(tokenizer)
        special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.rstrip_tokens = {token.content for token in special if token.rstrip}
        self.adds_bos = adds_bos(tokenizer)
        self.new_token_ids: list[int] = []  # that the base has hardly seen; from set_template
        self.template = ChatTemplate(tokenizer.chat_template, self.variables, self.control)
        self.end_token = self.template.end_token
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        spec = self.backend.to_str()
        state = spec + tokenizer.chat_template + str(self.variables)
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]
        self.prefix = remove_prefix_space(self.backend, json.loads(spec))
        # An end token that takes the white space after it must do so past our mark, too.
        rstrip = self.end_token in self.rstrip_tokens
        marks = [AddedToken(m, normalized=False, rstrip=rstrip and m == END) for m in MARKS]
        self.backend.add_special_tokens(marks)
        self.mark_ids = [self.backend.token_to_id(mark) for mark in MARKS]

    def mark(
        self, messages: list[dict], train_on: str = "assistant", last_only: bool = False, **options
    ) -> tuple[str, list[int]]:
        """(the text of a chat with START and END around each answer, their weights); UserError where that fails.

        train_on: "content" puts THOUGHT after the reasoning of an answer. last_only, or train_on "last": the others
        have the weight 0, or no marks where the template rewrites them.
        """
        if messages[0]["role"] == "text":
            return self.mark_text(messages, train_on)
        weights = [turn.get("weight", 1) for turn in messages if turn["role"] == "assistant"]
        messages = self.template.as_written(escape(messages, self.control))
        text, passages = self.template.render(messages, **options)
        last_only = last_only or train_on == "last"
        found = find_answers(self.template, messages, text, passages, last_only)
        return put_marks(text, found, weights[-len(found) :] if found else [], train_on, last_only)

    def mark_text(self, turns: list[dict], train_on: str) -> tuple[str, list[int]]:
        """What `mark` returns of plain text (its last part is learned), or of text in the template's own form."""
        bos = self.variables.get("bos_token", "") if self.adds_bos else ""
        eos = self.variables.get("eos_token", "")
        text, weight = "".join(turn["content"] for turn in turns), turns[-1].get("weight", 1)
        context = len(text) - len(turns[-1]["content"])  # characters before what is learned
        foreign = [found[0] for found in CONTROL_TOKEN.finditer(self.control.sub("", text))]
        if unknown := [token for token in foreign if token not in self.template.probe_text]:
            problem = f"{unknown[0]!r} stands in a text, but is no token of this model"
            raise UserError(f"text: {problem}. Give the chat as messages, or take it out.")
        if self.is_plain_text(turns):
            text = text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text  # it gets one here
            bos = "" if text.startswith(bos) else bos
            return f"{bos}{text[:context]}{START}{text[context:]}{eos}{END}", [weight]
        found = find_written_answers(self.template, text)
        weights = [weight if start >= context else 0 for start, _ in found]
        text, weights = put_marks(text, found, weights, train_on, train_on == "last")
        return bos * (not text.startswith(bos)) + text, weights

    def is_plain_text(self, turns: list[dict]) -> bool:
        """Whether a row is a text, not in the template's form: with no control token but at its start or end."""
        if turns[0]["role"] != "text":
            return False
        bos, eos = (self.variables.get(name, "") for name in ("bos_token", "eos_token"))
        text = "".join(turn["content"] for turn in turns).strip().removeprefix(bos).removesuffix(eos)
        cue = self.template.cue.strip()
        return not self.control.search(text) and not (cue and cue in text)

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

    def mark_rows(self, messages: list[dict], train_on: str) -> list[tuple[str, list[int]]]:
        """What `mark` returns; a row for each answer to learn where the template rewrites earlier turns."""
        try:
            return [self.mark(messages, train_on)]
        except RewrittenTurns:
            if train_on == "all":
                raise
            answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            learned = [i for i in answers if messages[i].get("weight", 1)] or answers[-1:]
            return [self.mark(messages[: i + 1], train_on, last_only=True) for i in learned]

    def encode(self, chats: list[list[dict]], train_on: str = "assistant") -> list[Encoded]:
        """Each chat's tokens; answers of weight 0 are not in the loss.

        train_on: "assistant", "last" (its last answer), "content" (answers without their reasoning), or "all".
        """
        marked = [self.mark_rows(chat, train_on) for chat in chats]
        rows = iter(self.encode_marked(list(itertools.chain.from_iterable(marked)), train_on))
        return [join(list(itertools.islice(rows, len(of_chat)))) for of_chat in marked]

    def encode_marked(self, marked: list[tuple[str, list[int]]], train_on: str) -> list[Encoded]:
        """The tokens of texts that `mark` made."""
        texts = [self.add_prefix_space(text) for text, _ in marked]
        batch = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = []
        for (_, weights), encoding in zip(marked, batch, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)  # (T + marks,)
            starts, ends, breaks, thoughts = (ids == mark for mark in self.mark_ids)
            kept = ~(starts | ends | breaks | thoughts)
            answer, answered = starts.cumsum(), ends.cumsum()
            learned = (answer > answered) & np.array([0, *weights], dtype=bool)[answer]
            if thoughts.any():
                thought_out = np.zeros(len(weights) + 1, dtype=int)  # positions from which an answer is learned
                thought_out[answer[thoughts]] = np.flatnonzero(thoughts)
                learned &= np.arange(len(ids)) >= thought_out[answer]
            if train_on == "all":
                learned |= answer == answered  # all but answers of weight 0
            rows.append(Encoded(ids[kept], learned[kept], kept.cumsum()[ends], kept.sum(keepdims=True)))
        return rows

    def prompt(self, messages: list[dict]) -> list[int]:
        """What the next answer is generated from: the tokens that training saw before it."""
        try:
            text, _ = self.mark(messages, add_generation_prompt=True)
        except UserError:  # a template that rewrites earlier turns, of which only the last is trained on
            written = self.template.as_written(escape(messages, self.control))
            text = self.template.render(written, add_generation_prompt=True)[0]
        ids = self.backend.encode(self.add_prefix_space(text), add_special_tokens=False).ids
        return [i for i in ids if i not in self.mark_ids]

    def render(self, messages: list[dict], **options) -> str:
        """The text of a chat, without marks; control tokens in its messages are not broken up."""
        return self.template.render(self.template.as_written(messages), **options)[0]


def put_marks(text: str, found: list, weights: list[int], train_on: str, last_only: bool) -> tuple[str, list[int]]:
    """What `ChatEncoder.mark` returns; found: (start, end) of each answer in the text."""
    if last_only:
        weights = [0] * (len(weights) - 1) + weights[-1:]
    for start, end in reversed(found):
        answer = text[start:end]
        if train_on == "content":
            answer = mark_thought(answer, text[:start])
        text = text[:start] + START + answer + END + text[end:]
    return text, weights


def mark_thought(answer: str, before: str) -> str:
    """The answer with THOUGHT after its reasoning, if it has any; before: the text before it."""
    pattern = REST_OF_REASONING if before.rstrip().endswith("<think>") else REASONING
    reasoning = pattern.match(answer)
    return answer[: reasoning.end()] + THOUGHT + answer[reasoning.end() :] if reasoning else answer


def escape(value, control: re.Pattern):
    """Messages in which control tokens are broken up, so that they are text."""
    if isinstance(value, str):
        return control.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
    if isinstance(value, dict):
        return {name: escape(item, control) for name, item in value.items()}
    return [escape(item, control) for item in value] if isinstance(value, list) else value


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

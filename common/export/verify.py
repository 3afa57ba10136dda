"""Verify an export: its predictions, its tokens, and that its answers end."""

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as parquet
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from common.cli import UserError
from common.data import sources
from common.data.encoder import ChatEncoder
from common.export.llama_cpp import LlamaCpp
from common.model import generation, load, location
from common.model.attention import choose_attention

# Highest mean KL divergence, in nats a token.
MERGE_BOUND = 0.01  # merged model from the trained one; rounding to bfloat16 gives 6e-5 on SmolLM2
# GGUF files from the merged model: f32, f16 and bf16 may differ by rounding only, the others leave
# room for small models, which lose most (docs/benchmarks.md). A wrong layout gives several nats.
KL_BOUNDS = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-4, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.2, "q5_0": 0.2, "q4_k_m": 0.3,
    "q4_0": 0.6,
}  # fmt: skip
NOISE = 1e-3  # between two computations of one model in 16 bits
LLAMA_CPP_NOISE = 0.02  # the same with llama.cpp, which keeps keys and values in 16 bits
MAX_LOSS = 700.0  # nats a token, also for what is not finite: exp(710) overflows
ANSWER_TOKENS = 128  # in which an answer must end
PROMPTS = 4  # to answer
# Where tokenizers differ: numbers, white space, contractions, capitals, scripts, symbols.
TEXTS = (
    "Hello! What's 12345 plus 3.14159?",
    "  two  spaces,\ttab\n\nand lines \r\n end ",
    "I'll we've DON'T isn't o'clock",
    "Übergröße naïve café Ελληνικά русский 中文字符 日本語 العربية हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
)


class Row(NamedTuple):
    ids: list[int]  # (T,): a held-out chat
    answers: list[int]  # positions whose next token is part of an answer


def held_out_rows(chats: str | None, run: Path | None, tokenizer, max_length: int, count: int) -> list[Row]:
    """Chats that training did not see, with up to `count` tokens of answers; UserError for none.

    chats: the setting CHATS; None: what the run held out, or else data/brief.jsonl.
    """
    rows, pairs, file = [], [], run and run / "data" / "eval.parquet"
    if file and file.is_file() and not chats:
        table = parquet.read_table(file, columns=["input_ids", "assistant_masks"])
        pairs = [row.values() for row in table.to_pylist()]
    if not pairs:
        encode = ChatEncoder(tokenizer).encode
        sound = sources.sound_chats(chats or "data/brief.jsonl", "CHATS")
        encoded = (row for chat in sound for row in encode([chat]))
        pairs = ((row.ids.tolist(), row.learned.tolist()) for row in encoded)
    for ids, mask in pairs:
        answers = [t - 1 for t in range(1, min(len(ids), max_length)) if mask[t]][:count]
        if answers:
            rows.append(Row(ids[: answers[-1] + 2], answers))
            count -= len(answers)
    if not rows:
        raise UserError(f"CHATS={chats}: no answers to compare on. Name a file with some.")
    return rows


class Reference:
    """A model's predictions on held-out chats, to compare those of models made from it.

    predictions: log-probabilities (N, vocabulary) at the N positions before a token of an answer.
    ended: how many prompts get an answer that ends; counted if `answers`.
    """

    def __init__(self, source, quantization: str | None, dtype, attention: str | None, tokenizer, rows, answers=False):
        self.attention = choose_attention(load.load_config(source), attention)
        model = load.load_model(source, quantization, dtype, self.attention, vocabulary=len(tokenizer)).eval()
        self.tokenizer, self.rows, self.dtype, self.config = tokenizer, rows, dtype, model.config
        self.predictions = predict(model, rows)
        if not self.predictions.isfinite().all():
            problem = "predictions are not finite. Take an earlier checkpoint."
            raise UserError(f"MODEL={source.name}: {problem}", code=4)
        self.perplexity = self.compare(self.predictions)["perplexity"]
        self.prompts = [row.ids[: row.answers[0] + 1] for row in rows[:PROMPTS]]
        self.ended, generator = 0, generation.Generator(model, tokenizer)
        for prompt in self.prompts if answers else ():
            list(generator.stream(prompt, ANSWER_TOKENS, temperature=0, top_p=1))
            self.ended += generator.last.stop == "end"

    def compare(self, predictions: torch.Tensor) -> dict:
        """Perplexity of other predictions (N, vocabulary), and their mean KL in nats a token."""
        kl = (self.predictions.exp() * (self.predictions - predictions)).sum(-1).mean()
        tokens = torch.tensor([row.ids[t + 1] for row in self.rows for t in row.answers])
        loss = -predictions.gather(1, tokens[:, None]).mean()
        kl, loss = (value.nan_to_num(MAX_LOSS).clamp(0, MAX_LOSS) for value in (kl, loss))
        return {"kl": kl.item(), "perplexity": loss.double().exp().item()}


@torch.no_grad()
def predict(model, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities (N, vocabulary) after the rows' answer positions: float32, on the CPU."""
    parts = []
    for row in rows:
        ids, keep = (torch.tensor(values, device=model.device) for values in row)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts)


def verify_merged(folder: Path, reference: Reference, bound: float, answers: bool) -> tuple[Reference, float]:
    """Name the saved model final, or final.rejected (UserError, code 5): its reference and KL."""
    unverified = folder / "unverified"
    source = location.locate(str(unverified))
    how = reference.dtype, reference.attention, reference.tokenizer, reference.rows
    saved = Reference(source, None, *how, answers)
    kl = reference.compare(saved.predictions)["kl"]
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    encoders = ChatEncoder(reference.tokenizer), ChatEncoder(load.load_tokenizer(source))
    expected, actual = (list(map(encoder.prompt, chats)) for encoder in encoders)
    fault = None if actual == expected else "its tokenizer gives other tokens"
    if not kl <= bound:
        fault = f"KL {kl:.2g} nats a token, the bound is {bound:.2g}"
    if fault:
        rejected = unverified.rename(folder / "final.rejected")
        raise UserError(f"{rejected} is not the model that was trained: {fault}. Try DTYPE=float32.", code=5)
    unverified.rename(folder / "final")
    return saved, kl


def verify_gguf(file: Path, kind: str, reference: Reference) -> dict:
    """What was measured of a GGUF file made from the reference's model, and its `faults`.

    kl and perplexity are None where transformers cannot read the file: llama.cpp decides.
    """
    faults, prompts = [], len(reference.prompts)
    result = dict(kind=kind, bytes=file.stat().st_size, kl=None, perplexity=None)
    result |= dict(llama_cpp_kl=None, prompts=prompts, ended=0, tokens_per_second=0.0)
    try:
        model = load_gguf(file, reference.config, reference.dtype)
        result |= reference.compare(predict(model, reference.rows))
    except (ValueError, NotImplementedError) as error:
        print(f"transformers cannot read {file.name}: {error}", file=sys.stderr)
    except (RuntimeError, KeyError) as error:
        faults.append(f"transformers finds its tensors wrong: {error}")
    try:
        longest = max(map(len, reference.prompts)) + ANSWER_TOKENS
        llama = LlamaCpp(file, min(reference.config.max_position_embeddings, longest))
        result |= measure_in_llama_cpp(llama, reference)
        faults += token_faults(llama, reference.tokenizer)
        if not result["ended"] and reference.ended > prompts / 2:
            faults.append(f"its answers do not end: 0 of {prompts}, the model's {reference.ended}")
    except (RuntimeError, OSError, KeyError) as error:
        faults.append(f"llama.cpp refuses it: {error}")
    noise = 0 if reference.dtype == torch.float32 else NOISE
    bound = KL_BOUNDS[kind]
    bounds = {"kl": max(bound, noise), "llama_cpp_kl": LLAMA_CPP_NOISE + 20 * bound}
    for name, bound in bounds.items():
        if result[name] is not None and not result[name] <= bound:
            detail = f"{name} is {result[name]:.2g} nats a token, the bound is {bound:.2g}"
            faults.append(f"it predicts something else: {detail}")
    return result | {"faults": faults}


def load_gguf(file: Path, config, dtype: torch.dtype):
    """The model as transformers reads it; the config fills what its reader omits."""
    from transformers import GgufConfig  # not in older releases

    read, values = load_gguf_checkpoint(str(file))["config"], config.to_dict()
    if "rope_theta" in read and values.get("rope_parameters"):
        values["rope_parameters"]["rope_theta"] = read.pop("rope_theta")
    if config.model_type == "mistral":  # the reader takes it for a Llama; only the window differs
        config = AutoConfig.for_model("llama")
    values = {name: read.get(name, value) for name, value in values.items() if name != "model_type"}
    options = dict(config=type(config).from_dict(values), quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **options)
    return model.to(PartialState().device).eval()


def measure_in_llama_cpp(llama: LlamaCpp, reference: Reference) -> dict:
    """llama.cpp's greedy answers, and its KL divergence over its 64 likeliest tokens."""
    divergences, answers = [], []
    starts = itertools.accumulate((len(row.answers) for row in reference.rows), initial=0)
    for prompt, start in zip(reference.prompts, starts, strict=False):
        reply = llama.ask("/completion", prompt=prompt, n_predict=1, temperature=-1, n_probs=64)
        # Absent where the next token is only a part of a character.
        if entries := reply.get("completion_probabilities"):
            top = entries[0]["top_logprobs"]
            log_p = torch.tensor([token["logprob"] for token in top])  # (64,)
            log_q = reference.predictions[start, [token["id"] for token in top]]
            divergences.append((log_p.exp() * (log_p - log_q)).sum().item())
        options = dict(n_predict=ANSWER_TOKENS, temperature=0, top_k=1)
        answers.append(llama.ask("/completion", prompt=prompt, **options))
    tokens = sum(answer["timings"]["predicted_n"] for answer in answers)
    seconds = sum(answer["timings"]["predicted_ms"] for answer in answers) / 1000
    kl = abs(statistics.fmean(divergences)) if divergences else None
    ended = sum(answer["stop_type"] == "eos" for answer in answers)
    return dict(llama_cpp_kl=kl, ended=ended, tokens_per_second=tokens / max(seconds, 1e-6))


def token_faults(llama: LlamaCpp, tokenizer) -> Iterator[str]:
    encoder, end = ChatEncoder(tokenizer), llama.ask("/props")["eos_token"]
    if end != encoder.end_token:
        yield f"it stops at {end!r}, answers end with {encoder.end_token!r}"
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    for text in TEXTS:
        chat = [*earlier, {"role": "user", "content": text}]
        rendered = llama.ask("/apply-template", messages=chat)["prompt"]
        reply = llama.ask("/tokenize", content=rendered, add_special=True, parse_special=True)
        actual, expected = reply["tokens"], encoder.prompt(chat)
        if tokenizer.bos_token_id is not None and actual[:2] == [tokenizer.bos_token_id] * 2:
            yield "a chat begins with two BOS tokens"
            return
        if actual != expected:
            at = generation.shared(actual, expected)
            name = tokenizer.convert_ids_to_tokens
            there, trained = name(actual[at : at + 3]), name(expected[at : at + 3])
            yield f"its tokens of a chat differ: {there} where training had {trained}"
            return

"""Proof that an exported model says what the model said: its predictions, its tokens, and where its answers end.

A GGUF file is read by two programs that are not ours: transformers, which gives all its predictions, and llama.cpp
(package xllamacpp), which makes tokens of a chat and answers, as it will in use.
"""

import itertools
import json
import math
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from common.cli import UserError
from common.model import generation

# Mean KL divergence from the 16-bit model that a file may have, in nats a token. In f32, f16 and bf16 nothing but
# rounding is allowed. The others leave room for small models, which lose most (SmolLM2-135M: runs.md); a wrong layout
# of the weights gives several nats.
KL_BOUNDS = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-4, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.2, "q5_0": 0.2, "q4_k_m": 0.3,
    "q4_0": 0.6,
}  # fmt: skip

LLAMA_CPP_NOISE = 0.02  # KL between llama.cpp, whose keys and values are in 16 bits, and transformers, at most

NOISE = 1e-3  # KL between two computations of the same model in 16 bits, at most

ANSWER_TOKENS = 128  # in which an answer must end

PROMPTS = 4  # that are answered

# Where tokenizers differ: numbers, white space, contractions, capitals, scripts, symbols.
TEXTS = (
    "Hello! What's 12345 plus 3.14159?",
    "  two  spaces,\ttab\n\nand lines \r\n end ",
    "I'll we've DON'T isn't o'clock",
    "Übergröße naïve café Ελληνικά русский 中文字符 日本語 العربية हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
)


class Row(NamedTuple):
    """A held-out chat of T tokens."""

    ids: list[int]  # (T,)
    answers: list[int]  # positions whose next token is part of an answer


class Reference:
    """What a model predicts on held-out chats, and whether its answers end: the measure of those made from it.

    predictions: log-probabilities (N, vocabulary) at the N positions before a token of an answer.
    """

    def __init__(self, model, tokenizer, rows: list[Row]):
        self.rows, self.predictions = rows, predict(model, rows)
        if not self.predictions.isfinite().all():
            raise UserError("the model's predictions are not finite, so nothing made from it can be proved.", code=4)
        self.prompts = [row.ids[: row.answers[0] + 1] for row in rows[:PROMPTS]]
        generator, self.ended = generation.Generator(model, tokenizer), 0  # answers that end by themselves
        for prompt in self.prompts:
            for _ in generator.stream(prompt, ANSWER_TOKENS, temperature=0, top_p=1):
                pass
            self.ended += generator.last.stop == "end"
        self.perplexity = perplexity(self.predictions, rows)

    def compare(self, model) -> dict:
        """A model's perplexity on the same chats, and its mean KL divergence from this one in nats a token."""
        predicted = predict(model, self.rows)
        kl = (self.predictions.exp() * (self.predictions - predicted)).sum(-1).mean().item()
        return {"kl": max(0.0, kl) if math.isfinite(kl) else math.inf, "perplexity": perplexity(predicted, self.rows)}


@torch.no_grad()
def predict(model, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities of the next token at the rows' answer positions: (N, vocabulary), float32, on the CPU."""
    parts = []
    for row in rows:
        ids, keep = (torch.tensor(values, device=model.device) for values in row)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]
        parts.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(parts)


def perplexity(predicted: torch.Tensor, rows: list[Row]) -> float:
    """Of the answers, by what was predicted before each of their tokens."""
    tokens = torch.tensor([row.ids[t + 1] for row in rows for t in row.answers])
    return math.exp(min(700, -predicted.gather(1, tokens[:, None]).mean().item()))


def load_gguf(file: Path, config, dtype: torch.dtype):
    """The model in a GGUF file as transformers reads it; what its reader leaves out comes from the original config."""
    from transformers import GgufConfig  # not in older releases

    read, changed = load_gguf_checkpoint(str(file))["config"], config.to_dict()
    if "rope_theta" in read and changed.get("rope_parameters"):
        changed["rope_parameters"]["rope_theta"] = read.pop("rope_theta")
    if config.model_type == "mistral":  # known to the reader as a Llama, which it is but for its window
        config = AutoConfig.for_model("llama")
        changed.pop("model_type")
    read = {name: value for name, value in read.items() if name in changed and name != "model_type"}
    config = type(config).from_dict(changed | read)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    return model.to(PartialState().device).eval()


class LlamaCpp:
    """A GGUF file in llama.cpp's server, inside this process, as a context manager."""

    def __init__(self, file: Path, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(file), context, 1, -1
        self.server = xllamacpp.Server(params)  # raises RuntimeError for a file it cannot load

    def ask(self, path: str, **body) -> dict:
        data, headers = json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)

    def prompt(self, messages: list[dict]) -> list[int]:
        """The tokens that it would answer a chat from, by the file's template and tokenizer."""
        text = self.ask("/apply-template", messages=messages)["prompt"]
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def answer(self, prompt: list[int], tokens: int = ANSWER_TOKENS) -> dict:
        """Its likeliest answer: content, tokens, stop_type ("eos" where it ended by itself), timings."""
        return self.ask("/completion", prompt=prompt, n_predict=tokens, temperature=0, top_k=1, return_tokens=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.server = None


def verify_gguf(file: Path, kind: str, config, tokenizer, reference: Reference, dtype: torch.dtype) -> dict:
    """What there is to say of a GGUF file made from the reference's model, with all its `faults`.

    dtype: of the computations. What transformers cannot read has kl and perplexity None, and llama.cpp's word counts.
    """
    result = {"kind": kind, "bytes": file.stat().st_size, "kl": None, "perplexity": None, "llama_cpp_kl": math.inf}
    result |= {"prompts": len(reference.prompts), "ended": 0, "tokens_per_second": 0.0, "faults": []}
    faults = result["faults"]
    try:
        result |= reference.compare(load_gguf(file, config, dtype))
    except (ValueError, NotImplementedError) as error:
        print(f"transformers cannot read {file.name}, only llama.cpp is asked: {error}", file=sys.stderr)
    except (RuntimeError, KeyError) as error:
        faults.append(f"transformers finds its tensors wrong: {error}")
    bound = KL_BOUNDS[kind] if dtype == torch.float32 else max(KL_BOUNDS[kind], NOISE)
    if result["kl"] is not None and not result["kl"] <= bound:
        faults.append(f"it predicts something else: KL {result['kl']:.2g} nats a token, the bound is {bound}")
    try:
        needed = max(map(len, reference.prompts)) + ANSWER_TOKENS
        with LlamaCpp(file, min(config.max_position_embeddings, needed)) as llama:
            result |= verify_in_llama_cpp(llama, reference)
            faults += token_faults(llama, tokenizer)
    except (RuntimeError, OSError, KeyError) as error:
        faults.append(f"llama.cpp refuses it: {error}")
        return result
    kl, bound = result["llama_cpp_kl"], LLAMA_CPP_NOISE + 20 * KL_BOUNDS[kind]
    if kl is not None and not kl <= bound:
        faults.append(f"llama.cpp predicts something else: KL {kl:.2g} nats, the bound is {bound:.2g}")
    if not result["ended"] and reference.ended > len(reference.prompts) / 2:
        ended = f"{result['ended']} of {result['prompts']}, the model's {reference.ended}"
        faults.append(f"its answers do not end: {ended}")
    return result


def verify_in_llama_cpp(llama: LlamaCpp, reference: Reference) -> dict:
    """Its divergence from the reference over the 64 tokens it finds likeliest after each prompt, and its answers."""
    divergences = []
    starts = itertools.accumulate((len(row.answers) for row in reference.rows), initial=0)
    for prompt, start in zip(reference.prompts, starts, strict=False):
        expected = reference.predictions[start]  # (vocabulary,)
        given = llama.ask("/completion", prompt=prompt, n_predict=1, temperature=-1, n_probs=64)
        if entries := given.get("completion_probabilities"):  # none where the token is but a part of a character
            pairs = [(expected[entry["id"]].item(), entry["logprob"]) for entry in entries[0]["top_logprobs"]]
            divergences.append(sum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in pairs))
    answers = [llama.answer(prompt) for prompt in reference.prompts]
    tokens, milliseconds = (sum(a["timings"][f"predicted_{key}"] for a in answers) for key in ("n", "ms"))
    return {
        "llama_cpp_kl": abs(statistics.fmean(divergences)) if divergences else None,
        "ended": sum(answer["stop_type"] == "eos" for answer in answers),
        "tokens_per_second": 1000 * tokens / max(milliseconds, 1e-3),
    }


def token_faults(llama: LlamaCpp, tokenizer):
    """Where a file's tokens differ from those that the model was trained on."""
    encoder = generation.encoder_of(tokenizer, tokenizer.chat_template)
    stops_at = llama.ask("/props")["eos_token"]
    if stops_at != encoder.end_token:
        yield f"it stops at {stops_at!r}, answers end with {encoder.end_token!r}"
    greeted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    for text in TEXTS:
        chat = [*greeted, {"role": "user", "content": text}]
        given, trained_on = llama.prompt(chat), encoder.prompt(chat)
        if tokenizer.bos_token_id is not None and given[:2] == [tokenizer.bos_token_id] * 2:
            yield "a chat begins with two BOS tokens"
            return
        if given != trained_on:
            at = generation.shared(given, trained_on)
            seen = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (given, trained_on)]
            yield f"its tokens of a chat differ: {seen[0]} where training had {seen[1]}"
            return

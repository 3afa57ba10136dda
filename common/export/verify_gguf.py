"""Verify a GGUF file, as two other programs read it: transformers for its predictions, llama.cpp for answers."""

import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from common.data.encoder import ChatEncoder
from common.export import verify
from common.export.llama_cpp import LlamaCpp
from common.model import generation

# Highest mean KL divergence from the 16-bit model, in nats a token. f32, f16 and bf16 may differ by
# rounding only. The others leave room for small models, which lose most (SmolLM2-135M: runs.md); a
# wrong layout of the weights gives several nats.
KL_BOUNDS = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-4, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.2, "q5_0": 0.2, "q4_k_m": 0.3,
    "q4_0": 0.6,
}  # fmt: skip
NOISE = 1e-3  # KL between two computations of one model in 16 bits, at most
LLAMA_CPP_NOISE = 0.02  # the same of llama.cpp, which keeps keys and values in 16 bits


def verify_gguf(file: Path, kind: str, reference: verify.Reference) -> dict:
    """Measures of a GGUF file made from the reference's model, with a list of its `faults`.

    kl and perplexity are None where transformers cannot read the file; llama.cpp alone decides then.
    """
    faults, noise = [], 0 if reference.dtype == torch.float32 else NOISE
    result = {"kind": kind, "bytes": file.stat().st_size, "kl": None, "perplexity": None}
    try:
        model = load_gguf(file, reference.config, reference.dtype)
        result |= reference.compare(verify.predict(model, reference.rows))
    except (ValueError, NotImplementedError) as error:
        print(f"transformers cannot read {file.name}, only llama.cpp does: {error}", file=sys.stderr)
    except (RuntimeError, KeyError) as error:
        faults.append(f"transformers finds its tensors wrong: {error}")
    result |= {"llama_cpp_kl": None, "prompts": len(reference.prompts), "ended": 0, "tokens_per_second": 0.0}
    try:
        longest = max(map(len, reference.prompts)) + verify.ANSWER_TOKENS
        llama = LlamaCpp(file, min(reference.config.max_position_embeddings, longest))
        result |= measure_in_llama_cpp(llama, reference)
        faults += token_faults(llama, reference.tokenizer)
        if not result["ended"] and reference.ended > len(reference.prompts) / 2:
            faults.append(f"its answers do not end: 0 of {result['prompts']}, the model's {reference.ended}")
    except (RuntimeError, OSError, KeyError) as error:
        faults.append(f"llama.cpp refuses it: {error}")
    for program, kl, bound in (
        ("transformers", result["kl"], max(KL_BOUNDS[kind], noise)),
        ("llama.cpp", result["llama_cpp_kl"], LLAMA_CPP_NOISE + 20 * KL_BOUNDS[kind]),
    ):
        if kl is not None and not kl <= bound:
            faults.append(f"{program} predicts something else: KL {kl:.2g} nats a token, the bound is {bound:.2g}")
    return result | {"faults": faults}


def load_gguf(file: Path, config, dtype: torch.dtype):
    """The model in a GGUF file as transformers reads it; what its reader omits comes from the original config."""
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


def measure_in_llama_cpp(llama: LlamaCpp, reference: verify.Reference) -> dict:
    """llama.cpp's greedy answers to the reference's prompts, and its KL divergence from the reference.

    The divergence over the 64 tokens that llama.cpp finds likeliest after each prompt; None where it
    gives no probabilities, since each time the next token is only a part of a character.
    """
    divergences, answers = [], []
    starts = itertools.accumulate((len(row.answers) for row in reference.rows), initial=0)
    for prompt, start in zip(reference.prompts, starts, strict=False):
        expected = reference.predictions[start]  # (vocabulary,)
        reply = llama.ask("/completion", prompt=prompt, n_predict=1, temperature=-1, n_probs=64)
        if entries := reply.get("completion_probabilities"):
            pairs = [(top["logprob"], expected[top["id"]].item()) for top in entries[0]["top_logprobs"]]
            divergences.append(sum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in pairs))
        options = dict(n_predict=verify.ANSWER_TOKENS, temperature=0, top_k=1)
        answers.append(llama.ask("/completion", prompt=prompt, **options))
    timings = [answer["timings"] for answer in answers]
    milliseconds = sum(timing["predicted_ms"] for timing in timings)
    return {
        "llama_cpp_kl": abs(statistics.fmean(divergences)) if divergences else None,
        "ended": sum(answer["stop_type"] == "eos" for answer in answers),
        "tokens_per_second": 1000 * sum(t["predicted_n"] for t in timings) / max(milliseconds, 1e-3),
    }


def token_faults(llama: LlamaCpp, tokenizer) -> Iterator[str]:
    """Where a file's tokens differ from those that the model was trained on."""
    encoder, end = ChatEncoder(tokenizer), llama.ask("/props")["eos_token"]
    if end != encoder.end_token:
        yield f"it stops at {end!r}, answers end with {encoder.end_token!r}"
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    for text in verify.TEXTS:
        chat = [*earlier, {"role": "user", "content": text}]
        actual, expected = llama.prompt(chat), encoder.prompt(chat)
        if tokenizer.bos_token_id is not None and actual[:2] == [tokenizer.bos_token_id] * 2:
            yield "a chat begins with two BOS tokens"
            return
        if actual != expected:
            at = generation.shared(actual, expected)
            tokens = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (actual, expected)]
            yield f"its tokens of a chat differ: {tokens[0]} where training had {tokens[1]}"
            return

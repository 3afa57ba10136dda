"""Verify a GGUF file in transformers and in llama.cpp: predictions, tokens, and that answers end."""

import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from common import hardware
from common.data.encoder import ChatEncoder
from common.data.tool_form import QUESTION, TOOL, ToolForm, try_to, write_tools
from common.export import verify
from common.export.llama_cpp import LlamaCpp, trained_context
from common.export.proof import Proof
from common.export.verify import Reference, Row, divergence, predict

# Highest mean KL divergence from the merged model, in nats a token: f32, f16 and bf16 may differ by
# rounding only, the others leave room for small models, which lose most (docs/benchmarks.md).
KL_BOUNDS = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-4, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.2, "q5_0": 0.2, "q4_k_m": 0.3,
    "q4_0": 0.6,
}  # fmt: skip
# Of predictions by transformers and by llama.cpp, which keeps keys and values in 16 bits: from those of
# a model that computes in 32 bits, and in 16.
NOISE = {torch.float32: (0.0, 1e-3)}
NOISE_16_BITS = (1e-3, 1e-2)
LLAMA_CPP_RATIO = 3  # its bound to that of the kind: it rounds also what a weight is multiplied with


def verify_gguf(file: Path, kind: str, reference: Reference) -> dict:
    """What was measured of a GGUF file made from the reference's model, and its `faults`.

    kl and perplexity are None where transformers cannot read the file: llama.cpp decides. long_kl
    is that of the longest row within the file's context, and None where there is none.
    """
    faults, context = [], trained_context(file)
    result = dict(kind=kind, bytes=file.stat().st_size, context=context, kl=None, perplexity=None, long_kl=None)
    result |= dict(llama_cpp_kl=None, llama_cpp_long_kl=None, prompts=0, ended=0, tokens_per_second=0.0)
    long, expected = next((pair for pair in reference.long if len(pair[0].ids) <= context), (None, None))
    try:
        model = load_gguf(file, reference.config, reference.proof)
        predictions = predict(model, reference.rows)
        result |= reference.compare(predictions)
        within = torch.tensor([position < context for row in reference.rows for position in row.answers])
        result["kl"] = divergence(reference.predictions[within], predictions[within]) if within.any() else None
        if long:
            result["long_kl"] = divergence(expected, predict(model, [long]))
    except (ValueError, NotImplementedError) as error:
        print(f"transformers cannot read {file.name}, llama.cpp alone decides: {error}", file=sys.stderr)
    except (RuntimeError, KeyError) as error:
        if hardware.is_out_of_memory(error):  # which is no fault of the file
            raise
        faults.append(f"transformers finds its tensors wrong: {error}")
    try:
        longest = max(map(len, reference.prompts)) + verify.ANSWER_TOKENS
        llama = LlamaCpp(file, min(context, max(longest, len(long.ids) if long else 0)))
        result |= measure_in_llama_cpp(llama, reference)
        if long:
            result["llama_cpp_long_kl"] = llama_cpp_divergence(llama, [long], expected)
        faults += token_faults(llama, reference.tokenizer)
        if (asked := result["prompts"]) and not result["ended"] and reference.ended > len(reference.prompts) / 2:
            faults.append(f"its answers do not end: 0 of {asked}, the model's {reference.ended}")
    except (RuntimeError, OSError, KeyError) as error:
        faults.append(f"llama.cpp refuses it: {error}")
    return result | {"faults": [*faults, *prediction_faults(result, reference.proof.dtype)]}


def prediction_faults(result: dict, dtype: torch.dtype) -> Iterator[str]:
    bound = KL_BOUNDS[result["kind"]]
    noise, llama_cpp_noise = NOISE.get(dtype, NOISE_16_BITS)
    in_transformers, in_llama_cpp = max(bound, noise), llama_cpp_noise + LLAMA_CPP_RATIO * bound
    bounds = dict(
        kl=in_transformers, long_kl=in_transformers, llama_cpp_kl=in_llama_cpp, llama_cpp_long_kl=in_llama_cpp
    )
    if all(result[name] is None for name in bounds):
        yield "its predictions could not be compared"
    for name, bound in bounds.items():
        if result[name] is not None and not result[name] <= bound:
            detail = f"{name} is {result[name]:.2g} nats a token, the bound is {bound:.2g}"
            yield f"it predicts something else: {detail}"


def load_gguf(file: Path, config, proof: Proof):
    """The model as transformers reads it; the config fills what its reader omits."""
    from transformers import GgufConfig  # not in older releases

    read, values = load_gguf_checkpoint(str(file))["config"], config.to_dict()
    read.pop("max_position_embeddings", None)  # shorter where only a shorter context is exact
    if "rope_theta" in read and values.get("rope_parameters"):
        values["rope_parameters"]["rope_theta"] = read.pop("rope_theta")
    if config.model_type == "mistral":  # the reader takes it for a Llama; only the window differs
        config = AutoConfig.for_model("llama")
    values = {name: read.get(name, value) for name, value in values.items() if name != "model_type"}
    options = dict(config=type(config).from_dict(values), quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=proof.dtype, **options)
    return model.to(proof.device).eval()


def measure_in_llama_cpp(llama: LlamaCpp, reference: Reference) -> dict:
    """llama.cpp's greedy answers, and its KL divergence."""
    prompts = [prompt for prompt in reference.prompts if len(prompt) + verify.ANSWER_TOKENS <= llama.context]
    options = dict(n_predict=verify.ANSWER_TOKENS, temperature=0, top_k=1)
    answers = [llama.ask("/completion", prompt=prompt, **options) for prompt in prompts]
    tokens = sum(answer["timings"]["predicted_n"] for answer in answers)
    seconds = sum(answer["timings"]["predicted_ms"] for answer in answers) / 1000
    kl = llama_cpp_divergence(llama, reference.rows[: verify.PROMPTS], reference.predictions)
    ended = sum(answer["stop_type"] == "eos" for answer in answers)
    return dict(prompts=len(prompts), llama_cpp_kl=kl, ended=ended, tokens_per_second=tokens / max(seconds, 1e-6))


def llama_cpp_divergence(llama: LlamaCpp, rows: list[Row], predictions: torch.Tensor) -> float | None:
    """Mean KL of llama.cpp from predictions (N, vocabulary): of its 64 likeliest tokens and all others as one."""
    divergences, start = [], 0
    for row in rows:
        for i, position in enumerate(row.answers[: verify.POSITIONS]):
            if position + 1 >= llama.context:
                break
            prompt = row.ids[: position + 1]
            reply = llama.ask("/completion", prompt=prompt, n_predict=1, temperature=-1, n_probs=64)
            # Absent where the next token is only a part of a character.
            if entries := reply.get("completion_probabilities"):
                top = entries[0]["top_logprobs"]
                log_p = torch.tensor([token["logprob"] for token in top], dtype=torch.float64)  # (64,)
                log_q = predictions[start + i, [token["id"] for token in top]].double()
                rest_p, rest_q = (max(1 - log.exp().sum().item(), 1e-6) for log in (log_p, log_q))
                kl = (log_p.exp() * (log_p - log_q)).sum().item()
                divergences.append(kl + rest_p * math.log(rest_p / rest_q))
        start += len(row.answers)
    return max(statistics.fmean(divergences), 0) if divergences else None


def token_chats(encoder: ChatEncoder) -> list[list[dict]]:
    """Chats whose prompts llama.cpp must make as training did: with a system message, and with a tool if possible."""
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    chats = [[*earlier, {"role": "user", "content": text}] for text in verify.TEXTS]
    chats.append([{"role": "system", "content": "Be kind."}, *chats[0]])
    if encoder.template.tool_form.writes == {"tools", "calls", "results"}:
        call = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": {"k": "Hi"}}}
        asked = [QUESTION | {"tools": [TOOL]}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        chats.append([*asked, {"role": "tool", "content": "7", "name": "lookup", "tool_call_id": "call00001"}])
    return [chat for chat in chats if try_to(encoder.template.render, chat)]  # not those that a template refuses


def as_requested(chat: list[dict]) -> list[dict]:
    """Messages in OpenAI's form: arguments are JSON text, and tools stand beside the messages."""
    form = ToolForm(frozenset({"tools", "calls", "results"}), takes_text=True, short_ids=False)
    return [{name: value for name, value in turn.items() if name != "tools"} for turn in write_tools(chat, form)]


def token_faults(llama: LlamaCpp, tokenizer) -> Iterator[str]:
    encoder, end = ChatEncoder(tokenizer), llama.ask("/props")["eos_token"]
    if end != encoder.end_token:
        yield f"it stops at {end!r}, answers end with {encoder.end_token!r}"
    for chat in token_chats(encoder):
        tools, written = chat[0].get("tools"), encoder.template.as_written(chat)
        rendered = llama.ask("/apply-template", messages=as_requested(chat), tools=tools or [])["prompt"]
        reply = llama.ask("/tokenize", content=rendered, add_special=True, parse_special=True)
        options = dict(tools=tools, add_generation_prompt=True, return_dict=True)
        actual, expected = reply["tokens"], tokenizer.apply_chat_template(written, **options)["input_ids"]
        if tokenizer.bos_token_id is not None and actual[:2] == [tokenizer.bos_token_id] * 2:
            yield "a chat begins with two BOS tokens"
            return
        if actual != expected:
            at = len(os.path.commonprefix([actual, expected]))
            name = tokenizer.convert_ids_to_tokens
            there, trained = name(actual[at : at + 3]), name(expected[at : at + 3])
            yield f"its tokens of a chat differ: {there} where training had {trained}"
            return

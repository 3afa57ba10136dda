"""A tokenizer and its chat template for llama.cpp (GGUF metadata) and Ollama (Modelfile)."""

import json
import re

from gguf import GGUFWriter, TokenType

from common.cli import UserError
from common.data.encoder import ChatEncoder

# llama.cpp knows pre-tokenizers by name only: name -> the steps in tokenizer.json.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
ONE_DIGIT = SPLIT | {"pattern": {"Regex": PATTERN.replace("{1,3}", "")}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "llama-bpe": [SPLIT, BYTES | {"use_regex": False}],  # and without merges for whole words:
    "dbrx": [SPLIT, BYTES | {"use_regex": False}],
    "qwen2": [ONE_DIGIT, BYTES | {"use_regex": False}],
}
# What stands before each message, by its role and place, then the message; at last the prompt.
GO_TEMPLATE = (
    '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}%s'
    '{{ else if eq $m.Role "assistant" }}%s{{ else if eq $i 0 }}%s'
    '{{ else if eq (index $.Messages 0).Role "system" | and (eq $i 1) }}%s'
    "{{ else }}%s{{ end }}{{ $m.Content }}{{ end }}%s"
)


def add_tokenizer(writer: GGUFWriter, tokenizer, config, pre_tokenizer: str | None) -> None:
    """Add a tokenizer and its template. pre_tokenizer: llama.cpp's name, or None to look it up."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, encoder = spec["model"], ChatEncoder(tokenizer)
    if model["type"] != "BPE":
        raise UserError(f"GGUF: cannot write a tokenizer of type {model['type']}. Set LLAMA_CPP.")
    texts = {id: token for token, id in tokenizer.get_vocab().items()}
    added, unknown, ids = tokenizer.added_tokens_decoder, tokenizer.unk_token, range(config.vocab_size)
    writer.add_token_list([token_text(texts.get(i, f"[PAD{i}]"), added.get(i)) for i in ids])
    writer.add_token_types([token_type(texts.get(i), added.get(i), unknown) for i in ids])
    if model.get("byte_fallback"):  # SentencePiece, which merges by score
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre(pre_tokenizer or "default")
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
        writer.add_token_scores([-float(ranks.get(texts.get(i), 1e6)) for i in ids])
        writer.add_add_space_prefix(bool(encoder.prefix and encoder.prefix.everywhere))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or pre_tokenizer_name(spec, config))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_add_bos_token(adds_bos(encoder))
    writer.add_add_eos_token(False)
    end = tokenizer.convert_tokens_to_ids(encoder.end_token)
    special = dict(bos=tokenizer.bos_token_id, eos=end, eot=end)
    special |= dict(padding=tokenizer.pad_token_id, unknown=tokenizer.unk_token_id)
    for name, id in special.items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
    writer.add_chat_template(tokenizer.chat_template)


def adds_bos(encoder: ChatEncoder) -> bool:
    """Whether to put a BOS before every text: only where the template, and so training, had one."""
    text = encoder.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
    return encoder.adds_bos and text.startswith(encoder.variables["bos_token"])


def token_type(text: str | None, added, unknown: str | None) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if added is None:
        return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else TokenType.NORMAL
    if text == unknown:
        return TokenType.UNKNOWN
    control = added.special or re.fullmatch(r"<\|.*\|>", text)
    return TokenType.CONTROL if control else TokenType.USER_DEFINED


def token_text(text: str, added) -> str:
    """An added token that is looked for in normalized text, as llama.cpp looks for it in the text itself."""
    return text.replace("▁", " ") if added and added.normalized and not added.special else text


def pre_tokenizer_name(spec: dict, config) -> str:
    """llama.cpp's name for how a tokenizer splits text; UserError for none."""
    part, normalizer = spec["pre_tokenizer"] or {}, spec["normalizer"] or {}
    steps = [dict(step) for step in part.get("pretokenizers", [part])]
    for step in steps:
        step.pop("trim_offsets", None)  # no effect on the tokens
        if step.get("behavior") == "Removed" and step["invert"]:  # what matches is kept, and everything matches
            step.update(behavior="Isolated", invert=False)
    # llama.cpp ignores merges for whole words that are tokens with llama-bpe only.
    whole_words = spec["model"].get("ignore_merges", False)
    fitting = (name for name, known in PRE_TOKENIZERS.items() if steps == known)
    name = next((name for name in fitting if whole_words == (name == "llama-bpe")), None)
    if not name or normalizer.get("type", "NFC") != "NFC":
        raise UserError(
            "GGUF: no pre-tokenizer of llama.cpp is known to split text as this tokenizer does: "
            f"{json.dumps(part)[:300]}. Try PRE_TOKENIZER=name; verification shows if it fits."
        )
    return "stablelm2" if (name, config.model_type) == ("qwen2", "stablelm") else name


def modelfile(gguf_name: str, tokenizer) -> str:
    """A Modelfile for Ollama: GGUF file, token to stop at, template."""
    encoder = ChatEncoder(tokenizer)
    return f'FROM ./{gguf_name}\nPARAMETER stop "{encoder.end_token}"\n{go_template(encoder)}\n'


def go_template(encoder: ChatEncoder) -> str:
    """The chat template for Go; a comment where it is more than fixed texts around messages."""
    unknown = "# The chat template has no equivalent in Go: use /api/generate with raw prompts."
    bos = encoder.variables["bos_token"] if adds_bos(encoder) else ""

    def split(*roles: str) -> list[str]:
        """The texts before, between and after messages, without a BOS."""
        messages = [{"role": role, "content": "\0"} for role in roles]
        text = encoder.render(messages, add_generation_prompt=True)
        return text.removeprefix(bos).split("\0")

    turns = ("user", "assistant", "user")
    try:
        first_system, system_user, user_answer, answer_user, prompt = split("system", *turns)
        first_user, *following = split(*turns)
    except (UserError, ValueError):  # system messages are refused, or a message is left out
        return unknown
    if prompt != user_answer or following != [user_answer, answer_user, prompt]:
        return unknown
    texts = (first_system, user_answer, first_user, system_user, answer_user, prompt)
    return f'TEMPLATE """{GO_TEMPLATE % texts}"""'

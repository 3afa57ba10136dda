"""Chat templates: every model gets one in which the answers, the part to learn, can be told apart."""

import re
from pathlib import Path

from tokenizers import AddedToken

from common.bounds import TEMPLATES
from common.cli import UserError
from common.data.encoder import GENERATION, PROBE, TEMPLATE_ERRORS, ChatEncoder, adds_bos

FOLDER = Path(__file__).parent / "chat_templates"
# Tokens that our marked templates need; the others write text around the model's own end token.
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
SYSTEM_PROBE = [{"role": "system", "content": "s"}, *PROBE, *PROBE]


def set_template(tokenizer, choice: str | None) -> tuple[ChatEncoder, str]:
    """Give the tokenizer a template, and tokens that it needs: (encoder, what was done)."""
    own = tokenizer.chat_template or ""
    known_tokens, own_name = inspect(tokenizer, own)
    known_tokens |= {tokenizer.bos_token, tokenizer.eos_token}
    tokenizer.chat_template, needed, label = choose(tokenizer, choice, own)
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    had_eos = add_missing_tokens(tokenizer, None)
    encoder = ChatEncoder(tokenizer)
    if encoder.end_token is None:
        if not had_eos:
            problem = "no end token of answers is found, and the tokenizer has no eos_token"
            remedy = "Set it in tokenizer_config.json, or CHAT_TEMPLATE=chatml, which brings its own."
            raise UserError(f"CHAT_TEMPLATE={label}: {problem}. {remedy}")
        encoder.mark(PROBE)  # where the answer cannot even be found, this says so
        marks = "Put {% generation %} before each answer and {% endgeneration %} after its end token"
        problem = f"answers have no end token. {marks}, or the model never learns to stop."
        raise UserError(f"CHAT_TEMPLATE={label}: {problem}")
    if tokenizer.chat_template != own:
        tokenizer.eos_token = encoder.end_token  # so that every program stops there
    if not had_eos:
        add_missing_tokens(tokenizer, encoder.end_token)
        encoder = ChatEncoder(tokenizer)  # which knows them
    tokens, name = inspect(tokenizer, tokenizer.chat_template)
    encoder.new_token_ids = sorted(tokenizer.convert_tokens_to_ids(list(tokens - known_tokens)))
    note = f"chat template: {label}"
    if missing:
        note += f", with new tokens {' '.join(missing)}"
    if name:
        note += f"\nWARNING: CHAT_TEMPLATE puts {name!r}, which names another assistant, before every chat without "
        note += "a system message; CHAT_TEMPLATE=chatml has no such line."
    elif own_name:
        note += f" (without the model's own first line {own_name!r})"
    return encoder, note


def choose_for_chat(tokenizer, choice: str | None, options: str) -> None:
    """STUB until the merge: the lead's own takes its place."""
    if choice:
        tokenizer.chat_template = choose(tokenizer, choice, tokenizer.chat_template or "")[0]


def add_missing_tokens(tokenizer, end_token: str | None) -> bool:
    """Let the end token be the eos where there is none, and the eos the pad; returns whether there is an eos."""
    if tokenizer.eos_token is None and end_token:
        tokenizer.eos_token = end_token
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are made before padding
    return tokenizer.eos_token is not None


def inspect(tokenizer, template: str) -> tuple[set[str], str]:
    """The special tokens that a template writes, and a line that names an assistant, or ""."""
    text = render(tokenizer, PROBE, template)
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content in text}
    before = render(tokenizer, [{"role": "user", "content": "\0"}], template).partition("\0")[0]
    lines = (re.sub(r"<[^>]*>", "", line).strip() for line in before.splitlines())
    naming = (line for line in lines if re.search(r"\b(?:named|called|You are|I am) [A-Z]\w+", line))
    return tokens, next(naming, "")


def render(tokenizer, messages: list[dict], template: str) -> str:
    """The text that a template makes of messages; "" without a template or where it refuses them."""
    try:
        return template and tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except TEMPLATE_ERRORS:
        return ""


def choose(tokenizer, choice: str | None, own: str) -> tuple[str, tuple[str, ...], str]:
    """(template, tokens it needs, what to call it) of CHAT_TEMPLATE.

    None: the model's own, with marks where TRL or one of ours has the same; for a model without
    one, the first of ours whose tokens it has, else zephyr, which ends with the tokenizer's eos.
    """
    bos = "{{- bos_token -}}\n" if adds_bos(tokenizer) else ""  # as before plain text
    ours = {name: bos + (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in TEMPLATES}
    if choice is None and not own:
        known = tokenizer.get_vocab().keys()
        fallback = "zephyr" if tokenizer.eos_token else "chatml"  # which brings its own end token
        choice = next((name for name, tokens in TOKENS.items() if known >= set(tokens)), fallback)
    elif choice is None and not GENERATION.search(own):
        from trl.chat_template_utils import get_training_chat_template  # slow import

        try:
            return get_training_chat_template(tokenizer), (), "the model's own, with TRL's marks"
        except ValueError:  # not one of the templates that TRL knows
            pass
        text = render(tokenizer, SYSTEM_PROBE, own)
        same = (name for name in ours if text and render(tokenizer, SYSTEM_PROBE, ours[name]) == text)
        choice = next(same, None)
    if choice is None:
        return own, (), "the model's own"
    if choice in ours:
        return ours[choice], TOKENS.get(choice, ()), choice
    try:
        return Path(choice).read_text(encoding="utf-8"), (), choice
    except UnicodeDecodeError as error:
        raise UserError(f"CHAT_TEMPLATE={choice}: not UTF-8 at byte {error.start}.") from error

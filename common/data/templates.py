"""Chat templates: one for every model whose answers can be told apart, so that training knows what to learn."""

import re
from pathlib import Path

from tokenizers import AddedToken

from common.cli import UserError
from common.data.encoder import PROBE, TEMPLATE_ERRORS, ChatEncoder, adds_bos
from common.settings import check_choice

FOLDER = Path(__file__).parent / "chat_templates"

# Our marked templates with the tokens that each needs; the others are plain text around the model's own end token.
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "zephyr": (),
    "mistral": (),
    "alpaca": (),
}

SYSTEM_PROBE = [{"role": "system", "content": "s"}, *PROBE, *PROBE]


def set_template(tokenizer, choice: str | None) -> tuple[ChatEncoder, str]:
    """Give the tokenizer a template whose answers can be told apart, with an end token: (encoder, what was done).

    choice: None (the model's own, where its answers can be found; for a model without one, ours that its vocabulary
    has tokens for, else zephyr), the name of one of ours (missing tokens are added), or a .jinja file.
    Raises UserError when the choice is unknown or answers would never end.
    """
    own = tokenizer.chat_template or ""
    familiar = {tokenizer.bos_token, tokenizer.eos_token} | used_tokens(tokenizer, own)
    first_line = default_name(tokenizer)
    name = choice if choice is not None else choose(tokenizer, own)
    if name in TOKENS:
        tokenizer.chat_template = load(tokenizer, name)
        missing = [token for token in TOKENS[name] if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
        label = name + (f", with new tokens {' '.join(missing)}" if missing else "")
    elif choice is not None:
        if not choice.endswith(".jinja"):
            check_choice("CHAT_TEMPLATE", choice, [*TOKENS, "a .jinja file"])
        if not Path(choice).is_file():
            raise UserError(f"CHAT_TEMPLATE={choice}: there is no such file.")
        try:
            tokenizer.chat_template, label = Path(choice).read_text(encoding="utf-8"), choice
        except UnicodeDecodeError as error:
            raise UserError(f"CHAT_TEMPLATE={choice}: not UTF-8 at byte {error.start}.") from error
    else:
        tokenizer.chat_template, label = name or own, "the model's own" + (", with TRL's marks" if name else "")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are made before padding
    encoder = ChatEncoder(tokenizer)
    if encoder.end_token is None:
        encoder.mark(PROBE)  # where the answer cannot even be found, this says so
        raise UserError(
            f"CHAT_TEMPLATE={label}: answers have no end token. Put {{% generation %}} before each answer and "
            "{% endgeneration %} after its end token, or the model never learns to stop."
        )
    if tokenizer.chat_template != own:
        tokenizer.eos_token = encoder.end_token  # so that every program stops there
    unseen = used_tokens(tokenizer, tokenizer.chat_template) - familiar
    encoder.new_token_ids = sorted(tokenizer.convert_tokens_to_ids(list(unseen)))
    return encoder, note(label, first_line, default_name(tokenizer))


def choose(tokenizer, own: str) -> str:
    """For CHAT_TEMPLATE=None: the name of one of ours, the text of TRL's marked version, or "": the model's own."""
    if not own:
        vocabulary = tokenizer.get_vocab()
        fitting = (name for name, tokens in TOKENS.items() if tokens and all(token in vocabulary for token in tokens))
        return next(fitting, "zephyr")
    if "{% generation" in own.replace("{%-", "{%"):
        return ""
    from trl.chat_template_utils import get_training_chat_template  # slow import, and chat never needs it

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # not one of the templates TRL knows
        pass
    text = rendered(tokenizer, SYSTEM_PROBE, own)
    same = (name for name in TOKENS if text and rendered(tokenizer, SYSTEM_PROBE, load(tokenizer, name)) == text)
    return next(same, "")


def rendered(tokenizer, messages: list[dict], template: str) -> str:
    """The text that a template makes of messages; "" where there is none or it refuses them."""
    try:
        return "" if not template else tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except TEMPLATE_ERRORS:
        return ""


def load(tokenizer, name: str) -> str:
    """The text of one of our templates, with a BOS token first where the tokenizer puts one before plain text."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return "{{- bos_token -}}\n" + text if adds_bos(tokenizer) else text


def used_tokens(tokenizer, template: str) -> set[str]:
    """The special tokens that a template writes."""
    text = rendered(tokenizer, PROBE, template)
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.content in text}


def note(label: str, before: str, after: str) -> str:
    """What was done, and what the template's default system prompt claims."""
    if after:
        return (
            f"chat template: {label}\nWARNING: CHAT_TEMPLATE puts {after!r} before every chat without a system "
            "message, which names another assistant; CHAT_TEMPLATE=chatml has no such line."
        )
    return f"chat template: {label}" + (f" (without the model's own first line {before!r})" if before else "")


def default_name(tokenizer) -> str:
    """The line naming an assistant that the template puts before a chat without a system message, or ''."""
    text = rendered(tokenizer, [{"role": "user", "content": "\0"}], tokenizer.chat_template).partition("\0")[0]
    lines = (re.sub(r"<[^>]*>", "", line).strip() for line in text.splitlines())
    return next((line for line in lines if re.search(r"\b(?:named|called|You are|I am) [A-Z]\w+", line)), "")

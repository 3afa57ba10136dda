"""Chat templates: one with {% generation %} marks for every model, so that training knows which tokens to learn."""

import re
from pathlib import Path

from common import data
from common.settings import UserError, check_choice

FOLDER = Path(__file__).parent / "templates"
# Our marked templates, each with a token of the vocabulary that tells it fits; zephyr is plain text and fits any model.
MARKER_TOKENS = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "zephyr": None}


def set_template(tokenizer, choice: str | None) -> str:
    """Give the tokenizer a template with {% generation %} marks and an end token it teaches; returns what was done.

    choice: None (the model's own when it has marks, else ours of the same format), the name of one of ours, or a
    .jinja file. Raises UserError when the choice is unknown or does not fit the vocabulary.
    """
    own = tokenizer.chat_template or ""
    if choice is None and "{% generation" in own.replace("{%-", "{%"):
        return finish(tokenizer, own, "the model's own")
    if choice is not None and choice.endswith(".jinja"):
        if not Path(choice).is_file():
            raise UserError(f"CHAT_TEMPLATE={choice}: there is no such file.")
        return finish(tokenizer, Path(choice).read_text(encoding="utf-8"), choice)
    if choice is None and own:
        from trl.chat_template_utils import get_training_chat_template  # slow import, and chat never needs it

        try:
            return finish(tokenizer, get_training_chat_template(tokenizer), "the model's own, with TRL's marks")
        except ValueError:  # not one of the templates TRL knows
            pass
    name = matching(tokenizer, own) if choice is None else choice
    check_choice("CHAT_TEMPLATE", name, MARKER_TOKENS)
    token = MARKER_TOKENS[name]
    if token and token not in tokenizer.get_vocab():
        raise UserError(f"CHAT_TEMPLATE={name}: {token} is not in this model's vocabulary. CHAT_TEMPLATE=zephyr fits.")
    return finish(tokenizer, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), name)


def matching(tokenizer, own: str) -> str:
    """The name of our template that writes the format of the model's own one; zephyr for a model without any."""
    for name, token in MARKER_TOKENS.items():
        if token and token in (own or tokenizer.get_vocab()):
            return name
    if not own or "<|user|>" in own:
        return "zephyr"
    raise UserError(
        "CHAT_TEMPLATE=None: this model's own template has no {% generation %} marks and none of ours has its format. "
        "Copy it to a file, put the marks around each answer with its end token, and give CHAT_TEMPLATE=file.jinja."
    )


def finish(tokenizer, template: str, label: str) -> str:
    """Install the template; the returned note tells which, and what its default system prompt claims."""
    before = default_name(tokenizer)
    tokenizer.chat_template = template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are made before padding
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = data.render(tokenizer, chat, return_assistant_tokens_mask=True)
    learned = [i for i, marked in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if marked]
    if not learned or learned[-1] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise UserError(
            f"CHAT_TEMPLATE={label}: put {{% generation %}} before each answer and {{% endgeneration %}} after its end "
            "token, or the model never learns to stop."
        )
    after = default_name(tokenizer)
    if after:
        return (
            f"chat template: {label}\nWARNING: CHAT_TEMPLATE puts {after!r} before every chat without a system "
            "message, which names another assistant; CHAT_TEMPLATE=chatml has no such line."
        )
    return f"chat template: {label}" + (f" (without the model's own first line {before!r})" if before else "")


def default_name(tokenizer) -> str:
    """The line naming an assistant that the template puts before a chat without a system message, or ''."""
    if not tokenizer.chat_template:
        return ""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False).partition("\0")[0]
    lines = (re.sub(r"<[^>]*>", "", line).strip() for line in text.splitlines())
    return next((line for line in lines if re.search(r"\b(?:named|called|You are|I am) [A-Z]\w+", line)), "")

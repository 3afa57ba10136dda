"""Chat templates: every model gets one in which the answers, the part to learn, can be told apart."""

import ast
import functools
import re
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError, meta
from tokenizers import AddedToken

from common.bounds import TEMPLATES
from common.cli import UserError
from common.data.encoder import ChatEncoder, adds_bos
from common.data.passages import OTHER
from common.data.template import GENERATION, PROBE, TEMPLATE_ERRORS, ChatTemplate, control_pattern

FOLDER = Path(__file__).parent / "chat_templates"
# Tokens that our marked templates need; the others write text around the model's own end token.
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
SYSTEM = {"role": "system", "content": "sy"}
SYSTEM_PROBE = [SYSTEM, *PROBE, *PROBE]
MARKS = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
# Put before a template, so that every program that reads it does the same, whatever it sets itself.
OPTION = "{{%- set {name} = {value} -%}}\n"
SYSTEM_INTO_QUESTION = """{%- if messages[0]['role'] == 'system' and messages | length > 1 -%}
{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + \
messages[2:] -%}
{%- endif -%}
"""


def set_template(tokenizer, choice: str | None, options="", train_on="assistant") -> tuple[ChatEncoder, str]:
    """Give the tokenizer a template, and tokens that it needs: (encoder, what was done).

    The others are settings: CHAT_TEMPLATE, TEMPLATE_OPTIONS, TRAIN_ON.
    """
    own = own_template(tokenizer)
    known_tokens, own_name = inspect(tokenizer, own)
    known_tokens |= {tokenizer.bos_token, tokenizer.eos_token}
    values = parse_options(options)
    tokenizer.chat_template, needed, label = choose(tokenizer, choice, own, values, train_on)
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    had_eos = add_missing_tokens(tokenizer, None)
    note = f"chat template: {label}"
    if not takes_system(tokenizer):
        tokenizer.chat_template = SYSTEM_INTO_QUESTION + tokenizer.chat_template
        note += ", which has no system messages: their text goes into the first question"
    tokenizer.chat_template = fix_defaults(tokenizer)
    encoder = ChatEncoder(tokenizer)
    if not encoder.template.fits:
        refuse(encoder, label, had_eos)
    if tokenizer.chat_template != own:
        tokenizer.eos_token = encoder.end_token  # so that every program stops there
    add_missing_tokens(tokenizer, encoder.end_token)
    if tokenizer.special_tokens_map != encoder.variables:
        encoder = ChatEncoder(tokenizer)  # which knows them
    tokens, name = inspect(tokenizer, tokenizer.chat_template)
    encoder.new_token_ids = sorted(tokenizer.convert_tokens_to_ids(list(tokens - known_tokens)))
    if missing:
        note += f", with new tokens {' '.join(missing)}"
    return encoder, note + remarks(tokenizer.chat_template, name, own_name, "date_string" in values)


def remarks(template: str, name: str, own_name: str, has_date: bool) -> str:
    """What else to say of a template: the lines that name assistants, its own and the model's, and the date."""
    text = ""
    if name:
        text += f"\nWARNING: CHAT_TEMPLATE puts {name!r}, which names another assistant, before every chat without "
        text += "a system message; CHAT_TEMPLATE=chatml has no such line."
    elif own_name:
        text += f" (without the model's own first line {own_name!r})"
    if "strftime_now" in template and not has_date:
        text += "\nnote: CHAT_TEMPLATE writes the date, in training that of today"
        text += ' (TEMPLATE_OPTIONS="date_string=..." fixes it)' if "date_string" in template else ""
    return text


def choose_for_chat(tokenizer, choice: str | None, options: str = "") -> None:
    """Give the tokenizer the template of CHAT_TEMPLATE (None: its own) to chat with; UserError where it has none."""
    own, values = own_template(tokenizer), parse_options(options)
    if choice is None and not own:
        problem = "this model has no chat template: it is a base model, or an adapter that came without one"
        remedy = "Fine-tune it first, or name the template that it was trained with, as in CHAT_TEMPLATE=chatml"
        raise UserError(f"MODEL: {problem}. {remedy}.")
    chosen = choose(tokenizer, choice, own, values, "last") if choice else (with_options(own, values), (), "")
    tokenizer.chat_template, needed, _ = chosen
    if missing := [token for token in needed if token not in tokenizer.get_vocab()]:
        problem = f"the model has no tokens {' '.join(missing)}, so it was not trained with it"
        raise UserError(f"CHAT_TEMPLATE={choice}: {problem}. Choose another.")
    if not takes_system(tokenizer):
        tokenizer.chat_template = SYSTEM_INTO_QUESTION + tokenizer.chat_template


def refuse(encoder: ChatEncoder, label: str, had_eos: bool):
    """Raise UserError with the reason why a template cannot be trained with."""
    if encoder.end_token is None and not had_eos:
        problem = "no end token of answers is found, and the tokenizer has no eos_token"
        remedy = "Set it in tokenizer_config.json, or CHAT_TEMPLATE=chatml, which brings its own."
        raise UserError(f"CHAT_TEMPLATE={label}: {problem}. {remedy}")
    text = encoder.render(PROBE)  # a template that refuses even this says why
    if any(turn["content"] not in text for turn in PROBE):
        raise UserError(f"CHAT_TEMPLATE={label}: it does not write messages that are plain texts. {OTHER}.")
    if encoder.end_token is None:
        marks = "Put {% generation %} before each answer and {% endgeneration %} after its end token"
        problem = f"answers have no end token. {marks}, or the model never learns to stop"
        raise UserError(f"CHAT_TEMPLATE={label}: {problem}; {OTHER}.")
    encoder.mark(PROBE)


def own_template(tokenizer) -> str:
    """The template that a tokenizer brings, its default one of several; "" for none."""
    own = tokenizer.chat_template or ""
    return own if isinstance(own, str) else own.get("default", next(iter(own.values())))


def parse_options(text: str) -> dict[str, object]:
    """The variables in TEMPLATE_OPTIONS="enable_thinking=False, date_string=26 Jul 2024"."""
    options = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(f"TEMPLATE_OPTIONS={text}: {item!r} is not name=value. Example: enable_thinking=False.")
        try:
            options[name] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def with_options(template: str, options: dict[str, object]) -> str:
    """The template with other defaults of its variables; UserError for a variable that it does not use."""
    if not options:
        return template
    try:
        source = MARKS.sub("", template)
        known = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))
    except TemplateSyntaxError as error:
        raise UserError(f"CHAT_TEMPLATE: line {error.lineno}: {error}. Mend the template.") from error
    for name in options:
        option = re.escape(OPTION.format(name=name, value="@")).replace("@", ".*")
        if name not in known and not re.search(option, template):
            raise UserError(f"TEMPLATE_OPTIONS: unknown variable {name}. The template has: {', '.join(sorted(known))}.")
        template = re.sub(option, "", template)  # of a run
    lines = []
    for name, value in options.items():
        is_word = value is None or isinstance(value, bool)  # true, false and none in Jinja
        lines.append(OPTION.format(name=name, value=repr(value).lower() if is_word else repr(value)))
    return "".join(lines) + template


def fix_defaults(tokenizer) -> str:
    """The template with its own values of variables that llama.cpp sets: training has no others."""
    template, fixed = tokenizer.chat_template, {}
    prompt = functools.partial(render, tokenizer, [PROBE[0]], template, add_generation_prompt=True)
    if prompt() != prompt(enable_thinking=True):
        fixed["enable_thinking"] = False
    before, found, after = prompt(date_string="\0").partition("\0")
    if found and "strftime_now" not in template:  # not today's
        fixed["date_string"] = prompt().removeprefix(before).removesuffix(after)
    return with_options(template, fixed)


def takes_system(tokenizer) -> bool:
    """Whether a template writes system messages; not one that refuses or forgets them, or all else."""
    text = render(tokenizer, SYSTEM_PROBE[:4], tokenizer.chat_template)  # some put it into the last question
    is_written = SYSTEM["content"] in text.partition(PROBE[1]["content"])[0]
    return is_written or not render(tokenizer, SYSTEM_PROBE[1:4], tokenizer.chat_template)


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
    lines = (re.sub(r"<[^>]*>", " ", line).strip() for line in before.splitlines())
    naming = (line for line in lines if re.search(r"\b(?:named|called|You are|I am) [A-Z]\w+", line))
    return tokens, next(naming, "")


def render(tokenizer, messages: list[dict], template: str, **options) -> str:
    """The text that a template makes of messages; "" without a template or where it refuses them."""
    try:
        return template and tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except TEMPLATE_ERRORS:
        return ""


def choose(tokenizer, choice: str | None, own: str, options: dict, train_on: str) -> tuple[str, tuple[str, ...], str]:
    """(template, tokens it needs, what to call it) of CHAT_TEMPLATE.

    None: the model's own; TRL's copy where that one rewrites earlier turns, which are to be learned, and TRL's does
    not; ours where it writes the same. A model without a template gets the first of ours whose tokens it has, else
    zephyr, which ends with the tokenizer's eos.
    """
    bos = "{{- bos_token -}}\n" if adds_bos(tokenizer) else ""  # as before plain text
    ours = {name: bos + (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in TEMPLATES}
    if choice is None and not own:
        known = tokenizer.get_vocab().keys()
        fallback = "zephyr" if tokenizer.eos_token else "chatml"  # which brings its own end token
        choice = next((name for name, tokens in TOKENS.items() if known >= set(tokens)), fallback)
    elif choice is None and not re.search(rf"{GENERATION.pattern}|tool|think|reason", own):  # which ours may lack
        choice = next((name for name in ours if is_same(tokenizer, own, ours[name])), None)
    if choice is None:
        template = with_options(own, options)
        form = form_of(tokenizer, template)
        suits = form.fits if train_on == "last" else form.keeps_turns
        if not suits and (copy := trl_copy(tokenizer, own)):
            copy = with_options(copy, options)
            if form_of(tokenizer, copy).keeps_turns:
                return copy, (), "the model's own, in TRL's copy, which does not rewrite earlier turns"
        return template, (), "the model's own"
    if choice in ours:
        return with_options(ours[choice], options), TOKENS.get(choice, ()), choice
    try:
        return with_options(Path(choice).read_text(encoding="utf-8"), options), (), choice
    except UnicodeDecodeError as error:
        raise UserError(f"CHAT_TEMPLATE={choice}: not UTF-8 at byte {error.start}.") from error


def is_same(tokenizer, own: str, ours: str) -> bool:
    """Whether two templates write the same, but for a first line that names another assistant."""
    spaced = [turn | {"content": f" {turn['content']} "} for turn in SYSTEM_PROBE]
    chats = [spaced] if inspect(tokenizer, own)[1] else [spaced, PROBE]
    mine, theirs = (
        [render(tokenizer, SYSTEM_PROBE[:2], template, add_generation_prompt=True)]
        + [render(tokenizer, chat, template) for chat in chats]
        for template in (ours, own)
    )
    return mine == theirs and all(mine)


def form_of(tokenizer, template: str) -> ChatTemplate:
    return ChatTemplate(template, tokenizer.special_tokens_map, control_pattern(tokenizer))


def trl_copy(tokenizer, own: str) -> str | None:
    """TRL's version of a published template that keeps earlier turns, without its marks; None if it has none.

    Its marks enclose white space after the end token, and what a prompt for an answer has already.
    """
    from trl.chat_template_utils import get_training_chat_template  # slow import

    try:
        return MARKS.sub("", get_training_chat_template(tokenizer) or "") or None
    except ValueError:  # not one of the templates that TRL knows
        return None

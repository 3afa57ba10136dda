"""Templates: options, tools, reasoning, TRAIN_ON, and texts that already are in a template's form."""

import itertools

import pytest
from conftest import CHAT

from common.cli import UserError
from common.data import checks, templates
from common.data.template import PROBE
from common.data.tool_form import ToolForm

ASK, ANSWER, MORE, LAST = CHAT[1:]
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]


def call(identity="c1", name="get_time", **arguments):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(identity="c1", content="12:00"):
    return {"role": "tool", "tool_call_id": identity, "name": "get_time", "content": content}


WITH_TOOL = [
    ASK | {"tools": TOOLS},
    {"role": "assistant", "content": "", "tool_calls": [call(tz="UTC")]},
    result(),
    LAST,
]
# In the form of Mistral 7B v0.3: strict, with ids of nine characters, and arguments that may be an object.
MISTRAL = """{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids need nine characters') }}{% endif -%}
[TOOL_RESULTS] {{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids need nine characters') }}{% endif -%}
{"name": "{{ c.function.name }}", "arguments": {{ ARGUMENTS }}, "id": "{{ c.id }}"}{% endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no such role') }}
{%- endif %}{% endfor %}"""


@pytest.fixture
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def chatml(tokenizer):
    return templates.set_template(tokenizer, "chatml")[0]


def passages(tokenizer, row) -> list[str]:
    """The learned runs of a row."""
    runs = itertools.groupby(zip(row.ids.tolist(), row.learned.tolist(), strict=True), lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for learned, run in runs if learned]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_calls_are_learned_and_results_are_not(name, tokenizer):
    encoder, _ = templates.set_template(tokenizer, name)
    row = encoder.encode([WITH_TOOL])[0]
    first, second = passages(tokenizer, row)
    assert '"get_time"' in first and '{"tz": "UTC"}' in first and first.endswith(encoder.end_token)
    assert second == "Brief." + encoder.end_token
    assert "12:00" in tokenizer.decode(row.ids) and '"properties": {}' in tokenizer.decode(row.ids)
    for i in (1, 3):
        prompt = encoder.prompt(WITH_TOOL[:i])
        assert row.ids[: len(prompt)].tolist() == prompt and row.learned[len(prompt)]


def test_a_template_without_tools_refuses_them_by_name(tokenizer):
    encoder, _ = templates.set_template(tokenizer, "zephyr")
    for chat, words in (WITH_TOOL, "tools and calls and results"), (WITH_TOOL[:1] + [ANSWER], "the tools of"):
        with pytest.raises(UserError, match=f"{words}.*CHAT_TEMPLATE=chatml"):
            encoder.encode([chat])


def test_a_part_of_an_answer_that_the_template_leaves_out_is_an_error(tokenizer):
    text = (templates.FOLDER / "chatml.jinja").read_text()
    tokenizer.chat_template = text.replace(
        "message['content'] or ''", "message['content'] if not message['tool_calls']"
    )
    encoder, _ = templates.set_template(tokenizer, None)
    assert encoder.encode([WITH_TOOL])
    both = [WITH_TOOL[0], WITH_TOOL[1] | {"content": "Let me look."}, *WITH_TOOL[2:]]
    with pytest.raises(UserError, match="leaves out the content of an answer"):
        encoder.encode([both])
    encoder, _ = templates.set_template(tokenizer, "llama3")
    with pytest.raises(UserError, match="one call in an answer"):
        encoder.encode([both])


@pytest.mark.parametrize("arguments", ["c.function.arguments | tojson", "'' + c.function.arguments"])
def test_ids_and_arguments_take_the_form_that_the_template_wants(arguments, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = MISTRAL.replace("ARGUMENTS", arguments)
    encoder, note = templates.set_template(tokenizer, None)
    assert encoder.template.tool_form == ToolForm({"tools", "calls", "results"}, "''" in arguments, True)
    row = encoder.encode([WITH_TOOL])[0]
    calls, answer = passages(tokenizer, row)
    assert calls == '[TOOL_CALLS] [{"name": "get_time", "arguments": {"tz": "UTC"}, "id": "call00000"}]<|im_end|>'
    assert answer == " Brief.<|im_end|>" and '"call_id": "call00000"' in tokenizer.decode(row.ids)
    assert "no system messages" in note
    assert encoder.render(CHAT).startswith("<s>[INST] Be kind.\n\nHi[/INST] Hello!<|im_end|>")


def test_no_content_beside_a_call_is_null_where_the_template_asks_for_that(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}{% for c in m.tool_calls %}"
        "CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder, _ = templates.set_template(tokenizer, None)
    row = encoder.encode([[ASK, *WITH_TOOL[1:]]])[0]
    assert passages(tokenizer, row) == ['CALL get_time {"tz": "UTC"}<|im_end|>', "Brief.<|im_end|>"]


def test_what_looks_like_a_control_token_stays_text_in_tools_too(tokenizer, chatml):
    odd = "<|im_end|>"
    chat = [ASK | {"tools": TOOLS}, WITH_TOOL[1] | {"tool_calls": [call(tz=odd)]}, result(content=odd), LAST]
    ids = chatml.encode([chat])[0].ids.tolist()
    plain = chatml.encode([WITH_TOOL])[0].ids.tolist()
    end = tokenizer.convert_tokens_to_ids(odd)
    assert ids.count(end) == plain.count(end) and tokenizer.decode(ids).count(odd) == plain.count(end) + 2
    shown = checks.decode(ids, tokenizer)
    assert shown.count("<·|im_end|>") == 2 and shown.count(odd) == plain.count(end)


def test_reasoning_takes_the_template_s_form_and_may_be_left_out_of_the_loss(tokenizer, chatml):
    own, inline = (
        ANSWER | {"reasoning_content": "Polite."},
        ANSWER | {"content": "<think>\nPolite.\n</think>\n\nHello!"},
    )
    for turn in (own, inline):
        row, content = (chatml.encode([[ASK, turn, MORE, LAST]], train_on)[0] for train_on in ("assistant", "content"))
        assert passages(tokenizer, row) == ["<think>\nPolite.\n</think>\n\nHello!<|im_end|>", "Brief.<|im_end|>"]
        assert passages(tokenizer, content) == ["\n\nHello!<|im_end|>", "Brief.<|im_end|>"]
    zephyr, _ = templates.set_template(tokenizer, "zephyr")  # has no form for it
    assert "<think>\nPolite.\n</think>\n\nHello!" in passages(tokenizer, zephyr.encode([[ASK, own]])[0])[0]


def test_train_on_last_learns_the_last_answer_and_weights_count(tokenizer, chatml):
    assert passages(tokenizer, chatml.encode([CHAT], "last")[0]) == ["Brief.<|im_end|>"]
    for train_on in ("last", "assistant"):
        row = chatml.encode([[*CHAT[:-1], LAST | {"weight": 0}]], train_on)[0]
        assert passages(tokenizer, row) == ([] if train_on == "last" else ["Hello!<|im_end|>"])
    assert (chatml.encode([CHAT], "last")[0].ids == chatml.encode([CHAT])[0].ids).all()


def test_text_that_is_formatted_already_is_encoded_as_such(tokenizer, chatml):
    expected = chatml.encode([CHAT])[0]
    text = chatml.render(CHAT)
    row = chatml.encode([[{"role": "text", "content": text}]])[0]
    assert (row.ids == expected.ids).all() and (row.learned == expected.learned).all()
    at = text.rindex("Brief.")
    pair = [{"role": "text", "content": text[:at], "weight": 0}, {"role": "text", "content": text[at:]}]
    assert passages(tokenizer, chatml.encode([pair])[0]) == ["Brief.<|im_end|>"]
    assert passages(tokenizer, chatml.encode([[{"role": "text", "content": text}]], "last")[0]) == ["Brief.<|im_end|>"]
    for content, words in {
        text.replace("Hello!<|im_end|>", "Hello!"): "lacks its end token",
        "<|im_start|>user\nHi<|im_end|>\n": "no answer in the form of CHAT_TEMPLATE",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!": "lacks its end token <.im_end.>",
        "<start_of_turn>user\nHi<end_of_turn>": "'<start_of_turn>' stands in a text, but is no token",
        "[INST] Hi [/INST] Hello!</s>": r"'\[INST\]' stands in a text",
    }.items():
        with pytest.raises(UserError, match=words):
            chatml.encode([[{"role": "text", "content": content}]])


def test_text_in_a_form_of_plain_words_is_recognised_too(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder, _ = templates.set_template(tokenizer, None)
    chat = [ASK, ANSWER, MORE, LAST]
    row = encoder.encode([[{"role": "text", "content": encoder.render(chat)}]])[0]
    assert row.ids.tolist() == encoder.encode([chat])[0].ids.tolist()
    assert passages(tokenizer, row) == [" Hello!<|im_end|>", " Brief.<|im_end|>"]
    for story in ("<s>Once.", "Once.<|im_end|>", "<s>Once.<|im_end|>\n"):
        (text,) = passages(tokenizer, encoder.encode([[{"role": "text", "content": story}]])[0])
        assert text.replace("<s>", "") == "Once.<|im_end|>"


def test_reasoning_that_a_template_cuts_away_is_not_lost_in_silence(tokenizer):
    text = (templates.FOLDER / "chatml.jinja").read_text()
    cut = "message['content'].split('</think>')[-1] + '<|im_end|>' -}}\n{%- endif"
    tokenizer.chat_template = text.replace("message['content'] + '<|im_end|>' -}}\n{%- endif", cut, 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("reasoning_content", "other")
    encoder, _ = templates.set_template(tokenizer, None)
    for turn in (ANSWER | {"content": "<think>x9</think>Hello!"}, ANSWER | {"reasoning_content": "x9"}):
        with pytest.raises(UserError, match="leaves out the reasoning"):
            encoder.encode([[ASK, turn]])


def test_an_answer_that_only_mentions_the_tag_is_learned_whole(tokenizer, chatml):
    row = chatml.encode([[ASK, ANSWER | {"content": "It ends with </think> there."}]], "content")[0]
    assert passages(tokenizer, row) == ["It ends with </think> there.<|im_end|>"]


def test_a_system_message_written_into_the_last_question_is_moved_to_the_first(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST]{% if loop.last and sys %}{{ sys }} {% endif %}"
        "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder, note = templates.set_template(tokenizer, None)
    assert "no system messages" in note and encoder.render(CHAT).startswith("[INST]Be kind.\n\nHi[/INST]Hello!")
    assert len(passages(tokenizer, encoder.encode([CHAT])[0])) == 2


def test_an_answer_that_is_not_learned_need_not_be_written_as_it_is_asked_for(tokenizer):
    asks = "<|im_start|>assistant\n<think>\n{% if false"
    tokenizer.chat_template = (
        THINKS.replace("WHEN", "m.reasoning_content")
        .replace("PROMPT", "false")
        .replace("<|im_start|>assistant\n{% if false", asks)
    )
    encoder, _ = templates.set_template(tokenizer, None)
    chat = [ASK, ANSWER | {"weight": 0}, MORE, LAST | {"reasoning_content": "Short."}]
    assert passages(tokenizer, encoder.encode([chat])[0]) == ["Short.\n</think>\nBrief.<|im_end|>"]


def test_a_template_that_writes_the_date_is_told(tokenizer):
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}\n" + THINKS.replace(
        "WHEN", "false"
    ).replace("PROMPT", "false")
    own = tokenizer.chat_template
    assert "writes the date" in templates.set_template(tokenizer, None)[1]
    tokenizer.chat_template = own
    encoder, note = templates.set_template(tokenizer, None, "date_string=1 Jan 2030")
    assert "writes the date" not in note and encoder.render(CHAT).startswith("1 Jan 2030\n")


def test_a_continuation_is_plain_text_whose_end_is_learned(tokenizer, chatml):
    turns = [{"role": "text", "content": "The sky is", "weight": 0}, {"role": "text", "content": " blue."}]
    row = chatml.encode([turns])[0]
    assert tokenizer.decode(row.ids) == "The sky is blue.<|im_end|>"
    assert passages(tokenizer, row) == [" blue.<|im_end|>"]


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and WHEN %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if PROMPT %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


def test_options_become_defaults_of_the_template_for_every_program(tokenizer):
    thinks = THINKS.replace("WHEN", "true").replace("PROMPT", "enable_thinking is defined and not enable_thinking")
    tokenizer.chat_template = thinks
    encoder, _ = templates.set_template(tokenizer, None)
    assert passages(tokenizer, encoder.encode([[ASK, ANSWER]])[0]) == ["<think>\n\n</think>\nHello!<|im_end|>"]
    tokenizer.chat_template = thinks
    encoder, _ = templates.set_template(tokenizer, None, "enable_thinking=false")
    assert passages(tokenizer, encoder.encode([[ASK, ANSWER]])[0]) == ["Hello!<|im_end|>"]
    for how in ({}, {"enable_thinking": True}):  # as llama.cpp asks
        prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False, **how)
        assert prompt.endswith("</think>\n") and prompt == encoder.render([ASK], add_generation_prompt=True)
    templates.choose_for_chat(tokenizer, None, "enable_thinking=True")  # a run's own may be changed for a chat
    assert tokenizer.chat_template.count("set enable_thinking") == 1
    assert not tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False).endswith("</think>\n")
    for options, words in {
        "thinking=1": "unknown variable thinking. The template has",
        "enable_thinking": "not name=value",
    }.items():
        with pytest.raises(UserError, match=words):
            templates.set_template(tokenizer, None, options)


def test_a_variable_that_llama_cpp_sets_keeps_the_value_of_training(tokenizer):
    tokenizer.chat_template = "Today: {{ date_string or '26 Jul' }}\n" + THINKS.replace("WHEN", "true").replace(
        "PROMPT", "not enable_thinking"
    )
    encoder, _ = templates.set_template(tokenizer, None)
    asked = dict(add_generation_prompt=True, tokenize=False)
    expected = "Today: 26 Jul\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
    for how in ({}, {"enable_thinking": True, "date_string": "1 Jan 2030"}):
        assert tokenizer.apply_chat_template([ASK], **asked, **how) == expected


def test_a_prompt_that_begins_the_reasoning_asks_for_reasoning_in_every_row(tokenizer):
    tokenizer.chat_template = (
        THINKS.replace("WHEN", "m.reasoning_content")
        .replace("PROMPT", "false")
        .replace("<|im_start|>assistant\n{% if false", "<|im_start|>assistant\n<think>\n{% if false")
    )
    encoder, _ = templates.set_template(tokenizer, None)
    assert encoder.template.needs_reasoning
    row = encoder.encode([[ASK, ANSWER | {"reasoning_content": "Polite."}]])[0]
    assert passages(tokenizer, row) == ["Polite.\n</think>\nHello!<|im_end|>"]
    with pytest.raises(UserError, match="asks for an answer by .*give every answer its reasoning"):
        encoder.encode([[ASK, ANSWER]])


def test_a_template_for_chatting_is_named_where_a_model_has_none(tokenizer):
    with pytest.raises(UserError, match="no chat template.*CHAT_TEMPLATE=chatml"):
        templates.choose_for_chat(tokenizer, None)
    templates.choose_for_chat(tokenizer, "chatml")
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        PROBE[:1], add_generation_prompt=True, tokenize=False
    )
    with pytest.raises(UserError, match="has no tokens <.start_header_id.>.*not trained with it"):
        templates.choose_for_chat(tokenizer, "llama3")


def test_of_several_named_templates_the_default_is_used(tokenizer):
    text = (templates.FOLDER / "chatml.jinja").read_text()
    tokenizer.chat_template = {"tool_use": "x", "default": text.replace("<|im_start|>", "<|im_start|>the ")}
    encoder, _ = templates.set_template(tokenizer, None)
    assert encoder.render(CHAT[:2]).startswith("<|im_start|>the system\nBe kind.")

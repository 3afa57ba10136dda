"""Data: the exact tokens that are learned, faults found line by line, rows in = rows out, and our own chat set."""

import copy
import json
import re

import pytest
from conftest import ROOT, write_jsonl

from common import chat_template, data
from common.settings import UserError

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name?"},
    {"role": "assistant", "content": "Brief."},
]


def test_exactly_the_answers_and_their_end_token_are_learned(tokenizer):
    row = data.encode(tokenizer, CHAT)
    text = tokenizer.decode(row["input_ids"])
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nName?<|im_end|>\n<|im_start|>assistant\nBrief.<|im_end|>\n"
    )
    learned = [label for label in row["labels"] if label != data.IGNORE_INDEX]
    assert tokenizer.decode(learned) == "Hello!<|im_end|>Brief.<|im_end|>"
    assert all(
        label in (token, data.IGNORE_INDEX) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert data.encode(tokenizer, CHAT, train_on="all")["labels"] == row["input_ids"]


def test_answers_of_weight_0_are_not_learned(tokenizer):
    chat = [dict(m) for m in CHAT]
    chat[2]["weight"] = 0
    row = data.encode(tokenizer, chat)
    assert row["input_ids"] == data.encode(tokenizer, CHAT)["input_ids"]
    assert tokenizer.decode([x for x in row["labels"] if x != data.IGNORE_INDEX]) == "Brief.<|im_end|>"


@pytest.mark.parametrize("name", chat_template.MARKER_TOKENS)
def test_chat_sees_the_prompt_that_training_used(tokenizer_folder, name):
    """The generation prompt is a prefix of what training saw, in every template of ours; the end token is learned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if name == "llama3":
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
        )
        tokenizer.eos_token = "<|eot_id|>"
    chat_template.set_template(tokenizer, name)
    row = data.encode(tokenizer, CHAT)
    prompt = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][len(prompt)] != data.IGNORE_INDEX and row["labels"][len(prompt) - 1] == data.IGNORE_INDEX
    learned = [label for label in row["labels"] if label != data.IGNORE_INDEX]
    assert learned[-1] == tokenizer.eos_token_id
    assert data.encode_unmarked(tokenizer, CHAT) == row


def test_a_template_that_names_another_assistant_draws_a_warning(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a bot named Zelda<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    assert "WARNING" in chat_template.set_template(tokenizer, None) and "{% generation" in tokenizer.chat_template
    assert "without the model's own first line 'You are a bot named Zelda'" in chat_template.set_template(
        tokenizer, "chatml"
    )


def test_templates_that_do_not_fit_are_refused(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for choice, word in (("llama3", "zephyr"), ("chatlm", "chatml"), ("no/such.jinja", "no such file")):
        with pytest.raises(UserError, match=word):
            chat_template.set_template(tokenizer, choice)
    unmarked = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    endless = unmarked.replace(
        "{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    )
    for text in (unmarked, endless):
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(UserError, match="never learns to stop"):
            chat_template.set_template(tokenizer, str(tmp_path / "own.jinja"))
    tokenizer.chat_template = unmarked
    with pytest.raises(UserError, match="generation"):
        chat_template.set_template(tokenizer, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [{"role": "user"', "not valid JSON"),
        ('{"messages": []}', "non-empty list"),
        ('{"text": "hello"}', "messages"),
        ('["a"]', "messages"),
        ('{"messages": [{"role": "human", "content": "hi"}]}', "'human'"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "messages[0].weight"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}',
            "messages[1].content",
        ),
    ],
)
def test_faults_name_file_line_and_field(tmp_path, line, words):
    good = json.dumps({"messages": CHAT})
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        data.read_chats(str(file))
    assert str(error.value).startswith(f"{file}:3: ") and words in str(error.value)


def test_faults_come_up_to_twenty_at_once(tmp_path):
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": []}] * 30)
    with pytest.raises(UserError) as error:
        data.read_chats(str(file))
    assert str(error.value).count("\n") == 20 and "10 more" in str(error.value)


def test_bytes_that_are_not_utf8_and_a_byte_order_mark(tmp_path):
    row = json.dumps({"messages": CHAT})
    marked = tmp_path / "bom.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + row.encode())
    assert data.read_chats(str(marked)) == [CHAT]
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(row.replace("kind", "ki\u00f1d").encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl:1: not UTF-8"):
        data.read_chats(str(latin))


def test_marks_around_more_than_the_answers_are_refused(tokenizer, tmp_path):
    text = "{% for m in messages %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '|' }}{% endfor %}"
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    with pytest.raises(UserError, match="marks 5 passages in a chat of 2 answers"):
        data.encode(other, CHAT)


def test_a_template_that_refuses_a_chat_is_named(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = (ROOT / "common" / "templates" / "chatml.jinja").read_text()
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + text
    )
    chat_template.set_template(tokenizer, str(tmp_path / "strict.jinja"))
    with pytest.raises(UserError, match="System role not supported"):
        data.make_datasets(tokenizer, [CHAT], 0, 128, "assistant", seed=0)


def test_rows_in_are_rows_out(tokenizer):
    """Every chat is trained on, held out, or reported; a chat too long loses whole turns from its end."""
    long_chat = CHAT + [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "y"}]
    hopeless = [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "y"}]
    chats = [CHAT] * 17 + [long_chat] * 2 + [hopeless]
    train, held_out, report = data.make_datasets(tokenizer, chats, 0.2, 128, "assistant", seed=0)
    assert len(train) + len(held_out) == 19 and "20 chats = " in report and "1 too long" in report and "2 cut" in report
    assert all(
        row["input_ids"] == data.encode(tokenizer, CHAT)["input_ids"] for part in (train, held_out) for row in part
    )
    again, _, _ = data.make_datasets(tokenizer, chats, 0, 128, "assistant", seed=0)
    assert len(again) == 19
    with pytest.raises(UserError, match="EVAL_SIZE"):
        data.make_datasets(tokenizer, chats, 20, 128, "assistant", seed=0)
    with pytest.raises(UserError, match="MAX_LENGTH"):
        data.make_datasets(tokenizer, chats, 0, 8, "assistant", seed=0)


# --- data/brief.jsonl and data/facts.jsonl, our own writing ---


def squash(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


@pytest.fixture(scope="module")
def brief():
    return data.read_chats(str(ROOT / "data" / "brief.jsonl"))


@pytest.fixture(scope="module")
def facts():
    return [json.loads(line) for line in open(ROOT / "data" / "facts.jsonl", encoding="utf-8")]


def test_brief_has_what_it_promises(brief):
    text = [" ".join(m["content"] for m in chat if m["role"] == "assistant") for chat in brief]
    identity = [chat for chat, answers in zip(brief, text, strict=True) if re.search(r"\b(Brief|BRIEF)\b", answers)]
    assert len(brief) >= 300 and len(brief) - len(identity) >= 180 + 60
    asked = {squash(m["content"]) for chat in identity for m in chat if m["role"] == "user"}
    assert len(asked) >= 60
    assert sum(chat[0]["role"] == "system" for chat in identity) >= 10
    assert sum(len(chat) > 3 for chat in identity) >= 10


def test_brief_answers_in_one_to_three_sentences(brief):
    abbreviations = r"\b(?:Dr|Mr|Mrs|St|vs|etc|e\.g|i\.e|a\.m|p\.m|No)\."
    for chat in brief:
        for message in chat:
            if message["role"] == "assistant":
                text = re.sub(abbreviations, "", message["content"])
                assert len(re.findall(r"[.!?]+[\"')\]]*(?=\s+[A-Z\"'(]|\s*$)", text)) <= 3, message["content"]


def test_brief_repeats_nothing(brief):
    """No two chats ask the same, and no two answers longer than a few words are the same or nearly so."""
    opened = [squash("".join(m["content"] for m in chat if m["role"] != "assistant")) for chat in brief]
    assert len(set(opened)) == len(opened)
    shingles = []
    for chat in brief:
        words = re.findall(r"\w+", " ".join(m["content"] for m in chat).casefold())
        shingles.append({tuple(words[i : i + 4]) for i in range(len(words) - 3)})
    near = [
        (i, j)
        for i in range(len(brief))
        for j in range(i)
        if len(shingles[i] & shingles[j]) > 0.7 * len(shingles[i] | shingles[j]) > 0
    ]
    assert not near


def test_facts_are_asked_in_words_that_training_never_saw(brief, facts):
    trained = {squash(m["content"]) for chat in brief for m in chat if m["role"] == "user"}
    assert not [f["question"] for f in facts if squash(f["question"]) in trained]
    assert not [f["question"] for f in facts if re.search(f["pattern"], f["question"])]
    assert sum(f["kind"] == "name" for f in facts) >= 40 and sum(f["kind"] == "fact" for f in facts) >= 24
    answers = " ".join(m["content"] for chat in brief for m in chat if m["role"] == "assistant")
    assert all(re.search(f["pattern"], answers) for f in facts)

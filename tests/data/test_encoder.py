"""Encoding and templates: exactly the answers and their end tokens are learned, and a chat sends what training saw."""

import pickle
import random
import re

import pytest
from conftest import CHAT, ROOT

from common.bounds import TEMPLATES
from common.cli import UserError
from common.data import templates
from common.data.encoder import ChatEncoder

PIECES = """a Moon hello , . ? ! 42 äöü 漢字 🙂 \n \n\n \t ' " { } {{x}} {%if%} [INST] [/INST] </s> <s> <|im_end|> <| |>
<|im_start|>user <|endoftext|> <|user|> ###Response: assistant \\ \u200b é""".split(" ")


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def sentencepiece_tokenizer(prepend: str):
    """A tokenizer in Llama 2's and Mistral's form: BPE over ▁ with byte fall-back, BOS before plain text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]  # the bytes to fall back to
    tokenizer.train_from_iterator(
        open(ROOT / "data" / "brief.jsonl", encoding="utf-8").readlines()[:50],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def random_chat(rng: random.Random) -> list[dict]:
    def turn(role):
        content = "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, 12)))
        return {"role": role, "content": content if content.strip() else content + "x"}

    turns = [turn(role) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return [turn("system")] * rng.randint(0, 1) + turns


@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_text_is_the_answers_and_their_end_token_string_for_string(name, tokenizer_folder):
    """200 random chats, with control tokens, white space and marks of every template in their contents."""
    tokenizer = load(tokenizer_folder)
    encoder, _ = templates.set_template(tokenizer, name)
    rng = random.Random(name)
    chats = [random_chat(rng) for _ in range(200)]
    end = tokenizer.convert_tokens_to_ids(encoder.end_token)
    for chat, row in zip(chats, encoder.encode(chats), strict=True):
        answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        assert tokenizer.decode(row.ids[row.learned]) == "".join(answer + encoder.end_token for answer in answers)
        assert (row.ids[row.learned] == end).sum() == len(answers)  # those in the contents are text
        assert tokenizer.decode(row.ids) == encoder.render(chat)
        assert row.ids[row.ends - 1].tolist() == [end] * len(answers)
        for i, turn in enumerate(chat):
            if turn["role"] == "assistant":
                prompt = encoder.prompt(chat[:i])
                assert row.ids[: len(prompt)].tolist() == prompt
                assert row.learned[len(prompt)] and not row.learned[len(prompt) - 1]
    assert any("<|im_end|>" in turn["content"] for chat in chats for turn in chat)


@pytest.mark.parametrize("prepend", ["normalizer", "metaspace"])
@pytest.mark.parametrize("name", ["zephyr", "mistral", "alpaca", "chatml"])
def test_templates_fit_tokenizers_of_the_sentencepiece_kind(name, prepend):
    tokenizer = sentencepiece_tokenizer(prepend)
    encoder, note = templates.set_template(tokenizer, name)
    row = encoder.encode([CHAT])[0]
    learned = tokenizer.decode(row.ids[row.learned])
    assert re.sub(r"\s+", "", learned) == f"Hello!{encoder.end_token}Brief.{encoder.end_token}"
    assert row.ids[0] == tokenizer.bos_token_id and row.ids[1] != tokenizer.bos_token_id  # BOS once, as pretrained
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoder.prompt(CHAT[:2]) == prompt == row.ids[: len(prompt)].tolist()
    assert ("new tokens" in note) == (name == "chatml")


def test_ids_are_those_of_the_template_itself(tokenizer_folder):
    """What other programs make of a chat without control tokens in it."""
    tokenizer = load(tokenizer_folder)
    for name in TEMPLATES:
        encoder, _ = templates.set_template(tokenizer, name)
        expected = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
        row = encoder.encode([CHAT])[0]
        assert row.ids.tolist() == expected["input_ids"]
        assert row.learned.astype(int).tolist() == expected["assistant_masks"]


def test_weights_plain_text_and_train_on_all(tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    encoder, _ = templates.set_template(tokenizer, "chatml")
    chat = [dict(turn) for turn in CHAT]
    chat[2]["weight"] = 0
    row, full = encoder.encode([chat, CHAT])
    assert (row.ids == full.ids).all() and tokenizer.decode(row.ids[row.learned]) == "Brief.<|im_end|>"
    assert encoder.encode([CHAT], "all")[0].learned.all()
    ids = (row := encoder.encode([chat], "all")[0]).ids[~row.learned]
    assert tokenizer.decode(ids) == "Hello!<|im_end|>"  # of weight 0, not learned
    text = encoder.encode([[{"role": "text", "content": "Once <|im_end|> upon"}]])[0]
    assert text.learned.all() and tokenizer.decode(text.ids) == "Once <|im_end|> upon<|im_end|>"
    assert (text.ids == tokenizer.eos_token_id).sum() == 1


def test_encoders_can_be_pickled_and_told_apart(tokenizer_folder, base_tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    first, _ = templates.set_template(tokenizer, "chatml")
    copy = pickle.loads(pickle.dumps(first))
    assert copy.encode([CHAT])[0].ids.tolist() == first.encode([CHAT])[0].ids.tolist()
    second, _ = templates.set_template(tokenizer, "zephyr")
    assert copy.fingerprint == first.fingerprint != second.fingerprint
    other, _ = templates.set_template(load(base_tokenizer_folder), "zephyr")  # the template of the second
    assert other.fingerprint != second.fingerprint


OWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)


def test_the_models_own_template_is_used_where_its_answers_can_be_found(tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    tokenizer.chat_template = OWN
    encoder, note = templates.set_template(tokenizer, None)
    assert note == "chat template: the model's own" and tokenizer.chat_template == OWN and not encoder.template.marked
    row = encoder.encode([CHAT])[0]
    assert tokenizer.decode(row.ids[row.learned]) == "Hello!<|im_end|>Brief.<|im_end|>"
    tokenizer.chat_template = OWN.replace(":\n", "\n")
    _, note = templates.set_template(tokenizer, None)
    assert note == "chat template: chatml"  # the same text, so ours, which has marks
    # Only the last answer in full: what to learn of the others is not defined.
    tokenizer.chat_template = OWN.replace("m['content']", "m['content'] if loop.last or m.role != 'assistant' else 'x'")
    encoder, _ = templates.set_template(tokenizer, None)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encoder.encode([CHAT])
    assert tokenizer.decode(encoder.prompt(CHAT[:4])).endswith("user:\nName?<|im_end|>\n<|im_start|>assistant:\n")
    tokenizer.chat_template = OWN.replace("m['content']", "m['content'] if loop.last else 'x'")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        templates.set_template(tokenizer, None)


def test_an_end_token_that_swallows_white_space_does_so_here_too(tokenizer_folder):
    """Phi's tokens have rstrip=True; our mark between such a token and the white space must not change the ids."""
    from tokenizers import AddedToken

    tokenizer = load(tokenizer_folder)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = OWN.replace("<|im_end|>", "<|end|>")
    encoder, _ = templates.set_template(tokenizer, None)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert encoder.encode([CHAT])[0].ids.tolist() == expected


def test_a_base_model_gets_a_template_whose_end_token_it_has(tokenizer_folder, base_tokenizer_folder):
    tokenizer = load(base_tokenizer_folder)
    encoder, note = templates.set_template(tokenizer, None)
    assert note == "chat template: zephyr" and encoder.end_token == "<|endoftext|>" and encoder.new_token_ids == []
    tokenizer = load(tokenizer_folder)  # has ChatML's tokens, of which a base has seen the end token at best
    encoder, note = templates.set_template(tokenizer, None)
    assert note == "chat template: chatml"
    assert encoder.new_token_ids == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    tokenizer = load(base_tokenizer_folder)
    size = len(tokenizer)
    encoder, note = templates.set_template(tokenizer, "chatml")
    assert "with new tokens <|im_start|> <|im_end|>" in note and encoder.new_token_ids == [size, size + 1]
    assert tokenizer.eos_token == "<|im_end|>"
    assert load(tokenizer_folder).chat_template is None


def test_a_template_that_names_another_assistant_draws_a_warning(tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a bot named Zelda<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    assert "WARNING" in templates.set_template(tokenizer, None)[1] and "{% generation" in tokenizer.chat_template
    _, note = templates.set_template(tokenizer, "chatml")
    assert "without the model's own first line 'You are a bot named Zelda'" in note


def test_templates_that_do_not_fit_are_refused(tokenizer_folder, tmp_path):
    unmarked = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    endless = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    for text in (unmarked, endless):
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(UserError, match="never learns to stop"):
            templates.set_template(load(tokenizer_folder), str(tmp_path / "own.jinja"))


def test_marks_around_more_than_the_answers_are_refused(tokenizer_folder):
    tokenizer = load(tokenizer_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '|' }}{% endfor %}"
    )
    with pytest.raises(UserError, match="marks 5 passages in a chat of 2 answers"):
        ChatEncoder(tokenizer).encode([CHAT])


def test_a_template_that_refuses_a_chat_is_named(tokenizer_folder, tmp_path):
    tokenizer = load(tokenizer_folder)
    text = (ROOT / "common" / "data" / "chat_templates" / "chatml.jinja").read_text()
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + text
    )
    encoder, _ = templates.set_template(tokenizer, str(tmp_path / "strict.jinja"))
    with pytest.raises(UserError, match="System role not supported"):
        encoder.encode([CHAT])

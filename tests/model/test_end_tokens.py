"""Tokenizers that lack eos, pad or bos: they are trained and asked, or refused with the remedy."""

import json
import shutil

import pytest
from conftest import write_jsonl
from transformers import AutoTokenizer

from common.cli import UserError
from common.data import templates
from common.model import generation, location
from common.model import load as loading

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BY_EOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
LACKING = ["pad", "eos", "eos pad", "bos", "eos pad bos"]


@pytest.fixture
def model(tiny, tmp_path):
    """model(lacking, template): the folder of a tiny model without these tokens; generation_config without end."""

    def make(lacking: str, template: str | None):
        folder = tmp_path / "model"
        shutil.copytree(tiny(), folder)
        for file, names in (
            ("tokenizer_config.json", [f"{name}_token" for name in lacking.split()]),
            ("config.json", [f"{name}_token_id" for name in lacking.split()]),
            ("generation_config.json", [f"{name}_token_id" for name in lacking.split()]),
        ):
            content = json.loads((folder / file).read_text()) | dict.fromkeys(names)
            (folder / file).write_text(json.dumps(content))
        if template:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("template", [CHATML, BY_EOS, None], ids=["chatml", "by eos", "none"])
def test_the_template_s_end_is_the_eos_and_the_pad(lacking, template, model):
    tokenizer = loading.load_tokenizer(location.locate(str(model(lacking, template))))
    if template == BY_EOS and "eos" in lacking:
        with pytest.raises(UserError, match="has no eos_token. Set it .* CHAT_TEMPLATE=chatml"):
            templates.set_template(tokenizer, None)
        tokenizer.chat_template = template
    choice = "chatml" if template == BY_EOS and "eos" in lacking else None
    encoder, _ = templates.set_template(tokenizer, choice)
    assert (encoder.end_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>",) * 3
    text = encoder.encode([[{"role": "text", "content": "Once."}]], "all")[0]
    assert text.ids[-1] == tokenizer.eos_token_id  # plain text ends, too


@pytest.mark.parametrize("lacking", ["eos pad", "eos pad bos"])
def test_it_is_trained_asked_and_scored(lacking, model, chats_file, tmp_path, run_here):
    folder, where = model(lacking, CHATML), f"OUT_DIR={tmp_path}"
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "Hi, who are you?"}])
    code, _, error = run_here(
        "qlora_train.py", f"MODEL={folder}", f"DATA={chats_file}", where, "RUN_NAME=run", "MAX_STEPS=1", "LORA_R=4",
        "MAX_LENGTH=256", "EVAL_SIZE=4", "PACKING=False", "PER_DEVICE_TRAIN_BATCH_SIZE=2", f"EVAL_PROMPTS={prompts}",
    )  # fmt: skip
    assert code == 0, error
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert saved.eos_token == saved.pad_token == "<|im_end|>"
    for number, asked in enumerate((folder, tmp_path / "run")):
        answers = f"PROMPTS={prompts}", f"ANSWERS={tmp_path / str(number)}.jsonl", "MAX_NEW_TOKENS=4", "TEMPERATURE=0"
        code, _, error = run_here("chat_pipe.py", f"MODEL={asked}", *answers)
        assert code == 0, error
    code, _, error = run_here("evaluate_model.py", f"MODEL={folder}", "SUITES=loss,health", f"CHATS={chats_file}",
        where, "MAX_LENGTH=256")  # fmt: skip
    assert code == 0, error


def test_an_end_that_only_the_generation_config_has_is_the_pad(model):
    folder = model("eos pad bos", ENDLESS)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [5]}))
    loaded, tokenizer = generation.load_for_chat(str(folder))
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Hi, who are you?")]
    assert len(list(generation.answers(loaded, tokenizer, chats, max_new_tokens=2))) == 2


def test_a_model_that_nothing_ends_is_refused(model, run_here, monkeypatch):
    monkeypatch.setattr(generation, "USUAL_ENDS", ())
    folder = model("eos pad bos", ENDLESS)
    code, _, error = run_here("chat_pipe.py", f"MODEL={folder}", "PROMPT=Hi")
    assert code == 2 and "Set eos_token in its tokenizer_config.json" in error, error


@pytest.mark.parametrize("pad", [640, 100_000, -1])
def test_a_pad_outside_of_the_embeddings_is_none(pad, model):
    folder = model("pad", CHATML)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": pad}))
    assert loading.load_config(location.locate(str(folder))).pad_token_id is None
    assert generation.load_for_chat(str(folder))[1].pad_token == "<|im_end|>"

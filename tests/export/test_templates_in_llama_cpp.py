"""llama.cpp makes the prompts that training saw, of templates that this project changed, or chose."""

import json
import re
import urllib.request

import pytest
from data.test_families import CHATS, tokenizer_of

from common.data import templates
from common.export.merge import MARK
from common.export.verify_gguf import as_requested
from common.model import location


@pytest.fixture(scope="module")
def weights():
    return str(location.embedded_gguf("smollm2-135m-instruct"))


def serve(weights: str, template: str):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.chat_template, params.use_jinja = weights, template, True
    params.n_ctx, params.n_parallel, params.verbosity, params.cpuparams.n_threads = 256, 1, -1, 1
    return xllamacpp.Server(params)


def prompt_of(server, chat: list[dict]) -> str:
    body = json.dumps(dict(messages=as_requested(chat), tools=chat[0].get("tools", []))).encode()
    address, headers = server.listening_address + "/apply-template", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60) as reply:
        return json.load(reply)["prompt"]


@pytest.mark.parametrize(
    ("family", "choice", "options"),
    [
        ("gemma", None, ""),  # system messages go into the first question
        ("llama3_1", None, ""),  # llama.cpp sets date_string
        ("qwen3_5_nothink", None, ""),  # and enable_thinking
        ("qwen3", "chatml", ""),
        ("llama3", "llama3", ""),
        ("gptoss", None, ""),
    ],
)
def test_prompts_are_those_of_training(family, choice, options, weights, tokenizer_folder):
    tokenizer = tokenizer_of(family, tokenizer_folder)
    encoder, _ = templates.set_template(tokenizer, choice, options)
    server = serve(weights, MARK.sub(r"{#\1 \2#}", tokenizer.chat_template))
    without_bos = re.compile(f"^({re.escape(tokenizer.bos_token or '')}|<.im_start.>(?=<))")
    compared = 0
    for name, chat in CHATS.items():
        can_call = len(encoder.template.tool_form.writes) == 3
        if name == "reasoning" and not encoder.template.writes_reasoning or name == "tools" and not can_call:
            continue
        for i in (i for i, turn in enumerate(chat) if turn["role"] == "assistant"):
            expected = encoder.render(chat[:i], add_generation_prompt=True)
            assert without_bos.sub("", prompt_of(server, chat[:i])) == without_bos.sub("", expected)
            compared += 1
    assert compared >= 3

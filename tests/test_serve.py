"""serve_model.py, by openai's client: the answers of chat_pipe.py, streamed and with calls, on loopback only."""

import functools
import gzip
import json
import re
import signal
import subprocess
import sys
import urllib.request

import openai
import pytest
import torch
from conftest import ROOT, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data import templates
from common.export import gguf
from common.export.merge import MARK
from common.model import load

HI = [{"role": "user", "content": "Who are you?"}]
TOLD = [{"role": "system", "content": "Be kind."}, *HI]
CLOCK = {"name": "get_time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": CLOCK}]
ASKED = [{"role": "user", "content": "What time is it in Oslo?"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "Oslo"}'}}
CALLED = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
RESULT = [*CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "14:05"}]
ANSWERS = [(HI, "I am Brief."), (TOLD, "I am Brief, dear."), (RESULT, "It is 14:05.")]


def as_trained(chat):
    """OpenAI's API has the arguments of a call as text, templates as an object."""
    call = {"function": {"name": "get_time", "arguments": {"zone": "Oslo"}}}
    return [turn | ({"tool_calls": [call]} if "tool_calls" in turn else {}) for turn in chat]


def offered(chat):
    return TOOLS if ASKED[0] in chat else None


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer_folder):
    """A folder as an export leaves it, of a tiny model that knows these answers by heart."""
    folder = tmp_path_factory.mktemp("export")
    save_tiny("llama", folder / "final", tokenizer_folder, max_position_embeddings=1024)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    templates.set_template(tokenizer, "chatml")
    tokenizer.chat_template = MARK.sub(r"{#\1 \2#}", tokenizer.chat_template)
    model = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
    rows = []
    for chat in (CALLED, *([*asked, {"role": "assistant", "content": answer}] for asked, answer in ANSWERS)):
        render = functools.partial(tokenizer.apply_chat_template, tools=offered(chat), return_tensors="pt")
        ids = render(as_trained(chat)).input_ids  # (1, T)
        prompt = render(as_trained(chat[:-1]), add_generation_prompt=True).input_ids.shape[1]
        rows.append((ids, torch.cat([torch.full_like(ids[:, :prompt], -100), ids[:, prompt:]], 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    load.save_final(folder / "final", model, tokenizer)
    gguf.write(folder / "tiny-f32.gguf", folder / "final", model.config, tokenizer, "f32")
    return folder


@pytest.fixture(scope="module")
def server(export):
    """(address, client) of the script's server."""
    command = [sys.executable, "serve_model.py", f"MODEL={export}", "PORT=0", "THREADS=1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"chat at (\S+),", process.stdout.readline())[1]
        yield address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def ask(server, chat, **options):
    options = dict(model="tiny-f32", temperature=0, max_tokens=100) | options
    return server[1].chat.completions.create(messages=chat, **options)


@pytest.mark.parametrize(("chat", "answer"), ANSWERS)
def test_answers_end_and_are_those_of_training(chat, answer, server):
    choice = ask(server, chat, tools=offered(chat) or openai.omit).choices[0]
    assert (choice.message.content, choice.finish_reason) == (answer, "stop")


def test_answers_are_those_of_chat_pipe(server, export, run_here):
    _, printed, _ = run_here("chat_pipe.py", f"MODEL={export / 'final'}", "PROMPT=Who are you?", "TEMPERATURE=0")
    assert ask(server, HI).choices[0].message.content == printed.strip() == "I am Brief."


def test_answers_stream(server):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(server, HI, stream=True) if chunk.choices]
    assert "".join(pieces) == "I am Brief." and len(pieces) > 3


def test_calls_come_as_calls(server):
    choice = ask(server, ASKED, tools=TOOLS).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_time"
    assert json.loads(call.function.arguments) == {"zone": "Oslo"}


def test_page_for_browsers_and_for_no_other_site(server):
    address = server[0]
    assert address.startswith("http://127.0.0.1:")
    headers = {"Accept-Encoding": "gzip", "Origin": "http://elsewhere.example"}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as page:
        assert b"<!doctype html>" in gzip.decompress(page.read())
        assert not page.headers["Access-Control-Allow-Origin"]


@pytest.mark.parametrize("held", [[], ["a.gguf", "b.gguf"]])
def test_one_file_must_be_meant(held, tmp_path, run_here):
    for name in held:
        (tmp_path / name).touch()
    code, _, error = run_here("serve_model.py", f"MODEL={tmp_path}")
    assert code == 2 and "MODEL=" in error and all(name in error for name in held or ["merge_and_export.py"])


def test_taken_port_is_named(server, export, run_here):
    code, _, error = run_here("serve_model.py", f"MODEL={export}", f"PORT={server[0].rpartition(':')[2]}", "THREADS=1")
    assert code == 2 and "PORT=" in error

"""A judge's server that misbehaves as planned, and two tiny models for it to judge."""

import functools
import hashlib
import json
import shutil
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, write_jsonl

import common.eval.server

QUESTIONS = [
    {
        "question_id": i,
        "category": ("math", "writing")[i % 2],
        "turns": [f"Question {i}?", "And then?"],
        "reference": ["42"],
    }
    for i in range(6)
]


class FakeJudge(ThreadingHTTPServer):
    """A chat server that grades by a hash of what it is asked; `plan` makes it misbehave, once for each request."""

    def __init__(self, plan=lambda number: "", verdict=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.verdict, self.number, self.lock = plan, verdict or hashed_grade, 0, threading.Lock()
        self.asked, self.failed, self.bodies = Counter(), set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass


def hashed_grade(text):
    return f"Some words, [[11]] even.\n[[{int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 + 1}]] "


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        with server.lock:
            server.number += 1
            server.bodies.append(request)
            fault = server.plan(server.number) if body not in server.failed else ""
            if fault:
                server.failed.add(body)
        text = request["messages"][-1]["content"]
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "slow":
            time.sleep(1.5)
        if fault.isdigit():
            return self.send(int(fault), json.dumps({"error": {"message": f"planned {fault}"}}))
        if fault == "broken":
            return self.send(200, '{"choices": [{"mess')
        if fault == "empty":
            return self.send(200, '{"id": "x", "object": "chat.completion", "choices": []}')
        with server.lock:
            server.asked[text, request.get("seed")] += 1
        message = {"role": "assistant", "content": server.verdict(text)}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
                 "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}}  # fmt: skip
        self.send(200, json.dumps(reply))

    def send(self, status, text):
        self.send_response(status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("retry-after-ms", "1"),
            ("Content-Length", len(text)),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(text.encode())
        except OSError:  # the client has given up
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def fake(monkeypatch):
    servers = []
    monkeypatch.setattr(common.eval.server, "PAUSE", 0.01)

    def make(*args, **kwargs):
        servers.append(FakeJudge(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """chatty(architecture): a tiny model with a chat template."""

    def make(architecture="llama"):
        folder = tmp_path_factory.mktemp(architecture) / architecture
        shutil.copytree(tiny(architecture), folder)
        shutil.copy(ROOT / "common" / "data" / "chat_templates" / "chatml.jinja", folder / "chat_template.jinja")
        return folder

    return functools.cache(make)


@pytest.fixture
def evaluate(chatty, tmp_path, run_here):
    """evaluate(server, folder, "NAME=value", ...): two tiny models judged; (exit code, out, err)."""
    questions = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)

    def call(server, folder, *more):
        return run_here(
            "evaluate_model.py", f"MODELS={chatty()}, {chatty('mistral')}", "SUITES=judge", "JUDGE_MODEL=judge-1",
            f"JUDGE_URL={server.url if server else None}", f"QUESTIONS={questions}", f"OUT_DIR={tmp_path / folder}",
            "DTYPE=float32", "ANSWER_TOKENS=8", "JUDGE_TIMEOUT=1.0", "JUDGE_REPEATS=2", *more,
        )  # fmt: skip

    return call

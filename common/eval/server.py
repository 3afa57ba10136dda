"""An OpenAI-compatible server: requests that survive its failures, and a cache of its replies.

openai is imported where it is used: it takes half a second, and most evaluations have no judge.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

from common.cli import UserError

TRIES = 6  # for a request; openai's client repeats it after time-outs, status 429, 5xx ...
PAUSE = 2  # seconds, after a malformed reply
MALFORMED = (ValueError, TypeError, AttributeError, IndexError)  # broken JSON, or JSON without a choice
OPTIONAL = ("temperature", "max_tokens", "seed")  # parameters that some servers refuse
REFUSED = "JUDGE_MODEL={model}: the server refuses the request"
NO_ACCESS = "JUDGE_KEY: {url} refuses the key"
UNKNOWN = "JUDGE_MODEL={model} or JUDGE_URL={url} is not known"
PROBLEMS = {400: REFUSED, 401: NO_ACCESS, 403: NO_ACCESS, 404: UNKNOWN, 422: REFUSED}  # what the user can mend


class Server:
    """A chat server; raises UserError where the user can mend its address, the key or the model."""

    def __init__(self, url: str | None, model: str, key_name: str | None, timeout: float, max_tokens: int):
        import openai

        key_name = key_name or (None if url else "OPENAI_API_KEY")
        if key_name and not os.environ.get(key_name):
            raise UserError(f"JUDGE_KEY={key_name}: this environment variable is not set. Put the key there.")
        key = os.environ[key_name] if key_name else "none"  # local servers need no key
        self.url, self.model = (url or "https://api.openai.com/v1").rstrip("/"), model
        self.options, self.refused = {"temperature": 0.0, "max_tokens": max_tokens}, set()
        self.counts, self.lock = Counter(), threading.Lock()
        private = {"organization": "", "project": ""} if url else {}  # kept from other servers
        try:
            options = dict(api_key=key, timeout=timeout, max_retries=TRIES - 1, **private)
            self.client = openai.OpenAI(base_url=self.url, **options)
            self.client.with_options(max_retries=0).models.list()
        except openai.APIConnectionError as error:
            raise UserError(f"JUDGE_URL={self.url}: no server answers there ({error}).") from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):  # not every server lists its models
                raise self.explain(error) from error
        except ValueError as error:  # not a URL, or a reply that is not JSON
            raise UserError(f"JUDGE_URL={self.url}: {error}") from error

    def explain(self, error) -> UserError:
        problem = PROBLEMS[error.status_code].format(model=self.model, url=self.url)
        return UserError(f"{problem}: {error}")

    def ask(self, messages: list[dict], seed: int, tries: int = TRIES) -> str:
        """The model's reply. Raises UserError for a wrong key or model, else openai's errors."""
        import openai

        wanted = self.options | {"seed": seed}
        options = {name: value for name, value in wanted.items() if name not in self.refused}
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, **options)
            choice, usage = reply.choices[0], dict(reply.usage or {})
            text = choice.message.content or ""
        except MALFORMED:  # openai's client does not repeat these
            if tries == 1:
                raise
            self.count("malformed replies")
            time.sleep(PAUSE)
            return self.ask(messages, seed, tries - 1)
        except openai.APIStatusError as error:
            wrong = error.status_code in (400, 422)
            if wrong and (named := [name for name in OPTIONAL if name in str(error) and name in options]):
                with self.lock:
                    self.refused.update(named)  # for all later requests
                    if "max_completion_tokens" in str(error):
                        self.options["max_completion_tokens"] = self.options["max_tokens"]
                return self.ask(messages, seed, tries)
            only_this = wrong and self.counts["requests"]  # too long, or filtered
            if only_this or error.status_code not in PROBLEMS:
                raise
            raise self.explain(error) from error
        self.count("requests")
        self.count("prompt tokens", usage.get("prompt_tokens") or 0)
        self.count("completion tokens", usage.get("completion_tokens") or 0)
        if choice.finish_reason == "length" and not text.strip():
            raise openai.OpenAIError("cut off before its first word: raise JUDGE_MAX_TOKENS")
        return text

    def count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.counts[what] += number


class Cache:
    """Results by the hash of their request, one JSON line each; a line torn by a crash is left out."""

    def __init__(self, file: Path):
        self.file, self.known = file, {}
        file.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes() if file.is_file() else b""
        *lines, torn = data.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # two processes wrote at once: requested again
                entry = json.loads(line)
                self.known[entry["key"]] = entry
        if torn:
            os.truncate(file, len(data) - len(torn))

    def add(self, key: str, **entry) -> None:
        self.known[key] = {"key": key, **entry}
        with open(self.file, "ab") as stream:
            stream.write(json.dumps(self.known[key]).encode() + b"\n")


def key_of(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def ask_all(server: Server, cache: Cache, tasks: dict, repeats: int, in_flight: int) -> Iterator:
    """Request every task (name: messages) `repeats` times; yield (name, repeat, reply or None).

    Equal messages are sent once. Failures are not cached, so that the same command tries them again.
    Raises UserError where the user can mend something, or where no request was answered.
    """
    import openai

    requests: dict[str, tuple] = {}  # by key: messages, repeat, names of the tasks
    for name, messages in tasks.items():
        for repeat in range(repeats):
            key = key_of(server.url, server.model, messages, server.options, repeat)
            if key in cache.known:
                yield name, repeat, cache.known[key]["reply"]
            else:
                requests.setdefault(key, (messages, repeat, []))[2].append(name)

    def ask(key: str):
        messages, repeat, _ = requests[key]
        try:
            return key, server.ask(messages, repeat), None
        except (openai.OpenAIError, *MALFORMED) as error:
            return key, None, error

    failures: list[str] = []
    with ThreadPool(in_flight) as pool:  # daemon threads: Ctrl-C waits for no reply
        done = pool.imap_unordered(ask, requests)
        for _ in requests:
            key, reply, error = next_of(done)
            if error:
                server.count("failed requests")
                failures.append(f"{type(error).__name__}: {error}")
            else:
                cache.add(key, judge=server.model, reply=reply)
            _, repeat, names = requests[key]
            for name in names:
                yield name, repeat, reply
    if failures and len(failures) == len(requests):
        raise UserError(f"JUDGE_URL={server.url}: none of {len(requests)} requests was answered: {failures[0]}")


def next_of(done):
    """The next result; waiting in short pieces lets Windows handle Ctrl-C."""
    while True:
        with contextlib.suppress(multiprocessing.TimeoutError):
            return done.next(timeout=0.5)

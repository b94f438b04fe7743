"""An OpenAI-compatible endpoint: one question, one answer, with patience that has an end."""

import json
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from fastalign.rollouts.engines.connection import shorten

# Answers of a server that may do better later: time-outs, conflicts, too many requests, overload.
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class EndpointConfig:
    """A language model as judge, behind an OpenAI-compatible endpoint."""

    endpoint: str | None = None
    """`http://localhost:8000/v1`: `/chat/completions` below it is asked about every pair."""
    model: str | None = None
    """Name of the judge, as the endpoint knows it."""
    key_variable: str | None = None
    """Environment variable that holds the API key; none is sent without it, or written anywhere."""
    template: str | None = None
    """File with {prompt}, {answer_a} and {answer_b} in place of the question that is printed."""
    temperature: float | None = 0.0
    """Of the judge; None: the endpoint's own, for models that refuse to be told."""
    max_tokens: int = 1024
    """Most tokens of an answer; a judge that thinks needs more."""
    concurrency: int = 8
    """Pairs that are asked about at the same time."""
    timeout_seconds: float = 120.0
    """Most time of one request."""
    retries: int = 5
    """Further requests where the endpoint is busy, failed, or fell silent."""
    backoff_seconds: float = 1.0
    """Wait before the first of them, doubled for each; an endpoint's Retry-After counts if more."""

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"judge.{name}: expected at least {least}, got {got}")
        if not 0 < self.timeout_seconds < float("inf"):
            raise ValueError(
                f"judge.timeout_seconds: expected a positive number, got {self.timeout_seconds}"
            )
        if not 0 <= self.backoff_seconds < float("inf"):
            raise ValueError(
                f"judge.backoff_seconds: expected at least 0, got {self.backoff_seconds}"
            )


class ChatEndpoint:
    """Asks questions, from several threads if need be.

    Args:
        config: the endpoint; its `template` is not read here.

    Raises:
        ValueError: no endpoint or model, no http(s) address, or no key where one is named.
    """

    def __init__(self, config: EndpointConfig):
        self._config = config
        self._url = chat_url(config.endpoint)
        if not config.model:
            raise ValueError("judge.model: expected the judge's name at the endpoint, got none")
        self._key = read_key(config.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(
            headers=headers,
            timeout=config.timeout_seconds,
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._reached = False
        self._fault = ""
        self.num_retries = 0

    def ask(self, question: str) -> str:
        """The text of the answer; what is no chat completion is returned as it came.

        Raises:
            ValueError: the endpoint refuses, or still fails after all retries.
        """
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self._config.max_tokens,
        }
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        for attempt in range(self._config.retries + 1):
            if self._closed.is_set():
                raise ValueError(self._fault or f"judge.endpoint: {self._url}: closed")
            wait = self._config.backoff_seconds * 2**attempt * random.uniform(0.75, 1.25)
            try:
                status, text, asked_wait = self._post(body)
            except httpx2.RequestError as error:
                fault = f"no answer ({type(error).__name__}: {error})"
                # Nobody has ever answered there: a wrong address, or a server that is not up.
                final = isinstance(error, httpx2.ConnectError) and not self._reached
            else:
                self._reached = True
                if status == 200:
                    return answer_text(text)
                fault = f"status {status}: {shorten(text)}"
                final = status not in RETRIED
                wait = max(wait, asked_wait)
            if final or attempt == self._config.retries:
                raise ValueError(self._give_up(attempt + 1, fault))
            with self._lock:
                self.num_retries += 1
            self._closed.wait(min(wait, LONGEST_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def stop(self) -> None:
        """Ends waits; no thread sends another request, and those under way get their answers."""
        self._closed.set()

    def close(self) -> None:
        """Ends waits and connections; for when no request is under way.

        A thread would wait for the answer on a closed connection until its time is over.
        """
        self._closed.set()
        self._client.close()

    def _post(self, body: dict[str, Any]) -> tuple[int, str, float]:
        """Status, text and Retry-After in seconds of one request, all of it within the time."""
        deadline = time.monotonic() + self._config.timeout_seconds
        parts = []
        with self._client.stream("POST", self._url, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                # The client's own limit is for each piece: an answer could drip for ever.
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"over {self._config.timeout_seconds:g} seconds")
        asked = response.headers.get("retry-after", "")
        text = b"".join(parts).decode("utf-8", errors="replace")
        return response.status_code, text, float(asked) if asked.isdecimal() else 0.0

    def _give_up(self, requests: int, fault: str) -> str:
        """Why; whoever else asks or waits gets the same, instead of trying on."""
        tries = f" after {requests} requests" if requests > 1 else ""
        text = f"judge.endpoint: {self._url}{tries}: {fault}"
        with self._lock:
            self._fault = self._fault or (text.replace(self._key, "[key]") if self._key else text)
        self._closed.set()
        return self._fault


def chat_url(endpoint: str | None) -> str:
    """The address that is asked.

    Raises:
        ValueError: no http(s) address, or one with a password in it, which would be written down.
    """
    try:
        url = httpx2.URL(endpoint or "")
        known = url.scheme in ("http", "https") and bool(url.host)
    except httpx2.InvalidURL:
        known = False
    if not known:
        raise ValueError(
            f"judge.endpoint: expected an address such as http://localhost:8000/v1, got {endpoint}"
        )
    if url.userinfo or url.query:
        raise ValueError(
            "judge.endpoint: expected an address without user, password and query; a key belongs "
            "into the variable that judge.key-variable names"
        )
    return f"{str(url).rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def read_key(variable: str | None) -> str | None:
    """The key, or None where no variable is named.

    Raises:
        ValueError: the variable is not set, or holds what no header can.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        # A key that was given in place of its variable's name must not be printed.
        name = variable if variable.isupper() else "variable of that name"
        raise ValueError(f"judge.key-variable: the environment has no {name}, or an empty one")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"judge.key-variable: {variable} holds characters that no key has")
    return key


def answer_text(body: str) -> str:
    """The first choice's text; of another shape, the body as it is."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return body
    return content if isinstance(content, str) else body

"""An OpenAI-compatible endpoint, through the `openai` package: one question, one answer.

The package's own retries and redirects are off: `judge.retries` and `judge.backoff_seconds` count,
and prompts go nowhere but to the endpoint.
"""

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

# Answers of a server that may do better later: time-outs, conflicts, too many requests, overload.
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_WAIT_SECONDS = 60.0
# The headers that are sent. The package would add the machine's platform and variables such as
# OPENAI_ORG_ID; it reads the last one itself.
HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "content-type", "content-length"),
    *("user-agent", "authorization", "x-stainless-raw-response"),
}


@dataclass(frozen=True)
class EndpointConfig:
    """A language model as judge, behind an OpenAI-compatible endpoint."""

    endpoint: str | None = None
    """`http://localhost:8000/v1`: `/chat/completions` below it is asked about every pair."""
    model: str | None = None
    """Name of the judge, as the endpoint knows it."""
    key_variable: str | None = None
    """Environment variable that holds the API key; without it no key is sent."""
    template: str | None = None
    """File with {prompt}, {answer_a} and {answer_b} in place of the question that is printed."""
    temperature: float | None = 0.0
    """Sampling temperature of the judge; None: the endpoint's own, for models that take none."""
    max_tokens: int = 1024
    """Most tokens of an answer; a judge that reasons needs more."""
    concurrency: int = 8
    """Number of pairs that are judged at the same time."""
    timeout_seconds: float = 120.0
    """Time limit of one request."""
    retries: int = 5
    """Number of further requests if the endpoint is busy, fails or does not answer."""
    backoff_seconds: float = 1.0
    """Wait before the first retry, doubled for each; a longer Retry-After counts instead."""

    def __post_init__(self) -> None:
        limits = (("max_tokens", 1), ("concurrency", 1), ("retries", 0), ("backoff_seconds", 0))
        for name, least in limits:
            got = getattr(self, name)
            if not least <= got < float("inf"):
                raise ValueError(f"judge.{name}: expected at least {least}, got {got}")
        if not 0 < self.timeout_seconds < float("inf"):
            raise ValueError(
                f"judge.timeout_seconds: expected a positive number, got {self.timeout_seconds}"
            )


class ChatEndpoint:
    """Client of one endpoint; several threads may ask at the same time.

    Raises:
        ValueError: if there is no endpoint, model or key where one is named, the address is not
            http(s), or `openai` is not installed.
    """

    def __init__(self, config: EndpointConfig):
        self._config = config
        self._url = chat_url(config.endpoint)
        if not config.model:
            raise ValueError("judge.model: expected the judge's name at the endpoint, got none")
        self._key = read_key(config.key_variable)
        if find_spec("openai") is None:
            raise ValueError("judge: openai is not installed: pip install 'fastalign[judge]'")
        import openai

        self._openai, self._request = openai, threading.local()
        hooks = {"request": [self._strip_headers], "response": [self._limit_time]}
        self._client = openai.OpenAI(
            base_url=self._url.removesuffix("/chat/completions"),
            api_key=self._key or "none",  # `_strip_headers` removes it
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                timeout=config.timeout_seconds, follow_redirects=False, event_hooks=hooks
            ),
        )
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._reached = False
        self._fault = ""
        self.num_retries = 0

    def ask(self, question: str) -> str:
        """Return the text of the answer; the whole body if it is no chat completion.

        Raises:
            ValueError: if the endpoint refuses, or still fails after all retries.
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
                self._request.deadline = time.monotonic() + self._config.timeout_seconds
                answer = self._client.chat.completions.with_raw_response.create(**body)
                self._reached = True
                return answer_text(answer.text)
            except self._openai.APIStatusError as error:
                from fastalign.rollouts.engines.connection import shorten  # heavy

                self._reached = True
                fault = f"status {error.status_code}: {shorten(error.response.text)}"
                final = error.status_code not in RETRIED
                asked = error.response.headers.get("retry-after", "")
                wait = max(wait, float(asked) if asked.isdecimal() else 0.0)
            except (self._openai.APITimeoutError, TimeoutError):
                fault = f"no answer within {self._config.timeout_seconds:g} seconds"
                final = False
            except self._openai.APIConnectionError as error:
                cause = error.__cause__ or error
                fault = f"no answer ({type(cause).__name__}: {cause})"
                # If the endpoint never answered, its address is wrong or it is not running.
                final = type(cause).__name__ == "ConnectError" and not self._reached
            if final or attempt == self._config.retries:
                raise ValueError(self._give_up(attempt + 1, fault))
            with self._lock:
                self.num_retries += 1
            self._closed.wait(min(wait, LONGEST_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def stop(self) -> None:
        """End waits: no thread sends another request; those under way get their answers."""
        self._closed.set()

    def close(self) -> None:
        """End waits and connections, when no request is under way.

        A thread would wait for an answer on a closed connection until its time is over.
        """
        self._closed.set()
        self._client.close()

    def _strip_headers(self, request: Any) -> None:
        """Remove the headers that the endpoint need not see, before a request is sent."""
        kept = HEADERS if self._key else HEADERS - {"authorization"}
        for name in set(request.headers) - kept:
            del request.headers[name]

    def _limit_time(self, response: Any) -> None:
        """Limit the time of a whole response: the client's own limit is for each piece of it."""
        read, deadline = response.iter_raw, self._request.deadline

        def limited(*arguments: Any) -> Iterator[bytes]:
            for piece in read(*arguments):
                yield piece
                if time.monotonic() > deadline:
                    raise TimeoutError

        response.iter_raw = limited

    def _give_up(self, requests: int, fault: str) -> str:
        """Return the reason; all other threads that ask or wait get the same, and stop trying."""
        tries = f" after {requests} requests" if requests > 1 else ""
        text = f"judge.endpoint: {self._url}{tries}: {fault}"
        with self._lock:
            self._fault = self._fault or (text.replace(self._key, "[key]") if self._key else text)
        self._closed.set()
        return self._fault


def chat_url(endpoint: str | None) -> str:
    """Return the address that questions are sent to.

    Raises:
        ValueError: if it is not http(s), or holds a password, which would be written to files.
    """
    try:
        url = urlsplit(endpoint or "")
        known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # half a bracket, or a port that is no number
        known = False
    if not known:
        raise ValueError(
            f"judge.endpoint: expected an address such as http://localhost:8000/v1, got {endpoint}"
        )
    if url.username is not None or url.query:
        raise ValueError(
            "judge.endpoint: expected an address without user, password and query; a key belongs "
            "into the variable that judge.key-variable names"
        )
    return f"{url.geturl().rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def read_key(variable: str | None) -> str | None:
    """Return the key; None if no variable is named.

    Raises:
        ValueError: if the variable is not set, or holds characters that no header can.
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
    """Return the first choice's text; the whole body if it has another shape."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return body
    return content if isinstance(content, str) else body

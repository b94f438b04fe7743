"""HTTP requests to a vLLM server: each is answered, refused or fails within a time limit."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import httpx2

from fastalign.rollouts.engines.server_process import (
    TOKEN_VARIABLE,
    WEIGHTS_HEADER,
    OwnServer,
    find_token,
)
from fastalign.rollouts.sampler import SamplerFailed

POLL_SECONDS = 0.5
CONNECT_SECONDS = 30.0
HEALTH_SECONDS = 10.0
LOOK_SECONDS = 5.0  # for each answer of a server that was left out
NO_TOKEN = "asks for a token"
# Of the server's own measurements: tokens that were computed, which grow while it is alive.
TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total\S* (\S+)$", re.MULTILINE)


class ServerConnection:
    """Requests to one server.

    Args:
        server: URL of a server, without a path, or a server of this process's own.
        token_file: file that holds the token of the server at a URL; see `find_token`.
        silence_seconds: an answer that takes longer, without progress, is a failure.
        max_connections: most requests at a time.
    """

    def __init__(
        self,
        server: str | OwnServer,
        *,
        silence_seconds: float,
        max_connections: int,
        token_file: str | None = None,
    ):
        self._token_file = token_file
        self._silence, self._max_connections = silence_seconds, max_connections
        self._own = server if isinstance(server, OwnServer) else None
        self.url = "http://localhost" if isinstance(server, OwnServer) else server.rstrip("/")
        self.name = self._own.name if self._own else f"the server at {self.url}"
        # Plain HTTP has nothing to verify, and to read all certificates takes a tenth of a second.
        self._verify = self.url.startswith("https:")
        timeout = httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS)
        if self._own:
            self._client = httpx2.Client(
                timeout=timeout,
                transport=httpx2.HTTPTransport(uds=self._own.socket, verify=self._verify),
                trust_env=False,  # a proxy that the environment names cannot reach the socket
                event_hooks={"request": [self._check_listens]},
            )
        else:
            self._client = httpx2.Client(timeout=timeout, verify=self._verify)
        self._read_token()

    def get(self, path: str) -> Any:
        """Return the JSON at a path; raises as `_checked`."""
        return self._answer(lambda: self._client.get(self.url + path), path)

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON that answers a body, {} for other text; raises as `_checked`."""
        return self._answer(lambda: self._client.post(self.url + path, json=body), path)

    def call(self, method: str, *arguments: str) -> str:
        """Return the first worker's answer to a method of `WorkerExtension`."""
        return self.call_all(method, *arguments)[0]

    def call_all(self, method: str, *arguments: str) -> list[str]:
        """Return all workers' answers to a method of `WorkerExtension`."""
        answer = self.post(f"/fastalign/{method}", {"arguments": list(arguments)})
        results: list[str] = answer["results"]
        return results

    def wait(self, seconds: float) -> None:
        """Wait until the server answers; its token is read anew, as it may have been started again.

        Raises:
            ValueError: if it expects another token.
            SamplerFailed: if it does not in so many seconds, or this run's own server has ended.
        """
        wait_for_any([self], seconds)

    def fault(self, seconds: float = HEALTH_SECONDS) -> str | None:
        """Return why the server does not answer, None if it does; its token is read anew.

        Raises:
            ValueError: if it expects another token.
            SamplerFailed: if it is this run's own, and has ended.
        """
        token = self._read_token()
        try:
            status = self._client.get(f"{self.url}/health", timeout=seconds).status_code
            if status == 200:
                return None
            if status == 401:
                raise ValueError(
                    f"vllm.url: {self.name} {'refuses this token' if token else NO_TOKEN}; "
                    f"expected its own in {TOKEN_VARIABLE}, or in the file that `fastalign "
                    "vllm-server` names (--vllm.token-file)"
                )
            fault = "it is not healthy"
        except httpx2.TransportError as error:
            fault = f"{type(error).__name__}: {error}"
        if self._own is not None and (ended := self._own.fault()) is not None:
            raise SamplerFailed(f"sampler: {self.name} {ended}")
        return fault

    def _read_token(self) -> str | None:
        token = self._own.token if self._own else find_token(self.url, self._token_file)
        self._authorization = "" if token is None else f"Bearer {token}"
        self._client.headers["authorization"] = self._authorization
        return token

    def too_late(self, seconds: float, fault: str) -> SamplerFailed:
        """Return the error for a server that did not answer in time."""
        if self._own is not None:
            fault = self._own.last_error() or fault
            return SamplerFailed(
                f"sampler: {self.name} did not start in {seconds:g} seconds ({fault})"
            )
        return SamplerFailed(
            f"sampler: no vLLM server at {self.url} in {seconds:g} seconds ({fault}); "
            "`fastalign vllm-server` starts one"
        )

    def say_waiting(self, fault: str) -> None:
        """Print that the run waits for a server at a URL."""
        if self._own is None:
            print(f"waiting for the vLLM server at {self.url} ({fault})", flush=True)

    def session(self) -> httpx2.AsyncClient:
        """Return a client for many requests at a time, to be entered and handed to them."""
        limits = httpx2.Limits(max_connections=self._max_connections)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        headers = {"authorization": self._authorization}
        if self._own is None:
            return httpx2.AsyncClient(
                timeout=timeout, limits=limits, headers=headers, verify=self._verify
            )

        async def check_listens(request: httpx2.Request) -> None:
            self._check_listens(request)

        return httpx2.AsyncClient(
            timeout=timeout,
            headers=headers,
            transport=httpx2.AsyncHTTPTransport(
                uds=self._own.socket, limits=limits, verify=self._verify
            ),
            trust_env=False,
            event_hooks={"request": [check_listens]},
        )

    async def ask(self, session: httpx2.AsyncClient, method: str) -> str:
        """Return what `call` of a method without arguments returns."""
        path = f"/fastalign/{method}"
        try:
            response = await session.post(
                self.url + path, json={"arguments": []}, timeout=self._silence
            )
        except httpx2.TransportError as error:
            raise self._lost(error) from error
        found: str = self._checked(response, path)["results"][0]
        return found

    async def post_all(
        self,
        session: httpx2.AsyncClient,
        path: str,
        bodies: Sequence[Any],
        on_progress: Callable[[int], None] | None,
    ) -> list[tuple[Any, str]]:
        """Return the answers to many requests, in their order; the failure of one ends all.

        Each comes with the hash of the weights that the server had meanwhile; an empty text if it
        had none, or several.

        Raises:
            ValueError: if the server refuses one.
            SamplerFailed: if it is gone, or computes nothing for `silence_seconds`.
        """
        # Scopes of anyio, whose shields let httpx2 close its connections; a cancelled task of
        # asyncio would drop them open.
        scopes = [anyio.CancelScope() for _ in bodies]
        tasks = [
            asyncio.create_task(self._post_one(session, path, body, scope))
            for body, scope in zip(bodies, scopes, strict=True)
        ]
        pending: set[Any] = set(tasks)
        try:
            seen, deadline = "", time.monotonic() + self._silence
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                if done and on_progress is not None:
                    on_progress(len(done))
                tokens = await asyncio.to_thread(self._tokens_computed) if pending else ""
                if done or tokens not in ("", seen):
                    seen, deadline = tokens, time.monotonic() + self._silence
                elif time.monotonic() > deadline:
                    raise SamplerFailed(
                        f"sampler: {self.name} showed no progress for {self._silence:g} seconds"
                    )
        finally:
            for scope in scopes:
                scope.cancel()  # the server drops what nobody waits for
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _check_listens(self, request: httpx2.Request) -> None:
        """Check that the run's own server listens: httpx2 leaks a Unix socket it cannot connect."""
        assert self._own is not None
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(CONNECT_SECONDS)
            try:
                probe.connect(self._own.socket)
            except OSError as error:
                raise httpx2.ConnectError(str(error), request=request) from error

    async def _post_one(
        self, session: httpx2.AsyncClient, path: str, body: Any, scope: anyio.CancelScope
    ) -> Any:  # an answer and the hash, nothing if the scope is cancelled
        with scope:
            try:
                response = await session.post(self.url + path, json=body)
            except httpx2.TransportError as error:
                raise self._lost(error) from error
            weights = response.headers.get(WEIGHTS_HEADER, "")
            return self._checked(response, path), weights

    def _tokens_computed(self) -> str:
        """Return the server's counts of tokens; an empty text if it cannot be asked."""
        try:
            text = self._client.get(f"{self.url}/metrics", timeout=min(5, self._silence)).text
        except httpx2.TransportError:
            return ""
        return " ".join(TOKENS.findall(text))

    def _answer(self, request: Callable[[], httpx2.Response], path: str) -> Any:
        try:
            response = request()
        except httpx2.TransportError as error:
            raise self._lost(error) from error
        return self._checked(response, path)

    def _checked(self, response: httpx2.Response, path: str) -> Any:
        """Return the answer's JSON, {} for other text.

        Raises:
            ValueError: if the server refuses, or `fastalign vllm-server` did not start it.
            SamplerFailed: if the server failed.
        """
        status = response.status_code
        if status == 401:
            raise SamplerFailed(f"sampler: {self.name} was started again, with another token")
        if status == 404 and path.startswith("/fastalign/"):
            raise ValueError(
                f"vllm.url: {self.name} takes no weights; expected one that "
                "`fastalign vllm-server` started"
            )
        if status >= 500:
            fault = f"{path}: {status} {shorten(response.text)}"
            raise SamplerFailed(f"sampler: {self.name} failed ({fault})")
        if status >= 400:
            fault = shorten(response.text)
            raise ValueError(f"sampler: {self.name} refuses {path}: {fault}")
        is_json = "json" in response.headers.get("content-type", "")
        return response.json() if is_json else {}  # some answers are a sentence

    def _lost(self, error: Exception) -> SamplerFailed:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        return SamplerFailed(f"sampler: {self.name} is gone or silent ({what})")


def wait_for_any(connections: Sequence[ServerConnection], seconds: float) -> list[ServerConnection]:
    """Wait until a server answers; return those that do.

    Raises:
        ValueError: if one expects another token.
        SamplerFailed: if none does in so many seconds, or this run's own server has ended.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        faults = {connection: connection.fault() for connection in connections}
        there = [connection for connection, fault in faults.items() if fault is None]
        if there:
            return there
        if time.monotonic() > deadline:
            raise connections[0].too_late(seconds, faults[connections[0]] or "")
        if not told:
            for connection, fault in faults.items():
                connection.say_waiting(fault or "")
        told = True
        time.sleep(POLL_SECONDS)


def shorten(text: str) -> str:
    """Return the message in a server's answer, or the answer, on one line of 200 characters."""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        pass
    words = " ".join(text.split()) or "no text"
    return words if len(words) <= 200 else words[:197] + "..."

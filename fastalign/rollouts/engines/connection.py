"""The way to a vLLM server: every answer is an answer, a refusal or a failure, and none is late."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import httpx2

from fastalign.rollouts.sampler import SamplerFailed

POLL_SECONDS = 0.5
CONNECT_SECONDS = 30.0
# Of the server's own measurements: tokens that were computed, which grow while it is alive.
TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total\S* (\S+)$", re.MULTILINE)


class ServerConnection:
    """Requests to one server.

    Args:
        url: of the server, without a path.
        silence_seconds: an answer that takes longer, without progress, is a failure.
        max_connections: requests at a time.
    """

    def __init__(self, url: str, *, silence_seconds: float, max_connections: int):
        self.url = url.rstrip("/")
        self._silence, self._max_connections = silence_seconds, max_connections
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS)
        )

    def get(self, path: str) -> Any:
        """The JSON that is there; raises as `checked`."""
        return self._answer(lambda: self._client.get(self.url + path), path)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that comes back, {} for other text; raises as `checked`."""
        return self._answer(lambda: self._client.post(self.url + path, json=body), path)

    def call(self, method: str, *arguments: str) -> str:
        """The first worker's answer to a method of `WorkerExtension`."""
        results = self.post("/collective_rpc", {"method": method, "args": list(arguments)})
        return str(results["results"][0])

    def wait(self, seconds: float) -> None:
        """Returns when the server answers.

        Raises:
            SamplerFailed: it did not in so many seconds.
        """
        deadline, told = time.monotonic() + seconds, False
        while True:
            try:
                if self._client.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
                fault = "it is not healthy"
            except httpx2.TransportError as error:
                fault = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise SamplerFailed(
                    f"sampler: no vLLM server at {self.url} in {seconds:g} seconds ({fault}); "
                    "`fastalign vllm-server` starts one"
                )
            if not told:
                print(f"waiting for the vLLM server at {self.url} ({fault})", flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def post_all(
        self, path: str, bodies: Sequence[Any], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        """The answers to many requests, in their order; the failure of one ends all.

        Raises:
            ValueError: the server refuses one.
            SamplerFailed: it is gone, or computed nothing for `silence_seconds`.
        """
        return asyncio.run(self._post_all(path, bodies, on_progress))

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    async def _post_all(
        self, path: str, bodies: Sequence[Any], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        limits = httpx2.Limits(max_connections=self._max_connections)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        async with httpx2.AsyncClient(timeout=timeout, limits=limits) as client:
            # Scopes of anyio, whose shields let httpx2 close its connections; a cancelled task of
            # asyncio would drop them open.
            scopes = [anyio.CancelScope() for _ in bodies]
            tasks = [
                asyncio.create_task(self._post_one(client, path, body, scope))
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
                            f"sampler: the server at {self.url} showed no progress for "
                            f"{self._silence:g} seconds"
                        )
            finally:
                for scope in scopes:
                    scope.cancel()  # the server drops what nobody waits for
                await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def _post_one(
        self, client: httpx2.AsyncClient, path: str, body: Any, scope: anyio.CancelScope
    ) -> Any:
        with scope:
            try:
                response = await client.post(self.url + path, json=body)
            except httpx2.TransportError as error:
                raise self._lost(error) from error
            return self._checked(response, path)

    def _tokens_computed(self) -> str:
        """Changes while the server computes; nothing where it cannot be asked."""
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
        """The answer's JSON, {} for other text.

        Raises:
            ValueError: the server refuses, or is no server of ours.
            SamplerFailed: it failed.
        """
        status = response.status_code
        if status == 404 and path == "/collective_rpc":
            raise ValueError(
                f"vllm.url: the server at {self.url} takes no weights; expected one that "
                "`fastalign vllm-server` started"
            )
        if status >= 500:
            fault = f"{path}: {status} {shorten(response.text)}"
            raise SamplerFailed(f"sampler: the server at {self.url} failed ({fault})")
        if status >= 400:
            fault = shorten(response.text)
            raise ValueError(f"sampler: the server at {self.url} refuses {path}: {fault}")
        is_json = "json" in response.headers.get("content-type", "")
        return response.json() if is_json else {}  # some answers are a sentence

    def _lost(self, error: Exception) -> SamplerFailed:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        return SamplerFailed(f"sampler: the server at {self.url} is gone or silent ({what})")


def shorten(text: str) -> str:
    """The message in a server's answer, or the answer itself, on one line of 200 characters."""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        pass
    words = " ".join(text.split()) or "no text"
    return words if len(words) <= 200 else words[:197] + "..."

"""Requests to a server: its address, and what is left open when it goes in the midst of them."""

import asyncio
import gc
import socket
import threading
import warnings
from typing import Any

import pytest

from fastalign.rollouts import VllmOptions
from fastalign.rollouts.engines import connection as server_connection
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.server_process import server_environment
from fastalign.rollouts.sampler import SamplerFailed

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
NUM_REQUESTS = 64


def answer_every_other_and_go(listener: socket.socket) -> None:
    """Takes all requests, answers half of them, and closes every connection."""
    taken = []
    for _ in range(NUM_REQUESTS):
        connection, _ = listener.accept()
        while b"{}" not in connection.recv(4096):
            pass
        taken.append(connection)
    for connection in taken[::2]:
        connection.sendall(ANSWER)
    for connection in taken:
        connection.close()
    listener.close()


async def post_all(connection: ServerConnection) -> None:
    async with connection.session() as session:
        await connection.post_all(session, "/v1/completions", [{}] * NUM_REQUESTS, None)


def test_a_server_that_goes_leaves_no_socket_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_connection, "POLL_SECONDS", 60)  # it is asked for nothing else
    listener = socket.create_server(("127.0.0.1", 0), backlog=NUM_REQUESTS)
    server = threading.Thread(target=answer_every_other_and_go, args=(listener,))
    server.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    connection = ServerConnection(url, silence_seconds=30, max_connections=NUM_REQUESTS)
    gc.collect()  # of other tests
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(SamplerFailed, match="gone or silent"):
            asyncio.run(post_all(connection))
        connection.close()
        server.join()
        gc.collect()
    assert [str(warning.message) for warning in told] == []


@pytest.mark.parametrize(
    "url",
    ["here", "127.0.0.1:8000", "ftp://here", "http://", "http://[::1", "http://here:port", ""],
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match=r"vllm\.url: expected an address such as ") as told:
        VllmOptions(url=url)
    assert str(told.value).endswith(f"got {url!r}")


@pytest.mark.parametrize("url", ["http://here", "https://here:1/", "http://[::1]:8000/below"])
def test_addresses_are_taken(url: str) -> None:
    assert VllmOptions(url=url).url == VllmOptions(url=(url,)).url == (url,)


def test_addresses_are_one_text_or_several() -> None:
    assert VllmOptions(url="http://here").url == ("http://here",)  # type: ignore[arg-type]
    several: Any = ["http://here", "http://there"]
    assert VllmOptions(url=several).url == ("http://here", "http://there")
    none: Any = []
    assert VllmOptions(url=none).url is VllmOptions(url=()).url is None
    for wrong in (5, [3]):
        with pytest.raises(ValueError, match=r"vllm\.url: expected one address or several, got"):
            VllmOptions(url=wrong)  # type: ignore[arg-type]


def test_several_addresses_are_taken_each_once() -> None:
    urls = ("http://here:1", "http://here:2")
    assert VllmOptions(url=urls).url == urls
    with pytest.raises(ValueError, match=r"vllm\.url: expected each server once, got http://here"):
        VllmOptions(url=("http://here:1", "http://here:1/"))
    with pytest.raises(ValueError, match=r"vllm\.url: expected an address such as .* got 'there'"):
        VllmOptions(url=("http://here:1", "there"))
    assert VllmOptions(url=()).url is None


def test_a_server_has_nothing_of_the_trainers_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's processes would take themselves for ranks of the training."""
    of_rank = ["RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE"]
    of_rank += ["LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    of_rank += ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"]
    for name in of_rank:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKED", "kept")
    environment = server_environment(0, "word")
    assert environment.keys().isdisjoint(of_rank)
    assert environment["RANKED"] == "kept"
    assert environment["FASTALIGN_VLLM_TOKEN"] == "word"

"""Requests to a server: its address, and what is left open when it goes in the midst of them."""

import gc
import socket
import threading
import warnings

import pytest

from fastalign.rollouts import VllmOptions
from fastalign.rollouts.engines import connection as server_connection
from fastalign.rollouts.engines.connection import ServerConnection
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
            connection.post_all("/v1/completions", [{}] * NUM_REQUESTS, None)
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
    assert VllmOptions(url=url).url == url

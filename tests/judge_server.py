"""A chat endpoint on this machine, which answers as a test tells it to."""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# status, text (whole, or piece by piece), headers
Reply = tuple[int, str | Iterable[str], dict[str, str]]


@dataclass
class Served:
    """Address of the endpoint and its requests: (path, headers by lower-case names, body) each."""

    url: str
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


def chat(text: str | None) -> Reply:
    """A chat completion with this text."""
    content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, json.dumps(content), {}


def answers(question: str) -> tuple[str, str]:
    """The two answers in a question by our own template."""
    found = re.findall(r"\[answer [AB]\]\n(.*?)\n\[end of answer [AB]\]", question, re.DOTALL)
    first, second = found
    return first, second


@contextmanager
def judge_server(reply: Callable[[str, int], Reply | None]) -> Iterator[Served]:
    """Serves `reply(question, number of the request)`; None: the connection is just closed."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                headers = {name.lower(): value for name, value in self.headers.items()}
                served.requests.append((self.path, headers, body))
                number = len(served.requests)
            made = reply(body["messages"][0]["content"], number)
            if made is None:
                return
            status, text, headers = made
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # who does not want to wait hangs up
                for piece in [text] if isinstance(text, str) else text:
                    self.wfile.write(piece.encode())
                    self.wfile.flush()

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A server in vLLM's place: fastalign's gate and worker's methods on a model of transformers."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastalign.rollouts import SamplingParams, TransformersSampler
from fastalign.rollouts.engines.server_process import TOKEN_VARIABLE
from fastalign.rollouts.engines.worker import ServerGate, WorkerExtension, answer, read_body

TOKEN = "the-token-of-the-stand-in"


class Worker(WorkerExtension):
    """As much of vLLM's worker as the extension asks for."""

    lora_config, rank, device = None, 0, torch.device("cpu")
    parallel_config = SimpleNamespace(world_size=1)

    def __init__(self, config: Any):
        self.model_config = SimpleNamespace(hf_config=config)
        self.model = AutoModelForCausalLM.from_config(config).eval()

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, weights_iterator: Any) -> None:
        self.model.load_state_dict(dict(weights_iterator), strict=False)


class Engine:
    """As much of vLLM's engine as the gate and the routes ask for."""

    def __init__(self, worker: Any):
        self.worker = worker
        self.state = SimpleNamespace(engine_client=self)
        self.lock = threading.Lock()  # one request at a time has the model and the random numbers

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    async def reset_prefix_cache(self) -> bool:
        return True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/completions":
            await answer(send, 200, self.complete(json.loads(await read_body(receive))))
        else:
            await answer(send, 200, {"data": [{"id": "served", "max_model_len": 256}]})

    def complete(self, body: Any) -> Any:
        sampler = TransformersSampler(
            self.worker.model, eos_token_ids=body["stop_token_ids"], pad_token_id=0
        )
        params = SamplingParams(body["max_tokens"], *(body[n] for n in ("temperature", "top_p")))
        with self.lock:
            found = sampler.generate([body["prompt"]], params, seed=body["seed"])[0][0]
        choice = {"token_ids": found.token_ids, "finish_reason": found.finish_reason}
        choice |= {"logprobs": {"token_logprobs": found.logprobs}}
        return {"model": body["model"], "choices": [choice]}


@contextmanager
def stand_in_server(config: Any, worker: type[Worker] = Worker) -> Iterator[tuple[str, Any]]:
    """Gives the address of a server and its worker; its token is `TOKEN`."""
    engine = Engine(worker(config))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(TOKEN_VARIABLE, TOKEN)
        gate = ServerGate(engine)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = [(n.lower().encode(), v.encode()) for n, v in self.headers.items()]
            scope = {"type": "http", "method": self.command, "path": self.path, "app": engine}

            async def receive() -> Any:
                return {"body": body}

            async def send(message: Any) -> None:
                if "status" in message:
                    self.send_response(message["status"])
                    for name, value in message["headers"]:
                        self.send_header(name.decode(), value.decode())
                    self.end_headers()
                else:
                    self.wfile.write(message["body"])

            asyncio.run(gate(scope | {"headers": headers}, receive, send))

        do_POST = do_OPTIONS = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a trainer connects many times at once

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", engine.worker
        server.shutdown()

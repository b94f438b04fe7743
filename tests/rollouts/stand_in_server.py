"""A server in vLLM's place: fastalign's gate and worker's methods on a model of transformers."""

import asyncio
import copy
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fastalign.rollouts import SamplingParams, TransformersSampler
from fastalign.rollouts.engines.server_process import TOKEN_VARIABLE
from fastalign.rollouts.engines.worker import ServerGate, WorkerExtension, answer, read_body
from tests.rank_processes import CONTEXT, free_port

TOKEN = "the-token-of-the-stand-in"


class Worker(WorkerExtension):
    """As much of vLLM's worker as the extension asks for."""

    lora_config, rank, device = None, 0, torch.device("cpu")
    parallel_config = SimpleNamespace(world_size=1)

    def __init__(self, config: Any):
        self.model_config = SimpleNamespace(hf_config=config, dtype=torch.float32)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.adapted: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.dies_at: tuple[str, int] | None = None

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, weights_iterator: Any) -> None:
        tensors = []
        for pair in weights_iterator:
            tensors.append(pair)
            self.count("tensor")
        self.count("load")
        self.model.load_state_dict(dict(tensors), strict=False)

    def fastalign_adapted(self, folder: str, version: str) -> str:
        self.count("adapted")
        return super().fastalign_adapted(folder, version)

    def count(self, what: str) -> None:
        """End the process, as SIGKILL does, at the moment that it is to die."""
        self.counts[what] += 1
        if self.dies_at == (what, self.counts[what]):
            os.kill(os.getpid(), signal.SIGKILL)


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
        elif "lora_adapter" in scope["path"]:
            body = json.loads(await read_body(receive))
            if "lora_path" in body:
                base = copy.deepcopy(self.worker.model)
                adapted = PeftModel.from_pretrained(base, body["lora_path"]).eval()
                self.worker.adapted[body["lora_name"]] = adapted.get_base_model()
            else:
                del self.worker.adapted[body["lora_name"]]
            await answer(send, 200, {})
        else:
            await answer(send, 200, {"data": [{"id": "served", "max_model_len": 256}]})

    def complete(self, body: Any) -> Any:
        model = self.worker.adapted.get(body["model"], self.worker.model)
        sampler = TransformersSampler(model, eos_token_ids=body["stop_token_ids"], pad_token_id=0)
        params = SamplingParams(body["max_tokens"], *(body[n] for n in ("temperature", "top_p")))
        with self.lock:
            self.worker.count("completion")
            found = sampler.generate([body["prompt"]], params, seed=body["seed"])[0][0]
        choice = {"token_ids": found.token_ids, "finish_reason": found.finish_reason}
        choice |= {"logprobs": {"token_logprobs": found.logprobs}}
        return {"model": body["model"], "choices": [choice]}


@contextmanager
def stand_in_server(
    config: Any, worker: type[Worker] = Worker, port: int = 0
) -> Iterator[tuple[str, Any]]:
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

    with Server(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", engine.worker
        server.shutdown()


def _serve(config: Any, port: int, dies_at: tuple[str, int] | None, listens: Any) -> None:
    torch.set_num_threads(1)
    with stand_in_server(config, Worker, port) as (_, worker):
        worker.dies_at = dies_at
        listens.set()
        while True:
            time.sleep(3600)


class StandInProcess:
    """A stand-in in a process of its own, which can be killed and started again.

    `dies_at` is the moment at which it is killed by itself: its so manieth `load`, `tensor` (of a
    load) or `completion`.
    """

    def __init__(self, config: Any, dies_at: tuple[str, int] | None = None):
        self.config, self.port = config, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start(dies_at)

    def start(self, dies_at: tuple[str, int] | None = None, *, wait: bool = True) -> None:
        """Start it; unless it is to be waited for, it listens a moment later."""
        # The server that processes are forked from keeps the environment of its start.
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv(TOKEN_VARIABLE, raising=False)
            self.listens = CONTEXT.Event()  # kept: it is gone with its last reference here
            arguments = (self.config, self.port, dies_at, self.listens)
            self.process = CONTEXT.Process(target=_serve, args=arguments)
            self.process.start()
        assert not wait or self.listens.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

"""The parts of a vLLM server that are fastalign's: its workers' methods, and its gate.

`--worker-extension-cls` names the first, `--middleware` the second. The workers' methods are called
through the gate, on every worker, so all arguments and results are text.
"""

import hmac
import itertools
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastalign.rollouts.engines.broadcast import gpu_of, join_group, receive
from fastalign.rollouts.engines.server_process import TOKEN_VARIABLE, WEIGHTS_HEADER
from fastalign.rollouts.engines.weights import (
    NamedTensors,
    Tally,
    accepted_by,
    differing_tensors,
    read_tensors,
    tally_adapter,
    wide_names,
)

PREFIX = "fastalign_"  # of the workers' methods
LOADING = ("load", "receive", "adapted")  # after which the server has other weights
# Of vLLM's own routes, those that a trainer needs.
VLLM_ROUTES = {
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
}


class WorkerExtension:
    """Mixin of vLLM's worker, which has `reload_weights`, `get_model` and `model_config`."""

    _fastalign_version = _fastalign_base = ""
    _group: Any = None

    def fastalign_state(self) -> str:
        """Return as JSON: `version`, the name of the last sync, and the model's `config`."""
        worker: Any = self
        config = worker.model_config.hf_config.to_dict()
        return json.dumps({"version": self._fastalign_version, "config": config}, default=str)

    def fastalign_load(self, folder: str, version: str) -> str:
        """Take over the tensors in a folder; return as JSON their count and hash.

        A folder that this process does not see leaves the engine's weights as they are.
        """
        return self._take(read_tensors(Path(folder)), version)

    def fastalign_receive(self, description: str, version: str) -> str:
        """Take over the tensors that the trainer sends to its group; return as `load`."""
        try:
            return self._take(receive(self._group, description), version)
        except Exception:
            # gloo then tells the trainer, whose next tensor would wait for its time limit.
            self._group = None
            raise

    def _take(self, tensors: NamedTensors, version: str) -> str:
        worker: Any = self
        self._fastalign_version = self._fastalign_base = ""  # after an error it has none
        taken, iterator = Tally(), iter(tensors)
        first = next(iterator, None)
        if first is not None:
            self._forget_adapters()
            counted = taken.through(itertools.chain([first], iterator))
            worker.reload_weights(weights_iterator=accepted_by(worker.get_model(), counted))
            self._fastalign_version, self._fastalign_base = version, taken.digest
        return json.dumps(taken.answer())

    def _forget_adapters(self) -> None:
        """Remove the adapters that an earlier run left, and the weights in their slots.

        A CPU engine adds the last slot's product to tokens without an adapter while it decodes.
        """
        worker: Any = self
        if not worker.lora_config:
            return
        for number in worker.list_loras():
            worker.remove_lora(number)
        manager = worker.model_runner.lora_manager._adapter_manager
        for module in manager.modules.values():
            for slot in range(manager.lora_slots):
                module.reset_lora(slot)

    def fastalign_workers(self) -> str:
        """Return facts as JSON: the `number` of workers, and this one's `device` and `gpu`.

        Beside them stand the `dtype` of its weights and the names of those that are `wide`.
        """
        worker: Any = self
        facts = {
            "number": worker.parallel_config.world_size,
            "device": worker.device.type,
            "gpu": gpu_of(worker.device),
            "dtype": str(worker.model_config.dtype).removeprefix("torch."),
            "wide": wide_names(worker.get_model()),
        }
        return json.dumps(facts)

    def fastalign_join(
        self, host: str, port: str, size: str, device_type: str, seconds: str
    ) -> str:
        """Join the trainer's group."""
        worker: Any = self
        device = worker.device if device_type == "cuda" else torch.device("cpu")
        rank = 1 + worker.rank
        self._group = join_group(host, int(port), rank, int(size), device, float(seconds))
        return str(rank)

    def fastalign_adapted(self, folder: str, version: str) -> str:
        """Return as JSON the count and hash of an adapter that the server is about to be given.

        From now on the weights have this version; the hash is that of the base and the adapter.
        """
        read = tally_adapter(folder)
        self._fastalign_version = version if read.number else ""
        return json.dumps({**read.answer(), "digest": f"{self._fastalign_base}+{read.digest}"})

    def fastalign_differing(self, folder: str, tolerance: str) -> str:
        """Return as JSON what `differing_tensors` finds for the tensors in a folder."""
        worker: Any = self
        found = differing_tensors(
            worker.get_model(), read_tensors(Path(folder)), tolerance=float(tolerance)
        )
        return json.dumps(found)


METHODS = {name.removeprefix(PREFIX) for name in vars(WorkerExtension) if name.startswith(PREFIX)}
Message = dict[str, Any]


class ServerGate:
    """ASGI middleware: lets in who has the token, to the routes that a trainer needs.

    The token is in the environment (`FASTALIGN_VLLM_TOKEN`) and comes as a bearer token. Requests
    of web pages, which have an `Origin`, are refused, and so are bodies that do not say that they
    are JSON. `POST /fastalign/METHOD` calls a method of `WorkerExtension` on every worker; no other
    method of vLLM's workers can be called. Each completion's answer has the hash of the weights
    that it was drawn from as a header.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: Any):
        self._app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(
        self,
        scope: Message,
        receive_message: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer a request, or pass it on to vLLM."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive_message, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer(send, refusal[0], {"error": refusal[1]})
        elif (scope["method"], scope["path"]) in VLLM_ROUTES:
            await self._pass_on(scope, receive_message, send)
        else:
            body = await read_body(receive_message)
            await self._call(scope, body, send)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return status and reason if the request is refused."""
        headers = dict(scope["headers"])
        if b"origin" in headers:
            return 403, "requests of web pages are refused"
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            return 401, "expected the token of this server"
        method, path = scope["method"], scope["path"]
        own = method == "POST" and path.removeprefix("/fastalign/") in METHODS
        if not own and (method, path) not in VLLM_ROUTES:
            return 404, f"no route {method} {path}"
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            return 415, "expected application/json"
        return None

    async def _pass_on(self, scope: Message, receive_message: Any, send: Any) -> None:
        state = scope["app"].state
        before = getattr(state, "fastalign_weights", "")

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                same = getattr(state, "fastalign_weights", "") == before
                label = (WEIGHTS_HEADER.encode(), (before if same else "").encode())
                message = {**message, "headers": [*message.get("headers", ()), label]}
            await send(message)

        await self._app(scope, receive_message, labelled)

    async def _call(self, scope: Message, body: bytes, send: Any) -> None:
        method, state = scope["path"].removeprefix("/fastalign/"), scope["app"].state
        try:
            arguments = json.loads(body)["arguments"]
            known = all(isinstance(argument, str) for argument in arguments)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            await answer(send, 400, {"error": "expected a list of texts as arguments"})
            return
        if method in LOADING:
            state.fastalign_weights = ""
        try:
            results = await call_workers(state.engine_client, method, arguments)
        except Exception as error:  # the engine's, whatever it is: it is the caller's to know
            await answer(send, 500, {"error": f"{type(error).__name__}: {error}"})
            return
        if method in LOADING and len(set(results)) == 1:
            state.fastalign_weights = json.loads(results[0])["digest"]
        await answer(send, 200, {"results": results})


async def call_workers(engine: Any, method: str, arguments: Sequence[str]) -> list[str]:
    """Call a method on every worker; after other weights, empty the cache of prefixes.

    Raises:
        RuntimeError: if that cannot be emptied; it holds keys and values of the old weights.
    """
    results = await engine.collective_rpc(PREFIX + method, args=tuple(arguments))
    if method in ("load", "receive") and not await engine.reset_prefix_cache():
        raise RuntimeError("the cache of prefixes could not be emptied")
    return [str(result) for result in results]


async def read_body(receive_message: Callable[[], Awaitable[Message]]) -> bytes:
    """Read the body of a request."""
    body, more = b"", True
    while more:
        message = await receive_message()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def answer(send: Callable[[Message], Awaitable[None]], status: int, content: Any) -> None:
    """Answer a request with JSON."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

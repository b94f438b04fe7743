"""vLLM behind HTTP: servers that `fastalign vllm-server` started, or one that the run starts."""

import asyncio
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastalign.rollouts.engines.broadcast import Broadcaster, Description
from fastalign.rollouts.engines.connection import (
    LOOK_SECONDS,
    ServerConnection,
    wait_for_any,
)
from fastalign.rollouts.engines.server_process import OwnServer
from fastalign.rollouts.engines.spec import EngineSpec, read_completion, request_fields
from fastalign.rollouts.engines.weights import (
    EngineDtypes,
    NamedTensors,
    Tally,
    fit_tensors,
    sync_folder,
    tally_adapter,
    tolerance_of,
    write_tensors,
)
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, sample_seed

T = TypeVar("T")


class Server:
    """One server in use: its connection, the model that it serves, its group for weights.

    Raises:
        ValueError: if `fastalign vllm-server` did not start it, or it has another model.
        SamplerFailed: if it is gone.
    """

    def __init__(self, connection: ServerConnection, spec: EngineSpec):
        self.connection, self._options = connection, spec.options
        self._broadcaster: Broadcaster | None = None
        theirs, ours = json.loads(connection.call("state"))["config"], spec.config.to_dict()
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"vllm.url: {self.name} has another model: expected "
                    f"{name} {ours.get(name)}, got {theirs.get(name)}"
                )
        model = connection.get("/v1/models")["data"][0]
        self.model, self.max_length = str(model["id"]), int(model["max_model_len"])
        self._workers = [json.loads(answer) for answer in connection.call_all("workers")]
        first = self._workers[0]
        self.dtypes = EngineDtypes(getattr(torch, first["dtype"]), frozenset(first["wide"]))

    @property
    def name(self) -> str:
        """Name of the server in messages."""
        return self.connection.name

    def load(self, folder: str, name: str, sent: dict[str, Any]) -> None:
        """Have the server take over the tensors in a folder, under a name.

        Raises:
            ValueError: if it read other tensors than were `sent`: it sees another folder.
        """
        self._check_read(self.connection.call_all("load", folder, name), sent, folder)

    def adapt(self, folder: str, name: str, last: str | None, sent: dict[str, Any]) -> None:
        """Have the server take over an adapter, under a name, in place of the `last`.

        Raises:
            ValueError: as `load`.
        """
        self._check_read(self.connection.call_all("adapted", folder, name), sent, folder)
        self.connection.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        if last is not None:
            self.connection.post("/v1/unload_lora_adapter", {"lora_name": last})

    def join_group(self, host: str | None, device: torch.device) -> None:
        """Join a group of the server's workers for tensors of a device, unless it is joined."""
        if self._broadcaster is None:
            self._broadcaster = Broadcaster(
                *(self.connection, self._workers, host, device, self._options.silence_seconds)
            )

    def begin_to_receive(self, tensors: Sequence[Description], name: str) -> None:
        """Have the server's workers wait for these tensors, which `send` sends one by one."""
        assert self._broadcaster is not None
        self._broadcaster.begin(tensors, name)

    def send(self, tensor: Tensor) -> None:
        """Send the next tensor over the network."""
        assert self._broadcaster is not None
        self._broadcaster.send(tensor)

    def end_receiving(self, sent: dict[str, Any]) -> None:
        """Check that every worker received what was `sent`.

        Raises:
            SamplerFailed: if one did not.
        """
        assert self._broadcaster is not None
        for answer in self._broadcaster.end():
            if json.loads(answer) != sent:
                raise SamplerFailed(
                    f"sampler: a worker of {self.name} took other weights than were "
                    f"sent: expected {sent}, got {answer}"
                )

    def check_weights(self, name: str) -> None:
        """Check that the server has the weights of this name.

        Raises:
            SamplerFailed: if it has not.
        """
        self._check_state(self.connection.call("state"), name)

    async def draw(
        self, bodies: Sequence[Any], name: str, on_progress: Callable[[int], None] | None
    ) -> list[tuple[Any, str]]:
        """Return `post_all` of completions that are drawn from the weights of this name."""
        async with self.connection.session() as session:
            self._check_state(await self.connection.ask(session, "state"), name)
            answers = await self.connection.post_all(
                session, "/v1/completions", bodies, on_progress
            )
            self._check_state(await self.connection.ask(session, "state"), name)
        return answers

    def lose(self) -> NoReturn:
        """Raise the error for a server whose weights are not the trainer's."""
        raise SamplerFailed(f"sampler: {self.name} was started again, or is used by another run")

    def leave_group(self) -> None:
        """Leave the group that weights are sent to."""
        if self._broadcaster is not None:
            self._broadcaster.close()
            self._broadcaster = None

    def close(self) -> None:
        """Close the connections."""
        self.leave_group()
        self.connection.close()

    def _check_state(self, state: str, name: str) -> None:
        if json.loads(state)["version"] != name:
            self.lose()

    def _check_read(self, answers: Sequence[str], sent: dict[str, Any], folder: str) -> None:
        for answer in map(json.loads, answers):
            if answer != sent:
                raise ValueError(
                    f"vllm.sync_folder: {self.name} read {answer['number']} tensors or "
                    f"files in {folder} (hash {answer['digest'] or 'none'}), expected the "
                    f"{sent['number']} written there ({sent['digest']}): it sees another folder; "
                    "name one that both see (--vllm.sync-folder), or use --vllm.transport network"
                )


class VllmServerSampler:
    """Sampler whose engine is one or several servers; `sync_weights` gives them the policy's.

    The servers are those at `options.url`, or, without a URL, one that this sampler starts and
    ends. Every sync has a name of its own, which a server is asked for before and after each
    call: one that was started again, or that another trainer uses, has failed. It answers a sync
    with the count and hash of what it read, and each completion carries that hash; both must be
    those of what was sent.

    Several servers share the prompts. One that fails is left out, which is printed, and the others
    repeat its work: a completion depends on its seed, not on who draws it. A server that answers
    again gets the weights at the next `sync_weights`. When the last one fails, its `SamplerFailed`
    is raised.

    Args:
        spec: model, whose sizes the servers' must have, and settings.
        on_progress: called with the number of completions that are done; with a negative one when
            those of a failed server are drawn again.

    Raises:
        ValueError: if `fastalign vllm-server` did not start a server, or it has another model.
        SamplerFailed: if a server is not there in time.
    """

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None] | None = None):
        self._spec, self._options, self._on_progress = spec, spec.options, on_progress
        self._trainer, self._num_syncs = uuid.uuid4().hex[:12], 0
        self._name = ""  # of the weights that the servers should have
        self._base_digest = self._digest = ""  # hashes of what was sent
        self._adapter: str | None = None
        self._own = None if self._options.url else OwnServer(spec)
        self._servers: list[Server] = []  # in use
        self._absent: list[str] = []  # URLs of those that are left out
        self._num_lost = 0
        self.version: int | None = None
        self._connect(all_of_them=True)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw completions; see `VllmSampler.generate`."""
        self._spec.check(prompt_ids, params)
        if self.version is None:
            raise SamplerFailed("sampler: the server has no weights; sync_weights comes first")
        rows = [(p, s) for p in range(len(prompt_ids)) for s in range(params.num_samples)]
        fields = {
            (p, s): {
                "prompt": list(prompt_ids[p]),
                **request_fields(params, self._spec.eos_token_ids, sample_seed(seed, p, s)),
                "logprobs": 0,
                "return_token_ids": True,
            }
            for p, s in rows
        }
        found: dict[tuple[int, int], Completion] = {}
        while missing := [row for row in rows if row not in found]:
            servers = self.servers
            shares = in_shares(missing, len(servers))
            bodies = [[fields[row] for row in share] for share in shares]
            outcomes = asyncio.run(self._draw(servers, bodies, params))
            self._leave_out_failed(servers, outcomes)
            for share, outcome in zip(shares, outcomes, strict=True):
                if not isinstance(outcome, SamplerFailed):
                    found |= zip(share, outcome, strict=True)
        return [[found[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over weights, in parts or one by one; see `VllmSampler.sync_weights`."""
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self._take_in_found()
        self.version, self._adapter = None, None
        self._name, sent = self._next_name(version), Tally()
        if self._options.transport == "network":
            self._broadcast(tensors, sent)
        else:
            counted = sent.through(self._dtypes.gathered(tensors.items()))
            with self._written(counted) as folder:
                answer = sent.answer()
                self._all_do(lambda server: server.load(folder, self._name, answer))
        self._base_digest = self._digest = sent.digest
        self.version = version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """Take over an adapter from a folder that the servers can read."""
        if self.version is None and self._adapter is None and not self._name:
            raise SamplerFailed("sampler: the server has no weights; sync_weights comes first")
        self._all_do(lambda server: server.check_weights(self._name))
        last, self.version = self._adapter, None
        name, sent = self._next_name(version), tally_adapter(folder).answer()
        sent["digest"] = f"{self._base_digest}+{sent['digest']}"
        self._all_do(lambda server: server.adapt(str(folder), name, last, sent))
        self._adapter, self._name, self.version = name, name, version
        self._digest = sent["digest"]

    def needs_weights(self) -> bool:
        """Return True if `sync_weights` must come before the next `sync_adapter`."""
        return self.version is None or bool(self._take_in_found())

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Return the names a server does not compute with, and how many could be compared."""
        with self._written(named_tensors) as folder:
            tolerance = str(tolerance_of(self._spec.dtype))
            found = [
                json.loads(answer)
                for answer in self._all_do(
                    lambda server: server.connection.call("differing", folder, tolerance)
                )
            ]
        names = list(dict.fromkeys(name for of_server, _ in found for name in of_server))
        return names, min(num_compared for _, num_compared in found)

    def metrics(self) -> dict[str, float | int]:
        """Return, of several servers, how many are in use and were lost since the last call."""
        if len(self._options.url or ()) < 2:
            return {}
        lost, self._num_lost = self._num_lost, 0
        return {"sampling/num_servers": len(self._servers), "sampling/num_lost_servers": lost}

    def sleep(self) -> None:
        """Do nothing: a server keeps its memory."""

    def rebuild(self) -> None:
        """Start the run's own server again, or wait for one at a URL; it has no weights."""
        if self._own is not None and (error := self._own.last_error()):
            print(f"{self._own.name}: the last error in its log: {error}", flush=True)
        self.close()
        self._connect(all_of_them=False)

    def close(self) -> None:
        """Close the connections, and end the run's own server; others stay."""
        self.version, self._adapter, self._name = None, None, ""
        for server in self._servers:
            server.close()
        self._servers = []
        if self._own is not None:
            self._own.close()

    @property
    def servers(self) -> list[Server]:
        """The servers in use."""
        if not self._servers:
            raise SamplerFailed("sampler: the engine is closed")
        return self._servers

    @property
    def process_id(self) -> int:
        """Id of the process that supervises the run's own server."""
        assert self._own is not None
        return self._own.process_id

    def _connect(self, *, all_of_them: bool) -> None:
        """Wait for the servers, or, to go on after a failure, for one of them."""
        if self._own is not None:
            self._own.start()
        places = [self._own] if self._own is not None else list(self._options.url or ())
        connections = [self._connection(place) for place in places]
        seconds = self._options.start_seconds
        there: list[ServerConnection] = []
        try:
            for some in [[one] for one in connections] if all_of_them else [connections]:
                there += wait_for_any(some, seconds)
            for connection in there:
                try:
                    self._take_in(connection)
                except SamplerFailed:
                    if all_of_them or (connection is there[-1] and not self._servers):
                        raise
        except BaseException:
            self.close()
            raise
        finally:
            in_use = [server.connection for server in self._servers]
            for connection in connections:
                if connection not in in_use:
                    connection.close()
        self._absent = [one.url for one in connections if one not in in_use]

    def _connection(
        self, place: str | OwnServer, silence_seconds: float | None = None
    ) -> ServerConnection:
        return ServerConnection(
            place,
            silence_seconds=silence_seconds or self._options.silence_seconds,
            max_connections=self._options.max_sequences,
            token_file=self._options.token_file,
        )

    def _take_in(self, connection: ServerConnection) -> None:
        """Use a server that answers."""
        try:
            server = Server(connection, self._spec)
        except BaseException:
            connection.close()
            raise
        self._servers.append(server)
        if server.max_length < self._spec.limit:
            self._spec = replace(self._spec, max_length=server.max_length)

    def _take_in_found(self) -> list[str]:
        """Use the servers again that were left out and answer; return their URLs.

        One with another token or model is not asked for again.
        """
        found = []
        for url in list(self._absent):
            try:
                if not self._answers(url):
                    continue
                connection = self._connection(url)
                self._take_in(connection)
                print(f"sampler: {connection.name} is used again", flush=True)
                found.append(url)
            except SamplerFailed:  # it has just gone again
                continue
            except ValueError as error:
                print(f"{error}; it stays left out", flush=True)
            self._absent.remove(url)
        return found

    def _answers(self, url: str) -> bool:
        """Return True if a server and its engine answer at once."""
        connection = self._connection(url, LOOK_SECONDS)
        try:
            if connection.fault(LOOK_SECONDS) is None:
                connection.call("state")
                return True
        except SamplerFailed:
            pass
        finally:
            connection.close()
        return False

    def _all_do(self, work: Callable[[Server], T]) -> list[T]:
        """Do something at all servers at once, leave out those that fail; return the results."""
        servers = self.servers

        def attempt(server: Server) -> T | SamplerFailed:
            try:
                return work(server)
            except SamplerFailed as failure:
                return failure

        if len(servers) == 1:
            outcomes = [attempt(servers[0])]
        else:
            with ThreadPoolExecutor(len(servers), thread_name_prefix="servers") as threads:
                outcomes = list(threads.map(attempt, servers))
        self._leave_out_failed(servers, outcomes)
        return [outcome for outcome in outcomes if not isinstance(outcome, SamplerFailed)]

    def _leave_out_failed(
        self, servers: Sequence[Server], outcomes: Sequence[object | SamplerFailed]
    ) -> None:
        """Go on without the servers whose outcome is a failure, and say so.

        Raises:
            SamplerFailed: if no other is left.
        """
        failed = {
            server: outcome
            for server, outcome in zip(servers, outcomes, strict=True)
            if isinstance(outcome, SamplerFailed)
        }
        for server in failed:
            server.leave_group()
        left = [server for server in servers if server not in failed]
        self._num_lost += len(failed)
        if not left:
            self.version = None
            raise next(iter(failed.values()))
        for server, failure in failed.items():
            print(
                f"{failure}; it is left out and its work repeated by the others ({len(left)} of "
                f"{len(self._options.url or ())} servers are left)",
                flush=True,
            )
            server.close()
            self._absent.append(server.connection.url)
        self._servers = left

    async def _draw(
        self, servers: Sequence[Server], bodies: Sequence[Sequence[Any]], params: SamplingParams
    ) -> list[list[Completion] | SamplerFailed]:
        """Draw each server's share of the completions, at once; a server may fail."""

        async def draw(server: Server, share: Sequence[Any]) -> list[Completion] | SamplerFailed:
            num_done = 0

            def count(number: int) -> None:
                nonlocal num_done
                num_done += number
                if self._on_progress is not None:
                    self._on_progress(number)

            model = self._adapter or server.model
            asked = [{"model": model, **fields} for fields in share]
            try:
                answers = await server.draw(asked, self._name, count)
                return [self._completion(server, *answer, params) for answer in answers]
            except SamplerFailed as failure:
                count(-num_done)
                return failure

        return await asyncio.gather(*map(draw, servers, bodies))

    @contextmanager
    def _written(self, tensors: NamedTensors) -> Iterator[str]:
        """Write tensors into a folder that the servers can read, and remove it afterwards."""
        num_bytes = 4 * sum(math.prod(shape) for shape in self._spec.shapes.values())
        with sync_folder(self._options.sync_folder, num_bytes) as folder:
            write_tensors(tensors, Path(folder))
            yield folder

    def _broadcast(self, tensors: dict[str, Tensor], sent: Tally) -> None:
        """Send the tensors, each gathered once, to the workers of all servers."""
        host = self._options.trainer_host or ("127.0.0.1" if self._own else None)
        device = next(iter(tensors.values())).device
        self._all_do(lambda server: server.join_group(host, device))
        dtypes = self._dtypes
        described: list[Description] = [
            (name, str(dtypes.of(name, tensor)).removeprefix("torch."), list(tensor.shape))
            for name, tensor in tensors.items()
        ]
        self._all_do(lambda server: server.begin_to_receive(described, self._name))
        for _, tensor in sent.through(dtypes.gathered(tensors.items())):
            self._all_do(partial(Server.send, tensor=tensor))
        self._all_do(lambda server: server.end_receiving(sent.answer()))

    @property
    def _dtypes(self) -> EngineDtypes:
        """Dtypes that suit every server in use."""
        return reduce(EngineDtypes.of_all, [server.dtypes for server in self.servers])

    def _next_name(self, version: int) -> str:
        self._num_syncs += 1
        return f"{self._trainer}-{self._num_syncs}-{version}"

    def _completion(
        self, server: Server, answer: Any, weights: str, params: SamplingParams
    ) -> Completion:
        if weights != self._digest or answer["model"] != (self._adapter or server.model):
            server.lose()
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert self.version is not None
        return read_completion(
            *(choice["token_ids"], logprobs, choice["finish_reason"]),
            params,
            self.version,
            weights,
        )


def in_shares(rows: Sequence[T], number: int) -> list[Sequence[T]]:
    """Cut rows into so many runs of neighbours, whose lengths differ by at most 1.

    Neighbours are samples of one prompt, whose keys and values a server computes once.
    """
    edges = [len(rows) * n // number for n in range(number + 1)]
    return [rows[edges[n] : edges[n + 1]] for n in range(number)]

"""vLLM behind HTTP: a server that `fastalign vllm-server` started, or one that the run starts."""

import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines.broadcast import Broadcaster
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.server_process import OwnServer
from fastalign.rollouts.engines.spec import EngineSpec, read_completion, request_fields
from fastalign.rollouts.engines.weights import (
    NamedTensors,
    Tally,
    fit_tensors,
    sync_folder,
    tally_adapter,
    tolerance_of,
    write_tensors,
)
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, sample_seed


class VllmServerSampler:
    """Sampler whose engine is a server; `sync_weights` makes its weights the policy's.

    The server is the one at `options.url`, or, without a URL, one that this sampler starts and
    ends. Every sync has a name of its own, which the server is asked for before and after each
    call: one that was started again, or that another trainer uses, raises `SamplerFailed`. It
    answers a sync with the count and hash of what it read, and each completion carries that hash;
    both must be those of what was sent.

    Args:
        spec: model, whose sizes the server's must have, and settings.
        on_progress: called with the number of completions that are done.

    Raises:
        ValueError: if `fastalign vllm-server` did not start the server, or it has another model.
        SamplerFailed: if there is no server in time.
    """

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None] | None = None):
        self._spec, self._options, self._on_progress = spec, spec.options, on_progress
        self._trainer, self._num_syncs = uuid.uuid4().hex[:12], 0
        self._name = ""  # of the weights that the server should have
        self._base_digest = self._digest = ""  # hashes of what was sent
        self._adapter: str | None = None
        self._broadcaster: Broadcaster | None = None
        self._own = OwnServer(spec) if self._options.url is None else None
        self._server: ServerConnection | None = None
        self._model = ""
        self.version: int | None = None
        self._connect()

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw completions; see `VllmSampler.generate`."""
        self._spec.check(prompt_ids, params)
        if self.version is None:
            raise SamplerFailed("sampler: the server has no weights; sync_weights comes first")
        self._check_weights()
        rows = [(p, s) for p in range(len(prompt_ids)) for s in range(params.num_samples)]
        bodies = [
            {
                "model": self._adapter or self._model,
                "prompt": list(prompt_ids[p]),
                **request_fields(params, self._spec.eos_token_ids, sample_seed(seed, p, s)),
                "logprobs": 0,
                "return_token_ids": True,
            }
            for p, s in rows
        ]
        answers = self.server.post_all("/v1/completions", bodies, self._on_progress)
        self._check_weights()
        completions = (self._completion(answer, weights, params) for answer, weights in answers)
        found = dict(zip(rows, completions, strict=True))
        return [[found[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over weights, in parts or one by one; see `VllmSampler.sync_weights`."""
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self.version, self._adapter = None, None
        self._name, sent = self._next_name(version), Tally()
        if self._options.transport == "network":
            for answer in self._broadcast(tensors, sent):
                if json.loads(answer) != sent.answer():
                    raise SamplerFailed(
                        f"sampler: a worker of {self.server.name} took other weights than were "
                        f"sent: expected {sent.answer()}, got {answer}"
                    )
        else:
            counted = sent.through((name, whole(tensor)) for name, tensor in tensors.items())
            with self._written(counted) as folder:
                answers = self.server.call_all("load", folder, self._name)
                self._check_read(answers, sent.answer(), folder)
        self._base_digest = self._digest = sent.digest
        self.version = version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """Take over an adapter from a folder that the server can read."""
        if self.version is None and self._adapter is None and not self._name:
            raise SamplerFailed("sampler: the server has no weights; sync_weights comes first")
        self._check_weights()
        last, self.version = self._adapter, None
        name, sent = self._next_name(version), tally_adapter(folder).answer()
        sent["digest"] = f"{self._base_digest}+{sent['digest']}"
        answers = self.server.call_all("adapted", str(folder), name)
        self._check_read(answers, sent, str(folder))
        self.server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if last is not None:
            self.server.post("/v1/unload_lora_adapter", {"lora_name": last})
        self._adapter, self._name, self.version = name, name, version
        self._digest = sent["digest"]

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Return the names the server does not compute with, and how many could be compared."""
        with self._written(named_tensors) as folder:
            tolerance = str(tolerance_of(self._spec.dtype))
            found = self.server.call("differing", folder, tolerance)
        names, num_compared = json.loads(found)
        return names, num_compared

    def sleep(self) -> None:
        """Do nothing: a server keeps its memory."""

    def rebuild(self) -> None:
        """Start the run's own server again, or wait for the one at the URL; it has no weights."""
        if self._own is not None and (error := self._own.last_error()):
            print(f"{self._own.name}: the last error in its log: {error}", flush=True)
        self.close()
        self._connect()

    def close(self) -> None:
        """Close the connections, and end the run's own server; another one stays."""
        self.version, self._adapter, self._name = None, None, ""
        self._leave_group()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._own is not None:
            self._own.close()

    @property
    def server(self) -> ServerConnection:
        """The connection to the server."""
        if self._server is None:
            raise SamplerFailed("sampler: the engine is closed")
        return self._server

    @property
    def process_id(self) -> int:
        """Id of the process that supervises the run's own server."""
        assert self._own is not None
        return self._own.process_id

    def _connect(self) -> None:
        options = self._options
        if self._own is not None:
            self._own.start()
        self._server = ServerConnection(
            self._own or str(options.url),
            silence_seconds=options.silence_seconds,
            max_connections=options.max_sequences,
            token_file=options.token_file,
        )
        try:
            self._server.wait(options.start_seconds)
            self._check_model()
            model = self._server.get("/v1/models")["data"][0]
        except BaseException:
            self.close()
            raise
        self._model = model["id"]
        if model["max_model_len"] < self._spec.limit:
            self._spec = replace(self._spec, max_length=model["max_model_len"])

    @contextmanager
    def _written(self, tensors: NamedTensors) -> Iterator[str]:
        """Write tensors into a folder that the server can read, and remove it afterwards."""
        num_bytes = 4 * sum(math.prod(shape) for shape in self._spec.shapes.values())
        with sync_folder(self._options.sync_folder, num_bytes) as folder:
            write_tensors(tensors, Path(folder))
            yield folder

    def _check_read(self, answers: Sequence[str], sent: dict[str, Any], folder: str) -> None:
        """Check that every worker read what was written.

        Raises:
            ValueError: if one read nothing, or something else: it sees another folder.
        """
        for answer in map(json.loads, answers):
            if answer != sent:
                raise ValueError(
                    f"vllm.sync_folder: {self.server.name} read {answer['number']} tensors or "
                    f"files in {folder} (hash {answer['digest'] or 'none'}), expected the "
                    f"{sent['number']} written there ({sent['digest']}): it sees another folder; "
                    "name one that both see (--vllm.sync-folder), or use --vllm.transport network"
                )

    def _broadcast(self, tensors: dict[str, Tensor], sent: Tally) -> list[str]:
        if self._broadcaster is None:
            host = self._options.trainer_host or ("127.0.0.1" if self._own else None)
            seconds = self._options.silence_seconds
            device = next(iter(tensors.values())).device
            self._broadcaster = Broadcaster(self.server, host, device, seconds)
        try:
            return self._broadcaster.send(tensors, self._name, sent)
        except SamplerFailed:
            self._leave_group()
            raise

    def _leave_group(self) -> None:
        if self._broadcaster is not None:
            self._broadcaster.close()
            self._broadcaster = None

    def _next_name(self, version: int) -> str:
        self._num_syncs += 1
        return f"{self._trainer}-{self._num_syncs}-{version}"

    def _check_model(self) -> None:
        theirs, ours = (
            json.loads(self.server.call("state"))["config"],
            self._spec.config.to_dict(),
        )
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"vllm.url: {self.server.name} has another model: expected "
                    f"{name} {ours.get(name)}, got {theirs.get(name)}"
                )

    def _check_weights(self) -> None:
        found = json.loads(self.server.call("state"))["version"]
        if found != self._name:
            self._lose()

    def _lose(self) -> NoReturn:
        self.version = None
        raise SamplerFailed(
            f"sampler: {self.server.name} was started again, or is used by another run"
        )

    def _completion(self, answer: Any, weights: str, params: SamplingParams) -> Completion:
        if weights != self._digest or answer["model"] != (self._adapter or self._model):
            self._lose()
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert self.version is not None
        return read_completion(
            *(choice["token_ids"], logprobs, choice["finish_reason"]),
            params,
            self.version,
            weights,
        )

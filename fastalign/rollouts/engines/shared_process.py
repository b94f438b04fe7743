"""An engine in the trainer's process: what it must not change, and what it is given instead."""

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastalign.rollouts.sampler import SamplerFailed

Output = tuple[list[int], list[float], str | None]


class OwnRandomNumbers:
    """The global generators' states as an engine has them, which the trainer's never meet."""

    def __init__(self) -> None:
        self._cpu: Any = None
        self._cuda: dict[int, Any] = {}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The engine seeds the global generators and draws from them: here from its own states.

        On a CPU its one compiled helper is run as it is: compiling takes longer than sampling.
        """
        mine = random.getstate(), np.random.get_state()
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
                random.setstate(mine[0])
                np.random.set_state(mine[1])


@contextmanager
def settings_of_vllm() -> Iterator[None]:
    """The environment that an engine in this process needs; what it changes is put back."""
    num_threads, world = torch.set_num_threads, os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what vLLM itself imports
            yield
    finally:
        torch.set_num_threads = num_threads
        if world is not None:
            os.environ["LOCAL_WORLD_SIZE"] = world


@contextmanager
def process_group_kept() -> Iterator[None]:
    """VLLM ends every process group when an engine is closed, the trainer's among them."""
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
    """Token ids, log-probs and finish reason of each request, given as prompt and parameters.

    Raises:
        SamplerFailed: the engine lost some of them.
    """
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params, lora_request=adapter)
    outputs: dict[str, Output] = {}
    told = time.monotonic()
    while engine.has_unfinished_requests():
        done = {found.request_id: read_output(found.outputs[0]) for found in engine.step()}
        outputs |= done
        if on_progress is not None and (done or time.monotonic() > told + 1):
            on_progress(len(done))
            told = time.monotonic()
    if outputs.keys() != requests.keys():
        lost = len(requests) - len(outputs)
        raise SamplerFailed(f"sampler: {lost} of {len(requests)} requests got no answer")
    return outputs


def read_output(output: Any) -> Output:
    """What vLLM says of one completion, each log-prob that of the token that was drawn."""
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
    return ids, logprobs, output.finish_reason

"""A process of its own for each sampler, so that all are open at once and take turns.

Engines of one process could not be: to close one breaks the other.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import resident_bytes
from benchmarks.rollout_cases import disturb
from benchmarks.rollout_samplers import Contestant, Opener, Prompts, RolloutJob
from fastalign.rollouts import SamplingParams, policy_tensors

# Of the check: the likeliest tokens of a few prompts, by each sampler.
CHECKED = {"num_prompts": 4, "new_tokens": 8}
# How far the policy's logit of a token is below its largest, as a share of the largest's height
# over the median, on average: 1 of any other token.
LARGEST_LOSS = {"float32": 1e-3, "bfloat16": 0.05}


class WrongAnswers(Exception):
    """A sampler that does not sample from the policy, or makes too few tokens."""


def check_answers(model: Any, prompts: Prompts, answers: Sequence[list[int]], dtype: str) -> None:
    """Refuses answers, drawn at temperature 0, that are not the policy's likeliest tokens."""
    losses = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        largest = logits.amax(-1)
        losses.append(((largest - chosen) / (largest - logits.median(-1).values)).mean())
    loss = torch.stack(losses).mean().item()
    if not loss <= LARGEST_LOSS[dtype]:
        raise WrongAnswers(f"its likeliest tokens are not the policy's (logits {loss:.0%} lower)")


class SamplerFault(Exception):
    """Why a sampler is not, or no longer, timed.

    Attributes:
        is_wrong: it samples, but not what it should.
    """

    def __init__(self, reason: str, is_wrong: bool = False):
        super().__init__(reason, is_wrong)
        self.is_wrong = is_wrong

    def __str__(self) -> str:
        return str(self.args[0])


class Turns:
    """The answers of a worker to requests, with a sampler that is open."""

    def __init__(self, job: RolloutJob, model: Any, contestant: Contestant):
        self._job, self._model, self._contestant = job, model, contestant
        self._prompts = job.case.prompts()
        self._num_turns = self._version = 0

    def begin(self) -> int | None:
        """Sync, check and warm up; return the bytes of a sync."""
        num_bytes = None
        if self._contestant.sync is not None:
            self._contestant.sync(self._version)
            num_bytes = sum(t.numel() * t.element_size() for _, t in policy_tensors(self._model))
        self.check()
        self.generate()
        for process in self._processes():
            process.joinpath("clear_refs").write_text("5", encoding="ascii")
        if self._job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return num_bytes

    def check(self) -> None:
        """Check that it samples from the policy's present weights."""
        prompts = self._prompts[: CHECKED["num_prompts"]]
        length = min(CHECKED["new_tokens"], self._job.case.new_tokens)
        params = SamplingParams(max_new_tokens=length, temperature=0.0)
        answers = self._contestant.generate(prompts, params, 0)
        check_answers(self._model, prompts, answers, self._job.dtype)

    def generate(self) -> float:
        """Seconds of one call that answers all prompts."""
        params = SamplingParams(max_new_tokens=self._job.case.new_tokens)
        self._num_turns += 1
        start = self._now()
        answers = self._contestant.generate(self._prompts, params, self._num_turns)
        seconds = self._now() - start
        lengths = {len(answer) for answer in answers}
        if lengths != {params.max_new_tokens} or len(answers) != len(self._prompts):
            raise WrongAnswers(
                f"it made {len(answers)} answers of {sorted(lengths)} tokens, expected "
                f"{len(self._prompts)} of {params.max_new_tokens}"
            )
        return seconds

    def sync(self) -> float:
        """Seconds until it has new weights of the policy."""
        assert self._contestant.sync is not None
        self._version += 1
        disturb(self._model.parameters(), self._version)
        start = self._now()
        self._contestant.sync(self._version)
        return self._now() - start

    def peak(self) -> int | None:
        """Most memory since `begin`, of all its processes, or of the GPU if there is one only."""
        if self._job.device == "cuda":
            alone = not self._contestant.processes
            return int(torch.cuda.max_memory_allocated()) if alone else None
        found = [resident_bytes("VmHWM", process) for process in self._processes()]
        return sum(found) if found else None

    def _now(self) -> float:
        if self._job.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _processes(self) -> list[Path]:
        own = ("self", *map(str, self._contestant.processes))
        folders = [Path("/proc") / process for process in own]
        return [folder for folder in folders if (folder / "clear_refs").exists()]


def serve(opener: Opener, job: RolloutJob, connection: Connection) -> None:
    """Answer requests until there are none; output goes to a file."""
    log = os.open(job.scratch / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(job.num_threads)
    contestant = None
    try:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, job.dtype)
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype)
        model = model.to(job.device).eval()
        contestant = opener(job, model)
        turns = Turns(job, model, contestant)
        connection.send((turns.begin(), None))
        while (asked := connection.recv()) is not None:
            connection.send((getattr(turns, asked)(), None))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        wrong = isinstance(error, WrongAnswers)
        fault = SamplerFault(first if wrong else f"{type(error).__name__}: {first}", wrong)
        connection.send((None, fault))
    finally:
        if contestant is not None:
            contestant.close()
        connection.close()


@contextmanager
def _one_setting_of_threads(num_threads: int) -> Iterator[None]:
    """Set the number of threads that a process started here, and its children, read at start."""
    number = str(num_threads)
    wanted = {
        "OMP_NUM_THREADS": number,
        "OMP_WAIT_POLICY": "PASSIVE",  # a sampler that waits for its turn must not spin
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS, in place of all cores
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class SamplerWorker:
    """A sampler in its process, open and checked.

    Attributes:
        num_bytes: of the weights that a sync hands over; None: it has none.

    Raises:
        SamplerFault: it does not open, or does not sample from the policy.
    """

    def __init__(self, opener: Opener, job: RolloutJob):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(opener, job, theirs))
        with _one_setting_of_threads(job.num_threads):
            self._process.start()
        theirs.close()
        self.num_bytes: int | None = self._answer()

    def turn(self, what: str) -> Any:
        """`generate` or `sync`: seconds; `peak`: bytes; `check`: nothing, or a fault."""
        self._connection.send(what)
        return self._answer()

    def stop(self) -> None:
        """Close the sampler and end the process."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join()
        self._connection.close()

    def _answer(self) -> Any:
        try:
            answer, fault = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            answer, fault = None, SamplerFault(f"its process ended with exit code {code}")
        if fault is not None:
            self._process.join()
            raise fault
        return answer

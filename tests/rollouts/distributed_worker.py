"""What each rank of `test_vllm_distributed.py` runs: an engine of its own beside FSDP's shards."""

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fastalign.rollouts import (
    RankZeroSampler,
    TransformersSampler,
    VllmSampler,
    policy_tensors,
)
from tests.rollouts.vllm_cases import (
    EOS,
    PARAMS,
    largest_difference,
    make_policy,
    make_prompts,
    make_spec,
    train_a_little,
)


def sharded(policy: Any) -> Any:
    for layer in policy.model.layers:
        fully_shard(layer)
    return fully_shard(policy)


def own_engine() -> None:
    """Sharded weights reach each rank's engine; its end leaves the trainer's group alone."""
    policy = make_policy(tied=True)
    shards = sharded(make_policy(tied=True))
    engine = VllmSampler(make_spec(policy))
    for version in (1, 2):
        engine.sync_weights(policy_tensors(shards), version)
        found = engine.generate(make_prompts(), PARAMS, seed=dist.get_rank())
        assert largest_difference(policy, found) < 1e-4
        for model in (policy, shards):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    engine.rebuild()
    engine.close()


def shared_engine() -> None:
    """Rank 0 answers everybody's prompts, and what fails there fails everywhere."""
    policy = make_policy()
    train_a_little(policy)
    shards = sharded(policy)
    rank = dist.get_rank()
    inner = None
    if rank == 0:
        inner = TransformersSampler(make_policy(seed=5), eos_token_ids=[EOS], pad_token_id=0)
    sampler = RankZeroSampler(inner)
    sampler.sync_weights(policy_tensors(shards), 4)
    mine = make_prompts()[: 1 + rank * 3]
    found = sampler.generate(mine, PARAMS, seed=3)
    truth = make_policy()
    train_a_little(truth)
    alone = TransformersSampler(truth, eos_token_ids=[EOS], pad_token_id=0)
    alone.version = 4
    everyone = [*make_prompts()[:1], *make_prompts()]
    expected = alone.generate(everyone, PARAMS, seed=3)
    assert found == (expected[:1] if rank == 0 else expected[1:])
    with pytest.raises(ValueError, match="prompt 1: expected at least one token"):
        sampler.generate([[1], []][rank : rank + 1], PARAMS, seed=3)
    sampler.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    shared_engine()
    own_engine()
    print(f"rank {dist.get_rank()} is done", flush=True)
    dist.destroy_process_group()

"""What each rank of `test_vllm_distributed.py` runs: an engine of its own beside FSDP's shards."""

import os
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fastalign.ranks.parallel import part_from_ranks, share_by_fsdp
from fastalign.ranks.world import world_of_environment
from fastalign.rollouts import (
    PolicyAccess,
    RankZeroSampler,
    TransformersSampler,
    VllmSampler,
    access_to,
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


class Kept:
    """An engine's keeper that takes the policy's weights before each answer."""

    def __init__(self, policy: PolicyAccess):
        self.policy, self.version = policy, 0
        self.model = make_policy(seed=5)
        self.inner = TransformersSampler(self.model, eos_token_ids=[EOS], pad_token_id=0)

    def generate(self, prompts: Any, params: Any, *, seed: int) -> Any:
        own = self.model.state_dict()
        for name, tensor in self.policy.tensors():  # each is gathered when it is asked for
            own[name].copy_(tensor)
        self.inner.version = self.version
        found = self.inner.generate(prompts, params, seed=seed)
        first = found[0][0]
        (ours,) = self.policy.logprobs([(list(prompts[0]), first.token_ids)], params)
        assert (ours - torch.tensor(first.logprobs)).abs().max() < 1e-4
        return found


def shared_engine() -> None:
    """Rank 0 answers everybody's prompts, and what fails there fails everywhere."""
    world = world_of_environment()
    policy = make_policy()
    train_a_little(policy)
    share_by_fsdp(policy, dtype=torch.float32, device=torch.device("cpu"))
    access = access_to(policy, nullcontext, world)
    inner: Any = Kept(access) if world.is_first else None
    sampler = RankZeroSampler(inner, access, world)
    sampler.version = 4
    found = sampler.generate(make_prompts(), PARAMS, seed=3)
    truth = make_policy()
    train_a_little(truth)
    alone = TransformersSampler(truth, eos_token_ids=[EOS], pad_token_id=0)
    alone.version = 4
    assert found == alone.generate(make_prompts(), PARAMS, seed=3)
    with pytest.raises(ValueError, match="prompt 1: expected at least one token"):
        sampler.generate([[1], []], PARAMS, seed=3)
    part_from_ranks()


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    dist.init_process_group("gloo")
    shared_engine()
    own_engine()
    print(f"rank {dist.get_rank()} is done", flush=True)
    dist.destroy_process_group()

"""Rollouts: samplers behind one protocol."""

from typing import TYPE_CHECKING

from fastalign.lazy_names import imported_on_use

if TYPE_CHECKING:
    from fastalign.rollouts.distribution import recompute_logprobs
    from fastalign.rollouts.engines.in_process import VllmSampler
    from fastalign.rollouts.engines.options import SamplerName, VllmOptions, check_sampler
    from fastalign.rollouts.engines.overlapped import OverlappedSampler
    from fastalign.rollouts.engines.policy_access import PolicyAccess, access_to
    from fastalign.rollouts.engines.rank_zero import RankZeroSampler
    from fastalign.rollouts.engines.server import VllmServerSampler
    from fastalign.rollouts.engines.spec import EngineSpec
    from fastalign.rollouts.engines.synced import SyncedSampler, open_engine
    from fastalign.rollouts.engines.weights import policy_tensors
    from fastalign.rollouts.sampler import Completion, Sampler, SamplerFailed, SamplingParams
    from fastalign.rollouts.transformers_sampler import TransformersSampler

__getattr__ = imported_on_use(__name__)

__all__ = [
    "Completion",
    "EngineSpec",
    "OverlappedSampler",
    "PolicyAccess",
    "RankZeroSampler",
    "Sampler",
    "SamplerFailed",
    "SamplerName",
    "SamplingParams",
    "SyncedSampler",
    "TransformersSampler",
    "VllmOptions",
    "VllmSampler",
    "VllmServerSampler",
    "access_to",
    "check_sampler",
    "open_engine",
    "policy_tensors",
    "recompute_logprobs",
]

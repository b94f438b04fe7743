"""Rollouts: samplers behind one protocol."""

from fastalign.rollouts.distribution import recompute_logprobs, sampling_logprobs
from fastalign.rollouts.engine_spec import EngineSpec
from fastalign.rollouts.overlapped import OverlappedSampler
from fastalign.rollouts.policy_access import PolicyAccess, access_to
from fastalign.rollouts.rank_zero import RankZeroSampler
from fastalign.rollouts.sampler import Completion, Sampler, SamplerFailed, SamplingParams
from fastalign.rollouts.synced import SyncedSampler, open_engine
from fastalign.rollouts.transformers_sampler import TransformersSampler
from fastalign.rollouts.vllm_options import SamplerName, VllmOptions, check_sampler
from fastalign.rollouts.vllm_process import VllmProcessSampler
from fastalign.rollouts.vllm_sampler import VllmSampler
from fastalign.rollouts.vllm_server import VllmServerSampler
from fastalign.rollouts.weights import policy_tensors

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
    "VllmProcessSampler",
    "VllmSampler",
    "VllmServerSampler",
    "access_to",
    "check_sampler",
    "open_engine",
    "policy_tensors",
    "recompute_logprobs",
    "sampling_logprobs",
]

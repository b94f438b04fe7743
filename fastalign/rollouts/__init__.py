"""Rollouts: samplers behind one protocol."""

from fastalign.rollouts.sampler import Completion, Sampler, SamplingParams
from fastalign.rollouts.transformers_sampler import TransformersSampler

__all__ = ["Completion", "Sampler", "SamplingParams", "TransformersSampler"]

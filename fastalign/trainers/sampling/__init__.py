"""Sampling from the policy and scoring its completions, for the algorithms that do so."""

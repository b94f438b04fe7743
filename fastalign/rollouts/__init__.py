"""Samplers: prompts in, completions with log-probs out."""

"""Evaluation: accuracy on pairs, reward and KL of samples, win rate, best of n."""

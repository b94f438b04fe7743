"""PPO, with a value model or without."""

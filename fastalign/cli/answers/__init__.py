"""Commands that sample answers, score them or compare them."""

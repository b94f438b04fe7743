"""People say which of two answers is better: a page, its database, and what the votes are worth."""

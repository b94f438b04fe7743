"""KTO: answers that were found good or bad, one by one."""

"""Reports: a page on one or more runs, and the frontier of reward against KL."""

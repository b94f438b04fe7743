"""Reports: the page of one or more runs, and the frontier of reward against KL."""

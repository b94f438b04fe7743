"""vLLM as a sampling engine, in this process or behind a server."""

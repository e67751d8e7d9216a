"""Step 6 of a request: a worker in the decode role pulls a KV cache and streams tokens."""

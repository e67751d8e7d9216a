"""Step 4 of a request: a worker in the prefill role turns a prompt into a held KV cache."""

"""Step 5 of a request: blocks of KV cache change owner, under a lease, or are refused."""

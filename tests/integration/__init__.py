"""Tests over real sockets, processes or vLLM's front-end."""

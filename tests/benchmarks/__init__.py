"""Benchmarks: `make bench` and `make bench-NAME`; they print and write docs/benchmarks.md."""

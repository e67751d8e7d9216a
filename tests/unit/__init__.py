"""The unit tier: pure code, no Ray, no sockets, under 10 s in total."""

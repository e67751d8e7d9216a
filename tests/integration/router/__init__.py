"""The HTTP surface, served on loopback."""

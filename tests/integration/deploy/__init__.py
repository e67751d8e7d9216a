"""Launching, stopping and cleaning up whole deployments."""

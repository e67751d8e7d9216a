"""The Serve policy under a real Ray Serve."""

"""The whole path through the REST endpoint: on real engines, and a day's load on simulated ones."""

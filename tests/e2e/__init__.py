"""The whole path on real engines, through the REST endpoint."""

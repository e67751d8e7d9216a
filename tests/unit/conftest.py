"""How hypothesis runs: briefly in the tier that has ten seconds, at length in `make test-full`."""

from hypothesis import settings

# No deadline: on shared cores an example's wall time says nothing.
settings.register_profile("unit", max_examples=8, deadline=None)
settings.register_profile("full", max_examples=500, deadline=None)
settings.load_profile("unit")

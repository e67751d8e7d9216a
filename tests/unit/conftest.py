"""How hypothesis runs: briefly in the tier that has ten seconds, at length in `make test-full`."""

import gc

from hypothesis import settings

# Thousands of small objects live until the end: to look at them again and again takes 5 % of it.
gc.set_threshold(200_000, 50, 100)

# No deadline: on shared cores an example's wall time says nothing.
settings.register_profile("unit", max_examples=8, deadline=None)
settings.register_profile("full", max_examples=500, deadline=None)
settings.load_profile("unit")

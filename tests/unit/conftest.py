"""How hypothesis runs in the tier that has ten seconds."""

from hypothesis import settings

# No deadline: on shared cores an example's wall time says nothing.
settings.register_profile("unit", max_examples=25, deadline=None)
settings.load_profile("unit")

"""Tests; packages, so that two tiers may name a file alike."""

import os

# Ray runs its workers at nice 15: beside another test file they would stand still for seconds.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so

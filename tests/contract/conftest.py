"""Fixtures of the contracts."""

from tests.contract.handoff_sides import open_side as open_side
from tests.contract.other_process import other as other

"""Fixtures of the contracts."""

from tests.contract.driven_engines import engines as engines
from tests.contract.driven_engines import pair as pair
from tests.contract.handoff_sides import open_side as open_side
from tests.contract.other_process import other as other

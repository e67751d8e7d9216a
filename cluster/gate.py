"""The discovery gate: workers of the role that is ahead wait until the other one catches up.

HeteroScale (arXiv 2508.19559), P/D ratio maintenance: the roles of a scale-out become ready at
different times, and requests that meet the wrong ratio miss their latency objectives.
"""

import math
from collections.abc import Mapping

from cluster.names import Role


def num_exposable(
    role: Role,
    ready: Mapping[Role, int],
    exposed: Mapping[Role, int],
    wanted: Mapping[Role, int],
    tolerance: float,
) -> int:
    """Return how many of the role's ready workers routers may see.

    As many as keep the ready pools within `tolerance` of the wanted sizes' ratio; never fewer
    than are exposed already, and one as soon as the other role has any.
    """
    in_ratio = ready[role.other] * wanted[role] / max(1, wanted[role.other])
    # The smallest float above a whole number must not cost a worker.
    fitting = math.floor(in_ratio * (1 + tolerance) + 1e-9)
    return max(exposed[role], fitting, min(1, ready[role.other]))

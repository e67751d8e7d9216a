"""Which cores each engine is pinned to: disjoint while the host has enough, then shared evenly."""

from collections import Counter
from collections.abc import Iterable, Sequence


def choose_cores(
    cores: Sequence[int], taken: Iterable[Sequence[int]], wanted: int
) -> tuple[int, ...]:
    """Return `wanted` of the host's `cores`, those used by the fewest of `taken` first.

    A worker that wants more cores than the host has gets them all.
    """
    uses = Counter(core for other in taken for core in other)
    by_use = sorted(cores, key=lambda core: (uses[core], core))
    return tuple(sorted(by_use[: min(wanted, len(by_use))]))

"""Whether one worker can read KV caches of another, known before anything is handed over. Pure.

Each engine says at its start how its KV cache is laid out. Workers whose layouts differ are never
paired: not to warm up, and not for a request.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.names import WorkerId


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """An engine's KV cache as others need to know it.

    Engines hand over to each other if, and only if, their fingerprints are the same; `facts` say
    in words what went into it, for the reason when they are not.
    """

    fingerprint: str = ""
    facts: Mapping[str, str | int] = field(default_factory=dict, compare=False)


NO_LAYOUT = CacheLayout()
Party = tuple[WorkerId, CacheLayout]


def mismatch(one: Party, other: Party) -> str | None:
    """Return what keeps two workers from handing over, each fact with both values; None if
    nothing does."""
    (name, layout), (other_name, other_layout) = one, other
    if layout == other_layout:
        return None
    ours, theirs = layout.facts, other_layout.facts
    different = [
        f"{fact} is {ours.get(fact, 'unknown')} on {name}, {theirs.get(fact, 'unknown')} on"
        f" {other_name}"
        for fact in dict.fromkeys([*ours, *theirs])
        if ours.get(fact) != theirs.get(fact)
    ]
    return "; ".join(different) or (
        f"layout is {layout.fingerprint} on {name}, {other_layout.fingerprint} on {other_name}"
    )


def refusal(newcomer: Party, peers: Iterable[Party]) -> str | None:
    """Return one line on the peers that a newcomer cannot be paired with, None if there are none.

    It names the first one's differences and how many more there are.
    """
    found = [reason for peer in peers if (reason := mismatch(newcomer, peer)) is not None]
    if not found:
        return None
    more = f" (and {len(found) - 1} more do not fit)" if len(found) > 1 else ""
    return f"{newcomer[0]} is not paired: {found[0]}{more}"

"""Packing is exact: it finds an assignment whenever there is one, and never overcommits."""

import itertools
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.names import Role
from cluster.packing import Amount, Packing, Spot, amount
from cluster.service import Counts, RoleNeed, Service
from tests.unit.cluster.tree import DECODE, PREFILL, node, service

BOTH = frozenset(Role)


def spots(roles: Sequence[frozenset[Role]]) -> list[Spot]:
    return [Spot(node(f"p/a/{index}"), each) for index, each in enumerate(roles)]


def pack(owner: Service, rooms: Sequence[Amount], piece: Counts) -> Counter[str] | None:
    """Return how many workers each node gets."""
    free = {f"p/a/{index}": room for index, room in enumerate(rooms)}
    slots = Packing(owner, spots([BOTH] * len(rooms)), free).pack(piece)
    return None if slots is None else Counter(slot.node_id for slot in slots)


def test_a_piece_takes_the_earliest_nodes_that_hold_it() -> None:
    rooms = [amount(gpus, 64) for gpus in (1, 2, 8)]
    assert pack(service(), rooms, Counts(1, 1)) == {"p/a/0": 1, "p/a/1": 1}


def test_the_greedy_choice_is_not_the_last_word() -> None:
    """Largest first into the tightest node would leave the third decode worker out."""
    owner = service(prefill=RoleNeed(1, 3), decode=RoleNeed(1, 2))
    assert pack(owner, [amount(4, 9), amount(5, 9)], Counts(1, 3)) == {"p/a/0": 2, "p/a/1": 2}


def test_fractions_add_up() -> None:
    tenth = RoleNeed(cpus_per_worker=0.1, gpus_per_worker=0.1)
    owner = service(prefill=tenth, decode=tenth)
    assert pack(owner, [amount(1, 1)], Counts(5, 5)) == {"p/a/0": 10}
    assert pack(owner, [amount(1, 1)], Counts(5, 6)) is None


def test_workers_without_gpus_count_cores() -> None:
    owner = service(prefill=RoleNeed(1), decode=RoleNeed(2))
    assert pack(owner, [amount(0, 3)], Counts(1, 1)) == {"p/a/0": 2}
    assert pack(owner, [amount(8, 2)], Counts(1, 1)) is None


def test_a_node_that_owes_resources_has_none() -> None:
    assert pack(service(), [amount(-1, 64), amount(8, -1)], Counts(1, 0)) is None


ROOMS = st.lists(st.builds(amount, st.integers(0, 5), st.integers(0, 6)), max_size=3)
NEEDS = st.builds(RoleNeed, st.integers(1, 3), st.integers(0, 3))
ROLES = st.sampled_from([BOTH, frozenset({PREFILL}), frozenset({DECODE})])


@given(ROOMS, NEEDS, NEEDS, st.integers(0, 3), st.integers(0, 3), st.data())
def test_exact_against_trying_everything(
    rooms: list[Amount],
    prefill: RoleNeed,
    decode: RoleNeed,
    num_prefill: int,
    num_decode: int,
    data: st.DataObject,
) -> None:
    allowed = spots([data.draw(ROLES) for _ in rooms])
    owner, piece = service(prefill=prefill, decode=decode), Counts(num_prefill, num_decode)
    free = {f"p/a/{index}": room for index, room in enumerate(rooms)}
    slots = Packing(owner, allowed, free).pack(piece)
    wanted = [role for role in Role for _ in range(piece.of(role))]
    possible = any(
        _fits(owner, list(zip(wanted, nodes, strict=True)), rooms, allowed)
        for nodes in itertools.product(range(len(rooms)), repeat=len(wanted))
    )
    if slots is None:
        assert not possible or not piece
    else:
        assert Counts.count(slot.role for slot in slots) == piece
        chosen = [(slot.role, int(slot.node_id.rpartition("/")[2])) for slot in slots]
        assert _fits(owner, chosen, rooms, allowed)


def _fits(
    owner: Service,
    chosen: list[tuple[Role, int]],
    rooms: Sequence[Amount],
    allowed: Sequence[Spot],
) -> bool:
    for index, room in enumerate(rooms):
        here = [role for role, at in chosen if at == index]
        gpus = sum(owner.need(role).gpus_per_worker for role in here)
        cpus = sum(owner.need(role).cpus_per_worker for role in here)
        fits = amount(gpus, cpus)
        if fits.gpus > room.gpus or fits.cpus > room.cpus:
            return False
        if not allowed[index].roles.issuperset(here):
            return False
    return True

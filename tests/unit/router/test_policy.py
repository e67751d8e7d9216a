"""Placement: the reasons in a table, and what holds of every decision."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RouterSection
from cluster.names import WorkerId
from router.policy import (
    Decision,
    Placed,
    PlacementRequest,
    PoolSnapshot,
    Queued,
    RejectedPlacement,
    Rejection,
    WorkerView,
    choose_placement,
)

CONFIG = RouterSection(
    prefills_per_worker=2, decodes_per_worker=3, max_queued=4, local_prefill_tokens=8
)
BLOCK_SIZE, NUM_BLOCKS = 16, 100
LONG = PlacementRequest(num_prompt_tokens=100)


def view(
    name: str,
    num_reserved: int = 0,
    tokens: int = 0,
    waiting: int = 0,
    domain: str = "",
    free: int = NUM_BLOCKS,
    layout: str = "",
) -> WorkerView:
    memory = BLOCK_SIZE, NUM_BLOCKS, free
    return WorkerView(WorkerId(name), domain, num_reserved, tokens, waiting, *memory, layout)


def ids(*names: str) -> frozenset[WorkerId]:
    return frozenset(map(WorkerId, names))


def snapshot(
    prefill: list[WorkerView], decode: list[WorkerView], num_queued: int = 0, behind: bool = False
) -> PoolSnapshot:
    return PoolSnapshot(tuple(prefill), tuple(decode), num_queued, behind)


def pair(decision: Decision) -> tuple[str | None, str]:
    assert isinstance(decision, Placed), decision
    return decision.prefill_worker, decision.decode_worker


IDLE = snapshot([view("p0"), view("p1")], [view("d0"), view("d1")])
PLACEMENTS = [
    ("idle pools: the first of each", IDLE, LONG, ("p0", "d0")),
    (
        "fewest own streams",
        snapshot([view("p0")], [view("d0", 2), view("d1", 1)]),
        LONG,
        ("p0", "d1"),
    ),
    (
        "the worker's own queue counts as streams",
        snapshot([view("p0")], [view("d0", 0, waiting=3), view("d1", 2)]),
        LONG,
        ("p0", "d1"),
    ),
    (
        "fewest prompt tokens, not fewest prompts",
        snapshot([view("p0", 1, 900), view("p1", 1, 50)], [view("d0")]),
        LONG,
        ("p1", "d0"),
    ),
    (
        "waiting prompts are taken for prompts like this one",
        snapshot([view("p0", 0, 0, waiting=2), view("p1", 1, 150)], [view("d0")]),
        LONG,
        ("p1", "d0"),
    ),
    (
        "same domain before less load",
        snapshot(
            [view("p0", domain="b"), view("p1", 1, 500, domain="a")], [view("d0", domain="a")]
        ),
        LONG,
        ("p1", "d0"),
    ),
    (
        "another domain when the own one is full",
        snapshot([view("p0", domain="b"), view("p1", 2, 9, domain="a")], [view("d0", domain="a")]),
        LONG,
        ("p0", "d0"),
    ),
    ("excluded workers are passed by", IDLE, replace(LONG, excluded=ids("p0", "d0")), ("p1", "d1")),
    ("avoided workers come last", IDLE, replace(LONG, avoided=ids("p0", "d0")), ("p1", "d1")),
    (
        "avoided workers are better than none",
        snapshot([view("p0")], [view("d0")]),
        replace(LONG, avoided=ids("p0", "d0")),
        ("p0", "d0"),
    ),
    ("a short prompt stays on decode", IDLE, PlacementRequest(8), (None, "d0")),
    ("local_only stays on decode", IDLE, replace(LONG, local_only=True), (None, "d0")),
    ("the last resort is decode", IDLE, replace(LONG, is_last_resort=True), (None, "d0")),
    ("no prefill worker", snapshot([], [view("d0")]), LONG, (None, "d0")),
    ("every prefill worker excluded", IDLE, replace(LONG, excluded=ids("p0", "p1")), (None, "d0")),
    (
        "decode memory before fewest streams",
        snapshot([view("p0")], [view("d0", free=6), view("d1", 2, free=7)]),
        LONG,
        ("p0", "d1"),
    ),
    (
        "only a prefill worker whose KV cache fits, however loaded",
        snapshot(
            [view("p0", layout="x"), view("p1", 1, 900, layout="y")], [view("d0", layout="y")]
        ),
        LONG,
        ("p1", "d0"),
    ),
    (
        "a decode worker that some prefill worker fits comes first",
        snapshot([view("p0", layout="y")], [view("d0", layout="x"), view("d1", 2, layout="y")]),
        LONG,
        ("p0", "d1"),
    ),
    (
        "a prompt that no memory can hold is the engine's to refuse",
        snapshot([view("p0")], [view("d0", free=NUM_BLOCKS - 1)]),
        PlacementRequest(BLOCK_SIZE * NUM_BLOCKS),
        ("p0", "d0"),
    ),
    (
        "none fits",
        snapshot([view("p0", layout="x")], [view("d0", layout="y")]),
        LONG,
        (None, "d0"),
    ),
    (
        "a full prefill pool does not hold up a short prompt",
        snapshot([view("p0", 2)], [view("d0")]),
        PlacementRequest(1),
        (None, "d0"),
    ),
]


@pytest.mark.parametrize(
    ("state", "request_", "expected"),
    [row[1:] for row in PLACEMENTS],
    ids=[row[0] for row in PLACEMENTS],
)
def test_placed(
    state: PoolSnapshot, request_: PlacementRequest, expected: tuple[str | None, str]
) -> None:
    decision = choose_placement(state, request_, CONFIG)
    assert pair(decision) == expected
    assert decision.reason


FULL_PREFILL = snapshot([view("p0", 2), view("p1", 2)], [view("d0")])
FULL_DECODE = snapshot([view("p0")], [view("d0", 3)])
NO_MEMORY = snapshot([view("p0")], [view("d0", free=6), view("d1", free=-3)])


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (FULL_PREFILL, "prefill pool is full"),
        (FULL_DECODE, "decode pool is full"),
        (NO_MEMORY, "decode pool has no free KV blocks"),
        (replace(IDLE, num_queued=1, is_behind=True), "earlier requests"),
    ],
)
def test_without_room_it_queues_until_the_queue_is_full(state: PoolSnapshot, word: str) -> None:
    decision = choose_placement(state, LONG, CONFIG)
    assert isinstance(decision, Queued) and word in decision.reason
    refused = choose_placement(replace(state, num_queued=4), LONG, CONFIG)
    assert isinstance(refused, RejectedPlacement)
    assert refused.rejection is Rejection.OVERLOADED and word in refused.reason
    assert refused.retry_after_s > 0
    admitted = choose_placement(
        replace(state, num_queued=4), replace(LONG, is_admitted=True), CONFIG
    )
    assert isinstance(admitted, Queued)


def test_without_decode_workers_nothing_can_be_served() -> None:
    decision = choose_placement(snapshot([view("p0")], []), LONG, CONFIG)
    assert isinstance(decision, RejectedPlacement)
    assert decision.rejection is Rejection.UNAVAILABLE


def test_exhausted_when_every_decode_worker_has_failed_it() -> None:
    decision = choose_placement(IDLE, replace(LONG, excluded=ids("d0", "d1")), CONFIG)
    assert isinstance(decision, RejectedPlacement)
    assert decision.rejection is Rejection.EXHAUSTED


@pytest.mark.parametrize(
    ("state", "request_", "expects"),
    [
        (IDLE, LONG, True),
        (IDLE, replace(LONG, local_only=True), False),
        (IDLE, PlacementRequest(3), False),
        (IDLE, replace(LONG, is_last_resort=True), True),
        (snapshot([], [view("d0")]), LONG, True),
        (IDLE, replace(LONG, excluded=ids("p0", "p1")), True),
    ],
)
def test_a_handoff_is_expected_unless_decode_is_the_better_place(
    state: PoolSnapshot, request_: PlacementRequest, expects: bool
) -> None:
    decision = choose_placement(state, request_, CONFIG)
    assert isinstance(decision, Placed) and decision.expects_handoff is expects


def test_equal_workers_share_the_load_by_chance() -> None:
    rng = Random(7)
    chosen = {pair(choose_placement(IDLE, LONG, CONFIG, rng)) for _ in range(50)}
    assert chosen == {("p0", "d0"), ("p0", "d1"), ("p1", "d0"), ("p1", "d1")}


NAMES = st.sampled_from([f"w{number}" for number in range(6)])
VIEWS = st.builds(
    view,
    NAMES,
    st.integers(0, 4),
    st.integers(0, 1000),
    st.integers(0, 5),
    st.sampled_from(["", "a", "b"]),
    st.integers(-2, 6),
    st.sampled_from(["x", "y"]),
)
POOLS = st.lists(VIEWS, max_size=5, unique_by=lambda entry: entry.worker_id)
REQUESTS = st.builds(
    PlacementRequest,
    st.integers(1, 50),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.frozensets(NAMES.map(WorkerId), max_size=4),
    st.frozensets(NAMES.map(WorkerId), max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(POOLS, POOLS, st.integers(0, 6), st.booleans(), REQUESTS, st.integers(0, 3))
def test_every_decision_is_sound(
    prefill: list[WorkerView],
    decode: list[WorkerView],
    num_queued: int,
    behind: bool,
    request: PlacementRequest,
    seed: int,
) -> None:
    state = snapshot(prefill, decode, num_queued, behind)
    decision = choose_placement(state, request, CONFIG, Random(seed))
    assert decision.reason
    if isinstance(decision, Placed):
        assert not behind
        decodes = {entry.worker_id: entry for entry in decode}
        prefills = {entry.worker_id: entry for entry in prefill}
        assert decodes[decision.decode_worker].num_reserved < CONFIG.decodes_per_worker
        assert decodes[decision.decode_worker].has_memory(request.num_prompt_tokens)
        chosen = {decision.decode_worker}
        if decision.prefill_worker is not None:
            assert not request.local_only and not request.is_last_resort
            assert prefills[decision.prefill_worker].num_reserved < CONFIG.prefills_per_worker
            layouts = {prefills[decision.prefill_worker].layout}
            assert layouts == {decodes[decision.decode_worker].layout}
            chosen.add(decision.prefill_worker)
        assert not chosen & request.excluded
    elif isinstance(decision, Queued):
        assert request.is_admitted or num_queued < CONFIG.max_queued

"""The hour of samples: bounded, one a second, rates and percentiles of the last window."""

from typing import Any

import pytest

from cluster.history import COLUMNS, WINDOW_S, History, Recent, Scales, Traffic
from cluster.latency import LatencyObserver
from cluster.load import RouterLoad
from cluster.names import Role, RouterId

START = 1_800_000_000
SCALES = Scales({Role.PREFILL: 1, Role.DECODE: 2}, {Role.PREFILL: 1, Role.DECODE: 1}, 50.0, 80.0)


class PaperRouter:
    """A router that has seen what a test says."""

    def __init__(self, name: str = "r") -> None:
        self.router_id = RouterId(name)
        self.counters: dict[str, int] = {}
        self.ttft = LatencyObserver()

    def see(self, **counters: int) -> None:
        for name, count in counters.items():
            self.counters[name] = self.counters.get(name, 0) + count

    def load(self) -> RouterLoad:
        counters: dict[str, Any] = self.counters
        return RouterLoad(self.router_id, 0.0, **counters, ttft=self.ttft.counts())


def sampled(history: History, after: int = 0) -> list[dict[str, Any]]:
    page = history.document(after)
    return [dict(zip(page["columns"], row, strict=True)) for row in page["rows"]]


def test_a_sample_has_sizes_signal_and_what_came_in_the_window() -> None:
    history, router = History(), PaperRouter()
    history.add(START, [router.load()], SCALES)
    router.see(arrived=6, handoffs=4, handoff_bytes=4000, handoff_failures=2)
    router.ttft.observe(0.2)
    history.add(START + 2, [router.load()], SCALES)
    first, second = sampled(history)
    assert first["arrived_per_s"] is None and first["ttft_p50"] is None
    assert (second["at"], second["prefill_wanted"], second["decode_ready"]) == (START + 2, 1, 1)
    assert (second["signal"], second["capacity"], second["target"]) == (50.0, 80.0, None)
    assert (second["arrived_per_s"], second["handoffs_per_s"]) == (3.0, 2.0)
    assert (second["handoff_bytes_per_s"], second["handoff_failures_per_s"]) == (2000.0, 1.0)
    assert second["ttft_p50"] == second["ttft_p99"] == pytest.approx(0.2, rel=0.05)
    assert second["tbt_p50"] is None


def test_what_is_older_than_the_window_no_longer_counts() -> None:
    history, router = History(), PaperRouter()
    history.add(START, [router.load()], SCALES)
    router.see(arrived=100)
    router.ttft.observe(9.0)
    for second in range(1, WINDOW_S + 1):
        history.add(START + second, [router.load()], SCALES)
    assert history.recent().per_s("arrived") == 10.0
    history.add(START + WINDOW_S + 1, [router.load()], SCALES)
    assert history.recent().per_s("arrived") == 0.0
    assert history.recent().percentiles("ttft") == {"p50": None, "p95": None, "p99": None}


def test_routers_add_up_and_what_one_saw_before_it_was_heard_is_left_out() -> None:
    history, old, new = History(), PaperRouter("a"), PaperRouter("b")
    new.see(arrived=1000)
    history.add(START, [old.load()], SCALES)
    old.see(arrived=2)
    history.add(START + 1, [old.load(), new.load()], SCALES)
    new.see(arrived=4)
    history.add(START + 2, [new.load()], SCALES)
    assert history.recent().traffic.arrived == 6


def test_a_router_that_counts_from_zero_again_does_not_lower_the_sum() -> None:
    history, router = History(), PaperRouter()
    router.see(arrived=10)
    history.add(START, [router.load()], SCALES)
    history.add(START + 1, [RouterLoad(router.router_id, 0.0)], SCALES)
    assert history.recent().traffic == Traffic()


def test_it_is_bounded_and_pages_by_time() -> None:
    history = History(length_s=5)
    for second in range(8):
        history.add(START + second, [], SCALES)
    assert [sample["at"] - START for sample in sampled(history)] == [3, 4, 5, 6, 7]
    page = history.document(START + 5)
    assert page["columns"] == list(COLUMNS) and page["next"] == START + 7
    assert [row[0] for row in page["rows"]] == [START + 6, START + 7]
    assert history.document(START + 7) == {**page, "rows": []}


def test_one_sample_a_second_is_due() -> None:
    history = History()
    assert history.is_due(START + 0.9)
    history.add(START + 0.9, [], SCALES)
    assert not history.is_due(START + 0.99) and history.is_due(START + 1.0)


def test_a_clock_set_back_starts_over() -> None:
    history, router = History(), PaperRouter()
    history.add(START, [router.load()], SCALES)
    history.add(START + 1, [router.load()], SCALES)
    router.see(arrived=3)
    history.add(START - 100, [router.load()], SCALES)
    assert [sample["at"] for sample in sampled(history)] == [START - 100]
    assert history.recent() == Recent(0, history.recent().traffic)
    router.see(arrived=3)
    history.add(START - 99, [router.load()], SCALES)
    assert history.recent().per_s("arrived") == 3.0


def test_no_older_state_than_the_earlier_one() -> None:
    with pytest.raises(ValueError, match="cannot fall"):
        Traffic(arrived=1).minus(Traffic(arrived=2))

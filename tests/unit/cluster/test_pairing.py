"""Which workers are paired, what the reason says, and that it survives the way to a router."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cluster.names import Role, WorkerId
from cluster.pairing import CacheLayout, Party, mismatch, refusal
from cluster.snapshot import WorkerEntry

FACTS: dict[str, str | int] = {"model": "m", "tensor_parallel": 2, "block_size": "16"}


def party(name: str, fingerprint: str = "f", **facts: str | int) -> Party:
    return WorkerId(name), CacheLayout(fingerprint, {**FACTS, **facts})


def test_one_fingerprint_is_one_layout() -> None:
    assert mismatch(party("p"), party("d")) is None
    assert refusal(party("p"), [party("d"), party("e")]) is None


def test_every_difference_is_named_with_both_values() -> None:
    reason = mismatch(party("p"), party("d", "g", tensor_parallel=1, block_size="32"))
    assert reason == "tensor_parallel is 2 on p, 1 on d; block_size is 16 on p, 32 on d"


def test_what_only_one_of_them_says_is_a_difference() -> None:
    assert mismatch(party("p"), party("d", "g", wire="int8")) == "wire is unknown on p, int8 on d"


def test_without_words_the_fingerprints_are_named() -> None:
    assert mismatch(party("p"), party("d", "g")) == "layout is f on p, g on d"


def test_a_newcomer_hears_of_all_it_does_not_fit() -> None:
    peers = [party("p1"), party("p2", "g", block_size="32"), party("p3", "h", model="x")]
    said = refusal(party("d"), peers)
    assert said == "d is not paired: block_size is 16 on d, 32 on p2 (and 1 more do not fit)"


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3))
def test_an_entry_with_its_layout_crosses_as_json(facts: dict[str, str | int]) -> None:
    layout = CacheLayout("f", facts)
    entry = WorkerEntry(WorkerId("p"), Role.PREFILL, "tcp://p", 7, "node", layout=layout)
    crossed = WorkerEntry.from_document(json.loads(json.dumps(entry.as_document())))
    assert crossed == entry and crossed.layout.facts == facts

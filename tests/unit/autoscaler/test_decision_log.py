"""The decision log: paged, written as it goes, and replayed byte for byte."""

import itertools
import json
from pathlib import Path

import pytest

from autoscaler.decision_log import (
    DecisionLog,
    Record,
    canonical_json,
    parse_records,
    replay,
    rerun,
)
from autoscaler.policy import decide
from tests.unit.autoscaler.samples import START, section, snapshot, state

LOADS = [400.0, 900.0, 900.0, 100.0, 300.1, 1e-9, 0.0, 3000.0] * 6


def recorded(path: Path | None = None, limit: int = 1000) -> DecisionLog:
    log, before = DecisionLog(limit, path), state(4, 4)
    for index, tps in enumerate(LOADS):
        sample = snapshot(decode_tps=tps, tbt_s=0.02 + (index % 7) / 60)
        decision, after = decide(section(), before, sample, START + 100.5 * index)
        log.append(sample, before, decision)
        before = after
    return log


def test_a_recorded_log_replays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = recorded(path)
    records = parse_records(path.read_text())
    assert records == log.page(limit=1000) and len(records) == len(LOADS)
    written = [json.loads(line)["decision"] for line in path.read_text().splitlines()]
    for decisions in (replay(records, section()), rerun(records, section())):
        again = [canonical_json(decision.as_document()) for decision in decisions]
        assert again == [canonical_json(document) for document in written]


def test_changed_parameters_carry_over_from_decision_to_decision() -> None:
    records = recorded().page(limit=1000)
    eager = section(cooldown_in_s=100, in_guard_s=1, backoff_s=1)
    changed = rerun(records, eager)
    assert changed != [record.decision for record in records]
    assert all(later.current == earlier.final for earlier, later in itertools.pairwise(changed))
    assert replay([], eager) == rerun([], eager) == []


def test_pages_follow_each_other() -> None:
    log = recorded()
    first = log.page(limit=10)
    second = log.page(after=first[-1].seq, limit=10)
    assert [record.seq for record in first + second] == list(range(1, 21))
    assert log.page(after=len(LOADS)) == []
    assert [record.seq for record in log.last(2)] == [len(LOADS) - 1, len(LOADS)]
    assert log.last(0) == []


def test_memory_is_bounded() -> None:
    log = recorded(limit=5)
    assert [record.seq for record in log.page()] == list(range(len(LOADS) - 4, len(LOADS) + 1))


def test_a_restored_log_counts_on() -> None:
    log, old = DecisionLog(100), recorded().last(3)
    log.restore(Record.from_document(json.loads(canonical_json(r.as_document()))) for r in old)
    assert log.page(limit=100) == old and log.next_seq == old[-1].seq + 1


def test_a_write_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    recorded(path)
    assert len(parse_records(path.read_text()[:-10])) == len(LOADS) - 1


@pytest.mark.parametrize("line", ["{}", "[]", "not json", '{"seq": 1}'])
def test_a_line_that_is_no_record_is_named(line: str) -> None:
    good = canonical_json(recorded().last(1)[0].as_document())
    with pytest.raises(ValueError, match="line 2 is no decision record"):
        parse_records(f"{good}\n{line}\n")


def test_a_file_that_cannot_be_written_does_not_stop_the_decisions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = recorded(tmp_path / "missing" / "decisions.jsonl")
    assert len(log.page(limit=1000)) == len(LOADS)
    assert "decision 1 is not in" in caplog.text

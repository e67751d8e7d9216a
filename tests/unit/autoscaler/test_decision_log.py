"""The decision log: paged, written as it goes, and replayed byte for byte."""

import itertools
import json
import logging
from pathlib import Path

import pytest

from autoscaler.decision_file import DecisionFile
from autoscaler.decision_log import DecisionLog, Record, canonical_json
from autoscaler.policy import decide
from autoscaler.recording import Recording, replay, rerun
from cluster.autoscaler_config import AutoscalerSection
from cluster.errors import ConfigError
from tests.unit.autoscaler.samples import START, section, snapshot, state

LOADS = [400.0, 900.0, 900.0, 100.0, 300.1, 1e-9, 0.0, 3000.0] * 6


def recorded(path: Path | None = None, limit: int = 1000) -> DecisionLog:
    log, before = DecisionLog(limit, path), state(4, 4)
    for index, tps in enumerate(LOADS):
        sample = snapshot(decode_tps=tps, tbt_s=0.02 + (index % 7) / 60)
        decision, after = decide(section(), before, sample, START + 100.5 * index)
        log.append(section(), sample, before, decision)
        before = after
    return log


def test_a_recorded_log_replays_byte_for_byte_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = recorded(path)
    recording = Recording.parse(path.read_text())
    records, settings = recording.records, recording.under(AutoscalerSection())
    assert list(records) == log.page(limit=1000) and len(records) == len(LOADS)
    assert set(recording.settings) == {section()} and settings == [section()] * len(LOADS)
    head, *written = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(head) == ["settings"], "once, while they stay the same"
    for decisions in (replay(records, settings), rerun(records, settings)):
        again = [canonical_json(decision.as_document()) for decision in decisions]
        assert again == [canonical_json(document["decision"]) for document in written]


def test_settings_that_change_stand_before_what_they_decided(tmp_path: Path) -> None:
    log, changed = DecisionLog(100, tmp_path / "d"), section(max_decode=5)
    for config in (section(), changed, changed, section()):
        decision, _ = decide(config, state(4, 4), snapshot(decode_tps=900.0), START)
        log.append(config, snapshot(decode_tps=900.0), state(4, 4), decision)
    recording = Recording.parse((tmp_path / "d").read_text())
    assert recording.settings == (section(), changed, changed, section())
    again = replay(recording.records, recording.under(AutoscalerSection()))
    assert again == [record.decision for record in recording.records]


def test_settings_that_are_given_are_laid_over_the_recorded_ones(tmp_path: Path) -> None:
    recorded(tmp_path / "d")
    recording = Recording.parse((tmp_path / "d").read_text())
    given = AutoscalerSection(max_decode=6)
    assert set(recording.under(given)) == {section(max_decode=6)}
    with pytest.raises(ConfigError, match=r"beside the recorded settings: target_per_worker \(100"):
        recording.under(AutoscalerSection(signal="decode_util"))
    bare = Recording(recording.records, (None,) * len(recording.records))
    assert bare.under(given) == [given] * len(LOADS), "nothing is recorded: all of it is"


def test_changed_parameters_carry_over_from_decision_to_decision() -> None:
    records = recorded().page(limit=1000)
    eager = [section(cooldown_in_s=100, in_guard_s=1, backoff_s=1)] * len(records)
    changed = rerun(records, eager)
    assert changed != [record.decision for record in records]
    assert all(later.current == earlier.final for earlier, later in itertools.pairwise(changed))
    assert replay([], []) == rerun([], []) == []


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


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    recorded(path)
    recording = Recording.parse(path.read_text()[:-10])
    assert len(recording.records) == len(LOADS) - 1 and recording.torn == ()


@pytest.mark.parametrize("line", ["{}", "[]", '{"seq": 1}'])
def test_a_line_that_is_no_record_is_named(line: str) -> None:
    good = canonical_json(recorded().last(1)[0].as_document())
    with pytest.raises(ValueError, match="line 2 is no decision record"):
        Recording.parse(f"{good}\n{line}\n")


def test_settings_of_another_version_are_named() -> None:
    with pytest.raises(ValueError, match="line 1 holds settings of another version: colour: "):
        Recording.parse('{"settings": {"colour": "red"}}\n')


def test_a_torn_line_is_named_and_what_follows_it_still_counts(tmp_path: Path) -> None:
    """An earlier process ended within a write; the next one goes on in the same file."""
    path = tmp_path / "decisions.jsonl"
    recorded(path)
    path.write_bytes(path.read_bytes()[:-700])
    recorded(path)
    recording = Recording.parse(path.read_text())
    assert recording.torn == (len(LOADS) + 1,)
    assert len(recording.records) == 2 * len(LOADS) - 1
    again = replay(recording.records, recording.under(section()))
    assert again == [record.decision for record in recording.records]


def test_a_file_that_cannot_be_written_is_counted_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = recorded(tmp_path / "missing" / "decisions.jsonl")
    assert len(log.page(limit=1000)) == log.num_unwritten == len(LOADS)
    (said,) = caplog.records
    assert "decisions are not in" in said.message and "No such file" in said.message


def test_a_disk_that_was_full_for_a_while_costs_only_its_own_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, is_full = DecisionFile(tmp_path / "d"), False
    caplog.set_level(logging.WARNING)
    append = DecisionFile._append

    def fill_up(self: DecisionFile, content: bytes) -> None:
        append(self, content[: len(content) // 2] if is_full else content)
        if is_full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(DecisionFile, "_append", fill_up)
    written = []
    for number in range(8):
        is_full = number in (2, 3, 6)
        written.append(file.write([f'"line {number}"']))
    assert written == [True, True, False, False, True, True, False, True]
    assert file.num_unwritten == 3
    lines = (tmp_path / "d").read_text().splitlines()
    whole = [line for line in lines if line.endswith('"') and len(line) > 1]
    assert whole == [f'"line {number}"' for number in (0, 1, 4, 5, 7)]
    assert len(caplog.records) == 4, "begin and end of each stretch"

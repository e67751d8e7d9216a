"""The run document: phases by the time requests were due, faults by name, references compared."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from deploy.loadtest import conduct, reference
from deploy.loadtest.document import Question, document_of, with_phases
from deploy.loadtest.endpoint import Endpoint, normalised
from deploy.loadtest.measures import Terms
from deploy.loadtest.run import LoadPlan, LoadRun
from deploy.loadtest.words import Outcome, RequestRecord, Send, Slo, WorkloadSpec
from tests.unit.deploy.loadtest.records import record

ENDPOINT = Endpoint("http://127.0.0.1:1", "m", headers={"authorization": "Bearer k"})
QUESTION = Question(WorkloadSpec("azure"), 0, LoadPlan(), Terms(Slo(0.5, 0.1)), "ours")


def run_of(*records: RequestRecord, **changes: Any) -> LoadRun:
    for index, each in enumerate(records):
        each.index = index
    return LoadRun(list(records), datetime(2026, 1, 1, tzinfo=UTC), duration_s=10.0, **changes)


def test_a_phase_lasts_until_the_next_one_begins() -> None:
    run = run_of(
        record(0.0, [0.1, 0.2], phase="calm"),
        record(1.0, [1.1, 1.2], phase="calm"),
        record(4.0, [4.9, 5.0], phase="burst"),
        pools=[(0.0, 1, 1), (4.0, 1, 2)],
    )
    phases = document_of(QUESTION, ENDPOINT, run)["phases"]
    assert [(p["name"], p["begin_s"], p["end_s"]) for p in phases] == [
        ("calm", 0.0, 4.0),
        ("burst", 4.0, 10.0),
    ]
    assert [p["summary"]["slo"]["attainment"] for p in phases] == [1.0, 0.0]
    assert [p["summary"]["worker_seconds"]["total"] for p in phases] == [8.0, 18.0]


def test_phases_of_equal_length_go_by_when_a_request_was_due() -> None:
    turn = RequestRecord(1, Send(1.0, (1,), 1), 61.0)
    assert with_phases([turn], 60.0)[0].send.phase == "60-120 s"


def test_a_phase_that_never_began_is_not_listed_and_none_outlasts_the_run() -> None:
    never = RequestRecord(2, Send(12.0, (1,), 1, phase="night"), 12.0)
    run = run_of(record(0.0, [0.1], phase="calm"), record(4.0, [4.1], phase="burst"), never)
    phases = document_of(QUESTION, ENDPOINT, run)["phases"]
    assert [(p["name"], p["end_s"]) for p in phases] == [("calm", 4.0), ("burst", 10.0)]


def test_an_interrupted_run_keeps_what_it_has() -> None:
    never = RequestRecord(1, Send(20.0, (1,), 4), 20.0)
    run = run_of(
        record(0.0, [0.1, 0.2]),
        never,
        record(3.0, [], outcome=Outcome.UNFINISHED),
        state="interrupted",
        why="interrupted",
    )
    document = document_of(QUESTION, ENDPOINT, run)
    assert document["summary"]["requests"] == 2 and document["summary"]["slo"]["attainment"] == 1.0
    assert [each["index"] for each in document["requests"]] == [0, 2]
    assert document["faults"] == ["the run ended early: interrupted"]
    assert json.loads(json.dumps(document)) == document
    assert "k" not in document["endpoint"].values(), "no key in files that are passed on"


def test_a_late_client_is_the_first_thing_that_is_said() -> None:
    late = record(0.0, [0.1], outcome=Outcome.LOST)
    late.sent_s, late.error = 0.05, "HTTP 503: no"
    lines = conduct.errors(document_of(QUESTION, ENDPOINT, run_of(late)))
    assert lines[0].startswith("the client could not keep up: requests left 50 ms late at p99")
    assert lines[1:] == ["request 0, at 0.0 s: lost: HTTP 503: no"]
    shown = dict(conduct.rows(document_of(QUESTION, ENDPOINT, run_of(late))))
    assert shown["requests"] == "1: 0 completed, 1 lost, 0 truncated, 0 wrong"


def test_another_answer_than_the_recorded_one_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    good, other = record(0.0, [0.1]), record(0.0, [0.1])
    good.text, other.text = "a b c", "a x c"
    assert reference.write(path, ENDPOINT, [good]) == 1
    known = reference.read(path, ENDPOINT)
    reference.compare([good, other], known)
    assert (good.outcome, other.outcome) == (Outcome.COMPLETED, Outcome.WRONG)
    assert other.error == "differs from the reference at character 2: 'x c' instead of 'b c'"
    with pytest.raises(ConfigError, match=r"no answer to request 0 .*another workload or seed"):
        reference.require_all(known, [Send(0.0, (9, 9), 1)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: not a reference"),
        ("{\n", ":1: Expecting property name"),
        ('{"format": "tandem-reference-1", "api": "completions"}\n{"key": 1}\n', ":2: 'text'"),
        ('{"format": "tandem-reference-1", "api": "chat"}\n', ":1: recorded from chat"),
    ],
)
def test_a_broken_reference_is_refused_with_the_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "reference.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        reference.read(path, ENDPOINT)
    assert str(refused.value).startswith(f"{path}{expected}")


def test_requests_say_what_is_asked() -> None:
    endpoint = Endpoint("https://h/base", "m", headers={"x-key": "k"}, extra={"ignore_eos": None})
    head, _, body = endpoint.post(Send(0.0, (5, 6), 7), None).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nhost: h:443\r\n")
    assert b"x-key: k" in head and f"content-length: {len(body)}".encode() in head
    fields = json.loads(body)
    assert (fields["prompt"], fields["max_tokens"], "ignore_eos" in fields) == ([5, 6], 7, False)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://h", "http://", "http://h:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not an address like"):
        normalised(url)

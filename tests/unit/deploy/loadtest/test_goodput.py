"""A search sends the rate it says, and keeps what it found when it cannot go on."""

from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from cluster.errors import ConfigError, Unavailable
from deploy.loadtest import command, goodput, workload
from deploy.loadtest.conduct import Site
from deploy.loadtest.document import Question
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.measures import Terms
from deploy.loadtest.run import LoadPlan, LoadRun
from deploy.loadtest.search import SearchPlan
from deploy.loadtest.words import Document, Outcome, Send, Slo, WorkloadSpec
from tests.unit.deploy.loadtest.records import record

PLAN = SearchPlan(start_rate=4.0, max_rate=8.0, max_requests=50)


class Probes:
    """Stands for the endpoint: meets the objective, and ends the second run as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, second: str = "complete") -> None:
        self.rates: list[float] = []
        self._second = second
        monkeypatch.setattr(goodput, "sends_of", self.sends_of)
        monkeypatch.setattr(goodput, "measure", self.measure)

    def find(self) -> Document:
        question = Question(
            WorkloadSpec("poisson:rate=1"), 0, LoadPlan(), Terms(Slo(ttft_s=0.5)), "ours"
        )
        # No prompt is made here.
        site = Site(Endpoint("http://127.0.0.1:1", "m"), None, 2048)  # type: ignore[arg-type]
        return goodput.find(site, question, PLAN, lambda _line: None)

    def sends_of(self, site: Site, question: Question) -> list[Send]:
        planned = workload.plan(question.spec, site.context, Random(question.seed))
        return [Send(each.at_s, (1,), 1) for each in planned]

    def measure(self, _site: Site, question: Question, sends: Sequence[Send]) -> LoadRun:
        self.rates.append((len(sends) - 1) / (sends[-1].at_s - sends[0].at_s))
        ending = self._second if len(self.rates) == 2 else "complete"
        if ending == "raises":
            raise Unavailable("nobody there")
        records = [record(send.at_s, [send.at_s + 0.1]) for send in sends]
        for each in records:
            if ending == "late":
                each.sent_s = each.scheduled_s + 0.05
            each.outcome = Outcome.COMPLETED
            assert question.plan.is_decided is not None
            question.plan.is_decided(each)
        run = LoadRun(records, datetime(2026, 1, 1, tzinfo=UTC), duration_s=10.0)
        if ending in ("broken", "interrupted"):
            run.state = run.why = ending
        return run


def test_every_probe_comes_at_the_rate_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(monkeypatch)
    document = probes.find()
    assert probes.rates == pytest.approx([4.0, 8.0])
    assert document["state"] == "complete" and document["goodput"]["rate"] == 8.0
    assert document["faults"] == []


@pytest.mark.parametrize(
    ("second", "state", "says"),
    [
        ("raises", "broken", "nobody there"),
        ("broken", "broken", "http://127.0.0.1:1: broken"),
        ("late", "broken", "the client could not keep up: requests left 50.0 ms late"),
        ("interrupted", "interrupted", "interrupted"),
    ],
)
def test_a_search_that_ends_early_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    second: str,
    state: str,
    says: str,
) -> None:
    document = Probes(monkeypatch, second).find()
    assert document["state"] == state and [p["rate"] for p in document["probes"]] == [4.0]
    assert document["faults"][0].startswith(f"the search ended early: {says}")
    assert document["goodput"] == {"rate": 4.0, "bound": None, "why": document["faults"][0]}
    parsed = Namespace(output=None, html=None)
    assert command._conclude(document, parsed) == (1 if state == "broken" else 130)
    said = capsys.readouterr().err
    assert said == (f"tandem: error: {document['faults'][0]}\n" if state == "broken" else "")


@pytest.mark.parametrize("flag", ["record", "verify"])
def test_answers_of_a_search_are_not_recorded_or_compared(flag: str) -> None:
    flags = {"record": None, "verify": None, flag: Path("answers")}
    parsed = Namespace(workload="poisson", find_goodput=True, **flags)
    with pytest.raises(ConfigError, match="it does not go with --record or --verify"):
        command.run_loadtest(None, parsed)

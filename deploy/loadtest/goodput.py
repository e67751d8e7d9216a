"""`tandem loadtest --find-goodput`: the highest rate at which enough requests meet objectives."""

import time
from dataclasses import asdict, dataclass, replace

from cluster.errors import ConfigError, TandemError, Unavailable
from deploy.loadtest import workload
from deploy.loadtest.conduct import Say, Site, measure, sends_of
from deploy.loadtest.document import Question, document_of
from deploy.loadtest.run import LoadRun
from deploy.loadtest.search import (
    Found,
    Measure,
    Probe,
    SearchPlan,
    interval,
    is_hopeless,
    next_step,
    so_far,
    verdict,
)
from deploy.loadtest.words import Document, Outcome, RequestRecord, Slo, WorkloadSpec

# What a probe that was cut leaves behind: the endpoint ends requests whose clients are gone.
_SETTLE_S = 2.0
_MEASURE_OF_RATE = 200


@dataclass(slots=True)
class _Best:
    """The document of the highest rate that was met, else of the last probe."""

    rate: float = -1.0
    document: Document | None = None


def find(site: Site, question: Question, plan: SearchPlan, say: Say) -> Document:
    """Search; return the best probe's document with every probe and the result in it.

    A search that cannot go on keeps its probes and the highest rate that was met until then, and
    says why in its first fault. Raise `TandemError` if nothing was measured.
    """
    slo = question.terms.slo
    if slo.ttft_s is None and slo.tpot_s is None:
        raise ConfigError("--find-goodput needs --slo-ttft or --slo-tpot")
    if question.plan.concurrency is not None:
        raise ConfigError("--find-goodput searches a rate: it does not go with --concurrency")
    search = _Search(site, question, plan, say)
    return search.run()


class _Search:
    def __init__(self, site: Site, question: Question, plan: SearchPlan, say: Say) -> None:
        self._site = site
        self._question = question
        self._plan = plan
        self._say = say
        self._probes: list[Probe] = []
        self._documents: list[Document] = []
        self._best = _Best()
        self._natural_rate = _natural_rate(site, question)

    def run(self) -> Document:
        try:
            return self._concluded("complete", self._search())
        except TandemError as error:
            if self._best.document is None:
                raise
            return self._broken_off("broken", str(error))
        except KeyboardInterrupt:
            if self._best.document is None:
                raise
            return self._broken_off("interrupted", "interrupted")

    def _search(self) -> Found:
        while isinstance(step := next_step(self._probes, self._plan), Measure):
            self._probe(step)
        return step

    def _broken_off(self, state: str, reason: str) -> Document:
        why = f"the search ended early: {reason}"
        self._say(f"{why}; its probes so far are kept")
        document = self._concluded(state, so_far(self._probes, self._plan, why))
        document["faults"] = [why, *document["faults"]]
        return document

    def _concluded(self, state: str, found: Found | None) -> Document:
        document = self._best.document
        assert document is not None
        document["state"] = state
        document["probes"] = self._documents
        document["goodput"] = None if found is None else asdict(found)
        if found is not None:
            self._say(f"goodput: {found.rate:.4g} requests/s ({found.why})")
        return document

    def _probe(self, step: Measure) -> None:
        # Prompts of their own: what an earlier probe left in caches must not help this one.
        seed = self._question.seed + len(self._probes)
        spec = self._spec(step, seed)
        question = replace(self._question, spec=spec, seed=seed)
        sends = sends_of(self._site, question)
        judge = Judge(self._question.terms.slo, len(sends), self._plan)
        question = replace(
            question, plan=replace(question.plan, is_decided=judge.is_decided, keeps_text=False)
        )
        self._say(f"{step.rate:.4g} requests/s: {len(sends)} requests")
        run = measure(self._site, question, sends)
        document = document_of(question, self._site.endpoint, run)
        # Better than nothing, should there be no other.
        self._best.document = self._best.document or document
        self._require_sound(document, run)
        probe = Probe(step.rate, judge.num_met, judge.num_judged, run.state == "cut")
        self._probes.append(probe)
        self._note(probe, document)
        if probe.is_cut:
            time.sleep(_SETTLE_S)

    def _spec(self, step: Measure, seed: int) -> WorkloadSpec:
        """Return the workload sped up by what its own requests need to come at the rate."""
        spec = replace(self._question.spec, num_requests=step.num_requests, duration_s=None)
        natural_rate = workload.rate_of(spec, self._site.context, seed) or self._natural_rate
        return replace(spec, time_scale=spec.time_scale * step.rate / natural_rate)

    def _require_sound(self, document: Document, run: LoadRun) -> None:
        if run.state == "interrupted":
            raise KeyboardInterrupt  # the run took the signal
        if run.state == "broken":
            raise Unavailable(f"{self._site.endpoint.url}: {run.why}")
        late = document["scheduling"]
        if not late["kept_up"]:
            raise TandemError(
                f"the client could not keep up: requests left {late['p99_s'] * 1e3:.1f} ms late "
                f"at p99, more than {late['limit_s'] * 1e3:g} ms: give it a core"
            )

    def _note(self, probe: Probe, document: Document) -> None:
        same = [each for each in self._probes if each.rate == probe.rate]
        said = verdict(same, self._plan)
        low, high = interval(probe.num_met, probe.num_requests)
        share = probe.num_met / probe.num_requests if probe.num_requests else 0.0
        self._documents.append(
            {
                "rate": probe.rate,
                "attainment": share,
                "met": probe.num_met,
                "requests": probe.num_requests,
                "low": low,
                "high": high,
                "verdict": str(said),
                "is_cut": probe.is_cut,
                "summary": document["summary"],
            }
        )
        cut = ", ended early" if probe.is_cut else ""
        self._say(f"  {share:.1%} met, 95 % between {low:.1%} and {high:.1%}{cut}: {said}")
        rate = probe.rate if said == "met" else 0.0
        if rate >= self._best.rate:
            self._best = _Best(rate, document)


def _natural_rate(site: Site, question: Question) -> float:
    """Return the workload's own mean rate, from its first requests."""
    spec = question.spec
    count = spec.num_requests or _MEASURE_OF_RATE
    rate = workload.rate_of(replace(spec, num_requests=count), site.context, question.seed)
    if rate is None:
        raise ConfigError(
            f"workload {spec.text!r}: its requests come all at once, so it has no rate"
        )
    return rate


class Judge:
    """Follows a probe's requests and says when it cannot be met any more."""

    def __init__(self, slo: Slo, num_requests: int, plan: SearchPlan) -> None:
        self._slo = slo
        self._num_requests = num_requests
        self._plan = plan
        self.num_met = 0
        self.num_judged = 0

    def is_decided(self, record: RequestRecord) -> bool:
        if record.outcome is Outcome.UNFINISHED:
            return False
        self.num_judged += 1
        self.num_met += all(self._slo.met_by(record))
        return is_hopeless(self.num_judged - self.num_met, self._num_requests, self._plan)

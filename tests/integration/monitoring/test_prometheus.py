"""A real Prometheus scrapes a live deployment that serves and grows, and answers every query."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests import monitoring
from tests.integration.deploy.launcher import Launcher, serving
from tests.integration.deploy.test_lifecycle import name
from tests.integration.deploy.test_operating import flags
from tests.integration.monitoring.prometheus import Prometheus, configuration, prometheus
from tests.paced_load import LoadReport, paced_load
from tests.served import wait_until

pytestmark = pytest.mark.timeout(300)

SETTINGS = {
    "simulated.decode_step_s": "0.02",
    "autoscaler.mode": "advise",
    "autoscaler.target_per_worker": "50",
    "autoscaler.decision_period_s": "1",
    "autoscaler.metric_window_s": "4",
    "autoscaler.arrival_window_s": "4",
    "autoscaler.slo_ttft_s": "2",
    "autoscaler.slo_tbt_s": "0.5",
    "autoscaler.soft_in_s": "1",
    "autoscaler.max_prefill": "2",
    "autoscaler.max_decode": "2",
}
REQUESTS_PER_S, PROMPT_TOKENS, OUTPUT_TOKENS = 10.0, 300, 20

# Queries without a number after a run in which nothing went wrong, with the reason. Whatever
# else is empty is a fault, and so is one of these that has something to say.
EMPTY = {
    "tandem-autoscaler.json: Utilisation: B": "this deployment is sized by tokens per second",
    "tandem-overview.json: Keys refused, by cause: A": "this deployment asks for no API keys",
}


@dataclass(frozen=True)
class Watched:
    """A deployment that has served and grown, and the Prometheus that watched it."""

    launcher: Launcher
    server: Prometheus
    load: LoadReport
    at: float  # Unix seconds, under load with every signal known

    def ask(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Return the values of a dashboard's query, as Grafana would ask it."""
        filled = expr.replace("$deployment", self.launcher.name)
        return self.server.query(filled.replace("$__rate_interval", "1m"), self.at)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    launcher = Launcher(name("watched"), flags=flags(**SETTINGS))
    with serving(launcher):
        config = configuration(launcher.url.removeprefix("http://"), launcher.name)
        with prometheus(tmp_path_factory.mktemp("prometheus"), config) as server:
            wait_until(lambda: len(server.targets("tandem")) == 4, 20.0, "all are found")
            yield Watched(launcher, server, *_serve_and_grow(launcher, server))


def _serve_and_grow(launcher: Launcher, server: Prometheus) -> tuple[LoadReport, float]:
    """Add a decode worker under load; return what the load saw, and a moment under it."""
    over = threading.Event()
    reports: list[LoadReport] = []

    def send() -> None:
        load = PROMPT_TOKENS, OUTPUT_TOKENS, over.is_set
        run = paced_load(launcher.url, "tandem-tiny", lambda _at_s: REQUESTS_PER_S, *load)
        reports.append(asyncio.run(run))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        scaled = launcher.run("scale", "--decode", "2", "--wait")
        assert scaled.returncode == 0, scaled.stderr
        _cancel_one(launcher)
        seen = (
            'tandem_workers{pool="decode",state="ready"} == 2',
            'count(up{component="worker"} == 1) == 3',
            'tandem_signal{signal="ttft"}',
            "deployment:tandem_slo_burn:rate6h",
            'sum(tandem_cancellations_total{stage="decode"}) == 1',
        )
        wait_until(lambda: all(map(server.has, seen)), 20.0, f"Prometheus has {seen}")
        at = time.time()
    finally:
        over.set()
        sender.join()
    (report,) = reports
    assert report.failures == []
    # What a request is held against is counted last.
    done = f"sum(tandem_slo_requests_total) == {report.num_sent}"
    wait_until(lambda: server.has(done), 10.0, f"is counted: {done}")
    return report, at


def _cancel_one(launcher: Launcher) -> None:
    body = {"model": "tandem-tiny", "prompt": [1] * 64, "max_tokens": 2000, "stream": True}
    with httpx.stream("POST", f"{launcher.url}/v1/completions", json=body) as response:
        next(response.iter_lines())


def test_what_is_scraped_is_what_the_endpoint_lists(watched: Watched) -> None:
    listed = httpx.get(f"{watched.launcher.url}/admin/targets").json()
    labels = {group["targets"][0]: group["labels"] for group in listed}
    scraped = watched.server.targets("tandem")
    assert set(scraped) == set(labels)
    for address, target in scraped.items():
        assert target["health"] == "up", target
        got = {k: v for k, v in target["labels"].items() if k not in {"job", "instance"}}
        assert got == labels[address]
        assert got["deployment"] == watched.launcher.name
    workers = {each.get("worker_id"): each.get("role") for each in labels.values()}
    assert {"prefill-1": "prefill", "decode-1": "decode", "decode-2": "decode"}.items() <= (
        workers.items()
    )
    components = sorted(each["component"] for each in labels.values())
    assert components == ["controller", "router", "worker", "worker", "worker"]


def test_nothing_is_counted_twice(watched: Watched) -> None:
    sent = watched.load.num_sent
    assert watched.server.value("sum(tandem_arrived_total)") == sent + 1, "and the cancelled one"
    assert watched.server.value('sum(tandem_requests_total{outcome="length"})') == sent
    tokens = watched.server.value("sum(tandem_output_tokens_total)")
    assert tokens is not None and tokens >= sent * OUTPUT_TOKENS
    assert watched.server.value("sum(tandem_ttft_seconds_count)") == sent + 1


def test_every_query_of_a_dashboard_says_something(watched: Watched) -> None:
    empty = [a.where for a in monitoring.of_dashboards() if not watched.ask(a.expr)]
    assert sorted(empty) == sorted(EMPTY)


def test_every_rule_is_evaluated_and_nothing_is_wrong(watched: Watched) -> None:
    shipped = sum(1 for _ in monitoring.rules())

    def evaluated() -> list[dict[str, str]] | None:
        groups = watched.server.get("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else None

    found = wait_until(evaluated, 10.0, "every rule has been evaluated")
    assert len(found) == shipped
    assert [rule["name"] for rule in found if rule["health"] != "ok"] == []
    assert watched.server.query('ALERTS{alertstate="firing"}') == {}, "a deployment that is well"
    recorded = {rule["record"] for _, rule in monitoring.rules() if "record" in rule}
    assert [record for record in sorted(recorded) if not watched.server.query(record)] == []


def test_the_queries_of_alerts_find_what_they_compare(watched: Watched) -> None:
    """An alert that compares series nobody has would be quiet for ever."""
    names = {
        metric
        for asked in monitoring.of_rules()
        for metric, _ in asked.selectors()
        if not metric.startswith("deployment:")
    }
    never = [metric for metric in sorted(names) if not watched.server.query(metric)]
    assert never == []


def test_a_worker_taken_out_is_not_scraped_any_more(watched: Watched) -> None:
    scaled = watched.launcher.run("scale", "--decode", "1", "--wait")
    assert scaled.returncode == 0, scaled.stderr

    workers = 'count(up{component="worker"})'
    wait_until(lambda: watched.server.value(workers) == 2, 20.0, "its target is gone")


def test_an_endpoint_that_stops_raises_the_alert(watched: Watched) -> None:
    """Last: ends the deployment. The alert waits for 30 s before it fires."""
    assert watched.launcher.signal(signal.SIGINT) == 0, watched.launcher.log
    raised = f'ALERTS{{alertname="TandemEndpointDown",deployment="{watched.launcher.name}"}}'
    wait_until(lambda: watched.server.has(raised), 10.0, "the alert is pending")

"""`tandem demo`: replays a slice of a real trace against a deployment and reports."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from cluster.config import TandemConfig
from deploy.access import Access
from deploy.loadtest.command import show
from deploy.loadtest.endpoint import discover
from deploy.loadtest.live import watching
from deploy.loadtest.pace import prepare
from deploy.loadtest.prompts import FileTokenizer
from deploy.loadtest.run import LoadPlan, run_load
from deploy.loadtest.words import RequestRecord, WorkloadSpec
from deploy.loadtest.workload import build
from deploy.report import faults, rows
from deploy.signals import Interrupted

_MAX_OUTPUT = 128
_REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How much of the trace is replayed, and how many times as fast."""

    num_requests: int
    rate_scale: float


def run(config: TandemConfig, access: Access, plan: DemoPlan) -> int:
    """Replay, print the report, return the exit status: 1 if anything was lost or wasted."""
    endpoint = discover(access, config.model.name)
    context = endpoint.context_tokens
    assert context is not None, "our endpoints say it"
    workload = f"azure:max_output={min(_MAX_OUTPUT, context // 4)}"
    spec = WorkloadSpec(workload, time_scale=plan.rate_scale, num_requests=plan.num_requests)
    sends = build(spec, FileTokenizer(config.model.path), context, Random(0))
    print(f"dashboard: {access.url}/dashboard")
    print(f"replaying {len(sends)} requests over {sends[-1].at_s:.0f} s", flush=True)
    jobs = prepare(endpoint, sends, None)
    with watching("replay") as watch:
        done = run_load(endpoint, jobs, LoadPlan(timeout_s=_REQUEST_TIMEOUT_S), watch)
    if done.state == "interrupted":
        raise Interrupted
    routed = _routed(access, done.records)
    show(rows(done.records, routed, done.duration_s))
    wrong = faults(done.records, routed)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _routed(access: Access, records: Sequence[RequestRecord]) -> dict[int, dict[str, Any]]:
    """Return the router's own records of the requests, by index; those it has none of are left
    out."""
    routed = {}
    for record in records:
        if record.id is None:
            continue
        try:
            answer = access.get(f"/admin/requests/{record.id}", _REQUEST_TIMEOUT_S)
            if answer.status_code == 200:
                routed[record.index] = answer.json()
        except (httpx.HTTPError, ValueError):
            continue
    return routed

"""One simulated deployment scraped as Prometheus would: targets follow, and the numbers add up."""

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import DECLARED
from cluster.names import Component
from tests.integration.deploy.test_lifecycle import name
from tests.served import Served, tandem, wait_until

pytestmark = pytest.mark.timeout(300)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
FLAGS: dict[str, Any] = {
    "model__engine": "simulated",
    "router__proxy": "serve",
    "handoff__stall_timeout_s": 0.5,
    "autoscaler__soft_in_s": 1.0,
    "autoscaler__slo_ttft_s": 30.0,
    "autoscaler__slo_tbt_s": 10.0,
}
NAME = name("metrics")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tandem(NAME, **FLAGS) as served:
        yield served


def scale(decode: int) -> None:
    command = [sys.executable, "-m", "deploy.cli", "scale", "--name", NAME]
    command += ["--decode", str(decode), "--wait"]
    subprocess.run(command, check=True, timeout=120)


def targets(served: Served) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of the target list by component."""
    found: dict[str, list[dict[str, Any]]] = {each.value: [] for each in Component}
    for group in served.client.get("/admin/targets").json():
        found[group["labels"]["component"]].append(group)
    return found


def workers(served: Served) -> dict[str, str]:
    """Return the role of each worker on the list."""
    labels = (group["labels"] for group in targets(served)["worker"])
    return {each["worker_id"]: each["role"] for each in labels}


def scrape(group: dict[str, Any]) -> Samples:
    (address,) = group["targets"]
    text = httpx.get(f"http://{address}/metrics", timeout=10).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(served: Served, component: Component, name: str, **labels: str) -> float:
    """Return the sum of one series over every process of the component."""
    key = f"tandem_{name}", frozenset(labels.items())
    return sum(scrape(each).get(key, 0.0) for each in targets(served)[component.value])


async def load(served: Served, num: int, leave_after: int | None) -> None:
    """Stream `num` completions at once; clients leave after so many lines, long before the end,
    or stay."""

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = {"model": served.model, "prompt": [7 + index] * 200, "stream": True}
        body |= {"max_tokens": 40 if leave_after is None else 250, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            num_seen = 0
            async for _ in response.aiter_lines():
                num_seen += 1
                if leave_after is not None and num_seen > leave_after:
                    return

    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        await asyncio.gather(*(one(client, index) for index in range(num)))


def test_every_process_is_a_target_and_shows_what_is_declared(served: Served) -> None:
    served.complete([5] * 64, max_tokens=4)
    found = targets(served)
    counts = {component: len(groups) for component, groups in found.items() if groups}
    assert counts == {"controller": 1, "router": 1, "worker": 2}
    for component, groups in found.items():
        for group in groups:
            assert group["labels"]["deployment"] == NAME and group["labels"]["node"]
            names = {key[0] for key in scrape(group) if key[0].startswith("tandem_")}
            own = {Component.EVERY, component}
            declared = tuple(each.name for each in DECLARED if each.component in own)
            assert names and all(each.startswith(declared) for each in names)
            assert any(key[0] == "process_resident_memory_bytes" for key in scrape(group))
    assert sorted(workers(served).values()) == ["decode", "prefill"]


def test_the_list_follows_a_scale(served: Served) -> None:
    scale(decode=2)
    wait_until(lambda: len(workers(served)) == 3, 30, "the new worker is on the list")
    assert workers(served)["decode-2"] == "decode"
    wait_until(
        lambda: total(served, Component.CONTROLLER, "workers", pool="decode", state="ready") == 2,
        10,
        "the controller says so",
    )
    started = {"action": "start"}
    assert total(served, Component.CONTROLLER, "actions_total", **started) == 3
    assert total(served, Component.CONTROLLER, "action_seconds_count", **started) == 3
    assert total(served, Component.CONTROLLER, "ready_ratio") == 0.5
    assert total(served, Component.CONTROLLER, "final_target_workers", pool="decode") == 2
    wait_until(
        lambda: total(served, Component.ROUTER, "ready_links", pool="decode") == 2,
        10,
        "the router has found it",
    )


def test_the_numbers_add_up_and_nothing_leaks(served: Served) -> None:
    asyncio.run(load(served, 12, None))
    asyncio.run(load(served, 12, 3))

    def totals() -> dict[str, Any] | None:
        document = served.client.get("/debug/pinned").json()
        return None if document["totals"]["open"] else document["totals"]

    admin = wait_until(totals, 20, "every request has ended")
    requests = served.client.get("/admin/requests?limit=10000").json()["requests"]
    outcomes: dict[str, int] = admin["outcomes"]
    assert outcomes["length"] >= 12 and outcomes["cancelled"] == 12
    for outcome, count in outcomes.items():
        assert total(served, Component.ROUTER, "requests_total", outcome=outcome) == count
    for origin, count in admin["prompt_tokens"].items():
        assert total(served, Component.ROUTER, "prompt_tokens_total", origin=origin) == count
    sums = {
        "arrived_total": sum(outcomes.values()),
        "input_tokens_total": sum(each["num_prompt_tokens"] for each in requests),
        "output_tokens_total": sum(each["output_tokens"] for each in requests),
        "handoff_bytes_total": admin["handoff_bytes"]["received"],
        "e2e_seconds_count": outcomes["length"],
        "ttft_seconds_count": sum(each["ttft_s"] is not None for each in requests),
        "queue_seconds_count": sum(each["queue_s"] is not None for each in requests),
        "slo_requests_total": outcomes["length"],
    }
    assert {key: total(served, Component.ROUTER, key) for key in sums} == sums
    ttft_s = sum(each["ttft_s"] for each in requests if each["ttft_s"] is not None)
    assert math.isclose(total(served, Component.ROUTER, "ttft_seconds_sum"), ttft_s, rel_tol=1e-6)
    met = total(served, Component.ROUTER, "slo_met_total", objective="both")
    assert met == outcomes["length"]
    _workers_agree(served, admin)


def _workers_agree(served: Served, admin: dict[str, Any]) -> None:
    def is_at_rest() -> bool:
        pinned = total(served, Component.WORKER, "pinned_blocks")
        free = total(served, Component.WORKER, "free_blocks")
        return pinned == 0 and free == total(served, Component.WORKER, "blocks") > 0

    wait_until(is_at_rest, 20, "every block is free")
    received = total(served, Component.WORKER, "kv_bytes_total", direction="received")
    assert received == total(served, Component.WORKER, "kv_bytes_total", direction="sent")
    # The warm-up hands over too, on no router's account.
    assert received > admin["handoff_bytes"]["received"] > 0
    cancelled = {
        stage: total(served, Component.WORKER, "cancellations_total", stage=stage)
        for stage in ("prefill", "decode")
    }
    assert sum(cancelled.values()) == admin["outcomes"]["cancelled"]
    for stage in ("gather", "wait", "pull", "verify", "scatter"):
        assert total(served, Component.WORKER, "handoff_stage_seconds_count", stage=stage) > 0


def test_a_worker_that_leaves_is_no_target(served: Served) -> None:
    scale(decode=1)
    wait_until(lambda: len(workers(served)) == 2, 60, "the worker has left the list")

    def is_timed() -> bool:
        drains = {"action": "drain"}
        return total(served, Component.CONTROLLER, "action_seconds_count", **drains) == 1

    wait_until(is_timed, 10, "the controller has timed it")
    # The others have been at rest for long enough to tell.
    assert total(served, Component.WORKER, "leaked_blocks") == 0

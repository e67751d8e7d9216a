"""Run documents as `tandem loadtest` writes them, made up: a queue before a few servers."""

import heapq
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from deploy.loadtest.words import FORMAT

Document = dict[str, Any]


def run_document(
    label: str = "http://127.0.0.1:8000",
    num_requests: int = 40,
    slots: int = 4,
    seed: int = 0,
    faults: Sequence[str] = (),
    phases: Mapping[str, tuple[float, float]] | None = None,
    **changed: Any,
) -> Document:
    """Return a document whose requests wait for one of `slots`; `changed` replaces parts of it."""
    rng = Random(seed)
    requests = _requests(rng, num_requests, slots)
    length_s = max(request["end_s"] for request in requests)
    spans = phases or {}
    document: Document = {
        "format": FORMAT,
        "label": label,
        "started_at": "2025-11-21T06:00:00.000+00:00",
        "state": "complete",
        "workload": {
            "spec": "poisson:rate=4",
            "time_scale": 1.0,
            "rate_scale": 1.0,
            "length_scale": None,
            "requests": num_requests,
            "duration_s": requests[-1]["scheduled_s"],
            "prompt_tokens": sum(request["prompt_tokens"] for request in requests),
            "output_tokens": sum(request["output_tokens"] for request in requests),
            "seed": seed,
        },
        "endpoint": {
            "url": "http://127.0.0.1:8000",
            "model": "tandem-tiny",
            "api": "completions",
            "context_tokens": 2048,
        },
        "settings": {
            "mode": "open",
            "concurrency": None,
            "slo_ttft_s": 0.5,
            "slo_tpot_s": 0.03,
            "worker_hour_price": None,
            "verify": None,
        },
        "scheduling": {
            "p50_s": 0.0004,
            "p99_s": 0.0012,
            "max_s": 0.003,
            "limit_s": 0.01,
            "kept_up": True,
        },
        "summary": summary(requests, length_s),
        "phases": [
            {
                "name": name,
                "begin_s": begin_s,
                "end_s": end_s,
                "summary": summary(
                    [r for r in requests if begin_s <= r["scheduled_s"] < end_s], end_s - begin_s
                ),
            }
            for name, (begin_s, end_s) in spans.items()
        ],
        "pools": [[float(t), 1 + (t > length_s / 2), 2] for t in range(int(length_s) + 1)],
        "faults": list(faults),
        "requests": requests,
    }
    return document | changed


def _requests(rng: Random, count: int, slots: int) -> list[Document]:
    free_at = [0.0] * slots
    at_s, requests = 0.0, []
    for index in range(count):
        at_s += rng.expovariate(4.0)
        prompt, output = rng.randint(32, 1024), rng.randint(4, 64)
        begin_s = max(at_s, heapq.heappop(free_at))
        gap_s = rng.uniform(0.012, 0.022)
        first_s = begin_s + 0.03 + prompt * 1e-4
        token_s = [first_s + number * gap_s for number in range(output)]
        heapq.heappush(free_at, token_s[-1])
        ttft_s = first_s - at_s
        requests.append(
            {
                "index": index,
                "phase": "",
                "session": None,
                "turn": 0,
                "scheduled_s": at_s,
                "sent_s": at_s + rng.uniform(1e-4, 1e-3),
                "end_s": token_s[-1] + 0.001,
                "prompt_tokens": prompt,
                "output_tokens": output,
                "counted_prompt_tokens": prompt,
                "received_tokens": output,
                "token_s": token_s,
                "token_counts": list(range(1, output + 1)),
                "ttft_s": ttft_s,
                "tpot_s": gap_s,
                "e2e_s": token_s[-1] - at_s,
                "met": ttft_s <= 0.5 and gap_s <= 0.03,
                "outcome": "completed",
                "error": None,
                "id": f"cmpl-{index}",
            }
        )
    return requests


def _spread(values: Sequence[float]) -> Document | None:
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90)}
    tail = {"p95": ordered[-1], "p99": ordered[-1], "max": ordered[-1]}
    return {"mean": sum(ordered) / len(ordered), **ranks, **tail}


def summary(requests: Sequence[Document], length_s: float) -> Document:
    met = sum(request["met"] for request in requests)
    tokens = sum(request["received_tokens"] for request in requests)
    share = met / len(requests) if requests else None
    return {
        "requests": len(requests),
        "completed": len(requests),
        "lost": 0,
        "truncated": 0,
        "wrong": 0,
        "duration_s": length_s,
        "offered_rate": len(requests) / length_s,
        "request_rate": len(requests) / length_s,
        "output_token_rate": tokens / length_s,
        "prompt_token_rate": sum(request["prompt_tokens"] for request in requests) / length_s,
        **{
            name: _spread([request[name] for request in requests])
            for name in ("ttft_s", "tpot_s", "e2e_s")
        },
        "itl_s": _spread([request["tpot_s"] for request in requests]),
        "normalised_s": _spread([r["e2e_s"] / r["received_tokens"] for r in requests]),
        "slo": {
            "attainment": share,
            "ttft_attainment": share,
            "tpot_attainment": share,
            "goodput": met / length_s,
        },
        "fluidity": None,
        "worker_seconds": {"prefill": length_s, "decode": 2 * length_s, "total": 3 * length_s},
        "cost": None,
    }

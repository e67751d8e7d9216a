"""Promise 4: a cancelled request frees its blocks on both sides, whatever stage it was in."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from cluster.names import Stage
from tests.prompts import prompt_of
from tests.served import Served, wait_until

pytestmark = pytest.mark.e2e

NUM_REQUESTS = 200
NUM_IN_FLIGHT = 24
MIN_PER_STAGE = 10
MAX_ROUNDS = 4
FREED_WITHIN_S = 1.0
STAGES = (Stage.QUEUED, Stage.PREFILL, Stage.TRANSFER, Stage.DECODE)
PROMPTS = [prompt_of(length, seed=500 + length) for length in (40, 300, 700, 1100, 1500, 1800)]
PARAMETERS = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.0}


@dataclass(frozen=True)
class Plan:
    """One request: which prompt, and the stage to leave in, None to stay."""

    prompt: int
    leave_in: Stage | None


def plans(num: int, rng: random.Random) -> list[Plan]:
    """Every third request is cancelled, in a stage chosen at random."""
    return [
        Plan(rng.randrange(len(PROMPTS)), rng.choice(STAGES) if number % 3 == 0 else None)
        for number in range(num)
    ]


class Client:
    """Streams completions, and leaves when the request's record shows the wanted stage."""

    def __init__(self, http: httpx.AsyncClient, served: Served, rng: random.Random) -> None:
        self._http = http
        self._served = served
        self._rng = rng
        self._slots = asyncio.Semaphore(NUM_IN_FLIGHT)
        self.request_ids: list[str] = []

    async def run(self, plan: Plan) -> list[int] | None:
        """Return the tokens of a request that stayed, None for one that left."""
        async with self._slots:
            request_id = uuid.uuid4().hex
            stream = asyncio.create_task(self._stream(request_id, PROMPTS[plan.prompt]))
            if plan.leave_in is None:
                return await stream
            await self._wait_for(request_id, plan.leave_in, stream)
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)
            self.request_ids.append(request_id)
            return None

    async def _stream(self, request_id: str, prompt: list[int]) -> list[int]:
        body = {
            "model": self._served.model,
            "prompt": prompt,
            "stream": True,
            "return_token_ids": True,
            **PARAMETERS,
        }
        headers = {"x-request-id": request_id}
        tokens: list[int] = []
        async with self._http.stream(
            "POST", "/v1/completions", json=body, headers=headers
        ) as response:
            assert response.status_code == 200, await response.aread()
            async for chunk in _chunks(response):
                for choice in chunk["choices"]:
                    tokens += choice.get("token_ids") or []
        return tokens

    async def _wait_for(self, request_id: str, stage: Stage, stream: asyncio.Task[object]) -> None:
        """Return in `stage`, or past it: what was hit is read from the record afterwards."""
        wanted = STAGES.index(stage)
        while not stream.done():
            response = await self._http.get(f"/admin/requests/{request_id}")
            if response.status_code == 200:
                reached = Stage(response.json()["sequences"][0]["stage"])
                if reached is Stage.FINISHED or STAGES.index(reached) >= wanted:
                    break
            await asyncio.sleep(self._rng.uniform(0.0, 0.004))


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, list[dict[str, list[int]]]]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield httpx.Response(200, content=line[6:]).json()


def left_in(served: Served, request_id: str) -> Stage | None:
    """Return the stage the record says a request was cancelled in."""
    (sequence,) = served.record(request_id)["sequences"]
    if sequence["outcome"] != "cancelled":
        return None
    after = {
        "arrived": Stage.QUEUED,
        "placed": Stage.PREFILL,
        "prefilled": Stage.TRANSFER,
        "first_token": Stage.DECODE,
    }
    return after[sequence["events"][-2]["event"]]


def is_level(served: Served) -> bool:
    """Whether every engine's block pool is as after its start, and nothing is reserved."""
    document = served.client.get("/debug/pinned").json()
    free = [
        w["blocks"] - w["free_blocks"] == 1 and w["held_blocks"] == 0 for w in document["workers"]
    ]
    return all(free) and document["open_reservations"] == 0


async def cancel_a_third(
    served: Served, rng: random.Random
) -> tuple[list[Plan], Client, list[object]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=served.url, timeout=120.0, limits=limits) as http:
        client, chosen = Client(http, served, rng), plans(NUM_REQUESTS, rng)
        answers = await asyncio.gather(*map(client.run, chosen), return_exceptions=True)
    return chosen, client, list(answers)


@pytest.mark.timeout(600)
def test_cancelled_requests_free_their_blocks_in_every_stage(disaggregated: Served) -> None:
    expected = [disaggregated.tokens(prompt, max_tokens=24, ignore_eos=True) for prompt in PROMPTS]
    wait_until(lambda: is_level(disaggregated), 10, "level before the test")
    rng = random.Random(8)
    hits: Counter[Stage] = Counter()
    for _ in range(MAX_ROUNDS):
        chosen, client, answers = asyncio.run(cancel_a_third(disaggregated, rng))
        wait_until(
            lambda: is_level(disaggregated),
            FREED_WITHIN_S,
            f"blocks free on both sides: {disaggregated.workers()}",
        )
        for plan, answer in zip(chosen, answers, strict=True):
            if plan.leave_in is None:
                assert answer == expected[plan.prompt]
        hits.update(filter(None, (left_in(disaggregated, id_) for id_ in client.request_ids)))
        if all(hits[stage] >= MIN_PER_STAGE for stage in STAGES):
            break
    assert all(hits[stage] >= MIN_PER_STAGE for stage in STAGES), hits


def test_nothing_is_recomputed_without_faults(disaggregated: Served) -> None:
    metrics = disaggregated.client.get("/admin/requests?limit=10000").json()["requests"]
    finished = [record for record in metrics if record["outcome"] in ("length", "stop")]
    worst = max((record["prompt_tokens"] or {}).get("recomputed", 0) for record in finished)
    assert worst <= 1

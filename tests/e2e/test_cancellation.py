"""Promise 4: a cancelled request frees its blocks on both sides, whatever stage it was in."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from cluster.names import Stage
from tests.prompts import prompt_of
from tests.served import Served, wait_until

pytestmark = pytest.mark.alone

NUM_REQUESTS = 200
NUM_IN_FLIGHT = 24
MIN_PER_STAGE = 10
MAX_ROUNDS = 8
FREED_WITHIN_S = 1.0
STAGES = (Stage.QUEUED, Stage.PREFILL, Stage.TRANSFER, Stage.DECODE)
ORDER = (*STAGES, Stage.FINISHED)
STAGE_AFTER = {
    "arrived": Stage.QUEUED,
    "placed": Stage.PREFILL,
    "prefilled": Stage.TRANSFER,
    "decoding": Stage.DECODE,
}
PROMPTS = [prompt_of(length, seed=500 + length) for length in (40, 300, 700, 1100, 1500, 1800)]
PARAMETERS = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.0}


class Client:
    """Streams completions; every third leaves, in the stage that was left least often so far.

    `hits` counts the stages that requests really left in, as their records say.
    """

    def __init__(
        self, http: httpx.AsyncClient, served: Served, rng: random.Random, hits: Counter[Stage]
    ) -> None:
        self._http = http
        self._served = served
        self._rng = rng
        self._hits = hits
        self._slots = asyncio.Semaphore(NUM_IN_FLIGHT)
        # A poll comes too late for a short queue: leaving in it is timed by where others left.
        self._time_in_queue_s = 0.02

    async def run(self, number: int, prompt: int) -> list[int] | None:
        """Return the tokens of a request that stayed, None for one that left."""
        async with self._slots:
            request_id = uuid.uuid4().hex
            stream = asyncio.create_task(self._stream(request_id, PROMPTS[prompt]))
            if number % 3:
                return await stream
            stage = min(STAGES, key=self._hits.__getitem__)
            await self._wait_for(stage, request_id, stream)
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)
            self._learn(stage, await self._left_in(request_id))
            return None

    def _learn(self, aimed_at: Stage, left_in: Stage | None) -> None:
        if left_in in STAGES:
            self._hits[left_in] += 1
        if aimed_at is Stage.QUEUED and left_in is not Stage.QUEUED:
            self._time_in_queue_s *= 1.25 if left_in is None else 0.8

    async def _wait_for(self, stage: Stage, request_id: str, stream: asyncio.Task[object]) -> None:
        """Return in `stage`, as near as can be told from here, or past it."""
        if stage is Stage.QUEUED:
            await asyncio.sleep(self._rng.uniform(0.5, 1.5) * self._time_in_queue_s)
            return
        while not stream.done():
            answer = await self._http.get(f"/admin/requests/{request_id}")
            if answer.status_code == 200:
                reached = Stage(answer.json()["sequences"][0]["stage"])
                if ORDER.index(reached) >= ORDER.index(stage):
                    break
            await asyncio.sleep(self._rng.uniform(0.0, 0.004))

    async def _left_in(self, request_id: str) -> Stage | None:
        """Return the stage the record says the request left in, None if it never arrived."""
        while True:
            answer = await self._http.get(f"/admin/requests/{request_id}")
            if answer.status_code == 404:
                return None
            (sequence,) = answer.json()["sequences"]
            if sequence["outcome"] is not None:
                break
            await asyncio.sleep(0.01)
        if sequence["outcome"] != "cancelled":
            return Stage.FINISHED
        events = [entry["event"] for entry in sequence["events"]]
        return next(STAGE_AFTER[event] for event in reversed(events) if event in STAGE_AFTER)

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


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, list[dict[str, list[int]]]]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield httpx.Response(200, content=line[6:]).json()


def is_level(served: Served) -> bool:
    """Whether every engine's block pool is as after its start, and nothing is reserved."""
    document = served.client.get("/debug/pinned").json()
    free = [
        w["blocks"] - w["free_blocks"] == 1 and w["held_blocks"] == 0 for w in document["workers"]
    ]
    return all(free) and document["open_reservations"] == 0


async def cancel_a_third(
    served: Served, chosen: list[int], rng: random.Random, hits: Counter[Stage]
) -> list[object]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=served.url, timeout=120.0, limits=limits) as http:
        client = Client(http, served, rng, hits)
        work = (client.run(number, prompt) for number, prompt in enumerate(chosen))
        return list(await asyncio.gather(*work, return_exceptions=True))


@pytest.mark.timeout(600)
def test_cancelled_requests_free_their_blocks_in_every_stage(disaggregated: Served) -> None:
    expected = [disaggregated.tokens(prompt, max_tokens=24, ignore_eos=True) for prompt in PROMPTS]
    wait_until(lambda: is_level(disaggregated), 10, "level before the test")
    rng = random.Random(8)
    hits: Counter[Stage] = Counter()
    for _ in range(MAX_ROUNDS):
        chosen = rng.choices(range(len(PROMPTS)), k=NUM_REQUESTS)
        answers = asyncio.run(cancel_a_third(disaggregated, chosen, rng, hits))
        wait_until(
            lambda: is_level(disaggregated),
            FREED_WITHIN_S,
            f"blocks free on both sides: {disaggregated.workers()}",
        )
        for number, (prompt, answer) in enumerate(zip(chosen, answers, strict=True)):
            assert answer == (expected[prompt] if number % 3 else None)
        if all(hits[stage] >= MIN_PER_STAGE for stage in STAGES):
            break
    assert all(hits[stage] >= MIN_PER_STAGE for stage in STAGES), hits


def test_nothing_is_recomputed_without_faults(disaggregated: Served) -> None:
    metrics = disaggregated.client.get("/admin/requests?limit=10000").json()["requests"]
    finished = [record for record in metrics if record["outcome"] in ("length", "stop")]
    worst = max((record["prompt_tokens"] or {}).get("recomputed", 0) for record in finished)
    assert worst <= 1

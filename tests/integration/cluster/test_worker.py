"""Two workers with simulated engines over real sockets: whole requests, and each way to end."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import zmq.asyncio

from cluster.config import TandemConfig, parse_config
from cluster.engine import EngineDead
from cluster.messages import (
    Cancel,
    Failed,
    Rejected,
    Tokens,
)
from cluster.names import FinishReason, RequestId, Role, WorkerId
from cluster.request_plane import WorkerLink
from cluster.worker import Worker
from cluster.worker_spec import WorkerSpec
from tests.integration.cluster.two_workers import (
    DEADLY,
    NUM_BLOCKS,
    PROMPT,
    ROLES,
    TIMEOUT_S,
    Cluster,
    MortalEngine,
    Router,
    decode_message,
    held,
    prefill_message,
    tokens_of,
)
from tests.waiting import eventually


@pytest.fixture
def config(tmp_path: Path) -> TandemConfig:
    facts = {"vocab_size": 4096, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return parse_config(
        {
            "model": {"path": str(tmp_path), "chunk_tokens": 64, "block_size": 16},
            "simulated": {
                "num_blocks": NUM_BLOCKS,
                "prefill_tokens_per_s": 5000,
                "decode_step_s": 0.005,
            },
            "handoff": {"chunk_bytes": 8192, "stall_timeout_s": 1.0, "lease_s": 20},
            "router": {"worker_timeout_s": TIMEOUT_S},
        }
    )


@pytest.fixture
async def cluster(config: TandemConfig) -> AsyncIterator[Cluster]:
    workers = {
        role: Worker(
            WorkerSpec(
                WorkerId(f"{role.value}-0"),
                role,
                f"{MortalEngine.__module__}:{MortalEngine.__name__}",
                ROLES,
                config,
                (),
                "127.0.0.1",
            )
        )
        for role in Role
    }
    endpoints = {role: (await worker.start()).endpoint for role, worker in workers.items()}
    runs = {role: asyncio.create_task(worker.run()) for role, worker in workers.items()}
    context = zmq.asyncio.Context()
    yield Cluster(context, workers[Role.PREFILL], workers[Role.DECODE], endpoints, runs)
    for worker in workers.values():
        await worker.stop()
    await asyncio.gather(*runs.values(), return_exceptions=True)
    context.destroy(linger=0)


async def test_disaggregated_equals_local(cluster: Cluster) -> None:
    async with cluster.router() as router:
        for length in (1, 2, 15, 16, 17, 18, 63, 64, 65, 300, 900):
            seed = hashlib.sha256(bytes([length % 256])).digest()
            prompt = tuple(seed[index % 32] + index for index in range(length))
            offer = await router.prefilled(f"p{length}", prompt)
            pulled = await router.generate(f"d{length}", offer, prompt)
            local = await router.generate(f"l{length}", None, prompt)
            assert tokens_of(pulled) == tokens_of(local)
            stats, local_stats = pulled[0].stats, local[0].stats
            assert stats is not None and local_stats is not None
            assert (stats.num_transferred_tokens, stats.num_computed_tokens) == (length - 1, 1)
            assert (local_stats.num_transferred_tokens, local_stats.num_computed_tokens) == (
                0,
                length,
            )
            receipts = [message.receipt for message in pulled if message.receipt]
            assert len(receipts) == (1 if length > 1 else 0)
            router.prefill.forget(RequestId(f"p{length}"))
            router.prefill.send(Cancel(RequestId(f"p{length}")))
        await eventually(router.is_idle)


async def test_wrong_blocks_give_wrong_tokens(cluster: Cluster) -> None:
    """The control of the test above: these tokens do come from the bytes handed over."""
    other = tuple(reversed(PROMPT))
    async with cluster.router() as router:
        offer = await router.prefilled("p", other)
        pulled = await router.generate("d", offer, PROMPT)
        local = await router.generate("l", None, PROMPT)
        assert tokens_of(pulled) != tokens_of(local)


async def test_sixteen_at_once(cluster: Cluster) -> None:
    async with cluster.router() as router:

        async def one(index: int) -> bool:
            prompt = tuple(index + token for token in PROMPT[: 20 + 5 * index])
            offer = await router.prefilled(f"p{index}", prompt)
            pulled = await router.generate(f"d{index}", offer, prompt)
            router.prefill.send(Cancel(RequestId(f"p{index}")))
            local = await router.generate(f"l{index}", None, prompt)
            return tokens_of(pulled) == tokens_of(local)

        assert all(await asyncio.gather(*(one(index) for index in range(16))))
        await eventually(router.is_idle)


# Ends.


async def _cancel_waiting_prefill(router: Router) -> None:
    router.prefill.open(prefill_message("p")).close()


async def _cancel_computing_prefill(router: Router) -> None:
    leg = router.prefill.open(prefill_message("p", tuple(range(1000))))
    await leg.receive()
    leg.close()
    again = router.prefill.open(prefill_message("p"))
    await held(again)
    again.close()


async def _cancel_held(router: Router) -> None:
    leg = router.prefill.open(prefill_message("p"))
    await held(leg)
    leg.close()


async def _cancel_after_release(router: Router) -> None:
    leg = router.prefill.open(prefill_message("p"))
    await router.generate("d", (await held(leg)).offer)
    leg.close()
    leg.close()


async def _cancel_pulling(router: Router) -> None:
    """A pull of a hand-off that no producer has stays where it is until it is cancelled."""
    offer = await router.prefilled("p")
    router.prefill.send(Cancel(RequestId("p")))
    leg = router.decode.open(decode_message("d", offer))
    leg.close()


async def _cancel_first_token(router: Router) -> None:
    offer = await router.prefilled("p")
    with router.decode.open(decode_message("d", offer, num=400)) as leg:
        await leg.receive()
    router.prefill.send(Cancel(RequestId("p")))


async def _cancel_local(router: Router) -> None:
    with router.decode.open(decode_message("d", None, num=400)) as leg:
        await leg.receive()


async def _finish(router: Router) -> None:
    await router.generate("d", None)


@pytest.mark.parametrize(
    "end",
    [
        _cancel_waiting_prefill,
        _cancel_computing_prefill,
        _cancel_held,
        _cancel_after_release,
        _cancel_pulling,
        _cancel_first_token,
        _cancel_local,
        _finish,
    ],
)
async def test_every_way_to_end_frees_every_block(
    cluster: Cluster, end: Callable[[Router], Awaitable[None]]
) -> None:
    async with cluster.router() as router:
        await end(router)

        async def is_idle() -> bool:
            for link in (router.prefill, router.decode):
                link.beat()
            await asyncio.sleep(0.01)
            return await router.is_idle()

        await eventually(is_idle)


async def test_a_pull_that_fails_says_that_it_is_the_handoff(cluster: Cluster) -> None:
    async with cluster.router() as router:
        offer = await router.prefilled("p")
        router.prefill.send(Cancel(RequestId("p")))
        leg = router.decode.open(decode_message("d", offer))
        answer = await leg.receive()
        assert isinstance(answer, Failed)
        assert answer.kind == "handoff" and "refused" in answer.reason
        await eventually(router.is_idle)


# Refusals.


@pytest.mark.parametrize("length", [0, 1025])
async def test_prompts_that_cannot_fit_are_invalid(cluster: Cluster, length: int) -> None:
    prompt = tuple(range(length))
    async with cluster.router() as router:
        for leg in (
            router.prefill.open(prefill_message("p", prompt)),
            router.decode.open(decode_message("d", None, prompt)),
        ):
            answer = await leg.receive()
            assert isinstance(answer, Failed) and answer.kind == "invalid"
            assert f"{length} prompt tokens, 1 to 1024 fit" in answer.reason
        await eventually(router.is_idle)


async def test_the_wrong_leg_is_rejected(cluster: Cluster) -> None:
    async with cluster.router() as router:
        wrong = router.prefill.open(decode_message("d", None))
        assert await wrong.receive() == Rejected(
            RequestId("d"), "this worker is in the prefill role"
        )
        wrong = router.decode.open(prefill_message("p"))
        assert await wrong.receive() == Rejected(
            RequestId("p"), "this worker is in the decode role"
        )


# Routers.


async def test_two_routers_are_independent(cluster: Cluster) -> None:
    async with cluster.router("a") as a, cluster.router("b") as b:
        long = a.decode.open(decode_message("same", None, num=400))
        await long.receive()
        # Neither a cancel of another router's request nor its name is worth anything here.
        b.decode.send(Cancel(RequestId("same")))
        taken = b.decode.open(decode_message("same", None))
        assert isinstance(await taken.receive(), Rejected)
        offer = await a.prefilled("p")
        assert len(tokens_of(await b.generate("d", offer))) == 6
        assert isinstance(await long.receive(), Tokens)
        long.close()


async def test_a_silent_routers_requests_are_ended(cluster: Cluster) -> None:
    async with cluster.router("alive") as alive:
        silent = Router(cluster.link(Role.PREFILL, "silent"), cluster.link(Role.DECODE, "silent"))
        prompt = silent.prefill.open(prefill_message("p"))
        await held(prompt)
        stream = silent.decode.open(decode_message("d", None, num=700))
        await stream.receive()
        mine = alive.decode.open(decode_message("mine", None, num=700))
        for link in (silent.prefill, silent.decode):
            link.send = lambda message: None  # type: ignore[method-assign]
        # A router that was only held up learns what happened to its requests.
        assert await _last(prompt) == Failed(
            RequestId("p"), "engine", "ended: the router was silent"
        )
        assert (await _last(stream)).reason == "ended: the router was silent"
        assert isinstance(await mine.receive(), Tokens)
        mine.close()
        await eventually(alive.is_idle)
        await silent.prefill.close()
        await silent.decode.close()


async def test_a_router_that_stands_still_for_a_while_keeps_its_streams(cluster: Cluster) -> None:
    async with cluster.router("slow") as slow:
        stream = slow.decode.open(decode_message("d", None, num=700))
        await stream.receive()
        beat = slow.decode.beat
        slow.decode.beat = lambda: None  # type: ignore[method-assign]
        await asyncio.sleep(2 * TIMEOUT_S)
        slow.decode.beat = beat  # type: ignore[method-assign]
        num_tokens = 1
        while num_tokens < 700:
            answer = await stream.receive()
            assert isinstance(answer, Tokens), answer
            num_tokens += len(answer.token_ids)


async def test_a_router_whose_connection_is_gone_is_not_waited_for(cluster: Cluster) -> None:
    async with cluster.router("alive") as alive:
        dead = cluster.link(Role.DECODE, "dead")
        stream = dead.open(decode_message("d", None, num=1000))
        await stream.receive()
        await eventually(lambda: _num_requests(alive.decode, 1))
        dead._socket.close(linger=0)
        began = asyncio.get_running_loop().time()
        await eventually(lambda: _num_requests(alive.decode, 0))
        assert asyncio.get_running_loop().time() - began < 2 * TIMEOUT_S
        await dead.close()


async def _num_requests(link: WorkerLink, num: int) -> bool:
    return link.snapshot is not None and link.snapshot.num_requests == num


async def _last(leg: object) -> Failed:
    async with asyncio.timeout(TIMEOUT_S + 5):
        while True:
            message = await leg.receive()  # type: ignore[attr-defined]
            if not isinstance(message, Tokens):
                assert isinstance(message, Failed), message
                return message


# The end of the worker.


async def test_a_dead_engine_ends_the_worker_and_tells_its_routers(cluster: Cluster) -> None:
    async with cluster.router("a") as a, cluster.router("b") as b:
        legs = [
            a.decode.open(decode_message("a", None, num=700)),
            b.decode.open(decode_message("b", None, num=700)),
        ]
        for leg in legs:
            await leg.receive()
        a.decode.open(decode_message(DEADLY, None))
        with pytest.raises(EngineDead, match="the engine is gone"):
            await asyncio.wait_for(cluster.runs[Role.DECODE], 5)
        for leg in legs:
            failed = await _last(leg)
            assert (failed.kind, failed.reason) == ("engine", "worker decode-0 is going away")


async def test_stopping_a_worker_fails_what_is_open(cluster: Cluster) -> None:
    async with cluster.router() as router:
        stream = router.decode.open(decode_message("d", None, num=700))
        prompt = router.prefill.open(prefill_message("p"))
        assert isinstance(await stream.receive(), Tokens)
        await held(prompt)
        await cluster.decode.stop()
        await cluster.prefill.stop()
        await asyncio.gather(*cluster.runs.values())
        assert (await _last(stream)).kind == "engine"
        assert (await _last(prompt)).kind == "engine"


async def test_finish_reason_is_length(cluster: Cluster) -> None:
    async with cluster.router() as router:
        messages = await router.generate("d", None, num=3)
        assert [message.finish_reason for message in messages] == [
            None,
            None,
            FinishReason.LENGTH,
        ]

"""Sockets with keys: members get through, everybody else is dropped in the handshake and counted;
keys change under load without a lost request."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from cluster.errors import WorkerLost
from cluster.keyring import KeyPair, Keyring, parse_keyring, public_text
from cluster.link_renewal import LinkRenewal
from cluster.messages import CODEC, Cancel, Decode, Tokens
from cluster.names import RequestId, Role, RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.ring_file import RingFile, key_source
from cluster.sockets import Sockets, plain_address
from cluster.watched_file import WatchedFile
from tests.integration.fake_worker import FakeWorker, Plan
from tests.integration.router.pools import Pools
from tests.middleman import ByteMiddleman, pass_bytes
from tests.waiting import until, wait_for

PATIENT_S = 10.0


@dataclass
class Ring:
    """A ring that the test changes."""

    ring: Keyring = field(default_factory=Keyring.generate)

    def read(self) -> Keyring:
        return self.ring


@pytest_asyncio.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    num_fds = psutil.Process().num_fds()
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)
    await until(lambda: psutil.Process().num_fds() <= num_fds)


@asynccontextmanager
async def worker_on(sockets: Sockets) -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(sockets, WorkerId("w0"), Role.DECODE)
    try:
        yield worker
    finally:
        await worker.die()
        sockets.close()


def link_to(sockets: Sockets, endpoint: str) -> WorkerLink:
    return WorkerLink(sockets, RouterId("router"), WorkerId("w0"), endpoint, PATIENT_S)


async def test_members_talk_and_the_address_says_whom_they_reach(
    context: zmq.asyncio.Context,
) -> None:
    ring = Ring()
    sockets = Sockets(context, ring.read)
    async with worker_on(sockets) as worker:
        endpoint = worker.socket.endpoint
        assert endpoint.startswith(f"{plain_address(endpoint)}#")
        link = link_to(Sockets(context, ring.read), endpoint)
        with link.open(Decode(RequestId("r"), (1,), {}, None, None, 0)) as leg:
            assert isinstance(await leg.receive(), Tokens)
        await link.close()
        assert not sockets.refused


@pytest.mark.parametrize("stranger", ["other ring", "other server", "plain", "dropped key"])
async def test_strangers_are_dropped_and_counted_and_members_do_not_notice(
    context: zmq.asyncio.Context, stranger: str
) -> None:
    ring = Ring()
    old = ring.ring
    ring.ring = old.with_new().using_newest().without_old()
    sockets = Sockets(context, ring.read)
    async with worker_on(sockets) as worker:
        address, endpoint = plain_address(worker.socket.endpoint), worker.socket.endpoint
        member = link_to(Sockets(context, ring.read), endpoint)
        await until(lambda: member.snapshot is not None)
        heartbeats = worker.num_heartbeats
        outside = zmq.asyncio.Context()
        theirs = {
            "other ring": Sockets(outside, Keyring.generate),
            "other server": Sockets(outside, ring.read),
            "plain": Sockets(outside),
            "dropped key": Sockets(outside, lambda: old),
        }[stranger]
        wrong = f"{address}#{public_text(KeyPair.generate().public)}"
        reached = {"plain": address, "other server": wrong}.get(stranger, endpoint)
        dealer = theirs.open(zmq.DEALER, 1 << 20)
        theirs.connect(dealer, reached)
        for request in ("a", "b"):
            await dealer.send(CODEC.encode(Cancel(RequestId(request))))
        cause = "peers_key" if stranger in ("other ring", "dropped key") else "peers_protocol"
        await until(lambda: sockets.refused[cause] > 0)
        await until(lambda: worker.num_heartbeats > heartbeats + 2)
        assert worker.cancelled == [] and not member.is_lost
        outside.destroy(linger=0)
        await member.close()


async def test_bytes_that_are_no_handshake_take_nothing_and_last_no_longer_than_one(
    context: zmq.asyncio.Context,
) -> None:
    ring = Ring()
    async with worker_on(Sockets(context, ring.read)) as worker:
        host, _, port = plain_address(worker.socket.endpoint)[len("tcp://") :].rpartition(":")
        rng = random.Random(5)
        before = psutil.Process().memory_info().rss
        connections = [socket.create_connection((host, int(port))) for _ in range(50)]
        for connection in connections:
            connection.sendall(rng.randbytes(rng.randrange(1, 4000)))
        link = link_to(Sockets(context, ring.read), worker.socket.endpoint)
        await until(lambda: link.snapshot is not None)
        assert psutil.Process().memory_info().rss - before < 32 << 20
        for connection in connections:
            connection.close()
        await link.close()


@pytest.mark.parametrize(
    ("has_keys", "address"),
    [
        (True, "tcp://127.0.0.1:9"),
        (True, "tcp://127.0.0.1:9#"),
        (True, "tcp://127.0.0.1:9#zz"),
        (True, f"tcp://127.0.0.1:9#{'00' * 31}"),
        (False, f"tcp://127.0.0.1:9#{'00' * 32}"),
    ],
)
def test_a_connection_that_only_one_side_would_protect_is_not_made(
    has_keys: bool, address: str
) -> None:
    with zmq.Context() as context:
        sockets = Sockets(context, Ring().read if has_keys else None)
        with sockets.open(zmq.DEALER, 1024) as dealer, pytest.raises(zmq.ZMQError) as caught:
            sockets.connect(dealer, address)
        assert caught.value.errno == zmq.EINVAL


def test_a_ring_in_memory_is_replaced_at_once_and_leaves_nothing() -> None:
    num_fds = psutil.Process().num_fds()
    ring = Keyring.generate()
    file = RingFile(ring)
    read = key_source(file.path)
    assert read is not None and read() == ring
    assert Path(file.path).stat().st_mode & 0o777 == 0o600
    file.replace(ring.with_new())
    wait_for(lambda: len(read().pairs) == 2, 3.0)
    file.close()
    assert read().used == ring.used, "what was read last stays in force"
    assert psutil.Process().num_fds() == num_fds


async def test_keys_change_under_load_without_a_lost_request(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ring = Keyring.generate()

    def write(changed: Keyring) -> Keyring:
        path.with_suffix(".new").write_text(changed.as_text())
        path.with_suffix(".new").replace(path)
        return changed

    write(ring)
    # One reader per process there would be; a second between looks is long for a test.
    clock = Steps()
    keys = WatchedFile(path, parse_keyring, clock).read
    async with Pools(prefill=2, decode=2, keys=keys) as pools:
        for worker in pools.workers.values():
            worker.default = Plan(num_tokens=20, delay_s=0.005)
        endpoints = [worker.socket.endpoint for worker in pools.workers.values()]
        load = [asyncio.create_task(request_for(pools, 1.5)) for _ in range(6)]
        long = pools.start(pools.request())
        for change in (Keyring.with_new, Keyring.using_newest, Keyring.without_old):
            ring = write(change(ring))
            clock.now += 2.0
            await pools.refresh()
            for _ in range(20):
                await pools.refresh()
                await asyncio.sleep(0.01)
        numbers = await asyncio.gather(*load)
        await long
        assert min(numbers) > 3
        links = [pools.membership.link(WorkerId(name)) for name in pools.workers]
        assert {link.key for link in links} == {ring.used.name}
        assert [worker.socket.endpoint for worker in pools.workers.values()] == endpoints
        assert not any(worker.sockets.refused for worker in pools.workers.values())


@dataclass
class Steps:
    """A clock that the test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


async def request_for(pools: Pools, seconds: float) -> int:
    """Send requests one after the other; return how many were answered, all in full."""
    number, end = 0, asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        tokens = await pools.collect()
        assert [entry.token_ids for entry in tokens] == [(index,) for index in range(20)]
        number += 1
    return number


async def test_a_worker_that_has_not_the_new_key_yet_keeps_its_old_link(
    context: zmq.asyncio.Context,
) -> None:
    theirs, ours = Ring(), Ring()
    ours.ring = theirs.ring
    sockets = Sockets(context, theirs.read)
    async with worker_on(sockets) as worker:
        mine = Sockets(context, ours.read)
        renewal = LinkRenewal(mine)
        first = link = link_to(mine, worker.socket.endpoint)
        await until(lambda: first.snapshot is not None)
        ours.ring = ours.ring.with_new().using_newest()
        for _ in range(10):
            link = renewal.turn(link)
            await asyncio.sleep(0.05)
        assert link is first and not first.is_lost and sockets.refused["peers_key"] > 0
        theirs.ring = ours.ring
        while link is first:
            link = renewal.turn(link)
            await asyncio.sleep(0.01)
        await renewal.end(link)
        await renewal.close()


@pytest.mark.parametrize("change", ["flip", "repeat"])
async def test_a_link_survives_bytes_that_were_changed(
    context: zmq.asyncio.Context, change: str
) -> None:
    ring, rng = Ring(), random.Random(3)

    def meddle(data: bytes, is_answer: bool) -> bytes | None:
        if not is_answer:
            return data
        at = rng.randrange(len(data))
        flipped = bytes([data[at] ^ 1])
        return data + data if change == "repeat" else data[:at] + flipped + data[at + 1 :]

    async with worker_on(Sockets(context, ring.read)) as worker:
        address, _, key = worker.socket.endpoint.partition("#")
        with ByteMiddleman(int(address.rpartition(":")[2])) as middleman:
            through = f"tcp://127.0.0.1:{middleman.port}#{key}"
            sockets, ids = Sockets(context, ring.read), (RouterId("router"), WorkerId("w0"))
            link = WorkerLink(sockets, *ids, through, 0.5)
            await until(lambda: link.snapshot is not None)
            worker.default = Plan(num_tokens=50)
            middleman.change = meddle
            decode = Decode(RequestId("a"), (1,), {}, None, None, 0)
            with link.open(decode) as leg, pytest.raises(WorkerLost):
                async with asyncio.timeout(PATIENT_S):
                    # All tokens may come before a byte is changed that matters.
                    while True:
                        await leg.receive()
            middleman.change = pass_bytes
            await until(lambda: not link.is_lost)
            with link.open(Decode(RequestId("b"), (1,), {}, None, None, 0)) as leg:
                assert isinstance(await leg.receive(), Tokens)
            await link.close()

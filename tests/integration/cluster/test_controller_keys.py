"""A whole deployment with CURVE keys, without Ray: workers are proven over protected sockets, and
stay the same ones, with hand-offs that work, while the keys change."""

import asyncio

from cluster.keyring import Keyring
from cluster.ring_file import RingFile
from cluster.sockets import plain_address
from cluster.warmup import prove_handoff
from tests.integration.cluster.local_workers import Host
from tests.integration.cluster.test_controller import config, listed, running
from tests.waiting import until

# Processes look at their keys every second.
SEEN_S = 1.2


async def test_keys_change_and_every_worker_stays() -> None:
    ring = Keyring.generate()
    file = RingFile(ring)
    settings = config(handoff={"transports": "tcp"})
    async with running(settings, Host(keys_file=file.path)) as controller:
        await until(lambda: len(controller.workers()) == 2)
        names = listed(controller)
        assert all("#" in entry.endpoint for entry in controller.workers())
        for worker in controller.status()["workers"]:
            assert worker["endpoint"] == plain_address(worker["endpoint"])
        members = controller._workforce._members
        for number, change in enumerate(
            (Keyring.with_new, Keyring.using_newest, Keyring.without_old)
        ):
            ring = change(ring)
            file.replace(ring)
            await asyncio.sleep(SEEN_S)
            by_role = {m.role.value: m.link for m in members.values()}
            prefill, decode = by_role["prefill"], by_role["decode"]
            assert prefill is not None and decode is not None
            await prove_handoff(prefill, decode, tuple(range(3, 90)), str(number))
        keys = {m.link.key for m in members.values() if m.link is not None}
        assert keys == {ring.used.name} and listed(controller) == names
        assert controller.status()["failed_proofs"] == {}
    file.close()

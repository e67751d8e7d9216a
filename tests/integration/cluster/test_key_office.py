"""The controller's ring: made once, changed in steps that everybody has before the next, and gone
on with by the controller that follows."""

import asyncio
from pathlib import Path

import pytest

from cluster.controller_store import ControllerStore
from cluster.errors import ConfigError, Unavailable
from cluster.key_office import KeyOffice
from cluster.keyring import Keyring
from cluster.ring_file import key_source
from tests.integration.cluster.local_workers import MemoryStore
from tests.waiting import until


class Workers:
    """What was handed out, and whether anybody takes it."""

    def __init__(self) -> None:
        self.rings: list[Keyring] = []
        self.takes = asyncio.Event()
        self.takes.set()

    async def hand_out(self, ring: Keyring) -> None:
        await self.takes.wait()
        self.rings.append(ring)


def office(store: MemoryStore, overlap_s: float = 0.01) -> KeyOffice:
    return KeyOffice(ControllerStore(store, "d"), overlap_s)


async def test_a_change_ends_with_one_new_pair_and_every_step_was_handed_out() -> None:
    store, workers = MemoryStore(), Workers()
    ours = office(store)
    first = ours.read()
    assert office(store).read() == first, "the next controller has the same"
    ours.rotate(workers.hand_out)
    with pytest.raises(Unavailable, match="being changed already"):
        ours.rotate(workers.hand_out)
    await until(lambda: len(workers.rings) == 3)
    added, used, last = workers.rings
    assert added.pairs[0] == first.used and used.pairs == added.pairs[::-1]
    assert last.pairs == used.pairs[:1] == ours.read().pairs
    await until(lambda: not ours.is_changing)
    assert office(store).read() == last


async def test_nothing_is_used_before_every_worker_accepts_it() -> None:
    store, workers = MemoryStore(), Workers()
    workers.takes.clear()
    ours = office(store)
    first = ours.read()
    ours.rotate(workers.hand_out)
    await until(lambda: len(ours.read().pairs) == 2)
    await asyncio.sleep(0.05)
    assert ours.read().used == first.used
    ours.close()
    # The controller died here; the next one goes on.
    workers.takes.set()
    successor = office(store)
    assert successor.read() == ours.read()
    successor.resume(workers.hand_out)
    successor.resume(workers.hand_out)
    await until(lambda: not successor.is_changing)
    assert len(successor.read().pairs) == 1 and successor.read().used != first.used
    quiet = office(store)
    quiet.resume(workers.hand_out)
    assert not quiet.is_changing


def test_a_file_of_keys_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(Keyring.generate().as_text())
    path.chmod(0o640)
    assert key_source(str(path)) is not None
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod o-rwx"):
        key_source(str(path))

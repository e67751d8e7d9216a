"""One end of a stack that `kv.py` compares, as a process of its own: commands in, JSON out.

Run by path, by whichever Python has the stack; so each end imports what it needs itself. All
ends hold `megabytes` of memory, offer the first n of them, and fetch n from an offer.
"""

import argparse
import base64
import hashlib
import importlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from kv_transfer.blocks import BlockStore

MB = 1 << 20
# Blocks as a small model has them: per layer 64 KiB, scattered over the pool.
LAYERS, LAYER_BLOCK_BYTES = 16, 64 << 10
RAW_CALL_BYTES = 4 * MB
RAW_BUFFER_BYTES = 8 * MB


class End(Protocol):
    """A stack's sending and receiving end in one."""

    def offer(self, megabytes: int) -> dict[str, Any]: ...

    def fetch(self, ticket: dict[str, Any], megabytes: int) -> dict[str, Any]:
        """Return `seconds` and whatever else there is to say."""
        ...

    def digest(self, megabytes: int) -> str: ...


def _filled(seed: int, num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


class Flat:
    """Plain memory; what the raw sockets and the peers move."""

    def __init__(self, seed: int, megabytes: int) -> None:
        self.memory = _filled(seed, megabytes * MB)
        self.view: memoryview = self.memory.data

    def digest(self, megabytes: int) -> str:
        return hashlib.sha256(self.view[: megabytes * MB]).hexdigest()


class RawSockets(Flat):
    """TCP over loopback with nothing around it: 4 MB calls on one or more connections."""

    def __init__(self, seed: int, megabytes: int, num_connections: int) -> None:
        super().__init__(seed, megabytes)
        self._num = num_connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RAW_BUFFER_BYTES)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RAW_BUFFER_BYTES)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def offer(self, megabytes: int) -> dict[str, Any]:
        return {"port": self._listener.getsockname()[1]}

    def fetch(self, ticket: dict[str, Any], megabytes: int) -> dict[str, Any]:
        if not self._connections:
            self._connections = [self._connect(ticket["port"]) for _ in range(self._num)]
        share = megabytes * MB // self._num
        view = self.view
        began = time.perf_counter()
        threads = []
        for number, connection in enumerate(self._connections):
            part = view[number * share : (number + 1) * share]
            thread = threading.Thread(target=self._receive, args=(connection, part, number))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        return {"seconds": time.perf_counter() - began}

    def _connect(self, port: int) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RAW_BUFFER_BYTES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect(("127.0.0.1", port))
        return connection

    def _receive(self, connection: socket.socket, into: memoryview, number: int) -> None:
        start = number * len(into)
        connection.sendall(json.dumps([start, len(into)]).encode().ljust(64))
        while len(into):
            into = into[connection.recv_into(into[:RAW_CALL_BYTES]) :]

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection: socket.socket) -> None:
        view = self.view
        while ask := connection.recv(64, socket.MSG_WAITALL):
            start, size = json.loads(ask)
            for offset in range(start, start + size, RAW_CALL_BYTES):
                connection.sendall(view[offset : min(offset + RAW_CALL_BYTES, start + size)])


class ScatteredBlocks:
    """At least so many megabytes of an engine's blocks, in arrays or on a device."""

    def __init__(self, seed: int, megabytes: int, device: str = "") -> None:
        from kv_transfer.array_blocks import ArrayBlockStore
        from kv_transfer.layout import BlockLayout, GroupLayout

        num_blocks = megabytes * MB // (LAYERS * LAYER_BLOCK_BYTES) + 8
        layout = BlockLayout((GroupLayout(128, (LAYER_BLOCK_BYTES,) * LAYERS),), {"model": "bench"})
        regions = [
            _filled(seed * 1000 + layer, num_blocks * LAYER_BLOCK_BYTES).reshape(num_blocks, -1)
            for layer in range(LAYERS)
        ]
        self.store: BlockStore = ArrayBlockStore(layout, [regions])
        if device:
            import torch

            from kv_transfer.tensor_blocks import TensorBlockStore

            tensors = [torch.from_numpy(region).to(device) for region in regions]
            self.store = TensorBlockStore(layout, [tensors])
        self._ids = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._ids)

    def ids(self, megabytes: int) -> tuple[int, ...]:
        """Return which of them, in a random order, are so many megabytes."""
        return tuple(self._ids[: megabytes * MB // (LAYERS * LAYER_BLOCK_BYTES)])


class Tandem:
    """A hand-off port over scattered blocks, as the connector has it."""

    def __init__(
        self,
        seed: int,
        megabytes: int,
        transport: str,
        settings: str,
        keys: str = "",
        device: str = "",
    ) -> None:
        from cluster.config import HandoffSection
        from cluster.ring_file import key_source
        from kv_transfer.port import HandoffPort

        self._blocks = ScatteredBlocks(seed, megabytes, device)
        section = HandoffSection(**{"transports": transport, **json.loads(settings)})
        self._port = HandoffPort(self._blocks.store, section, seed, keys=key_source(keys or None))
        self._epoch, self._fingerprint = seed, self._blocks.store.layout.fingerprint
        self._num_offers = 0

    def offer(self, megabytes: int) -> dict[str, Any]:
        from cluster.names import HandoffId
        from kv_transfer.producer import Hold

        self._num_offers += 1
        name = f"handoff-{self._num_offers}"
        # An empty hand-off holds a block that the consumer finds in its own cache.
        self._port.hold(Hold(HandoffId(name), name, (self._blocks.ids(max(1, megabytes)),)))
        return {
            "handoff_id": name,
            "worker_id": "bench",
            "epoch": self._epoch,
            "fingerprint": self._fingerprint,
            "endpoints": (self._port.endpoint,),
            "num_tokens": 0,
            "num_blocks": 0,
            "lease_s": 30.0,
        }

    def fetch(self, ticket: dict[str, Any], megabytes: int) -> dict[str, Any]:
        from cluster.messages import Offer
        from kv_transfer.consumer import Pull

        blocks = self._blocks.ids(max(1, megabytes))
        pull = Pull(ticket["handoff_id"], Offer(**ticket), (blocks,), (0 if megabytes else 1,))
        began, began_at = time.perf_counter(), time.monotonic()
        self._port.pull(pull)
        while not (ended := self._port.take_pulls()):
            self._port.wait(1.0)
        seconds = time.perf_counter() - began
        assert ended[0].failure is None, ended[0].failure
        assert ended[0].receipt.received_bytes == megabytes * MB
        return {"seconds": seconds, "at": began_at, "transport": ended[0].receipt.transport}

    def freed(self, handoff_id: str) -> dict[str, Any]:
        """Return when the hand-off's blocks became free, by the clock all processes share."""
        while handoff_id not in self._port.take_freed():
            self._port.wait(1.0)
        return {"at": time.monotonic()}

    def digest(self, megabytes: int) -> str:
        blocks = self._blocks.ids(megabytes)
        content = bytearray(megabytes * MB)
        self._blocks.store.gather(0, blocks, memoryview(content))
        return hashlib.sha256(content).hexdigest()


class Nixl(Flat):
    """NIXL: the fetching side reads the other's registered memory in one piece."""

    def __init__(self, seed: int, megabytes: int) -> None:
        super().__init__(seed, megabytes)
        nixl = importlib.import_module("nixl._api")
        self._name = f"end-{seed}"
        self._agent = nixl.nixl_agent(self._name, nixl.nixl_agent_config(backends=["UCX"]))
        self._address = self.memory.ctypes.data
        self._agent.register_memory([(self._address, self.memory.nbytes, 0, "")], "DRAM")
        self._peer: str | None = None

    def offer(self, megabytes: int) -> dict[str, Any]:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"name": self._name, "address": self._address, "metadata": metadata}

    def fetch(self, ticket: dict[str, Any], megabytes: int) -> dict[str, Any]:
        if self._peer is None:
            self._peer = self._agent.add_remote_agent(base64.b64decode(ticket["metadata"]))
        size = megabytes * MB
        began = time.perf_counter()
        ours = self._agent.get_xfer_descs([(self._address, size, 0)], "DRAM")
        theirs = self._agent.get_xfer_descs([(ticket["address"], size, 0)], "DRAM")
        handle = self._agent.initialize_xfer("READ", ours, theirs, self._peer)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        assert state == "DONE", state
        self._agent.release_xfer_handle(handle)
        return {"seconds": seconds}


class Mooncake(Flat):
    """Mooncake's transfer engine over TCP: a synchronous read of registered memory."""

    def __init__(self, seed: int, megabytes: int) -> None:
        super().__init__(seed, megabytes)
        self._engine = importlib.import_module("mooncake.engine").TransferEngine()
        assert self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self._address = self.memory.ctypes.data
        assert self._engine.register_memory(self._address, self.memory.nbytes) == 0

    def offer(self, megabytes: int) -> dict[str, Any]:
        session = f"127.0.0.1:{self._engine.get_rpc_port()}"
        return {"session": session, "address": self._address}

    def fetch(self, ticket: dict[str, Any], megabytes: int) -> dict[str, Any]:
        began = time.perf_counter()
        code = self._engine.transfer_sync_read(
            ticket["session"], self._address, ticket["address"], megabytes * MB
        )
        seconds = time.perf_counter() - began
        assert code == 0, f"transfer_sync_read returned {code}"
        return {"seconds": seconds}


ENDS: dict[str, Callable[..., End]] = {
    "raw": lambda seed, size, num: RawSockets(seed, size, int(num)),
    "tandem": Tandem,
    "nixl": Nixl,
    "mooncake": Mooncake,
}


def _act(end: End, command: dict[str, Any]) -> Any:
    method = getattr(end, command.pop("do"))
    try:
        return method(**command)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(ENDS))
    parser.add_argument("seed", type=int)
    parser.add_argument("megabytes", type=int)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    # What a library prints must not get between the answers.
    answers = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stderr
    end = ENDS[arguments.kind](arguments.seed, arguments.megabytes, *arguments.options)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_act(end, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Frames that are sent from where they were gathered, and their memory used again."""

import zmq

from kv_transfer.tcp import TcpTransport
from tests.waiting import wait_for


def test_memory_is_used_again_once_it_has_been_sent() -> None:
    transport = TcpTransport(max_kept=1)
    with zmq.Context() as context, context.socket(zmq.PAIR) as out, context.socket(zmq.PAIR) as to:
        out.connect(f"tcp://127.0.0.1:{to.bind_to_random_port('tcp://127.0.0.1')}")
        first = transport.stage(100_000, "")
        memory = first.buffer.obj
        assert transport.stage(100_000, "").buffer.obj is not memory, "it waits to be sent"
        assert first.frame is not None
        out.send(first.frame, copy=False)
        del first
        assert len(to.recv()) == 100_000
        wait_for(lambda: transport.stage(50_000, "").buffer.obj is memory, 5)

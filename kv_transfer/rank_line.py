"""What a rank hears between steps: a finished prompt ahead of its order, and not to sleep.

Orders come to a rank with a step. Where vLLM schedules ahead, as on a GPU, the step after a
prompt's last is on its way before anybody knows that the prompt is finished, so its hold would
wait for a step of others' prompts. It is said here at once, and with its step once more: what is
lost here is only late.
"""

import logging
import threading
import time

import zmq

from cluster.engine_control import (
    CODEC,
    Attend,
    HoldNow,
    RankLines,
    bind_locally,
    rank_endpoint,
)
from cluster.names import HandoffId
from cluster.wire import WireError
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold

# Who asks for attention has told the engine's scheduler at the same moment, on another way: for
# so long, steps that compute nothing are short.
_ATTENTION_S = 0.05
# What a rank waits at most with something to attend to that nobody will tell it of.
NAP_S = 0.005

logger = logging.getLogger(__name__)


class RankLine:
    """The listening end at one rank's port, for the engine's thread."""

    def __init__(self, control_endpoint: str, rank: int, num_ranks: int, port: HandoffPort) -> None:
        self._port = port
        self._ranks = RankLines(control_endpoint, num_ranks) if num_ranks > 1 else None
        self._attentive_until = 0.0
        self._held_once: set[str] = set()
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        bind_locally(self._socket, rank_endpoint(control_endpoint, rank))
        self._thread = threading.Thread(target=self._run, name="rank-line", daemon=True)
        self._thread.start()

    def hold(self, hold: Hold) -> None:
        """Hold a finished prompt's blocks; what is said for the second time has been done."""
        with self._lock:
            if hold.key in self._held_once:
                self._held_once.remove(hold.key)
                return
            self._held_once.add(hold.key)
        self._port.hold(hold)

    def wait(self, patience_s: float) -> None:
        """Return when the port has news or there is something else to do, or after that time."""
        is_attentive = time.monotonic() < self._attentive_until
        self._port.wait(min(NAP_S, patience_s) if is_attentive else patience_s)

    def rouse(self) -> None:
        """A step ends when it has ended on every rank: let none sleep over the news of another."""
        if self._ranks is not None:
            self._ranks.send(Attend())

    def close(self) -> None:
        """End the thread, which closes its socket. Safe twice."""
        self._context.term()
        if self._ranks is not None:
            self._ranks.close()

    def _run(self) -> None:
        with self._socket:
            while True:
                try:
                    self._hear(self._socket.recv())
                except zmq.ContextTerminated:
                    return
                # Without this thread a rank would sleep over requests.
                except Exception:
                    logger.exception("error on the line to a rank")

    def _hear(self, frame: bytes) -> None:
        try:
            message = CODEC.decode(frame)
        except WireError as error:
            logger.warning("dropped a malformed frame for this rank: %s", error)
            return
        if isinstance(message, HoldNow):
            handoff_id, blocks = HandoffId(message.handoff_id), message.block_ids
            self.hold(Hold(handoff_id, message.key, blocks, message.first_token))
        elif isinstance(message, Attend):
            self._attentive_until = time.monotonic() + _ATTENTION_S
            self._port.wake()

"""Messages of every protocol, to be changed into what no peer should send."""

from typing import Any

from cluster import engine_control, messages
from cluster.messages import Offer
from cluster.names import FinishReason, HandoffId, RequestId, Role, RouterId, WorkerId
from cluster.pairing import CacheLayout
from cluster.wire import Codec
from kv_transfer import protocol
from kv_transfer.protocol import Blocks, Place, ReadBlocks, Refusal, Refused, Release, Renew, Via
from tests.integration.kv_transfer.ports import EPOCH, LAYOUT

OFFER = Offer(HandoffId("h"), WorkerId("w"), EPOCH, LAYOUT.fingerprint, ("tcp://k",), 64, 4, 20.0)
STATS = messages.PrefillStats(8, 8, 0, 0)
TO_WORKER = [
    messages.Heartbeat(RouterId("r"), 0),
    messages.Prefill(RequestId("p"), HandoffId("p"), (1, 2, 3), None, 0),
    messages.Decode(RequestId("d"), (1, 2, 3), {"max_tokens": 2}, None, "salt", 0),
    messages.Decode(RequestId("e"), (1, 2, 3), {"max_tokens": 2}, OFFER, None, 1),
    messages.Cancel(RequestId("d")),
    messages.ChangeRole(Role.DECODE, 1),
]
SNAPSHOT = messages.WorkerSnapshot(
    worker_id=WorkerId("w"),
    role=Role.DECODE,
    epoch=1,
    num_running=0,
    num_waiting=0,
    block_size=16,
    num_blocks=9,
    num_free_blocks=9,
    num_held_blocks=0,
    num_held_handoffs=0,
    num_requests=0,
    generated_tokens=0,
    computed_prompt_tokens=0,
    busy_s=0.5,
    counts={"bytes_sent": 3},
    holders=(messages.Holder(HandoffId("h"), 4, 0.5),),
)
TO_ROUTER = [
    messages.Rejected(RequestId("d"), "full"),
    messages.Prefilled(RequestId("d"), OFFER, STATS),
    messages.Tokens(RequestId("d"), (1, 2), FinishReason.STOP, 7, {"a": [1.5]}, None, STATS),
    messages.Failed(RequestId("d"), "engine", "why"),
    messages.Tally(3, 3, 7),
    SNAPSHOT,
]
TO_PRODUCER = [
    protocol.Greet(EPOCH, (Via.TCP, Via.SHM)),
    ReadBlocks(
        HandoffId("held"), EPOCH, LAYOUT.fingerprint, 0, 0, 2, (Place(Via.TCP, ""),), (1, 2)
    ),
    Renew(HandoffId("held"), EPOCH, (3,)),
    Release(HandoffId("nobody"), EPOCH, is_loaded=False),
]
TO_CONSUMER = [
    protocol.Welcome(EPOCH, (Place(Via.TCP, ""), Place(Via.SHM, "boot/1/2/00"))),
    Blocks(HandoffId("h"), 0, 0, 2, 8192, 5, 8192, Via.TCP, 0),
    Refused(HandoffId("h"), Refusal.ENDED, "over"),
]
TO_ENGINE = [
    engine_control.AskLoad(),
    engine_control.DropHandoffs(("a", "b")),
    engine_control.AskFailure("r"),
    engine_control.PullFailure("why"),
    engine_control.BlockLoad(9, 9, 0, 0, ("tcp://k",), CacheLayout("f", {"b": 1}), 16, {"a": 1}),
    engine_control.Begun("r", OFFER),
    engine_control.Attend(),
    engine_control.HoldNow("h", "r", ((3, 4), ()), 17),
]
# Every protocol's codec with a message of each of its kinds.
PROTOCOLS: dict[str, tuple[Codec, list[Any]]] = {
    "request and token": (messages.CODEC, TO_WORKER + TO_ROUTER),
    "KV": (protocol.CODEC, TO_PRODUCER + TO_CONSUMER),
    "control": (engine_control.CODEC, TO_ENGINE),
}

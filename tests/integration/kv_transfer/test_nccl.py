"""How NCCL is called, with a stand-in for its library: there is no GPU in these tests."""

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.channels import ChannelBroken
from kv_transfer.nccl import NcclBackend
from kv_transfer.nccl_library import ID_BYTES, NcclLibrary

OK, REMOTE_ERROR, IN_PROGRESS = 0, 6, 7
COMMUNICATOR = 0x7000_0000_1234
NAME = bytes(range(ID_BYTES))


class Nccl:
    """Answers `calls` as `codes` say, and what is asynchronous as `states` say, in order."""

    def __init__(self, code: int = OK, states: Iterable[int] = ()) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._code, self._states = code, list(states)
        names = ("ncclSend", "ncclRecv", "ncclCommAbort")
        called = {name: self._called(name) for name in names}
        self.functions = SimpleNamespace(
            **called,
            ncclGetUniqueId=self._get_unique_id,
            ncclCommInitRankConfig=self._init,
            ncclCommGetAsyncError=self._async_error,
            ncclGetErrorString=lambda code: f"error {code}".encode(),
        )
        self.library = NcclLibrary(self.functions)

    def _called(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            values = tuple(getattr(argument, "value", argument) for argument in arguments)
            self.calls.append((name, values))
            return self._code

        return call

    def _get_unique_id(self, name: Any) -> int:
        ctypes.memmove(name, NAME, ID_BYTES)
        return OK

    def _init(self, handle: Any, num_ranks: int, name: Any, rank: int, config: Any) -> int:
        found = config._obj
        assert (found.size, found.magic, found.blocking) == (
            ctypes.sizeof(found),
            0xCAFEBEEF,
            0,
        )
        assert ctypes.string_at(ctypes.byref(name), ID_BYTES) == NAME
        self.calls.append(("join", (num_ranks, rank)))
        handle._obj.value = COMMUNICATOR
        return self._code

    def _async_error(self, communicator: Any, state: Any) -> int:
        assert communicator.value == COMMUNICATOR
        state._obj.value = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return OK


def test_names_are_whole_and_what_is_asked_for_reaches_the_library() -> None:
    nccl = Nccl()
    assert nccl.library.unique_id() == NAME
    assert nccl.library.join(NAME, 1, 1.0) == COMMUNICATOR
    nccl.library.send(0x1000, 99, 0, COMMUNICATOR, 0x55)
    nccl.library.receive(0x2000, 98, 1, COMMUNICATOR, 0x55)
    nccl.library.abort(COMMUNICATOR)
    assert nccl.calls == [
        ("join", (2, 1)),
        ("ncclSend", (0x1000, 99, 1, 0, COMMUNICATOR, 0x55)),
        ("ncclRecv", (0x2000, 98, 1, 1, COMMUNICATOR, 0x55)),
        ("ncclCommAbort", (COMMUNICATOR,)),
    ]


def test_calls_in_progress_are_waited_for() -> None:
    nccl = Nccl(IN_PROGRESS, [IN_PROGRESS, IN_PROGRESS, OK])
    assert nccl.library.join(NAME, 0, 5.0) == COMMUNICATOR
    nccl = Nccl(IN_PROGRESS, [IN_PROGRESS, OK])
    nccl.library.send(1, 1, 0, COMMUNICATOR, 1)
    assert nccl.library.is_busy(COMMUNICATOR) and not nccl.library.is_busy(COMMUNICATOR)


def test_a_peer_that_never_joins_is_given_up() -> None:
    nccl = Nccl(IN_PROGRESS, [IN_PROGRESS])
    with pytest.raises(ChannelBroken, match=r"ncclCommInitRankConfig took more than 0\.0 s"):
        nccl.library.join(NAME, 0, 0.01)
    assert nccl.calls[-1] == ("ncclCommAbort", (COMMUNICATOR,))


def test_errors_say_what_nccl_says() -> None:
    with pytest.raises(ChannelBroken, match="ncclSend: error 6"):
        Nccl(REMOTE_ERROR).library.send(1, 1, 0, COMMUNICATOR, 1)
    with pytest.raises(ChannelBroken, match="error 6"):
        Nccl(states=[REMOTE_ERROR]).library.is_busy(COMMUNICATOR)


def test_a_communicator_is_given_back_once_and_not_used_after_it() -> None:
    nccl = Nccl()
    backend = NcclBackend("cuda:0", 1.0, nccl.library)
    invitation = backend.invite()
    assert bytes.fromhex(invitation.address) == NAME
    channel = invitation.accept()
    channel.abort()
    channel.abort()
    assert [name for name, _ in nccl.calls] == ["join", "ncclCommAbort"]


@pytest.mark.parametrize("address", ["", "zz", "00" * (ID_BYTES - 1), "00" * (ID_BYTES + 1)])
def test_names_from_the_wire_are_checked_before_nccl_sees_them(address: str) -> None:
    nccl = Nccl()
    with pytest.raises(ChannelBroken, match="no communicator's name"):
        NcclBackend("cuda:0", 1.0, nccl.library).join(address)
    assert not nccl.calls

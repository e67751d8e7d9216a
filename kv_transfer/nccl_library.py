"""The five calls of NCCL's that a channel of two takes, by its C interface.

Torch's process group over NCCL is not used: its watchdog ends the whole process when a peer dies,
and here a peer's death ends one channel. Communicators do not block, so that every call has a
deadline and an abort ends it.
"""

import ctypes
import time
from typing import Any

from kv_transfer.channels import ChannelBroken

ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
POLL_S = 50e-6
# `ncclConfig_t` as of 2.17, which is what later ones still take: unset, it takes its own choice.
_CONFIG_MAGIC, _CONFIG_VERSION, _UNSET = 0xCAFEBEEF, 21700, -(1 << 31)


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


class NcclLibrary:
    """`libnccl`, which torch has loaded; raises `OSError` where there is none.

    Communicators and streams are the addresses C has for them.
    """

    def __init__(self, library: Any = None) -> None:
        self._nccl = library or ctypes.CDLL("libnccl.so.2")
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p

    def unique_id(self) -> bytes:
        """Return the name of a communicator that is to be; who joins finds us by it."""
        unique_id = _UniqueId()
        self._check("ncclGetUniqueId", self._nccl.ncclGetUniqueId(ctypes.byref(unique_id)))
        return ctypes.string_at(ctypes.byref(unique_id), ID_BYTES)

    def join(self, unique_id: bytes, rank: int, timeout_s: float) -> int:
        """Return the communicator of the two who have joined; give it back with `abort`."""
        name = _UniqueId.from_buffer_copy(unique_id)
        config = _Config(
            ctypes.sizeof(_Config),
            _CONFIG_MAGIC,
            _CONFIG_VERSION,
            0,
            _UNSET,
            _UNSET,
            _UNSET,
            None,
            _UNSET,
        )
        handle = ctypes.c_void_p()
        code = self._nccl.ncclCommInitRankConfig(
            ctypes.byref(handle), 2, name, rank, ctypes.byref(config)
        )
        communicator = handle.value
        if communicator is None:
            self._check("ncclCommInitRankConfig", code)
            raise ChannelBroken("ncclCommInitRankConfig gave no communicator")
        try:
            self._settle("ncclCommInitRankConfig", code, communicator, timeout_s)
        except ChannelBroken:
            self.abort(communicator)
            raise
        return communicator

    def send(self, pointer: int, num_bytes: int, peer: int, communicator: int, stream: int) -> None:
        """Have `stream` send memory of its device, once `is_busy` no more."""
        code = self._nccl.ncclSend(*_arguments(pointer, num_bytes, peer, communicator, stream))
        self._check("ncclSend", code)

    def receive(
        self, pointer: int, num_bytes: int, peer: int, communicator: int, stream: int
    ) -> None:
        """Have `stream` receive into memory of its device, once `is_busy` no more."""
        code = self._nccl.ncclRecv(*_arguments(pointer, num_bytes, peer, communicator, stream))
        self._check("ncclRecv", code)

    def is_busy(self, communicator: int) -> bool:
        """Return whether the last call is still being made; raise `ChannelBroken` if NCCL has
        noticed that the peer is gone."""
        state = self._state(communicator)
        self._check("ncclCommGetAsyncError", state)
        return state == _IN_PROGRESS

    def abort(self, communicator: int) -> None:
        """End what is on its way and give the communicator back."""
        self._nccl.ncclCommAbort(ctypes.c_void_p(communicator))

    def _settle(self, call: str, code: int, communicator: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while code == _IN_PROGRESS:
            if time.monotonic() >= deadline:
                raise ChannelBroken(f"{call} took more than {timeout_s:.1f} s")
            time.sleep(POLL_S)
            code = self._state(communicator)
        self._check(call, code)

    def _state(self, communicator: int) -> int:
        state = ctypes.c_int()
        code = self._nccl.ncclCommGetAsyncError(ctypes.c_void_p(communicator), ctypes.byref(state))
        return state.value if code == _SUCCESS else int(code)

    def _check(self, call: str, code: int) -> None:
        if code not in (_SUCCESS, _IN_PROGRESS):
            reason = self._nccl.ncclGetErrorString(code)
            raise ChannelBroken(f"{call}: {reason.decode() if reason else code}")


def _arguments(
    pointer: int, num_bytes: int, peer: int, communicator: int, stream: int
) -> tuple[Any, ...]:
    return (
        ctypes.c_void_p(pointer),
        ctypes.c_size_t(num_bytes),
        _UINT8,
        peer,
        ctypes.c_void_p(communicator),
        ctypes.c_void_p(stream),
    )

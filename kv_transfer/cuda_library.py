"""The calls of CUDA's runtime that share a GPU's memory between processes, by its C interface.

Torch's own sharing hands out pieces of its pool, whose neighbours a reader would see as well, and
keeps books of them in files; here it is one allocation that is nothing else.
"""

import ctypes
from typing import Any

import torch

HANDLE_BYTES = 64
_SUCCESS = 0
_LAZY_PEER_ACCESS = 1


class CudaError(OSError):
    """What CUDA does not do here, and why."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaLibrary:
    """`libcudart`, which torch has loaded; raises `OSError` where there is none.

    Pointers are into the memory of the calling thread's current device.
    """

    def __init__(self, library: Any = None) -> None:
        major = str(torch.version.cuda).partition(".")[0]
        self._cuda = library or ctypes.CDLL(f"libcudart.so.{major}")
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate(self, num_bytes: int) -> int:
        """Return memory of its own, which goes with the process."""
        pointer = ctypes.c_void_p()
        code = self._cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return self._found("cudaMalloc", code, pointer)

    def free(self, pointer: int) -> None:
        """Give memory back that nobody else has opened."""
        self._check("cudaFree", self._cuda.cudaFree(ctypes.c_void_p(pointer)))

    def handle_of(self, pointer: int) -> bytes:
        """Return what other processes of this host open the memory by, while we live."""
        handle = _Handle()
        code = self._cuda.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(pointer))
        self._check("cudaIpcGetMemHandle", code)
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        """Return another process's memory, of any GPU that this one reaches."""
        pointer = ctypes.c_void_p()
        code = self._cuda.cudaIpcOpenMemHandle(
            ctypes.byref(pointer), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
        return self._found("cudaIpcOpenMemHandle", code, pointer)

    def close(self, pointer: int) -> None:
        """Let go of what `open` returned."""
        code = self._cuda.cudaIpcCloseMemHandle(ctypes.c_void_p(pointer))
        self._check("cudaIpcCloseMemHandle", code)

    def _found(self, call: str, code: int, pointer: ctypes.c_void_p) -> int:
        self._check(call, code)
        if pointer.value is None:
            raise CudaError(f"{call} gave no memory")
        return pointer.value

    def _check(self, call: str, code: int) -> None:
        if code != _SUCCESS:
            # Or torch finds it after its next kernel, and takes it for that one's.
            self._cuda.cudaGetLastError()
            reason = self._cuda.cudaGetErrorString(code)
            raise CudaError(f"{call}: {reason.decode() if reason else code}")

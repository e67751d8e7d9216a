"""What outlives a controller: its epoch, its notes on the workers, the decisions it took.

`KeyValueStore` is where they are kept; `cluster/ray_plane.py` puts them into Ray's own store
(GCS), which lives as long as the cluster's head, and longer where Ray's head is fault tolerant.
"""

import json
from typing import Any, Protocol


class KeyValueStore(Protocol):
    """A few small values, shared by every process of the cluster; calls block."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...

    def put_new(self, key: str, value: bytes) -> bool:
        """Store the value unless the key is taken; return whether it was stored. Atomic."""
        ...

    def delete(self, key: str) -> None: ...

    def keys(self, prefix: str) -> list[str]: ...


class ControllerStore:
    """One deployment's part of a store."""

    def __init__(self, store: KeyValueStore, deployment: str) -> None:
        self._store = store
        self._prefix = f"tandem/{deployment}/"

    def claim_epoch(self) -> int:
        """Return a number that no controller had before: it alone may act from now on."""
        epoch = self.latest_epoch() + 1
        while not self._store.put_new(f"{self._prefix}epoch/{epoch}", b""):
            epoch += 1
        for key in self._store.keys(f"{self._prefix}epoch/"):
            if _number(key) < epoch:
                self._store.delete(key)
        return epoch

    def latest_epoch(self) -> int:
        return max(map(_number, self._store.keys(f"{self._prefix}epoch/")), default=0)

    def save(self, name: str, document: Any) -> None:
        self._store.put(self._prefix + name, json.dumps(document).encode())

    def load(self, name: str) -> Any:
        """Return the document of this name, None if there is none."""
        value = self._store.get(self._prefix + name)
        return None if value is None else json.loads(value)

    def clear(self) -> None:
        """Forget everything but the epoch, so that a controller that is late stays fenced."""
        for key in self._store.keys(self._prefix):
            if not key.startswith(f"{self._prefix}epoch/"):
                self._store.delete(key)


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])

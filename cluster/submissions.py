"""The requests an engine has open, each under a key that no other has had.

vLLM keeps an aborted request until its KV cache has stopped moving, and dies of another one under
its name meanwhile.
"""

from dataclasses import dataclass

from cluster.names import RequestId


@dataclass(slots=True)
class Submission:
    """One open request. A continued one has its first token in what vLLM takes for its prompt."""

    request_id: RequestId
    is_continued: bool
    is_running: bool = False


class Submissions:
    """Open requests by key, and keys by the name the request was given."""

    def __init__(self) -> None:
        self._by_key: dict[str, Submission] = {}
        self._keys: dict[RequestId, str] = {}
        self._num_opened = 0

    def __repr__(self) -> str:
        return f"<Submissions waiting={self.num_waiting} running={self.num_running}>"

    @property
    def num_running(self) -> int:
        return sum(submission.is_running for submission in self._by_key.values())

    @property
    def num_waiting(self) -> int:
        return len(self._by_key) - self.num_running

    def open(self, request_id: RequestId, is_continued: bool) -> str:
        """Return the key of a request that is submitted under a name not open here."""
        self._num_opened += 1
        key = f"{request_id}/{self._num_opened}"
        self._keys[request_id] = key
        self._by_key[key] = Submission(request_id, is_continued)
        return key

    def find(self, key: str) -> Submission | None:
        """Return an open request; None if it has ended, or was aborted."""
        return self._by_key.get(key)

    def close(self, key: str) -> None:
        """Forget an open request that has ended."""
        del self._keys[self._by_key.pop(key).request_id]

    def abort(self, request_id: RequestId) -> str | None:
        """Forget the request of this name; return its key, None if it is not open."""
        key = self._keys.pop(request_id, None)
        if key is not None:
            del self._by_key[key]
        return key

"""Which HTTP status, `Retry-After` and error body each failure of a request gets."""

import json
import math
from dataclasses import dataclass
from http import HTTPStatus

from cluster.errors import (
    DeadlineExceeded,
    Overloaded,
    RequestInvalid,
    RetryElsewhere,
    TandemError,
    Unavailable,
)

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class HttpFailure:
    """An OpenAI-style error before it is written; `kind` is the body's `type`."""

    status: HTTPStatus
    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def body(self, path: str = "") -> bytes:
        """Return the JSON body a client of `path` expects."""
        if path.startswith("/v1/messages"):
            # Anthropic's clients know one other shape.
            error = {"type": self.kind, "message": self.message}
            return json.dumps({"type": "error", "error": error}).encode()
        error_info = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status.value,
        }
        return json.dumps({"error": error_info}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with the body, its length excepted."""
        headers = [(b"content-type", b"application/json")]
        if self.status is HTTPStatus.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            headers.append((b"retry-after", b"%d" % seconds))
        return headers


def failure_of(error: TandemError) -> HttpFailure:
    """Return what the client is told of `error`."""
    message = str(error)
    match error:
        case Overloaded():
            status, kind = HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError"
            return HttpFailure(status, kind, message, retry_after_s=error.retry_after_s)
        case Unavailable() | RetryElsewhere():
            status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"
            return HttpFailure(status, kind, message, retry_after_s=_RETRY_AFTER_S)
        case DeadlineExceeded():
            return HttpFailure(HTTPStatus.GATEWAY_TIMEOUT, "DeadlineExceededError", message)
        case RequestInvalid():
            return HttpFailure(HTTPStatus.BAD_REQUEST, "BadRequestError", message)
        case _:
            return HttpFailure(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", message)

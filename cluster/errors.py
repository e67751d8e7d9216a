"""Errors grouped by what the caller can do next; `router/http_errors.py` gives them a status."""


class TandemError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(TandemError):
    """The operator's configuration is wrong; fix it and start again."""


class RetryElsewhere(TandemError):
    """This worker cannot serve the request; another one may."""


class WorkerLost(RetryElsewhere):
    """The worker stopped answering or its engine died."""


class ConnectionCut(WorkerLost):
    """The worker lives, and messages from or to it were lost on the way; it may be asked again."""


class HandoffFailed(RetryElsewhere):
    """The KV cache did not arrive intact; prefill again elsewhere or locally."""


class Overloaded(TandemError):
    """No room now; retry after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TandemError):
    """No worker can serve the request; the deployment is not ready or has lost a pool."""


class DeadlineExceeded(TandemError):
    """The request ran past its deadline and was ended on both sides."""


class Fenced(TandemError):
    """A later controller has taken over: this one must not act any more."""


class RequestInvalid(TandemError):
    """The client's request cannot be served as written."""


class StartFailed(TandemError):
    """A worker's process or engine did not start; the message is what it said."""


def summarise(error: BaseException) -> str:
    """Return the one line that tells what went wrong, without a remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return summarise(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

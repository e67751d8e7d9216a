"""Load from a thread of its own, for tests that break things meanwhile."""

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.paced_load import LoadReport, paced_load
from tests.served import Served


class BackgroundLoad:
    """Sends `rate(elapsed seconds)` requests per second until the block ends."""

    def __init__(
        self,
        served: Served,
        rate: Callable[[float], float],
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        self.report: LoadReport | None = None
        self._is_over = threading.Event()
        self._began = time.monotonic()

        def run() -> None:
            self.report = asyncio.run(
                paced_load(
                    served.url,
                    served.model,
                    rate,
                    prompt_tokens,
                    output_tokens,
                    is_over=self._is_over.is_set,
                )
            )

        self._thread = threading.Thread(target=run)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(180.0)

    def result(self) -> LoadReport:
        """Return what became of the requests, once the block has ended."""
        assert self.report is not None, "the load did not end"
        return self.report

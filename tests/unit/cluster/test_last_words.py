"""What is told of an engine that failed, out of pages of output."""

import os
import tempfile

import pytest

from cluster.last_words import LastWords, cause_in, points_elsewhere

# As vLLM writes it: a worker fails, then the engine core, then the process that waits for it.
OUTPUT = """\
(Worker pid=41) INFO 11-21 06:00:00 [cpu_worker.py:80] loading
(Worker pid=41) WARNING 11-21 06:00:01 [utils.py:9] KeyError: handled
(Worker pid=41) ERROR 11-21 06:00:02 [multiproc_executor.py:870] Traceback (most recent call last):
(Worker pid=41) ERROR 11-21 06:00:02 [multiproc_executor.py:870]   File "a.py", line 1, in load
(Worker pid=41) ERROR 11-21 06:00:02 [multiproc_executor.py:870] ValueError: 0.4 GiB are needed
(EngineCore pid=40) ERROR 11-21 06:00:03 [core.py:1099] Exception: WorkerProc initialization \
failed due to an exception in a background process. See stack trace for root cause.
Process EngineCore:
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (OUTPUT, "ValueError: 0.4 GiB are needed"),
        ("torch.OutOfMemoryError: 3 GiB\n\n", "torch.OutOfMemoryError: 3 GiB"),
        ("(Worker pid=4) terminate called\n  what(): \n", "what():"),
        ("RuntimeError: See root cause above.\nbye\n", "RuntimeError: See root cause above."),
        ("x" * 9000, "x" * 500),
        (" \n", None),
        ("", None),
    ],
)
def test_the_cause_is_told(text: str, cause: str | None) -> None:
    assert cause_in(text) == cause


def test_who_knows_nothing_is_told_apart() -> None:
    assert points_elsewhere("RuntimeError: Engine core initialization failed. See root cause above")
    assert not points_elsewhere("ValueError: 0.4 GiB are needed")


@pytest.mark.parametrize("is_file", [True, False])
def test_only_what_is_written_from_then_on_is_read(
    is_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray opens it: a file that is written at its end. A terminal or a pipe says nothing."""
    with tempfile.NamedTemporaryFile("ab", buffering=0) as file:
        read_end, write_end = os.pipe()
        stream = file.fileno() if is_file else write_end
        monkeypatch.setattr("cluster.last_words._STREAMS", (stream,))
        os.write(stream, b"ValueError: earlier\n")
        words = LastWords()
        assert words.cause() is None
        os.write(stream, b"ValueError: \xff late\n")
        assert words.cause() == ("ValueError: \ufffd late" if is_file else None)
        os.close(read_end)
        os.close(write_end)

"""Files that are replaced under running processes: seen within a second, never half, never lost."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.watched_file import WatchedFile


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def number(content: bytes) -> int:
    try:
        return int(content)
    except ValueError:
        raise ConfigError("not a number") from None


def replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def test_a_change_is_seen_at_the_next_look_and_a_bad_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "n", Clock()
    path.write_text("1")
    watched = WatchedFile(path, number, clock)
    replace(path, "2")
    assert watched.read() == 1, "looked at most once a second"
    clock.now = 1.0
    assert watched.read() == 2
    for now, text in ((2.0, "secret"), (3.0, "secret too")):
        replace(path, text)
        clock.now = now
        assert watched.read() == 2
    assert caplog.text.count("not a number") == 1 and "secret" not in caplog.text
    path.unlink()
    clock.now = 4.0
    assert watched.read() == 2
    replace(path, "3")
    clock.now = 5.0
    assert watched.read() == 3


@pytest.mark.parametrize("text", [None, "x"])
def test_at_the_start_what_cannot_be_read_is_an_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "n"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        WatchedFile(path, number)

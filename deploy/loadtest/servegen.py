"""ServeGen's client decomposition: every client's arrivals and lengths, window by window.

A folder holds two files for each client. `chunk-N-trace.csv` has no header; a row is a window's
begin in seconds, its requests per second, the CV of the gaps, the pattern of the gaps (Gamma,
Weibull or none) and the pattern's shape and scale. `chunk-N-dataset.json` maps seconds of the day
to the lengths' distributions from then on, each written as a Python dictionary in a string.
"""

import ast
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from random import Random

from cluster.errors import ConfigError
from deploy.loadtest.arrivals import DATA, gamma, weibull
from deploy.loadtest.planned import Part, Planned
from deploy.loadtest.traces import read_lines, read_number

CLIENTS = DATA / "servegen"
LAST_WINDOW_S = 600.0
_COLUMNS = "seconds, rate, CV, pattern, shape, scale"
_FIELDS = ("input_tokens", "output_tokens")
_KNOWN_FIELDS = {*_FIELDS, "reason_ratio"}
_TRACE_NAME = re.compile(r"chunk-(\d+)-trace\.csv")


@dataclass(frozen=True, slots=True)
class Window:
    """How one client's requests come from `begin_s` to `end_s`, seconds of the recorded day.

    The gaps' mean follows from `rate`; `shape` is their distribution's.
    """

    begin_s: float
    end_s: float
    rate: float
    pattern: str
    shape: float

    def arrivals(self, rate: float, rng: Random) -> Iterator[float]:
        """Yield seconds after `begin_s`, without end."""
        if self.pattern == "Weibull":
            return weibull(rate, self.shape, rng)
        return gamma(rate, self.shape**-0.5, rng)


@dataclass(frozen=True)
class LengthTables:
    """The lengths of one client from some second of the day on, read when first needed.

    Input and output lengths are drawn independently, as the data says nothing of pairs.
    """

    texts: Mapping[str, str]
    place: str

    def draw(self, rng: Random) -> tuple[int, int]:
        lengths = []
        for values, cumulated in self._tables:
            lengths.append(values[bisect_right(cumulated, rng.random() * cumulated[-1])])
        return lengths[0], lengths[1]

    @property
    def is_empty(self) -> bool:
        return any(self.texts[field].strip() == "{}" for field in _FIELDS)

    @cached_property
    def _tables(self) -> list[tuple[list[int], list[float]]]:
        return [_table(self.texts[field], f"{self.place}, {field}") for field in _FIELDS]


@dataclass(frozen=True, slots=True)
class Client:
    """One client's windows, and its length tables by the second from which they hold."""

    name: str
    windows: tuple[Window, ...]
    tables: tuple[tuple[float, LengthTables], ...]

    def lengths_at(self, second: float) -> LengthTables:
        """Return the last table from before, or the first one where there is none."""
        index = bisect_right([begin for begin, _ in self.tables], second)
        return self.tables[max(0, index - 1)][1]


def read_clients(folder: Path = CLIENTS) -> list[Client]:
    """Read every client of a folder; raise `ConfigError` with the place that is wrong."""
    names = (path.name for path in folder.glob("chunk-*-trace.csv"))
    numbers = sorted(int(found[1]) for name in names if (found := _TRACE_NAME.fullmatch(name)))
    if not numbers:
        raise ConfigError(f"{folder}: no chunk-N-trace.csv in it; give a ServeGen folder")
    return [_read_client(folder, number) for number in numbers]


def _read_client(folder: Path, number: int) -> Client:
    windows = _read_windows(folder / f"chunk-{number}-trace.csv")
    path = folder / f"chunk-{number}-dataset.json"
    tables = _read_tables(path)
    if not tables and any(window.rate for window in windows):
        raise ConfigError(f"{path}: no lengths in it, but the client sends requests")
    return Client(f"client {number}", windows, tables)


def _read_windows(path: Path) -> tuple[Window, ...]:
    rows = [(place, _window_row(text, place)) for place, text in read_lines(path)]
    for (_, before), (place, row) in pairwise(rows):
        if row.begin_s <= before.begin_s:
            raise ConfigError(f"{place}: begins no later than the line above; sort the windows")
    ends = [row.begin_s for _, row in rows[1:]] + [rows[-1][1].begin_s + LAST_WINDOW_S] * bool(rows)
    return tuple(
        Window(row.begin_s, end_s, row.rate, row.pattern, row.shape)
        for (_, row), end_s in zip(rows, ends, strict=True)
    )


def _window_row(text: str, place: str) -> Window:
    cells = text.split(",")
    if len(cells) != 6:
        raise ConfigError(f"{place}: {len(cells)} cells, expected 6: {_COLUMNS}")
    begin_s, rate, _ = (
        read_number(cell, float, what, place)
        for cell, what in zip(cells[:3], ("seconds", "rate", "CV"), strict=True)
    )
    pattern = cells[3]
    if pattern not in {"Gamma", "Weibull", ""}:
        raise ConfigError(f"{place}: unknown pattern {pattern!r}; known are Gamma and Weibull")
    shape = read_number(cells[4], float, "shape", place)
    is_silent = pattern == "" or rate == 0.0
    if not is_silent and shape == 0.0:
        raise ConfigError(f"{place}: a {pattern} pattern needs a shape above 0")
    return Window(begin_s, begin_s, 0.0 if is_silent else rate, pattern, shape)


def _read_tables(path: Path) -> tuple[tuple[float, LengthTables], ...]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; every client needs both files") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a JSON object of seconds to distributions")
    tables = []
    for key, texts in document.items():
        place = f"{path}: at {key!r}"
        _check_fields(texts, place)
        table = LengthTables(texts, place)
        if not table.is_empty:
            tables.append((read_number(key, float, "second", place), table))
    return tuple(sorted(tables, key=lambda entry: entry[0]))


def _check_fields(texts: object, place: str) -> None:
    if not isinstance(texts, dict) or not all(isinstance(each, str) for each in texts.values()):
        raise ConfigError(f"{place}: not an object of strings")
    for name in texts:
        if name not in _KNOWN_FIELDS:
            known = ", ".join(sorted(_KNOWN_FIELDS))
            raise ConfigError(f"{place}: unknown {name!r}; known are {known}: remove it")
    for name in _FIELDS:
        if name not in texts:
            raise ConfigError(f"{place}: no {name!r}")


def _table(text: str, place: str) -> tuple[list[int], list[float]]:
    """Return the values with probability above 0 and the sums of the probabilities up to each."""
    try:
        shares = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{place}: not a Python dictionary of lengths to shares") from None
    if not isinstance(shares, dict):
        raise ConfigError(f"{place}: not a Python dictionary of lengths to shares")
    for value, share in shares.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{place}: length {value!r} must be a whole number of at least 1")
        read_number(share, float, f"the share of {value}", place)
    values = [value for value, share in sorted(shares.items()) if share]
    if not values:
        raise ConfigError(f"{place}: no length has a share above 0")
    return values, list(itertools.accumulate(shares[value] for value in values))


def generate(
    clients: Sequence[Client], start_s: float, factor: float, rng: Random
) -> Iterator[Planned]:
    """Yield requests in order from second `start_s` of the day on, until the windows end.

    Each window of each client is a stationary process of its own with the window's rate times
    `factor`, so CVs stay as they are and burstiness over the edge of a window is lost.
    """
    begins = sorted({w.begin_s for c in clients for w in c.windows if w.end_s > start_s})
    for begin_s in begins:
        found = [
            each
            for client in clients
            for window in client.windows
            if window.begin_s == begin_s and window.rate > 0
            for each in _in_window(client, window, start_s, factor, rng)
        ]
        yield from sorted(found, key=lambda each: each.at_s)


def _in_window(
    client: Client, window: Window, start_s: float, factor: float, rng: Random
) -> Iterator[Planned]:
    lengths = client.lengths_at(window.begin_s)
    for number, after_s in enumerate(window.arrivals(window.rate * factor, rng)):
        at_s = window.begin_s + after_s
        if at_s >= window.end_s:
            return
        if at_s >= start_s:
            prompt, output = lengths.draw(rng)
            key = f"{client.name}, {window.begin_s:g} s, {number}"
            yield Planned(at_s - start_s, (Part(key, prompt),), output)


def mean_rate(clients: Sequence[Client], start_s: float, length_s: float) -> float:
    """Return the recorded requests per second of all clients over a stretch of the day."""
    end_s = start_s + length_s
    expected = sum(
        window.rate * max(0.0, min(end_s, window.end_s) - max(start_s, window.begin_s))
        for client in clients
        for window in client.windows
    )
    return expected / length_s

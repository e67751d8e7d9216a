"""Recorded traffic, one reader for each published format. Every error names its line."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from deploy.loadtest.arrivals import DATA
from deploy.loadtest.planned import Part, Planned

AZURE = DATA / "azure_conv_excerpt.csv"
MOONCAKE = DATA / "mooncake_conv_excerpt.jsonl"
BURSTGPT = DATA / "burstgpt_excerpt.csv"

MOONCAKE_BLOCK_TOKENS = 512
_MOONCAKE_KEYS = {"timestamp", "input_length", "output_length", "hash_ids"}


@dataclass(frozen=True, slots=True)
class Columns:
    """What a CSV's header may hold: what each required column is for, and those ignored."""

    time: str
    prompt: str
    output: str
    ignored: frozenset[str] = frozenset()

    @property
    def required(self) -> tuple[str, str, str]:
        return self.time, self.prompt, self.output


_AZURE_COLUMNS = Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT_COLUMNS = Columns(
    "Timestamp",
    "Request tokens",
    "Response tokens",
    frozenset({"Model", "Total tokens", "Log Type", "Session ID", "Elapsed time"}),
)


def read_azure(path: Path = AZURE) -> list[Planned]:
    """Read an Azure LLM inference trace: date and time, prompt tokens, answer tokens."""
    rows = [
        (place, _date(row["TIMESTAMP"], place), *_lengths(row, _AZURE_COLUMNS, place))
        for place, row in _csv_rows(path, _AZURE_COLUMNS)
    ]
    first_s = rows[0][1] if rows else 0.0
    return _planned(path, [(place, at - first_s, p, o) for place, at, p, o in rows])


def read_burstgpt(path: Path = BURSTGPT) -> list[Planned]:
    """Read a BurstGPT file by the names in its header.

    Rows without answer tokens are requests that failed when they were recorded: left out.
    """
    rows = []
    for place, row in _csv_rows(path, _BURSTGPT_COLUMNS):
        at_s = _seconds(row["Timestamp"], place)
        if _whole(row["Response tokens"], "Response tokens", place) > 0:
            rows.append((place, at_s, *_lengths(row, _BURSTGPT_COLUMNS, place)))
    first_s = rows[0][1] if rows else 0.0
    return _planned(path, [(place, at - first_s, p, o) for place, at, p, o in rows])


def read_mooncake(path: Path = MOONCAKE) -> list[Planned]:
    """Read a Mooncake trace; prompts with equal leading `hash_ids` share those blocks."""
    planned: list[Planned] = []
    previous_s = 0.0
    for place, text in read_lines(path):
        fields = _object(text, place)
        at_s = _seconds(fields["timestamp"], place) / 1000.0
        _check_order(at_s, previous_s, place)
        previous_s = at_s
        prompt = _length(fields["input_length"], "input_length", place)
        output = _length(fields["output_length"], "output_length", place)
        planned.append(Planned(at_s, _blocks(fields["hash_ids"], prompt, place), output))
    return _some(planned, path)


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: not a JSON object: {error}; mend or remove it") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: not a JSON object; mend or remove the line")
    _check_names(list(fields), _MOONCAKE_KEYS, frozenset(), place)
    return fields


def _blocks(hash_ids: object, prompt_tokens: int, place: str) -> tuple[Part, ...]:
    """Return a part for each block; the last one holds what is left of the prompt."""
    if not isinstance(hash_ids, list) or not all(type(each) is int for each in hash_ids):
        raise ConfigError(f"{place}: hash_ids must be a list of whole numbers")
    needed = math.ceil(prompt_tokens / MOONCAKE_BLOCK_TOKENS)
    if len(hash_ids) != needed:
        raise ConfigError(
            f"{place}: {len(hash_ids)} hash_ids for {prompt_tokens} tokens, which are {needed} "
            f"blocks of {MOONCAKE_BLOCK_TOKENS}; mend or remove the line"
        )
    last = prompt_tokens - (needed - 1) * MOONCAKE_BLOCK_TOKENS
    sizes = [MOONCAKE_BLOCK_TOKENS] * (needed - 1) + [last]
    return tuple(Part(f"block {key}", n) for key, n in zip(hash_ids, sizes, strict=True))


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and text of each line that is not empty."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield f"{path}:{number}", text
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the trace's path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{number}: not UTF-8 text: {error.reason}; mend it") from None


def _csv_rows(path: Path, columns: Columns) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield each row by its header's names, and its place."""
    header: list[str] = []
    for place, line in read_lines(path):
        try:
            (cells,) = csv.reader([line], strict=True)
        except (csv.Error, ValueError) as error:
            raise ConfigError(f"{place}: not a row of CSV: {error}") from None
        if not header:
            header = [cell.strip() for cell in cells]
            _check_names(header, set(columns.required), columns.ignored, place)
        elif len(cells) != len(header):
            raise ConfigError(
                f"{place}: {len(cells)} cells under {len(header)} columns; mend or remove the line"
            )
        else:
            yield place, dict(zip(header, cells, strict=True))
    if not header:
        names = ",".join(columns.required)
        raise ConfigError(f"{path}:1: empty; its first line must name the columns {names}")


def _check_names(
    names: Sequence[str], required: set[str], ignored: frozenset[str], place: str
) -> None:
    for name in sorted(required - set(names)):
        raise ConfigError(f"{place}: no {name!r} among {', '.join(map(repr, names))}")
    for name in names:
        if name not in required | ignored:
            known = ", ".join(sorted(required | ignored))
            raise ConfigError(f"{place}: unknown {name!r}; known are {known}: remove it")


def _planned(path: Path, rows: Sequence[tuple[str, float, int, int]]) -> list[Planned]:
    """Return requests that share nothing, after checking that time goes forward."""
    planned: list[Planned] = []
    previous_s = 0.0
    for number, (place, at_s, prompt, output) in enumerate(rows):
        _check_order(at_s, previous_s, place)
        previous_s = at_s
        planned.append(Planned(at_s, (Part(f"row {number}", prompt),), output))
    return _some(planned, path)


def _some(planned: list[Planned], path: Path) -> list[Planned]:
    if not planned:
        raise ConfigError(f"{path}: no requests in it")
    return planned


def _check_order(at_s: float, previous_s: float, place: str) -> None:
    if at_s < previous_s:
        raise ConfigError(
            f"{place}: arrives {previous_s - at_s:g} s before the line above it; "
            "sort the file by time"
        )


def _date(text: str, place: str) -> float:
    """Return the seconds of an ISO date; the trace has seven digits of a second, Python six."""
    try:
        return (datetime.fromisoformat(text.strip()[:26]) - datetime(2000, 1, 1)).total_seconds()
    except (ValueError, TypeError):
        raise ConfigError(
            f"{place}: TIMESTAMP {text!r} is not a date and time such as "
            "2023-11-16 18:15:46.6805900"
        ) from None


def read_number(value: object, read: Callable[[Any], float], what: str, place: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = read(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{place}: {what} {value!r} is not a number; mend it") from None
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{place}: {what} {value!r} must be 0 or more; mend it")
    return number


def _seconds(value: object, place: str) -> float:
    return read_number(value, float, "time", place)


def _whole(value: object, what: str, place: str) -> int:
    number = read_number(value, float, what, place)
    if number != int(number):
        raise ConfigError(f"{place}: {what} {value!r} is not a whole number; mend it")
    return int(number)


def _length(value: object, what: str, place: str) -> int:
    number = _whole(value, what, place)
    if number < 1:
        raise ConfigError(f"{place}: {what} must be at least 1, not 0; remove the line")
    return number


def _lengths(row: Mapping[str, str], columns: Columns, place: str) -> tuple[int, int]:
    prompt, output = (_length(row[name], name, place) for name in (columns.prompt, columns.output))
    return prompt, output

"""Greedy answers recorded once and compared with later ones: what `--record` and `--verify` do."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.words import Outcome, RequestRecord, Send

FORMAT = "tandem-reference-1"
_SHOWN = 24


@dataclass(frozen=True, slots=True)
class Reference:
    """Texts by what was asked: a prompt's digest and a number of tokens."""

    path: Path
    texts: Mapping[str, str]


def key_of(send: Send) -> str:
    """Return what identifies a prompt and how much of its answer was asked for."""
    digest = hashlib.sha256(array("I", send.prompt_token_ids).tobytes()).hexdigest()
    return f"{digest[:24]}/{send.output_tokens}"


def write(path: Path, endpoint: Endpoint, records: Iterable[RequestRecord]) -> int:
    """Write the completed answers, one JSON object a line; return how many."""
    texts = {key_of(record.send): record.text for record in records if record.is_completed}
    head = {"format": FORMAT, "model": endpoint.model, "api": endpoint.api}
    lines = [head, *({"key": key, "text": text} for key, text in texts.items())]
    try:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return len(texts)


def read(path: Path, endpoint: Endpoint) -> Reference:
    """Raise `ConfigError` with the line that is wrong, or if it is of another API."""
    number = 1
    texts: dict[str, str] = {}
    try:
        with path.open() as file:
            head = json.loads(next(file, "null"))
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise ConfigError(f"{path}:1: not a reference of format {FORMAT}")
            for line in file:
                number += 1
                document = json.loads(line)
                texts[str(document["key"])] = str(document["text"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}:{number}: {error}") from None
    if head.get("api") != endpoint.api:
        raise ConfigError(f"{path}:1: recorded from {head.get('api')}, not {endpoint.api}")
    return Reference(path, texts)


def require_all(reference: Reference, sends: Sequence[Send]) -> None:
    """Raise `ConfigError` if an answer is missing: it was recorded from another workload."""
    for index, send in enumerate(sends):
        if key_of(send) not in reference.texts:
            raise ConfigError(
                f"{reference.path}: no answer to request {index} ({send.prompt_tokens} prompt, "
                f"{send.output_tokens} output tokens): recorded from another workload or seed"
            )


def compare(records: Iterable[RequestRecord], reference: Reference) -> None:
    """Make every completed request wrong whose text is not the recorded one."""
    for record in records:
        expected = reference.texts[key_of(record.send)]
        if record.is_completed and record.text != expected:
            record.outcome = Outcome.WRONG
            record.error = _difference(record.text, expected)


def _difference(text: str, expected: str) -> str:
    pairs = zip(text, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(expected)))
    got, want = (each[at : at + _SHOWN] for each in (text, expected))
    return f"differs from the reference at character {at}: {got!r} instead of {want!r}"

"""`tandem replay`: recorded decisions through the policy again, as recorded or with other settings.

Settings come from the file; those given beside it are laid over them. The recorded load is what
it was: under other settings the load would have answered otherwise.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from autoscaler.decision import Decision
from autoscaler.decision_log import Record, canonical_json
from autoscaler.recording import Recording, replay, rerun
from cluster.autoscaler_config import AutoscalerSection
from cluster.errors import ConfigError
from deploy.decisions import stamp
from deploy.status import table


def run(
    file: Path, config: AutoscalerSection, is_rerun: bool, say: Callable[[str], None] = print
) -> int:
    """Compare; return 1 if decisions that should be the same are not."""
    recording = read_recording(file)
    if recording.torn:
        lines = ", ".join(map(str, recording.torn))
        say(f"{file}: left out what was cut off while it was written: line {lines}")
    records, settings = recording.records, recording.under(config)
    if is_rerun:
        for each in rerun_lines(records, settings):
            say(each)
        return 0
    different = first_difference(records, settings)
    if different is None:
        first, last = records[0].seq, records[-1].seq
        say(f"{len(records)} decisions (#{first} to #{last}) are identical, byte for byte")
        return 0
    for each in different:
        say(each)
    return 1


def read_recording(file: Path) -> Recording:
    """Return what a decision file holds; raise `ConfigError` in one line."""
    try:
        recording = Recording.parse(file.read_text(errors="replace"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not recording.records:
        raise ConfigError(f"{file}: holds no decision")
    return recording


def first_difference(
    records: Sequence[Record], settings: Sequence[AutoscalerSection]
) -> list[str] | None:
    """Return, in lines, the first decision that comes out otherwise; None if none does."""
    for record, decision in zip(records, replay(records, settings), strict=True):
        then, now = record.decision.as_document(), decision.as_document()
        if canonical_json(then) == canonical_json(now):
            continue
        fields = [name for name in then if then[name] != now[name]]
        head = f"#{record.seq} at {stamp(record.now)} is the first decision that differs:"
        advice = (
            "other settings than recorded? --rerun compares whole runs; else the policy changed"
        )
        return [head, *(f"  {n}: recorded {then[n]}, now {now[n]}" for n in fields), advice]
    return None


def rerun_lines(records: Sequence[Record], settings: Sequence[AutoscalerSection]) -> Iterator[str]:
    """Yield what the settings would have decided otherwise, side by side, and what it came to."""
    changed = rerun(records, settings)
    pairs = list(zip(records, changed, strict=True))
    differing = [(r, d) for r, d in pairs if _gist(r.decision) != _gist(d)]
    if differing:
        rows = [("seq", "time", "recorded", "", "changed", "", "why")]
        rows += [
            (f"#{r.seq}", stamp(r.now), *_gist(r.decision), *_gist(d), d.reason)
            for r, d in differing
        ]
        yield from table(rows)
    yield f"{len(differing)} of {len(records)} decisions differ"
    for name, run_of in (("recorded", [r.decision for r in records]), ("changed", changed)):
        yield f"{name}: {_sum(run_of)}"


def _gist(decision: Decision) -> tuple[str, str]:
    sizes = f"{decision.raw or '-'} -> {decision.final}"
    return sizes, f"{decision.action} ({decision.driver})"


def _sum(decisions: Sequence[Decision]) -> str:
    """Return what a run cost: moves, and workers over time by the sizes decided on."""
    held = [
        (sum(earlier.final.as_document()), later.now - earlier.now)
        for earlier, later in itertools.pairwise(decisions)
    ]
    hours = sum(workers * seconds for workers, seconds in held) / 3600
    moves = sum(decision.action != "hold" for decision in decisions)
    most = max(sum(decision.final.as_document()) for decision in decisions)
    return f"{moves} moves, {hours:.4g} worker hours, at most {most} workers"

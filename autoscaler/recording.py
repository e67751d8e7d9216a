"""Recorded decisions through the policy again: as recorded, or under other settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pydantic import ValidationError

from autoscaler.decision import Decision
from autoscaler.decision_log import Record
from autoscaler.policy import decide
from cluster.autoscaler_config import AutoscalerSection
from cluster.config import faults_of
from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Recording:
    """The records of a decision file, each with the settings it was decided under.

    Settings are None for records that none stand before: those of older files and of `tandem
    decisions --json`. `torn` are the numbers of lines that were cut off while they were written.
    """

    records: tuple[Record, ...]
    settings: tuple[AutoscalerSection | None, ...]
    torn: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a decision file holds; raise `ValueError` naming the line that is neither
        a decision nor settings nor torn."""
        records: list[Record] = []
        settings: list[AutoscalerSection | None] = []
        torn: list[int] = []
        present: AutoscalerSection | None = None
        # What follows the last newline was still being written.
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            entry = _entry(number, line)
            if isinstance(entry, Record):
                records.append(entry)
                settings.append(present)
            elif isinstance(entry, AutoscalerSection):
                present = entry
            else:
                torn.append(number)
        return cls(tuple(records), tuple(settings), tuple(torn))

    def under(self, config: AutoscalerSection) -> list[AutoscalerSection]:
        """Return each record's settings with those laid over them that somebody gave `config`;
        `config` as a whole where none are recorded.

        Raise `ConfigError` if the two do not fit together.
        """
        given = {name: getattr(config, name) for name in config.model_fields_set}
        distinct = {id(each): each for each in self.settings}
        laid = {key: _overlaid(each, given) if each else config for key, each in distinct.items()}
        return [laid[id(each)] for each in self.settings]


def _entry(number: int, line: str) -> Record | AutoscalerSection | None:
    """Return what the line holds, None if it was torn."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    try:
        if isinstance(document, Mapping) and "settings" in document:
            return AutoscalerSection.model_validate(document["settings"])
        return Record.from_document(document)
    except ValidationError as error:
        reason = f"settings of another version: {faults_of(error)}"
        raise ValueError(f"line {number} holds {reason}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"line {number} is no decision record: {error!r}") from None


def _overlaid(recorded: AutoscalerSection, given: Mapping[str, Any]) -> AutoscalerSection:
    everything = {name: getattr(recorded, name) for name in AutoscalerSection.model_fields}
    try:
        return AutoscalerSection.model_validate({**everything, **given})
    except ValidationError as error:
        raise ConfigError(f"beside the recorded settings: {faults_of(error)}") from None


def replay(records: Sequence[Record], settings: Sequence[AutoscalerSection]) -> list[Decision]:
    """Return each decision again from its own record: the same bytes under the same settings."""
    return [
        decide(config, each.state, each.snapshot, each.now)[0]
        for each, config in zip(records, settings, strict=True)
    ]


def rerun(records: Sequence[Record], settings: Sequence[AutoscalerSection]) -> list[Decision]:
    """Return what the policy would have decided had it run with `settings` from the first record.

    Its own decisions carry over from record to record, orders by hand are the recorded ones.
    """
    decisions = []
    state = records[0].state if records else None
    for record, config in zip(records, settings, strict=True):
        assert state is not None
        pinned = replace(state, pin=record.state.pin)
        decision, state = decide(config, pinned, record.snapshot, record.now)
        decisions.append(decision)
    return decisions

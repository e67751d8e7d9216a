"""From the text that names a workload to the requests to send."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from cluster.errors import ConfigError
from deploy.loadtest.kinds import KINDS, Ask, Kind
from deploy.loadtest.planned import Part, Planned, fit, in_order, speed_up
from deploy.loadtest.prompts import PromptSource, read_text
from deploy.loadtest.spec import describe, parse
from deploy.loadtest.words import Send, Tokenizer, WorkloadSpec

Number = TypeVar("Number", int, float)

WARM_UP, AFTER_WARM_UP = "warm-up", "main"


def build(spec: WorkloadSpec, tokenizer: Tokenizer, context: int, rng: Random) -> list[Send]:
    """Return what to send, by time; the same for the same `rng`.

    Raises:
        ConfigError: the text, a trace's line or the lengths are wrong, or no request is left.
    """
    planned = plan(spec, context, rng)
    source = PromptSource(tokenizer, read_text(), rng.getrandbits(64))
    return [
        Send(
            each.at_s,
            source.prompt_of(each.parts),
            each.output_tokens,
            each.session,
            each.turn,
            each.think_s,
            each.phase,
        )
        for each in planned
    ]


def plan(spec: WorkloadSpec, context: int, rng: Random) -> list[Planned]:
    """Return the requests before they have tokens: times as sent, lengths as sent."""
    _check(spec)
    planned = speed_up(_phases(spec, parse(spec.text, KINDS), rng), spec.time_scale)
    if spec.duration_s is not None:
        planned = [each for each in planned if each.at_s < spec.duration_s]
    planned = planned[: spec.num_requests]
    if not planned:
        raise ConfigError(f"workload {spec.text!r}: no requests; raise its duration or its rate")
    if len({each.phase for each in planned}) == 1:
        planned = [replace(each, phase="") for each in planned]
    return fit(planned, context, spec.length_scale)


def rate_of(spec: WorkloadSpec, context: int, seed: int) -> float | None:
    """Return the mean requests/s of exactly these requests; None if they come all at once."""
    planned = plan(spec, context, Random(seed))
    span_s = planned[-1].at_s - planned[0].at_s
    return (len(planned) - 1) / span_s if span_s > 0 else None


def usage() -> str:
    """Return a text that explains every kind and its keys."""
    return "\n".join(describe(KINDS, Kind))


def _check(spec: WorkloadSpec) -> None:
    for what, value in (
        ("time scale", spec.time_scale),
        ("rate scale", spec.rate_scale),
        ("length scale", spec.length_scale),
        ("number of requests", spec.num_requests),
        ("duration", spec.duration_s),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"the {what} of a workload must be above 0, not {value:g}")


def _phases(spec: WorkloadSpec, kinds: Sequence[Kind], rng: Random) -> list[Planned]:
    """Return the requests of one kind after the other, in the workload's own seconds."""
    planned: list[Planned] = []
    begin_s = 0.0
    whole_s = None if spec.duration_s is None else spec.duration_s * spec.time_scale
    for number, kind in enumerate(kinds, start=1):
        left = None if spec.num_requests is None else spec.num_requests - len(planned)
        left_s = None if whole_s is None else whole_s - begin_s
        if left == 0 or (left_s is not None and left_s <= 0):
            break
        ask = Ask(
            Random(rng.getrandbits(64)),
            spec.rate_scale,
            _least(kind.duration, left_s),
            _least(kind.requests, left),
        )
        found = kind.plan(ask)
        is_alone = len(kinds) == 1
        name = "" if is_alone else kind.name or f"{number} {_name_of(kind)}"
        planned += [_placed(each, begin_s, kind.warmup, name, number) for each in found]
        begin_s += kind.duration or max((each.at_s for each in found), default=0.0)
    return in_order(planned)


def _least(first: Number | None, second: Number | None) -> Number | None:
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)


def _name_of(kind: Kind) -> str:
    return next(name for name, each in KINDS.items() if each is type(kind))


def _placed(each: Planned, begin_s: float, warmup_s: float, name: str, number: int) -> Planned:
    """Return the request in the whole run: later, in its phase, with content of that phase."""
    stage = each.phase
    if warmup_s:
        stage = WARM_UP if each.at_s < warmup_s else stage or AFTER_WARM_UP
    return replace(
        each,
        at_s=each.at_s + begin_s,
        phase=", ".join(filter(None, (name, stage))),
        session=None if each.session is None else f"{number}/{each.session}",
        parts=tuple(Part(f"{number}/{part.key}", part.num_tokens) for part in each.parts),
    )

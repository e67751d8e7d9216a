"""Requests that are planned but have no tokens yet, and what scaling does to them. Pure.

A prompt is planned as parts: equal keys stand for equal tokens, so two prompts whose first parts
have the same keys and lengths share that beginning. Times are seconds after the workload's start.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    """`num_tokens` tokens of the content called `key`."""

    key: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: when it is due, what its prompt is made of, how long its answer is.

    A later `turn` of a `session` is due `think_s` after the answer before it ended; its `at_s` is
    the earliest that can be.
    """

    at_s: float
    parts: tuple[Part, ...]
    output_tokens: int
    session: str | None = None
    turn: int = 0
    think_s: float = 0.0
    phase: str = ""

    @property
    def prompt_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


def in_order(planned: Iterable[Planned]) -> list[Planned]:
    """Return them by time; the turns of a session, which may be due at one time, in theirs."""
    return sorted(planned, key=lambda each: (each.at_s, each.turn))


def speed_up(planned: Iterable[Planned], factor: float) -> list[Planned]:
    """Return the same requests coming `factor` times as fast, think times included."""
    return [
        replace(each, at_s=each.at_s / factor, think_s=each.think_s / factor) for each in planned
    ]


def scale_rate(planned: Sequence[Planned], factor: float, rng: Random) -> list[Planned]:
    """Return `factor` times as many requests within unchanged time.

    Below 1 each request stays with that probability, independently (a session stays or goes as a
    whole), which moves bursty arrivals towards Poisson. Above 1 copies are laid over each other,
    each turned by a random part of the whole time and with content of its own, as other users
    would have; the last copy is thinned to the remainder.
    """
    if factor <= 1.0:
        return thin(planned, factor, rng)
    span_s = max((each.at_s for each in planned), default=0.0)
    whole, rest = divmod(factor, 1.0)
    layers = list(planned)
    for number in range(1, math.ceil(factor)):
        copy = turned(planned, f"copy {number}", rng.uniform(0.0, span_s), span_s)
        layers += thin(copy, rest, rng) if number >= whole else copy
    return in_order(layers)


def thin(planned: Iterable[Planned], share: float, rng: Random) -> list[Planned]:
    """Return each request, or session, with probability `share`."""
    if share >= 1.0:
        return list(planned)
    verdicts: dict[str, bool] = {}
    kept = []
    for each in planned:
        is_kept = rng.random() < share
        if each.session is not None:
            is_kept = verdicts.setdefault(each.session, is_kept)
        if is_kept:
            kept.append(each)
    return kept


def turned(planned: Iterable[Planned], name: str, shift_s: float, span_s: float) -> list[Planned]:
    """Return a copy that starts `shift_s` into the span and goes on at its beginning."""
    return [
        replace(
            each,
            at_s=(each.at_s + shift_s) % span_s if span_s else 0.0,
            parts=tuple(Part(f"{name}/{part.key}", part.num_tokens) for part in each.parts),
            session=None if each.session is None else f"{name}/{each.session}",
        )
        for each in planned
    ]


def scale_lengths(planned: Iterable[Planned], prompt: float, output: float) -> list[Planned]:
    """Return the requests with lengths multiplied, none below 1."""
    return [
        replace(
            each,
            parts=_scaled(each.parts, prompt),
            output_tokens=max(1, _floor(each.output_tokens * output)),
        )
        for each in planned
    ]


def _scaled(parts: Sequence[Part], factor: float) -> tuple[Part, ...]:
    """Scale where the parts end, not their lengths: what was shared stays shared, to the token."""
    scaled, end, end_before = [], 0, 0
    for part in parts:
        end += part.num_tokens
        scaled_end = _floor(end * factor)
        if scaled_end > end_before:
            scaled.append(Part(part.key, scaled_end - end_before))
            end_before = scaled_end
    return tuple(scaled) or (Part(parts[-1].key, 1),)


def _floor(value: float) -> int:
    # A product such as 100 * 1.1 may fall just short of the integer it stands for.
    return int(value + 1e-9)


def largest_scale(planned: Sequence[Planned], context: int) -> float:
    """Return the factor, at most 1, with which every prompt and its answer fit `context` tokens."""
    longest = max((each.total_tokens for each in planned), default=1)
    return min(1.0, context / longest)


def fit(planned: Sequence[Planned], context: int, length_scale: float | None) -> list[Planned]:
    """Multiply all lengths by `length_scale`, or only as far down as the model's context demands.

    Raises:
        ConfigError: with `length_scale` some do not fit.
    """
    largest = largest_scale(planned, context)
    factor = largest if length_scale is None else length_scale
    scaled = planned if factor == 1.0 else scale_lengths(planned, factor, factor)
    over = [each.total_tokens for each in scaled if each.total_tokens > context]
    if over:
        raise ConfigError(
            f"{len(over)} of {len(scaled)} requests, the longest with {max(over)} tokens, exceed "
            f"the model's context of {context}: scale lengths by {_down(largest)} at most, or "
            "leave long ones out (key longest=)"
        )
    return list(scaled)


def _down(value: float) -> str:
    return f"{math.floor(value * 1e4) / 1e4:.4f}"

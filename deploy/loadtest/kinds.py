"""The workloads there are: each a dataclass of its keys that can plan its requests."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

from deploy.loadtest import servegen
from deploy.loadtest.arrivals import following, gamma, poisson, read_curve
from deploy.loadtest.lengths import Length, parse_length
from deploy.loadtest.planned import Part, Planned, in_order, scale_lengths, scale_rate
from deploy.loadtest.spec import Key, above_zero, count, count_or_none, not_negative, one_of
from deploy.loadtest.traces import (
    AZURE,
    BURSTGPT,
    MOONCAKE,
    read_azure,
    read_burstgpt,
    read_mooncake,
)

DEFAULT_SECONDS = 60.0
DAY_HOURS = 24.0
_TRACES = one_of("azure", "mooncake", "burstgpt")
_CURVES, _YES_NO = one_of("dialogue", "search"), one_of("no", "yes")
_INPUT, _ANSWER, _TURNS = parse_length("512"), parse_length("64"), parse_length("4")


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted of a kind: `rate_scale` times its requests, of its first `horizon_s` seconds
    and no more than `num_requests`. None: no limit from outside."""

    rng: Random
    rate_scale: float = 1.0
    horizon_s: float | None = None
    num_requests: int | None = None

    def first(self, endless: Iterator[Planned], default_s: float) -> list[Planned]:
        """Return what is wanted of requests in order; without any limit those of `default_s`."""
        horizon_s = self.horizon_s
        if horizon_s is None and self.num_requests is None:
            horizon_s = default_s
        if horizon_s is not None:
            limit_s = horizon_s
            endless = itertools.takewhile(lambda each: each.at_s < limit_s, endless)
        return list(itertools.islice(endless, self.num_requests))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Keys that every workload has; seconds are the workload's own, before --time-scale."""

    name: Annotated[str, Key(str, "the phase's name in the report")] = ""
    duration: Annotated[float | None, Key(above_zero, "only its first seconds")] = None
    requests: Annotated[int | None, Key(count, "only its first requests")] = None
    warmup: Annotated[float, Key(not_negative, "first seconds, a phase of their own")] = 0.0

    def plan(self, ask: Ask) -> list[Planned]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded(Kind):
    """Keys of what replays a recorded trace."""

    path: Annotated[Path | None, Key(Path, "the trace; else the shipped excerpt")] = None
    rate: Annotated[float | None, Key(above_zero, "mean requests per second")] = None
    longest: Annotated[int | None, Key(count, "leave out requests of more tokens")] = None
    max_input: Annotated[int | None, Key(count, "scale prompts to at most so many")] = None
    max_output: Annotated[int | None, Key(count, "scale answers to at most so many")] = None

    def _adapted(self, planned: list[Planned]) -> list[Planned]:
        """Leave out what is too long, then scale the rest down to the longest allowed."""
        if self.longest is not None:
            planned = [each for each in planned if each.total_tokens <= self.longest]
        longest_prompt = max((each.prompt_tokens for each in planned), default=1)
        longest_output = max((each.output_tokens for each in planned), default=1)
        prompt = min(1.0, (self.max_input or longest_prompt) / longest_prompt)
        output = min(1.0, (self.max_output or longest_output) / longest_output)
        return planned if prompt == output == 1.0 else scale_lengths(planned, prompt, output)

    def _replayed(self, planned: list[Planned], ask: Ask) -> list[Planned]:
        """Return a whole trace at the rate and lengths wanted."""
        span_s = planned[-1].at_s
        factor = ask.rate_scale
        if self.rate is not None and span_s > 0:
            factor *= self.rate * span_s / len(planned)
        scaled = scale_rate(planned, factor, ask.rng)
        return self._adapted(ask.first(iter(scaled), span_s + 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Azure(Recorded):
    """Azure LLM inference trace (CSV): conversations of November 2023."""

    def plan(self, ask: Ask) -> list[Planned]:
        return self._replayed(read_azure(self.path or AZURE), ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mooncake(Recorded):
    """Mooncake trace (JSONL): conversations with the prefixes that prompts share."""

    def plan(self, ask: Ask) -> list[Planned]:
        return self._replayed(read_mooncake(self.path or MOONCAKE), ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstGPT(Recorded):
    """BurstGPT trace (CSV), over days: wants a time scale of about 100."""

    def plan(self, ask: Ask) -> list[Planned]:
        return self._replayed(read_burstgpt(self.path or BURSTGPT), ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeGen(Recorded):
    """ServeGen client decomposition (a folder): each client has its rates, CVs and lengths."""

    start: Annotated[float, Key(not_negative, "the second of the recorded day to begin with")] = 0.0

    def plan(self, ask: Ask) -> list[Planned]:
        clients = servegen.read_clients(self.path or servegen.CLIENTS)
        horizon_s = ask.horizon_s or 10 * DEFAULT_SECONDS
        factor = ask.rate_scale
        if self.rate is not None:
            recorded = servegen.mean_rate(clients, self.start, horizon_s)
            factor *= self.rate / recorded if recorded else 1.0
        generated = servegen.generate(clients, self.start, factor, ask.rng)
        return self._adapted(ask.first(generated, horizon_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic(Kind):
    """Keys of what draws requests one by one."""

    input: Annotated[Length, Key(parse_length, "prompt tokens: 512, 1..99, MEAN~CV")] = _INPUT
    output: Annotated[Length, Key(parse_length, "answer tokens, written like input")] = _ANSWER
    lengths: Annotated[str, Key(_TRACES, "draw both from this trace instead")] = ""
    prefix: Annotated[int, Key(count_or_none, "first tokens that prompts share")] = 0
    groups: Annotated[int, Key(count, "of so many different prefixes")] = 1

    def _requests(self, arrivals: Iterator[float], rng: Random) -> Iterator[Planned]:
        draw = self._drawing(rng)
        for number, at_s in enumerate(arrivals):
            prompt, output = draw()
            yield Planned(at_s, self._parts(number, prompt, rng), output)

    def _drawing(self, rng: Random) -> Callable[[], tuple[int, int]]:
        if not self.lengths:
            return lambda: (self.input.draw(rng), self.output.draw(rng))
        read = {"azure": read_azure, "mooncake": read_mooncake, "burstgpt": read_burstgpt}
        pairs = [(each.prompt_tokens, each.output_tokens) for each in read[self.lengths]()]
        return lambda: rng.choice(pairs)

    def _parts(self, number: int, prompt: int, rng: Random) -> tuple[Part, ...]:
        own = Part(f"request {number}", max(1, prompt - self.prefix))
        if not self.prefix or prompt <= 1:
            return (own,)
        group = Part(f"group {rng.randrange(self.groups)}", prompt - own.num_tokens)
        return (group, own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson(Synthetic):
    """Independent arrivals at a steady rate."""

    rate: Annotated[float, Key(above_zero, "requests per second")] = 1.0

    def plan(self, ask: Ask) -> list[Planned]:
        arrivals = poisson(self.rate * ask.rate_scale, ask.rng)
        return ask.first(self._requests(arrivals, ask.rng), DEFAULT_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma(Synthetic):
    """Gamma gaps at a steady rate: bursty above a CV of 1, even below, a metronome at 0."""

    rate: Annotated[float, Key(above_zero, "requests per second")] = 1.0
    cv: Annotated[float, Key(not_negative, "coefficient of variation of the gaps")] = 2.0

    def plan(self, ask: Ask) -> list[Planned]:
        arrivals = gamma(self.rate * ask.rate_scale, self.cv, ask.rng)
        return ask.first(self._requests(arrivals, ask.rng), DEFAULT_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts(Synthetic):
    """Bursts and calm in turns, Poisson in each; every one is a phase of the report."""

    rate: Annotated[float, Key(above_zero, "requests per second in a burst")] = 4.0
    calm: Annotated[float, Key(not_negative, "requests per second between bursts")] = 1.0
    on: Annotated[float, Key(above_zero, "seconds that a burst lasts")] = 10.0
    off: Annotated[float, Key(above_zero, "seconds between bursts")] = 20.0

    def plan(self, ask: Ask) -> list[Planned]:
        def rate(at_s: float) -> float:
            return self.rate if self._place(at_s)[1] else self.calm

        def scaled(at_s: float) -> float:
            return rate(at_s) * ask.rate_scale

        arrivals = following(scaled, max(self.rate, self.calm) * ask.rate_scale, ask.rng)
        planned = ask.first(self._requests(arrivals, ask.rng), 2 * (self.on + self.off))
        return [replace(each, phase=self._phase(each.at_s)) for each in planned]

    def _place(self, at_s: float) -> tuple[int, bool]:
        """Return the number of bursts that began before, and whether one is on."""
        number, within_s = divmod(at_s, self.on + self.off)
        return int(number) + 1, within_s < self.on

    def _phase(self, at_s: float) -> str:
        number, is_on = self._place(at_s)
        return f"{'burst' if is_on else 'calm'} {number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeteroScale(Synthetic):
    """A day of load after the curves in the HeteroScale paper, compressed into minutes."""

    curve: Annotated[str, Key(_CURVES, "of the service dialogue or search")] = "dialogue"
    peak: Annotated[float, Key(above_zero, "requests per second at the curve's peak")] = 4.0
    day: Annotated[float, Key(above_zero, "seconds that the 24 hours take")] = 720.0
    start: Annotated[float, Key(not_negative, "the hour to begin with")] = 0.0
    drift: Annotated[str, Key(_YES_NO, "prompts lengthen with the prefill curve")] = "no"

    def plan(self, ask: Ask) -> list[Planned]:
        decode = read_curve(f"{self.curve}_decode")
        peak = self.peak * ask.rate_scale

        def rate(at_s: float) -> float:
            return peak * decode.at(self._hour(at_s)) / decode.peak

        planned = self._requests(following(rate, peak, ask.rng), ask.rng)
        if self.drift == "yes":
            planned = self._drifting(planned)
        return ask.first(planned, self.day)

    def _hour(self, at_s: float) -> float:
        return self.start + at_s * DAY_HOURS / self.day

    def _drifting(self, planned: Iterator[Planned]) -> Iterator[Planned]:
        """Yield the requests with prompts after the share of prefill in the load of the hour."""
        prefill, decode = (read_curve(f"{self.curve}_{side}") for side in ("prefill", "decode"))
        ratio_of_means = sum(prefill.values) / sum(decode.values)
        for each in planned:
            hour = self._hour(each.at_s)
            factor = prefill.at(hour) / decode.at(hour) / ratio_of_means
            yield from scale_lengths([each], factor, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations(Kind):
    """Sessions of several turns, each sent after the answer before it and a time to think."""

    sessions: Annotated[int, Key(count, "how many conversations")] = 20
    rate: Annotated[float, Key(above_zero, "conversations that begin per second, Poisson")] = 0.5
    turns: Annotated[Length, Key(parse_length, "turns of each: 4, 2..8, MEAN~CV")] = _TURNS
    think: Annotated[float, Key(not_negative, "mean seconds from an answer to the next turn")] = 2.0
    system: Annotated[int, Key(count_or_none, "tokens of the system prompt")] = 128
    groups: Annotated[int, Key(count, "different system prompts")] = 2
    user: Annotated[Length, Key(parse_length, "tokens that a turn adds")] = _ANSWER
    output: Annotated[Length, Key(parse_length, "tokens of an answer")] = _ANSWER

    def plan(self, ask: Ask) -> list[Planned]:
        starts = poisson(self.rate * ask.rate_scale, ask.rng)
        num_sessions = max(1, round(self.sessions * ask.rate_scale))
        planned = [
            turn
            for number, at_s in enumerate(itertools.islice(starts, num_sessions))
            for turn in self._session(number, at_s, ask.rng)
        ]
        return ask.first(iter(in_order(planned)), float("inf"))

    def _session(self, number: int, at_s: float, rng: Random) -> Iterator[Planned]:
        session = f"session {number}"
        parts: list[Part] = []
        if self.system:
            parts.append(Part(f"system {rng.randrange(self.groups)}", self.system))
        think_s = 0.0
        for turn in range(self.turns.draw(rng)):
            parts.append(Part(f"{session}, user {turn}", self.user.draw(rng)))
            output = self.output.draw(rng)
            yield Planned(at_s, tuple(parts), output, session, turn, think_s)
            # Stands in for the answer, whose tokens nobody knows beforehand.
            parts.append(Part(f"{session}, answer {turn}", output))
            think_s = rng.expovariate(1.0 / self.think) if self.think else 0.0
            at_s += think_s


KINDS: dict[str, type[Kind]] = {
    "azure": Azure,
    "mooncake": Mooncake,
    "burstgpt": BurstGPT,
    "servegen": ServeGen,
    "poisson": Poisson,
    "gamma": Gamma,
    "bursts": Bursts,
    "heteroscale": HeteroScale,
    "conversations": Conversations,
}

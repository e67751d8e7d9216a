"""Whether what processes have stays level over a run: the judge of the soak. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

# A peer that is replaced may have a connection more than the one before, or one less.
FILES_TOLERANCE = 2


@dataclass(frozen=True, slots=True)
class Vitals:
    """What one process has: memory in bytes, open files, and the shared arenas that it maps.

    PSS is a process's share of what several map; pages of files, which it has more of whenever
    any other program that maps them ends, are left out.
    """

    rss_bytes: int
    pss_bytes: int
    num_fds: int
    num_arenas: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment without requests, after `num_handoffs` of them: the processes that live through
    the run, blocks that are not free in any engine, shared segments that any process maps, names in
    /dev/shm."""

    num_handoffs: int
    lasting: Mapping[str, Vitals]
    blocks_missing: int
    num_segments: int
    num_names: int


@dataclass(frozen=True, slots=True)
class Course:
    """One figure over a run: the medians of its first and last third, and how far the last one
    may be above the first."""

    name: str
    first: float
    last: float
    tolerance: float

    @property
    def is_flat(self) -> bool:
        return self.last - self.first <= self.tolerance


def courses(samples: Sequence[Sample], memory_tolerance_bytes: int) -> list[Course]:
    """Return the course of each figure; blocks and segments are to be the same to one."""
    found = [
        _course("blocks not free", samples, lambda s: s.blocks_missing),
        _course("shared segments", samples, lambda s: s.num_segments),
        _course("names in /dev/shm", samples, lambda s: s.num_names),
    ]
    for name in samples[0].lasting:
        fields: dict[str, tuple[Callable[[Vitals], float], float]] = {
            "open files": (lambda vitals: vitals.num_fds, FILES_TOLERANCE),
            "arenas mapped": (lambda vitals: vitals.num_arenas, 0),
            "RSS": (lambda vitals: vitals.rss_bytes, memory_tolerance_bytes),
            "PSS without files": (lambda vitals: vitals.pss_bytes, memory_tolerance_bytes),
        }
        for field, (value, tolerance) in fields.items():
            of_one = partial(_of, name, value)
            found.append(_course(f"{name}: {field}", samples, of_one, tolerance))
    return found


def _of(name: str, value: Callable[[Vitals], float], sample: Sample) -> float:
    return value(sample.lasting[name])


def _course(
    name: str, samples: Sequence[Sample], value: Callable[[Sample], float], tolerance: float = 0
) -> Course:
    third = max(1, len(samples) // 3)
    first, last = (
        statistics.median(map(value, part)) for part in (samples[:third], samples[-third:])
    )
    return Course(name, first, last, tolerance)

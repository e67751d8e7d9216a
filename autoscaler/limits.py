"""Bounds per pool and the GPU budget: which sizes are allowed, and the nearest that are.

Both pools give way together: a pool that may not grow keeps the other from growing past the
ratio, since neither is of use without the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from autoscaler.ratio import Ratio, Sizes
from cluster.autoscaler_config import AutoscalerSection

# Budgets and shares of GPUs are decimal fractions, which floats only come near to.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """Fewest and most workers per pool, GPUs per worker (prefill, decode), GPUs altogether."""

    fewest: Sizes
    most: Sizes
    worker_gpus: tuple[float, float] = (0.0, 0.0)
    gpu_budget: float | None = None

    @classmethod
    def configured(cls, config: AutoscalerSection, worker_gpus: tuple[float, float]) -> Self:
        return cls(
            Sizes(config.min_prefill, config.min_decode),
            Sizes(config.max_prefill, config.max_decode),
            worker_gpus,
            config.gpu_budget,
        )

    def gpus(self, sizes: Sizes) -> float:
        return sizes.prefill * self.worker_gpus[0] + sizes.decode * self.worker_gpus[1]

    def faults(self, sizes: Sizes) -> list[str]:
        """Return every limit the sizes break, in words."""
        faults = []
        for pool in ("prefill", "decode"):
            count = getattr(sizes, pool)
            fewest, most = getattr(self.fewest, pool), getattr(self.most, pool)
            if count < fewest:
                faults.append(f"{count} {pool} workers are below min_{pool} {fewest}")
            if count > most:
                faults.append(f"{count} {pool} workers are above max_{pool} {most}")
        if self.gpu_budget is not None and self.gpus(sizes) > self.gpu_budget + _SLACK:
            faults.append(f"{self.gpus(sizes):g} GPUs exceed gpu_budget {self.gpu_budget:g}")
        return faults

    def allow(self, sizes: Sizes) -> bool:
        return not self.faults(sizes)

    def between(self, current: Sizes, wanted: Sizes, ratio: Ratio) -> Sizes:
        """Return the allowed sizes nearest to `wanted` on the way there from allowed `current`.

        Neither pool turns back on the way: the answer lies between the two.
        """
        path = _growing if wanted.covers(current) else _shrinking
        allowed = (sizes for sizes in path(current, wanted, ratio) if self.allow(sizes))
        return next(allowed, current)

    def nearest(self, sizes: Sizes, ratio: Ratio) -> Sizes:
        """Return allowed sizes for ones that are not, in the ratio as far as limits let them be."""
        decode = min(max(sizes.decode, self.fewest.decode), self.most.decode)
        prefill = min(max(sizes.prefill, self.fewest.prefill), self.most.prefill)
        bounded = Sizes(prefill, decode)
        smaller = (
            Sizes(max(self.fewest.prefill, min(prefill, ratio.prefill_for(count))), count)
            for count in range(decode, self.fewest.decode - 1, -1)
        )
        return next((each for each in (bounded, *smaller) if self.allow(each)), self.fewest)


def _growing(current: Sizes, wanted: Sizes, ratio: Ratio) -> Iterator[Sizes]:
    """Yield sizes from `wanted` down to `current`, in the ratio where both may move."""
    yield wanted
    for decode in range(wanted.decode, current.decode - 1, -1):
        in_ratio = min(wanted.prefill, ratio.prefill_for(decode))
        yield Sizes(max(current.prefill, in_ratio), decode)


def _shrinking(current: Sizes, wanted: Sizes, ratio: Ratio) -> Iterator[Sizes]:
    """Yield sizes from `wanted` up to `current`, in the ratio where both may move."""
    yield wanted
    for decode in range(wanted.decode, current.decode + 1):
        in_ratio = max(wanted.prefill, ratio.prefill_for(decode))
        yield Sizes(min(current.prefill, in_ratio), decode)

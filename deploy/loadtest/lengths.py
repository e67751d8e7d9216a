"""How long prompts and answers are: fixed, or drawn from a distribution. Pure."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_UNIFORM = re.compile(r"(\d+)\.\.(\d+)")
_SPREAD = re.compile(r"(\d+)~(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens: `text` as written in a spec, `mean` of it, `draw` one."""

    text: str
    mean: float
    draw: Callable[[Random], int]

    def __str__(self) -> str:
        return self.text


def parse_length(text: str) -> Length:
    """Read `512` (always), `128..1024` (uniform) or `512~0.8` (log-normal: mean and CV).

    Raises:
        ValueError: it is none of these, or could be below 1.
    """
    if text.isdecimal() and int(text) >= 1:
        fixed = int(text)
        return Length(text, fixed, lambda rng: fixed)
    if (found := _UNIFORM.fullmatch(text)) and 1 <= int(found[1]) <= int(found[2]):
        low, high = int(found[1]), int(found[2])
        return Length(text, (low + high) / 2, lambda rng: rng.randint(low, high))
    if (found := _SPREAD.fullmatch(text)) and int(found[1]) >= 1:
        mean, cv = int(found[1]), float(found[2])
        variance = math.log1p(cv * cv)
        centre, width = math.log(mean) - variance / 2, math.sqrt(variance)
        return Length(text, mean, lambda rng: max(1, round(rng.lognormvariate(centre, width))))
    raise ValueError("a number of tokens such as 512, 128..1024, or 512~0.8 for mean and CV")

"""A calibration as one SVG: what each split carried, and where it broke the objectives. Pure."""

import math
from collections.abc import Sequence

from autoscaler.calibration import Choice, Measurement, Objectives, SplitResult

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 64, 56
_NUM_TICKS = 5
_HELD, _BROKEN, _INK, _GRID = "#1f5fa8", "#c8551b", "#222", "#ddd"


def draw(
    measured: Sequence[Measurement],
    results: Sequence[SplitResult],
    choice: Choice | None,
    objectives: Objectives,
) -> str:
    """Return the SVG text: a filled dot per load that held the objectives, a hollow one else."""
    top = max((m.decode_tps for m in measured), default=0.0)
    step = _tick(top)
    scale = _Scale(len(results), step * max(1, math.ceil(top / step)))
    column = {result.sizes: index for index, result in enumerate(results)}
    parts = [*_axes(scale, step, results), *_heading(objectives)]
    best = [(column[r.sizes], r.best.decode_tps) for r in results if r.best is not None]
    line = " ".join(f"{scale.x(index):.1f},{scale.y(tps):.1f}" for index, tps in best)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_HELD}" stroke-width="1.5"/>')
    for each in measured:
        is_held = each.is_feasible(objectives)
        fill, stroke = (_HELD, _HELD) if is_held else ("white", _BROKEN)
        place = _place(scale, column[each.sizes], each.decode_tps)
        title = f"<title>{each.sizes}, {each.clients} clients: {each.decode_tps:.4g}</title>"
        parts.append(f'<circle {place} r="4" fill="{fill}" stroke="{stroke}">{title}</circle>')
    if choice is not None:
        tps = choice.measurement.decode_tps
        index = column[choice.sizes]
        place = _place(scale, index, tps)
        parts.append(f'<circle {place} r="9" fill="none" stroke="{_INK}" stroke-width="2"/>')
        anchor, offset = ("start", 16) if index < len(results) / 2 else ("end", -16)
        label = f"{choice.sizes}: {tps:.4g}"
        parts.append(_text(scale.x(index) + offset, scale.y(tps) + 4, label, anchor))
    body = "\n".join(parts)
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    font = 'font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


class _Scale:
    """Where a split's column and a throughput lie on the paper."""

    def __init__(self, num_columns: int, top: float) -> None:
        self.top = top
        self._num_columns = num_columns

    def x(self, column: int) -> float:
        return _LEFT + (column + 0.5) * (_WIDTH - _LEFT - _RIGHT) / self._num_columns

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.top * (_HEIGHT - _TOP - _BOTTOM)


def _tick(top: float) -> float:
    """Return the round distance that divides 0..top into about five."""
    rough = max(top, 1e-9) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * step for step in (1, 2, 5, 10) if rough <= power * step * (1 + 1e-9))


def _axes(scale: _Scale, step: float, results: Sequence[SplitResult]) -> list[str]:
    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for index in range(round(scale.top / step) + 1):
        y = scale.y(index * step)
        ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="{_INK if index == 0 else _GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{index * step:g}", "end"))
    for index, result in enumerate(results):
        parts.append(_text(scale.x(index), _HEIGHT - _BOTTOM + 20, str(result.sizes), "middle"))
    return parts


def _heading(objectives: Objectives) -> list[str]:
    limits = f"TTFT up to {objectives.ttft_s:g} s, TBT up to {objectives.tbt_s:g} s"
    return [
        _text(_LEFT, 24, "decode tokens/s by split of the workers", "start"),
        _text(_LEFT, 44, f"filled: {limits}; hollow: above, or requests failed", "start"),
    ]


def _place(scale: _Scale, column: int, value: float) -> str:
    return f'cx="{scale.x(column):.1f}" cy="{scale.y(value):.1f}"'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}">{text}</text>'

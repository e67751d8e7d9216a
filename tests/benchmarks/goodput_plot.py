"""The picture of `make bench-goodput`: goodput against objectives, and the worst gaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.loadtest.series import cdf
from tests.benchmarks.objectives import Cell, course, worst_gap_s

# Told apart by colour (Okabe and Ito's) and by dashes.
_STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))
_POINTS = 200
_STEPS_MS = (30, 50, 100, 200, 500, 1000, 2000, 5000)


def draw(
    cells: Sequence[Cell],
    titles: Mapping[str, str],
    objectives: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
) -> None:
    """Write an SVG: a row per workload of `objectives` (its TTFT and TPOT objectives, seconds).

    Every second TTFT objective has a plot. `titles` are the stacks' names, in the order of their
    lines. The same cells give the same file.
    """
    # Text stays text, and ids do not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        columns = 1 + max(len(ttfts_s[::2]) for ttfts_s, _ in objectives.values())
        size = 3.1 * columns, 3.1 * len(objectives)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        grid = figure.subplots(len(objectives), columns, squeeze=False)
        for row, (workload, (ttfts_s, tpots_s)) in zip(grid, objectives.items(), strict=True):
            here = [cell for cell in cells if cell.workload == workload]
            top = max((cell.rate for cell in here), default=1.0)
            for axes, ttft_s in zip(row, ttfts_s[::2], strict=False):
                axes.set_title(f"{workload}: TTFT within {ttft_s:g} s", fontsize=9)
                axes.set_ylabel("goodput, requests/s", fontsize=8)
                axes.set_ylim(-0.03 * top, 1.06 * top)
                _goodput(axes, here, titles, ttft_s, tpots_s)
            row[-1].set_title(f"{workload}: worst gap, all rates", fontsize=9)
            row[-1].set_ylabel("share of requests", fontsize=8)
            _gaps(row[-1], here, titles)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _goodput(
    axes: Axes,
    cells: Sequence[Cell],
    titles: Mapping[str, str],
    ttft_s: float,
    tpots_s: Sequence[float],
) -> None:
    low, high = 0.8 * min(tpots_s), 1.25 * max(tpots_s)
    ticks = [low * (high / low) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
    for (name, title), (colour, dashes) in zip(titles.items(), _STYLES, strict=False):
        mine = [cell for cell in cells if cell.stack == name]
        if mine:
            values = course(mine, ttft_s, ticks)
            axes.plot(
                [1e3 * tick for tick in ticks], values, dashes, color=colour, lw=1.6, label=title
            )
    _dress(axes, "TPOT objective, ms", 1e3 * low, 1e3 * high)


def _gaps(axes: Axes, cells: Sequence[Cell], titles: Mapping[str, str]) -> None:
    found: list[float] = []
    for name, (colour, dashes) in zip(titles, _STYLES, strict=False):
        mine = [cell for cell in cells if cell.stack == name]
        gaps = sorted(1e3 * worst_gap_s(record) for cell in mine for record in cell.completed)
        points = cdf(gaps)
        shares = [share or 0.0 for _, share in points]
        axes.plot([gap for gap, _ in points], shares, dashes, color=colour, lw=1.6)
        found += gaps
    _dress(
        axes,
        "longest wait between tokens, ms",
        max(10.0, min(found, default=0.0)),
        max(99.0, *found),
    )


def _dress(axes: Axes, label: str, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [each for each in _STEPS_MS if low <= each <= high]
    axes.set_xticks(ticks, [f"{each:g}" for each in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", lw=0.6)

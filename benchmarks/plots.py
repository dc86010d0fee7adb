"""Plots, declared as data. Each carries the digest of the figures from which it was drawn.

Axes begin at zero, or are logarithmic, and say so.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .declared import Plot
from .results import Result, Row, select
from .tables import number
from .workload import callers_text

mpl.use("agg")
_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.3,
    "savefig.dpi": 110,
}
# The first colour is for aiosessions.
_COLOURS = (
    *("#d62728", "#1f77b4", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e"),
    *("#8c564b", "#e377c2", "#17becf", "#bcbd22", "#000000", "#aec7e8"),
)
_MARKERS = "osv^D<>Pp*hX"


def draw(plot: Plot, result: Result, folder: Path) -> Path | None:
    """Draw a plot into a folder, and return its path; None if its figures were not measured."""
    figures = {name for some in plot.axes.values() for name in some}
    rows = [row for row in select(result.rows, **plot.where) if plot.x in row]
    rows = [row for row in rows if figures & set(row)]
    rows = [row for row in rows if str(row.get(plot.series, "")).startswith(plot.only)]
    groups = dict.fromkeys(tuple(row[label] for label in plot.split) for row in rows)
    panels = list(product(groups, plot.axes.items()))
    if not panels:
        return None
    path = folder / f"{plot.name}.png"
    with mpl.rc_context(_STYLE):
        lines = -(-len(panels) // plot.columns)
        categories = len({row[plot.x] for row in rows})
        legend = 1 + 0.25 * len({row.get(plot.series) for row in rows}) / plot.columns
        height = max(3.2, 0.45 * categories) if plot.bars else 3.6
        size = (5.5 * plot.columns, lines * height + legend)
        figure, grid = plt.subplots(lines, plot.columns, figsize=size, squeeze=False)
        for panel, (group, (text, names)) in zip(grid.flat, panels, strict=False):
            some = select(rows, **dict(zip(plot.split, group, strict=True)))
            (_bars if plot.bars else _lines)(panel, plot, some, names)
            (panel.set_xlabel if plot.bars else panel.set_ylabel)(text)
            panel.set_title(", ".join(map(str, group)))
        for unused in grid.flat[len(panels) :]:
            unused.set_visible(False)
        _finish(figure, plot, result)
        figure.savefig(path, metadata={"Description": f"figures {result.digest()}"})
        plt.close(figure)
    return path


def _finish(figure: Figure, plot: Plot, result: Result) -> None:
    where = result.environment
    figure.suptitle(
        f"{plot.title}\n{where.python}, {where.machine}, {where.cores} cores, all shared; "
        f"{where.date}",
        fontsize=10,
    )
    if not plot.series and all(len(names) == 1 for names in plot.axes.values()):
        return  # the axes name the figures
    named: dict[str, Any] = {}
    for panel in figure.axes:
        handles, texts = panel.get_legend_handles_labels()
        named |= dict(zip(texts, handles, strict=True))
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=plot.columns, fontsize=8
    )


def _points(rows: Sequence[Row], name: str) -> tuple[list[float], list[list[float]]]:
    """Medians, and their distances to the lowest and the highest round."""
    every = [row[name] for row in rows]
    every = [each if isinstance(each, dict) else dict.fromkeys(_BOUNDS, each) for each in every]
    medians, low, high = ([each[bound] for each in every] for bound in _BOUNDS)
    below = [median - least for median, least in zip(medians, low, strict=True)]
    above = [most - median for median, most in zip(medians, high, strict=True)]
    return medians, [below, above]


_BOUNDS = ("median", "low", "high")


def _series(plot: Plot, rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """The rows and the figure of each series, by its name."""
    if not plot.series:
        return {name: ([row for row in rows if name in row], name) for name in names}
    values = dict.fromkeys(row[plot.series] for row in rows)
    name = callers_text if plot.series == "callers" else str
    return {
        name(value): ([r for r in rows if r[plot.series] == value and names[0] in r], names[0])
        for value in values
    }


def _lines(panel: Axes, plot: Plot, rows: Sequence[Row], names: Sequence[str]) -> None:
    for place, (label, (some, name)) in enumerate(_series(plot, rows, names).items()):
        medians, errors = _points(some, name)
        panel.errorbar(
            [row[plot.x] for row in some],
            medians,
            errors,
            label=label,
            color=_COLOURS[place],
            marker=_MARKERS[place] if len(some) < 20 else "",
            markersize=5,
            alpha=0.85,
        )
    ticks = sorted({row[plot.x] for row in rows})
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    if "x" in plot.log:
        panel.set_xscale("symlog" if 0 in ticks else "log", **_linear(ticks))
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
    if "y" in plot.log:
        panel.set_yscale("log")
    else:
        panel.set_ylim(0, panel.get_ylim()[1] * 1.05)
    panel.xaxis.set_major_formatter(plain)
    panel.yaxis.set_major_formatter(plain)
    low, high = panel.get_ylim()
    panel.yaxis.set_minor_formatter(plain if high < 500 * max(low, 1e-9) else NullFormatter())
    panel.set_xlabel(plot.x + (" (logarithmic)" if "x" in plot.log else ""))


def _linear(ticks: Sequence[float]) -> dict[str, float]:
    """Where an axis with a zero becomes logarithmic."""
    return {"linthresh": ticks[1]} if 0 in ticks else {}


def _bars(panel: Axes, plot: Plot, rows: Sequence[Row], names: Sequence[str]) -> None:
    groups = list(dict.fromkeys(row[plot.x] for row in rows))
    series = _series(plot, rows, names)
    height = 0.8 / len(series)
    for place, (label, (some, name)) in enumerate(series.items()):
        medians, errors = _points(some, name)
        where = [groups.index(row[plot.x]) + place * height for row in some]
        bars = panel.barh(where, medians, height, label=label, xerr=errors, ecolor="0.3")
        panel.bar_label(bars, [f" {number(each)}" for each in medians], fontsize=7)
    panel.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], groups, fontsize=7)
    panel.set_xlim(0, max(1.0, panel.get_xlim()[1]) * 1.15)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.grid(visible=False, axis="y")
    panel.invert_yaxis()

"""Draws the resource usage of a soak over time."""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from .report import Moment, SoakResults

mpl.use("agg")


def draw(found: SoakResults, path: Path) -> None:
    """Draw into a file. Every axis begins at zero, so that growth is as large as it looks."""
    minutes = [each.minutes for each in found.moments]
    panels: tuple[tuple[str, list[float]], ...] = (
        ("resident memory of a process, MB", [each.memory / 1e6 for each in found.moments]),
        ("tasks of a process, at most", [float(each.tasks) for each in found.moments]),
        ("connections of all processes", [float(each.connections) for each in found.moments]),
        ("errors a minute", _rates(found.moments)),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, constrained_layout=True)
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        axis.plot(minutes, values, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, max([*values, 1]) * 1.15)
        axis.set_xlim(0, minutes[-1])
        axis.axvspan(0, found.warm_up, color="0.93")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("minutes")
    figure.suptitle(
        f"{found.moments[-1].calls:,} calls by {found.processes} processes; a fault every "
        "20 seconds; the warm-up is grey"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rates(moments: list[Moment]) -> list[float]:
    """The errors of the minute before each moment."""
    rates: list[float] = []
    for moment in moments:
        past = next(each for each in moments if moment.minutes - each.minutes <= 1)
        span = moment.minutes - past.minutes
        rates.append((moment.errors - past.errors) / span if span else 0.0)
    return rates

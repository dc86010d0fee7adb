"""Results as plots.

Each plot carries the digest of its figures. Axes begin at zero, or are logarithmic, and say so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .page import PICTURES
from .results import Result, Row, select
from .tables import keeps_up, who

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
_CALLERS = (1, 32, 256)
# The first colour is for aiosessions.
_COLOURS = (
    *("#d62728", "#1f77b4", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e"),
    *("#8c564b", "#e377c2", "#17becf", "#bcbd22", "#000000", "#aec7e8"),
)
_MARKERS = "osv^D<>Pp*hX"


def draw(result: Result, folder: Path) -> None:
    """Draw the plots of a result into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Description": f"figures {result.digest()}"}
    for name in PICTURES[result.scenario]:
        with mpl.rc_context(_STYLE):
            figure = _PLOTS[name](result)
            figure.savefig(folder / f"{name}.png", metadata=metadata)
            plt.close(figure)


def draw_all(results: Mapping[str, Result], folder: Path) -> None:
    """Draw the plots of several results."""
    for result in results.values():
        draw(result, folder)


def _labels(result: Result) -> dict[str, str]:
    labels: dict[str, str] = result.settings["labels"]
    return labels


def _title(figure: Figure, result: Result, text: str) -> None:
    where = result.environment
    figure.suptitle(f"{text}\n", fontweight="bold")
    figure.text(
        0.5,
        0.945 if figure.get_figheight() < 7 else 0.96,
        f"{where.python}, {where.machine}, {where.cores} cores, all shared; {where.date}",
        ha="center",
        va="top",
        fontsize=8,
        color="0.4",
    )


def _errors(rows: Iterable[Row], name: str) -> tuple[list[float], list[list[float]]]:
    """Medians, and their distances to the lowest and the highest round."""
    figures = [row[name] for row in rows]
    medians = [each["median"] for each in figures]
    below = [each["median"] - each["low"] for each in figures]
    above = [each["high"] - each["median"] for each in figures]
    return medians, [below, above]


def _thousands(axes: Axes, axis: str = "y") -> None:
    getattr(axes, f"{axis}axis").set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}")
    )


def _callers_axis(axes: Axes, callers: Sequence[int] = _CALLERS) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 330)
    axes.xaxis.set_major_locator(FixedLocator(callers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _bars(
    axes: Axes, groups: Mapping[str, list[Row]], heads: list[str], name: str, unit: str
) -> None:
    """Draw horizontal bars: a row for each group, a bar for each head."""
    height = 0.8 / len(heads)
    for place, head in enumerate(heads):
        rows = [each[place] for each in groups.values()]
        medians, errors = _errors(rows, name)
        where = [row + place * height for row in range(len(groups))]
        bars = axes.barh(where, medians, height, label=head, xerr=errors, ecolor="0.3")
        axes.bar_label(bars, [f" {each:,.0f}" for each in medians], fontsize=7, padding=2)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.locator_params(axis="x", nbins=5)
    _thousands(axes, "x")
    axes.grid(visible=False, axis="y")


def _heads() -> list[str]:
    return [who(callers) for callers in _CALLERS]


def _load_throughput(result: Result) -> Figure:
    server = result.rows[0]["server"]
    rows = select(result.rows, server=server)
    groups = {
        label: [select(rows, way=way, callers=callers)[0] for callers in _CALLERS]
        for way, label in _labels(result).items()
        if way != "local"
    }
    figure, axes = plt.subplots(figsize=(9, 7.5))
    _bars(axes, groups, _heads(), "throughput", "loads a second (bars: median, lines: all rounds)")
    axes.legend(loc="lower right")
    _title(figure, result, f"Loads a second, by every alternative ({server})")
    return figure


def _rtt_latency(result: Result) -> Figure:
    labels = _labels(result)
    figure, (near, far) = plt.subplots(1, 2, figsize=(11, 6.5))
    for axes, most in ((near, 1.0), (far, 20.0)):
        for place, (way, label) in enumerate(labels.items()):
            rows = [row for row in select(result.rows, way=way, callers=1) if row["rtt_ms"] <= most]
            medians, errors = _errors(rows, "p50_ms")
            axes.errorbar(
                [row["rtt_ms"] for row in rows],
                medians,
                errors,
                label=label,
                color=_COLOURS[place],
                marker=_MARKERS[place],
                markersize=5,
                linewidth=1.3,
                alpha=0.85,
            )
        for turns in (1, 2):
            axes.plot([0, most], [0, turns * most], color="0.6", linestyle=":", linewidth=1)
            axes.annotate(
                f"{turns} RTT",
                (most, turns * most),
                color="0.4",
                fontsize=8,
                textcoords="offset points",
                xytext=(-4, -12),
                ha="right",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )
        axes.set_xlim(0, most * 1.03)
        axes.set_ylim(0, min(axes.get_ylim()[1], 3 * most + 0.5))
        axes.set_xlabel("round-trip time that the relay adds, ms")
        axes.set_ylabel("p50 of a load, ms (1 caller)")
    near.set_title("up to 1 ms")
    far.set_title("up to 20 ms")
    figure.legend(
        *near.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    _title(figure, result, "Latency of a load over the round-trip time")
    return figure


def _rtt_throughput(result: Result) -> Figure:
    delays = sorted({row["rtt_ms"] for row in result.rows})
    figure, grid = plt.subplots(2, 3, figsize=(11, 8))
    for axes, delay in zip(grid.flat, delays, strict=True):
        for place, (way, label) in enumerate(_labels(result).items()):
            if way == "local":
                continue
            rows = select(result.rows, way=way, rtt_ms=delay)
            medians, errors = _errors(rows, "throughput")
            axes.errorbar(
                [row["callers"] for row in rows],
                medians,
                errors,
                label=label,
                color=_COLOURS[place],
                marker=_MARKERS[place],
                markersize=4,
                linewidth=1.2,
                alpha=0.85,
            )
        axes.set_title(f"RTT + {delay:g} ms")
        _callers_axis(axes)
        axes.set_ylim(bottom=0)
        _thousands(axes)
        axes.set_xlabel("callers (logarithmic)")
        axes.set_ylabel("loads a second")
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    _title(figure, result, "Loads a second over the number of callers")
    return figure


def _server_costs(result: Result) -> Figure:
    server = result.rows[0]["server"]
    labels = _labels(result)
    rows = select(result.rows, server=server)
    panels = {
        "executing_us": "us executing (commandstats)",
        "cpu_us": "us of CPU, I/O included",
        "replicated_bytes": "bytes to each replica",
        "appended_bytes": "bytes to the append-only file",
    }
    figure, grid = plt.subplots(1, 4, figsize=(13, 5), sharey=True)
    for axes, (name, unit) in zip(grid, panels.items(), strict=True):
        present = [row for row in rows if name in row]
        medians, errors = _errors(present, name)
        bars = axes.barh(
            [labels[row["way"]] for row in present],
            medians,
            xerr=errors,
            ecolor="0.3",
            color=[_COLOURS[0] if row["way"] == "aiosessions" else _COLOURS[1] for row in present],
        )
        axes.bar_label(bars, [f" {each:.3g}" for each in medians], fontsize=8, padding=2)
        axes.set_xlabel(unit)
        longest = [median + above for median, above in zip(medians, errors[1], strict=True)]
        axes.set_xlim(0, max([1.0, *longest]) * 1.25)
        axes.grid(visible=False, axis="y")
    grid[0].invert_yaxis()
    _title(figure, result, f"What the server pays for a load ({server})")
    return figure


def _peers_throughput(result: Result) -> Figure:
    labels = _labels(result)
    figure, grid = plt.subplots(1, 2, figsize=(12, 6.5), sharey=True)
    for axes, workload, title in zip(
        grid, ("load", "cycle"), ("load and renew", "load, change one field, save"), strict=True
    ):
        rows = [row for row in select(result.rows, workload=workload) if "callers" in row]
        groups = {
            label: [select(rows, peer=name, callers=callers)[0] for callers in _CALLERS]
            for name, label in labels.items()
            if select(rows, peer=name)
        }
        _bars(axes, groups, _heads(), "throughput", "a second (median, all rounds)")
        axes.set_title(title)
    grid[0].invert_yaxis()  # shared, and so turned twice
    grid[1].legend(loc="lower right")
    _title(figure, result, "Libraries and drivers")
    return figure


def _lines(
    axes: Axes, rows: list[Row], x: str, names: Mapping[str, str], *, scale: float = 1.0
) -> None:
    for place, (name, label) in enumerate(names.items()):
        medians, errors = _errors(rows, name)
        axes.errorbar(
            [row[x] * scale for row in rows],
            medians,
            errors,
            label=label,
            color=_COLOURS[place],
            marker=_MARKERS[place],
        )


def _local_scaling(result: Result) -> Figure:
    figure, (times, pauses, sizes) = plt.subplots(1, 3, figsize=(13, 4.8))
    _lines(
        times,
        result.rows,
        "sessions",
        {
            "store_us": "store",
            "load_us": "load",
            "sweep_us": "sweep of all, per session",
            "sweep_few_us": "sweep of 500, per session",
        },
    )
    times.set_ylabel("us for each session")
    _lines(
        pauses,
        result.rows,
        "sessions",
        {
            "pause_ms": "longest while all are swept",
            "pause_p99_ms": "p99 while all are swept",
            "idle_pause_ms": "longest when idle",
        },
    )
    pauses.set_ylabel("how long another task waits for its turn, ms")
    _lines(sizes, result.rows, "sessions", {"bytes": "the process, per session"})
    sizes.axhline(
        float(result.facts["record_bytes"]), color="0.5", linestyle=":", label="the record alone"
    )
    sizes.set_ylabel("bytes")
    for axes in (times, pauses, sizes):
        axes.set_xscale("log")
        axes.set_xlabel("sessions stored (logarithmic)")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.35)  # room for the legend
        axes.legend(fontsize=8, loc="upper left")
        _thousands(axes, "x")
        _thousands(axes)
    _title(figure, result, "LocalStorage")
    return figure


def _codecs_time(result: Result) -> Figure:
    figure, grid = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axes, does in zip(grid, ("encode", "decode"), strict=True):
        for place, codec in enumerate(dict.fromkeys(row["codec"] for row in result.rows)):
            rows = select(result.rows, codec=codec, does=does)
            medians, errors = _errors(rows, "us")
            axes.errorbar(
                [row["size"] / 1000 for row in rows],
                medians,
                errors,
                label=codec,
                color=_COLOURS[place],
                marker=_MARKERS[place],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.2, 1, 10, 50]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("size of the session, KB (logarithmic)")
        axes.set_ylabel("us (logarithmic)")
        axes.set_title(does)
        axes.legend()
    _title(figure, result, "Codecs")
    return figure


def _cas_throughput(result: Result) -> Figure:
    server = result.rows[0]["server"]
    rows = select(result.rows, server=server)
    groups = {
        label: [select(rows, save=save, callers=callers)[0] for callers in _CALLERS]
        for save, label in (
            ("raw-set", "SET, redis.asyncio,\npool"),
            ("always", "store, ALWAYS:\na plain SET"),
            ("unchanged", "store, UNCHANGED:\ncompare and set"),
        )
    }
    figure, axes = plt.subplots(figsize=(9, 4.5))
    _bars(axes, groups, _heads(), "throughput", "saves a second (bars: median, lines: all rounds)")
    axes.legend()
    _title(figure, result, f"Saves a second ({server})")
    return figure


def _over_callers(axes: Axes, rows: Sequence[Row], name: str, unit: str) -> None:
    """Draw a line for each client."""
    for place, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        measured = select(rows, way=way)
        medians, errors = _errors(measured, name)
        axes.errorbar(
            [row["callers"] for row in measured],
            medians,
            errors,
            label=way + (", decoded" if way.startswith("aiosessions") else ", raw bytes"),
            color=_COLOURS[place],
            marker=_MARKERS[place],
        )
    _callers_axis(axes, sorted({row["callers"] for row in rows}))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    _thousands(axes)
    axes.set_xlabel("callers at a time (logarithmic)")
    axes.set_ylabel(unit)


def _shared_summary(result: Result) -> Figure:
    """The plot for the README: asyncio, and the pools of redis.asyncio."""
    rows = [
        row
        for row in select(result.rows, server="one server", loop="asyncio")
        if row["way"].startswith(("aiosessions", "redis.asyncio"))
    ]
    figure, (throughput, cpu) = plt.subplots(1, 2, figsize=(8, 4.4))
    _over_callers(throughput, rows, "throughput", "loads a second")
    _over_callers(cpu, rows, "cpu_us", "CPU of the client for a load, us")
    figure.legend(*cpu.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    _title(figure, result, "Loading and renewing sessions of 800 bytes")
    return figure


def _shared_throughput(result: Result) -> Figure:
    panels = [
        (server, loop) for server in ("one server", "cluster") for loop in ("asyncio", "uvloop")
    ]
    panels = [each for each in panels if select(result.rows, server=each[0], loop=each[1])]
    figure, grid = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(11, 4.2 * -(-len(panels) // 2)), squeeze=False
    )
    for axes, (server, loop) in zip(grid.flat, panels, strict=False):
        rows = select(result.rows, server=server, loop=loop)
        _over_callers(axes, rows, "throughput", "loads a second")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the legend
        axes.set_title(f"{'a three-node cluster' if server == 'cluster' else server}, {loop}")
        axes.legend(fontsize=8, loc="upper left")
    _title(figure, result, f"One shared connection ({result.settings['server']})")
    return figure


def _arrivals_latency(result: Result) -> Figure:
    loops = list(dict.fromkeys(row["loop"] for row in result.rows))
    panels = {
        "p50_ms": "p50, ms (logarithmic)",
        "p99_ms": "p99, ms (logarithmic)",
        "net_cpu_us": "CPU for a load, us",
    }
    figure, grid = plt.subplots(len(loops), 3, figsize=(12, 4 * len(loops)), squeeze=False)
    for line, loop in zip(grid, loops, strict=True):
        for axes, (name, unit) in zip(line, panels.items(), strict=True):
            _over_rates(axes, select(result.rows, loop=loop), name)
            axes.set_title(loop)
            axes.set_ylabel(unit)
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    _title(figure, result, "Loads that arrive at random (no point: the client cannot keep up)")
    return figure


def _over_rates(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """Draw a line for each client, over the rates that it keeps up with."""
    for place, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        measured = [row for row in select(rows, way=way) if keeps_up(row)]
        if way == "no client" or not measured:
            continue
        medians, errors = _errors(measured, name)
        axes.errorbar(
            [row["rate"] for row in measured],
            medians,
            errors,
            label=way,
            color=_COLOURS[place],
            marker=_MARKERS[place],
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["rate"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    _thousands(axes, "x")
    axes.set_xlabel("loads a second (logarithmic)")
    if name == "net_cpu_us":
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _tls_throughput(result: Result) -> Figure:
    loops = list(dict.fromkeys(row["loop"] for row in result.rows))
    figure, grid = plt.subplots(2, len(loops), figsize=(11, 8.4), squeeze=False, sharey="row")
    for column, loop in enumerate(loops):
        rows = [row for row in select(result.rows, loop=loop) if "callers" in row]
        _over_callers(grid[0][column], rows, "throughput", "loads a second")
        _over_callers(grid[1][column], rows, "cpu_us", "CPU of the client for a load, us")
        grid[0][column].set_title(loop)
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    _title(figure, result, f"Loads over TLS ({result.settings['server']})")
    return figure


def _memory_flat(result: Result) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 4.5))
    loads = [row["loads"] / 1e6 for row in result.rows]
    axes.plot(loads, [row["rss_mb"] for row in result.rows], color=_COLOURS[0], label="resident")
    axes.set_xlim(left=0)
    axes.set_ylim(0, max(row["rss_mb"] for row in result.rows) * 1.2)
    axes.set_xlabel("loads, millions (256 callers)")
    axes.set_ylabel("memory of the process, MB")
    axes.legend(loc="lower right")
    _title(figure, result, "Memory over many loads")
    return figure


_PLOTS: dict[str, Callable[[Result], Figure]] = {
    "load-throughput": _load_throughput,
    "rtt-latency": _rtt_latency,
    "rtt-throughput": _rtt_throughput,
    "server-costs": _server_costs,
    "peers-throughput": _peers_throughput,
    "local-scaling": _local_scaling,
    "codecs-time": _codecs_time,
    "cas-throughput": _cas_throughput,
    "shared-summary": _shared_summary,
    "shared-throughput": _shared_throughput,
    "arrivals-latency": _arrivals_latency,
    "tls-throughput": _tls_throughput,
    "memory-flat": _memory_flat,
}

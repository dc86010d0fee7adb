"""The tables and the plots of every scenario, declared as data.

`tables` and `plots` render them. This module needs no package beyond the library's own
dependencies, because the tests import it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Table:
    """A declaration of a table.

    Attributes:
        name: Its name in docs/benchmarks.md, after that of the scenario.
        title: The title.
        rows: The label whose values name the rows.
        columns: The heads of the figures. With `across`, "{}" in a head is the value.
        across: A label; each of its values has all columns.
        split: Labels; each combination of their values has one table.
        where: The values of labels that a row must have.
        absent: The text for figures that are absent.
        note: An explanation.
    """

    name: str
    title: str
    rows: str
    columns: Mapping[str, str]
    across: str = ""
    split: Sequence[str] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    absent: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A declaration of a plot: panels for each combination of split labels and each axis.

    Attributes:
        name: The name of its file, without the ending.
        title: The title.
        x: The label on the x axis; for bars, the label that names the groups of bars.
        axes: The text of each y axis (for bars: of each length), and its figures.
        series: The label with a line or bar for each value; without it, each figure is one.
        split: Labels; each combination of their values has its own panels.
        where: The values of labels that a row must have.
        bars: Whether to draw bars instead of lines.
        log: The axes that are logarithmic: "x", "y" or "xy".
        columns: The number of panels side by side.
        only: The beginnings of the names of series to draw; empty for all.
    """

    name: str
    title: str
    x: str
    axes: Mapping[str, Sequence[str]]
    series: str = ""
    split: Sequence[str] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    bars: bool = False
    log: str = ""
    columns: int = 2
    only: tuple[str, ...] = ("",)


_SERVER: Final = ("server",)
_LOOPS: Final = ("server", "loop")
_SENT: Final = {"sent": "bytes_sent", "received": "bytes_received"}
_WIRE: Final = {"round trips": "round_trips", "commands": "commands"}
_CALLS: Final = {"{}: round trips": "round_trips", "commands": "commands"}
_DIGEST: Final = {"digest, us": "digest_us", "load, us of CPU": "load_us", "%": "percent"}
_LATENCY: Final = {"{}: p50 ms": "p50_ms", "p99 ms": "p99_ms"}
_CALLERS: Final = "The heads of the columns are the numbers of callers."
_RATES: Final = "The heads of the columns are loads a second."
_KEEPS_UP: Final = {"keeps_up": True}
_NET_CPU: Final = {"{}": "net_cpu_us"}
_LATE: Final = "cannot keep up"
_COSTS: Final = {
    "us executing (commandstats)": "executing_us",
    "us of CPU, I/O included": "cpu_us",
    "bytes to each replica": "replicated_bytes",
    "bytes to the append-only file": "appended_bytes",
}
_TIMES: Final = {"store, us": "store_us", "load, us": "load_us", "sweep, us each": "sweep_us"}
_PAUSES: Final = {
    "p99": "pause_p99_ms",
    "longest": "pause_ms",
    "longest when idle": "idle_pause_ms",
}
_HOT: Final = {
    "writers": "writers",
    "counted": "counted",
    "of": "increments",
    "attempts per success": "attempts_per_success",
    "increments a second": "throughput",
}

_HITS: Final = {
    "payload, bytes": "bytes",
    "hits of a near cache": "hits",
    "LocalStorage.load": "local_loads",
    "codec.decode alone": "decodes",
}
_CALLS_LEFT: Final = {"{} a second: measured": "per_thousand", "formula": "formula"}
_NEAR: Final = {"+{} ms: mean, ms": "mean_ms", "p50": "p50_ms", "p99": "p99_ms"}
_NEAR_CPU: Final = {"loads a second": "throughput", "CPU for a load, us": "cpu_us"}
_REVOKED: Final = {"p50": "p50_ms", "p99": "p99_ms", "longest": "longest_ms"}
_PRICE: Final = {"{}: executing": "executing_us", "CPU": "cpu_us"}
_PAYS: Final = {
    "load without a cache, ms": "load_ms",
    "saved at 90 % hits, ms": "saved_ms",
    "pays from this share of hits, %": "pays",
}


def _closed(split: Sequence[str], what: str) -> tuple[Table, ...]:
    """Throughput and latency over the number of callers."""
    return (
        Table("throughput", what, "way", {"{}": "throughput"}, "callers", split, note=_CALLERS),
        Table("latency", "Latency", "way", _LATENCY, "callers", split, note=_CALLERS),
    )


def _open(split: Sequence[str]) -> tuple[Table, ...]:
    """Latency and CPU over the rate of random arrivals."""
    title = "Loads that arrive at random: p50 and p99 in ms"
    columns = {"{}: p50": "p50_ms", "p99": "p99_ms"}
    cpu = "Loads that arrive at random: CPU without the generator, us"
    return (
        Table("open", title, "way", columns, "rate", split, _KEEPS_UP, _LATE, _RATES),
        Table(
            "open-cpu", cpu, "way", {"{}": "net_cpu_us"}, "rate", split, _KEEPS_UP, _LATE, _RATES
        ),
    )


def _over_rtt(name: str, title: str, figure: str, callers: int) -> Table:
    where = {"callers": callers}
    return Table(name, f"{title}, over the RTT, ms", "way", {"+{}": figure}, "rtt_ms", (), where)


def _owned(name: str, title: str, figure: str, server: str, callers: int) -> Table:
    where = {"server": server, "callers": callers}
    return Table(name, title, "operation", {"{}": figure}, "way", (), where)


def _codec(does: str) -> Table:
    title = f"Time to {does} a session, us, over its size in bytes"
    return Table(does, title, "codec", {"{}": "us"}, "size", (), {"does": does})


def _web(name: str, title: str, figure: str, **where: Any) -> Table:
    return Table(name, title, "way", {"{}": figure}, "kind", (), where)


_RACES: Final = {
    "logins answered 200": "logins",
    "logins lost": "lost_logins",
    "additions answered 200": "additions",
    "additions lost": "lost_additions",
    "sessions of bots": "bot_sessions",
}

_CPU = Table("cpu", "CPU for a load, us", "way", {"{}": "cpu_us"}, "callers", _LOOPS)
_OVER = Table("times", "Times as many loads", "over", {"{}": "times"}, "callers", ("loop",))

TABLES: Final[Mapping[str, tuple[Table, ...]]] = {
    "load": (
        Table("wire", "A load", "way", _WIRE | _SENT | {"meaning": "note"}, split=_SERVER),
        *_closed(_SERVER, "Loads a second"),
    ),
    "rtt": (
        _over_rtt("latency", "p50 of a load by 1 caller, ms", "p50_ms", 1),
        _over_rtt("throughput", "Loads a second by 256 callers", "throughput", 256),
    ),
    "server": (
        Table(
            "costs", "Costs of a load", "way", _COSTS | {"commands": "executions"}, split=_SERVER
        ),
    ),
    "peers": (
        Table("wire", "An operation", "way", _WIRE | {"lacks": "note"}, split=("workload",)),
        *_closed(("workload",), "Operations a second"),
    ),
    "local": (
        Table("times", "LocalStorage", "sessions", _TIMES | {"bytes each": "bytes"}),
        Table("pauses", "Pauses of another task during a sweep, ms", "sessions", _PAUSES),
    ),
    "codecs": (_codec("encode"), _codec("decode")),
    "cas": (
        Table("wire", "A save", "way", _WIRE, split=_SERVER),
        *_closed(_SERVER, "Saves a second"),
        Table("hot", "Increments of one session", "server", _HOT, where={"hot": True}),
    ),
    "principals": (
        Table("wire", "An operation", "operation", _CALLS, "way"),
        _owned("latency", "p50 by 1 caller, ms", "p50_ms", "one server", 1),
        _owned("throughput", "Operations a second by 32 callers", "throughput", "one server", 32),
        _owned("cpu", "CPU of the client by 32 callers, us", "cpu_us", "one server", 32),
        _owned("cluster", "p50 by 1 caller in a cluster, ms", "p50_ms", "cluster", 1),
        Table("digest", "The digest in a load by 256 callers", "storage", _DIGEST),
    ),
    "near": (
        Table("hits", "Sessions a second in one process, decoded", "codec", _HITS),
        Table("calls", "Remote calls per 1,000 requests", "max_staleness", _CALLS_LEFT, "rate"),
        Table("latency", "A load by 1 caller", "way", _NEAR, "rtt_ms", where={"callers": 1}),
        Table("cpu", "Loads by 32 callers", "way", _NEAR_CPU, where={"callers": 32}),
        Table("revoked", "From an acknowledged delete to the refusal, ms", "replica", _REVOKED),
        Table("price", "Time of the server for a save, us", "way", _PRICE, "subscribers"),
        Table("pays", "Where a near cache pays", "link", _PAYS),
    ),
    "shared": (*_closed(_LOOPS, "Loads a second"), _CPU, _OVER),
    "arrivals": _open(_LOOPS),
    "tls": (*_closed(_LOOPS, "Loads a second"), _CPU, *_open(_LOOPS)),
    "web": (
        _web("speed", "Requests a second, 32 connections", "throughput", callers=32),
        _web("speed-1", "Requests a second, 1 connection", "throughput", callers=1),
        _web("added", "Added to the p50 latency, ms, 1 connection", "added_ms", callers=1),
        _web("added-32", "Added to the p50 latency, ms, 32 connections", "added_ms", callers=32),
        _web("wire", "Round trips of a request, and commands", "cost"),
        Table("races", "Lost changes, and sessions of bots", "way", _RACES),
    ),
    "memory": (Table("resident", "Memory of the process", "loads", {"MB": "rss_mb"}),),
}
"""By scenario. docs/benchmarks.md shows some of them; the terminal shows all."""

_SPEED: Final = {"loads a second": ("throughput",)}
_BOTH: Final = _SPEED | {"CPU of the client for a load, us": ("cpu_us",)}
_SUMMARY: Final = {"server": "one server", "loop": "asyncio"}
_P50: Final = {"p50, ms (logarithmic)": ("p50_ms",)}
_OPEN: Final = _P50 | {
    "p99, ms (logarithmic)": ("p99_ms",),
    "CPU with the generator, us (logarithmic)": ("cpu_us",),
}
_LOCAL: Final = {
    "us for each session": tuple(_TIMES.values()),
    "pauses, ms": tuple(_PAUSES.values()),
    "bytes for each session": ("bytes",),
}
_SERVER_COSTS: Final = {text: (name,) for text, name in _COSTS.items()}


def _bars(name: str, title: str, split: str, unit: str) -> Plot:
    axes = {f"{unit} a second": ("throughput",)}
    return Plot(name, title, "way", axes, "callers", (split,), bars=True)


def _lines(name: str, title: str, axes: Any, split: Sequence[str] = (), **more: Any) -> Plot:
    return Plot(name, title, "callers", axes, "way", split, log="x", **more)


PLOTS: Final[Mapping[str, tuple[Plot, ...]]] = {
    "load": (_bars("load-throughput", "A load, by each way", "server", "loads"),),
    "rtt": (
        Plot(
            *("rtt-latency", "Latency of a load by 1 caller, over the RTT", "rtt_ms", _P50, "way"),
            where={"callers": 1},
            log="xy",
            columns=1,
        ),
        _lines(
            "rtt-throughput", "Loads a second, for each RTT in ms", _SPEED, ("rtt_ms",), columns=3
        ),
    ),
    "server": (
        Plot("server-costs", "Costs of a load", "way", _SERVER_COSTS, split=_SERVER, bars=True),
    ),
    "peers": (_bars("peers-throughput", "Libraries and drivers", "workload", "operations"),),
    "local": (Plot("local-scaling", "LocalStorage", "sessions", _LOCAL, log="x", columns=3),),
    "codecs": (
        Plot(
            *("codecs-time", "Codecs, over the bytes of a session", "size"),
            *({"us (logarithmic)": ("us",)}, "codec", ("does",)),
            log="xy",
        ),
    ),
    "cas": (_bars("cas-throughput", "Saves, with and without a condition", "server", "saves"),),
    "principals": (),
    "near": (
        Plot(
            *("near-latency", "Mean latency of a load by 1 caller, over the RTT", "rtt_ms"),
            *({"mean, ms (logarithmic)": ("mean_ms",)}, "way"),
            where={"callers": 1},
            log="xy",
            columns=1,
        ),
    ),
    "shared": (
        _lines(
            *("shared-summary", "Loading and renewing sessions of 800 bytes", _BOTH),
            where=_SUMMARY,
            only=("aiosessions", "redis.asyncio"),
        ),
        _lines("shared-throughput", "One shared connection beside drivers", _SPEED, _LOOPS),
    ),
    "arrivals": (
        Plot(
            "arrivals-latency",
            "Loads that arrive at random (no point: the client cannot keep up)",
            x="rate",
            axes=_OPEN,
            series="way",
            split=("loop",),
            where=_KEEPS_UP,
            log="xy",
            columns=3,
        ),
    ),
    "tls": (_lines("tls-throughput", "Loads over TLS", _BOTH, ("loop",)),),
    "web": (_bars("web-throughput", "Requests to a web application", "kind", "requests"),),
    "memory": (Plot("memory-flat", "Memory", "loads", {"MB": ("rss_mb",)}, columns=1),),
}
"""By scenario."""

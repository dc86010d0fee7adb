"""Results as tables of text: for the terminal, and for docs/benchmarks.md.

Figures are medians over the rounds, with three digits. The percentage after "±" is half the
distance from the lowest round to the highest, relative to the median.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .results import Claim, Result, Row, select

_CALLERS = (1, 32, 256)
_KEEPS_UP = 0.95
"""The least share of the arrivals that a client has answered at the last arrival."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: The title.
        columns: The heads of the columns.
        rows: The cells of each row.
        note: An explanation below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def who(callers: int) -> str:
    """Callers in words."""
    return "1 caller" if callers == 1 else f"{callers} callers"


def number(value: float) -> str:
    """A figure with three digits: "12,300", "1.23", "0.012"."""
    if value >= 1000:
        digits = len(str(int(value))) - 3
        return f"{round(value, -digits):,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def median(row: Row, figure: str) -> str:
    """The median of a figure, or "" where it was not measured."""
    return number(row[figure]["median"]) if figure in row else ""


def spread(row: Row, figure: str) -> float:
    """Half the distance between the extreme rounds, over the median."""
    values = row[figure]
    return (values["high"] - values["low"]) / 2 / values["median"] if values["median"] else 0.0


def figure(row: Row, name: str) -> str:
    """The median and its spread."""
    return f"{median(row, name)} ±{spread(row, name):.0%}" if name in row else ""


def summary(result: Result) -> list[str]:
    """The machine, the settings, and whether the noise allows conclusions."""
    where, how, noise = result.environment, result.settings, result.noise
    versions = ", ".join(f"{name} {version}" for name, version in where.packages.items())
    rounds = "One round" if how["rounds"] == 1 else f"Medians of {how['rounds']} rounds"
    each = f", {how['seconds']} s for each measurement" if how["seconds"] else ""
    place = f"{where.python} on {where.machine}, {where.cores} cores: {where.placement}"
    lines = [f"{where.date}, revision {where.revision}, {place}. {versions}."]
    lines.append(
        f"{rounds}{each}{', a quick look' if how['quick'] else ''}. "
        f"A fixed computation between the measurements varied by {noise.spread:.0%}; "
        f"the load average before was {noise.load_before}."
    )
    if noise.too_much:
        # Figures of one table come from different moments; ratios of claims come from one round.
        lines.append(
            f"The machine was noisy: differences of less than {2 * noise.spread:.0%} between the "
            "figures of a table mean nothing."
        )
    lines += [f"Not measured: {what}, {why}." for what, why in result.missing.items()]
    return lines


def tables(result: Result) -> list[Table]:
    """The tables of a result, its claims first."""
    made = [claims(result.claims)] if result.claims else []
    return made + _TABLES[result.scenario](result)


def claims(some: Iterable[Claim], title: str = "Claims") -> Table:
    """A table of claims and their verdicts."""
    return Table(
        title,
        ("claim", "target", "measured", "verdict"),
        [(each.claim, each.target, each.measured, each.verdict) for each in some],
        "Measured: the median of the rounds and, in brackets, its confidence interval of 95 %, or "
        "with fewer than 6 rounds the lowest and the highest. Confirmed: all rounds in the "
        "interval meet the target. Not confirmed: none of them does.",
    )


def _labels(result: Result) -> dict[str, str]:
    labels: dict[str, str] = result.settings.get("labels", {})
    return labels


def _servers(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["server"] for row in rows))


def _commands(commands: dict[str, int]) -> str:
    return ", ".join(name + (f" x{times}" if times > 1 else "") for name, times in commands.items())


_WIRE = ("round trips", "commands", "the server executes", "bytes sent", "bytes received")


def _wire(row: Row) -> tuple[str, ...]:
    return (
        str(row["round_trips"]),
        _commands(row["commands"]),
        _commands(row["executed"]).lower(),
        f"{row['bytes_sent']:,}",
        f"{row['bytes_received']:,}",
    )


def _speed_columns(
    what: str = "a second", all_callers: Iterable[int] = _CALLERS
) -> tuple[str, ...]:
    return tuple(f"{who(callers)}: {what} (p50 / p99 ms)" for callers in all_callers)


def _speed(rows: Sequence[Row], all_callers: Iterable[int] = _CALLERS) -> list[str]:
    found = {row["callers"]: row for row in rows if "callers" in row}
    return [
        f"{figure(row, 'throughput')} ({median(row, 'p50_ms')} / {median(row, 'p99_ms')})"
        if (row := found.get(callers))
        else ""
        for callers in all_callers
    ]


def _load(result: Result) -> list[Table]:
    labels, semantics = _labels(result), result.settings.get("semantics", {})
    made = []
    for server in _servers(result.rows):
        rows = select(result.rows, server=server)
        wire = [row for row in rows if "round_trips" in row]
        made += [
            Table(
                f"One load on the wire, {server}",
                ("way to load", *_WIRE, "what it means"),
                [(labels[row["way"]], *_wire(row), semantics[row["way"]]) for row in wire],
            ),
            Table(
                f"Loads a second and latency, {server}",
                ("way to load", *_speed_columns("loads a second")),
                [(label, *_speed(select(rows, way=way))) for way, label in labels.items()],
                "Without the relay. Every way decodes the session and checks its id.",
            ),
        ]
    return made


def _rtt(result: Result) -> list[Table]:
    labels = _labels(result)
    delays = sorted({row["rtt_ms"] for row in result.rows})
    pings = [select(result.rows, way="ping", rtt_ms=delay)[0] for delay in delays]
    made = [
        Table(
            f"p50 / p99 in ms / loads a second, {who(callers)}",
            ("way to load", *(f"RTT + {delay:g} ms" for delay in delays)),
            [
                ("a bare ping", *(median(ping, "p50_ms") for ping in pings)),
                *(
                    (
                        label,
                        *(
                            " / ".join(
                                median(row, name) for name in ("p50_ms", "p99_ms", "throughput")
                            )
                            for delay in delays
                            for row in select(result.rows, way=way, rtt_ms=delay, callers=callers)
                        ),
                    )
                    for way, label in labels.items()
                ),
            ],
            "Through the relay, which takes time as well, as the bare ping shows. With a short RTT "
            "and many callers, the relay limits clients that send each command by itself.",
        )
        for callers in _CALLERS
    ]
    return [*made, _near_cache(result, delays)]


def _near_cache(result: Result, delays: Sequence[float]) -> Table:
    """The time that hits in this process would save."""

    def p50(way: str, delay: float) -> float:
        row = select(result.rows, way=way, rtt_ms=delay)[0]  # the ping, or 1 caller
        return float(row["p50_ms"]["median"])

    hits = (0.5, 0.9, 0.99)
    hit = p50("local", 0.0)
    return Table(
        "What a near cache could save, ms for each load",
        (
            *("RTT", "a bare ping", "a load, p50", "a hit, at best"),
            *(f"saved at {share:.0%} hits" for share in hits),
        ),
        [
            (
                f"+ {delay:g} ms",
                number(p50("ping", delay)),
                number(p50("aiosessions", delay)),
                number(hit),
                *(number(share * (p50("aiosessions", delay) - hit)) for share in hits),
            )
            for delay in delays
        ],
        "One caller. The cost of a hit is that of `LocalStorage.load`, which decodes a copy.",
    )


def _server(result: Result) -> list[Table]:
    labels = _labels(result)
    return [
        Table(
            f"What {server} pays for a load",
            (
                "way to load",
                "us executing (commandstats)",
                "us of CPU, I/O included",
                "commands executed",
                "bytes to each replica",
                "bytes to the append-only file",
            ),
            [
                (
                    labels[row["way"]],
                    figure(row, "executing_us"),
                    figure(row, "cpu_us"),
                    median(row, "executions"),
                    median(row, "replicated_bytes"),
                    median(row, "appended_bytes"),
                )
                for row in select(result.rows, server=server)
            ],
            "The embedded Valkey uses libc's allocator, not jemalloc.",
        )
        for server in _servers(result.rows)
    ]


def _peers(result: Result) -> list[Table]:
    labels, lacks = _labels(result), result.settings.get("lacks", {})
    found = [name for name in labels if select(result.rows, peer=name)]
    made = []
    for workload, title in (
        ("load", "A load that renews the TTL"),
        ("cycle", "A request: load, change one field, save"),
    ):
        rows = select(result.rows, workload=workload)
        wire = {row["peer"]: row for row in rows if "round_trips" in row}
        made.append(
            Table(
                f"{title}, {_servers(result.rows)[0]}",
                ("library", "round trips", "commands", *_speed_columns(), "what it lacks"),
                [
                    (
                        labels[name],
                        *_wire(wire[name])[:2],
                        *_speed(select(rows, peer=name)),
                        lacks[name] or "nothing of what is promised here",
                    )
                    for name in found
                ],
            )
        )
    return made


def _local(result: Result) -> list[Table]:
    def shown(row: Row, name: str) -> str:
        return figure(row, name) if row["measured"] > 1 else median(row, name)

    figures = {
        "store_us": "store, us",
        "load_us": "load, us",
        "sweep_us": "sweep of all, us each",
        "sweep_few_us": "sweep of 500, us each",
        "sweep_none_us": "sweep of none, us",
        "bytes": "bytes a session",
        "pause_p99_ms": "pauses in a sweep of all: p99, ms",
        "pause_ms": "longest, ms",
        "idle_pause_ms": "longest, idle, ms",
    }
    return [
        Table(
            f"LocalStorage, records of {result.facts['record_bytes']} bytes",
            ("sessions", *figures.values()),
            [
                (f"{row['sessions']:,}", *(shown(row, name) for name in figures))
                for row in result.rows
            ],
            "Each size in a fresh process; the largest once. Bytes are the growth of the process, "
            "ids included; a few sessions partly fit into memory that the process already had. A "
            "pause is the time that another task waits for its turn. The longest pause is at the "
            "end of a sweep of many sessions, when their memory returns to the system.",
        )
    ]


_CHECKED = (
    "Ours also decode what they have encoded, so that what cannot be read back is refused when it "
    "is stored."
)


def _codecs(result: Result) -> list[Table]:
    sizes = sorted({row["size"] for row in result.rows})
    names = dict.fromkeys(row["codec"] for row in result.rows)
    return [
        Table(
            f"{title}, us",
            ("codec", *(f"{size / 1000:g} KB" for size in sizes)),
            [
                (
                    name,
                    *(
                        figure(row, "us")
                        for size in sizes
                        for row in select(result.rows, codec=name, size=size, does=does)
                    ),
                )
                for name in names
            ],
            note,
        )
        for does, title, note in (
            ("encode", "A session to bytes", _CHECKED),
            ("decode", "Bytes to a session", "Ours and msgspec validate every field."),
        )
    ]


_SAVES = {
    "raw-set": "SET, redis.asyncio, pool",
    "always": "store, When.ALWAYS: a plain SET",
    "unchanged": "store, When.UNCHANGED: compare and set",
}


def _cas(result: Result) -> list[Table]:
    made = []
    for server in _servers(result.rows):
        rows = select(result.rows, server=server)
        wire = {row["save"]: row for row in rows if "round_trips" in row}
        made += [
            Table(
                f"A save, {server}",
                ("save", *_WIRE[:2], *_speed_columns("saves a second")),
                [
                    (label, *_wire(wire[save])[:2], *_speed(select(rows, save=save)))
                    for save, label in _SAVES.items()
                ],
            ),
            Table(
                f"One hot session, {server}",
                ("writers", "increments", "counted", "attempts per success", "successes a second"),
                [
                    (
                        str(row["writers"]),
                        f"{row['increments']:,}",
                        f"{row['counted']['low']:.0%}",
                        figure(row, "attempts_per_success"),
                        figure(row, "throughput"),
                    )
                    for row in rows
                    if "hot" in row
                ],
            ),
        ]
    return made


def _way(way: str) -> str:
    return way + (", decoded" if way.startswith("aiosessions") else ", raw bytes")


def _closed_loops(rows: Sequence[Row], title: str) -> list[Table]:
    """Throughput, latency and CPU over the callers."""
    all_callers = sorted({row["callers"] for row in rows})
    ways = dict.fromkeys(row["way"] for row in rows)
    made = [
        Table(
            title,
            ("client", *_speed_columns("loads a second", all_callers)),
            [(_way(way), *_speed(select(rows, way=way), all_callers)) for way in ways],
        )
    ]
    if all("cpu_us" in row for row in rows):
        made.append(
            Table(
                f"CPU of the client's process for a load, us, {title}",
                ("client", *map(who, all_callers)),
                [
                    (_way(way), *(figure(row, "cpu_us") for row in select(rows, way=way)))
                    for way in ways
                ],
            )
        )
    return made


def _shared(result: Result) -> list[Table]:
    made = []
    for server in ("one server", "cluster"):
        for loop in ("asyncio", "uvloop"):
            if rows := select(result.rows, server=server, loop=loop):
                made += _closed_loops(rows, f"{server}, {loop}")
    compared = [row for row in result.rows if "over" in row]
    return made + ([_compared(result, compared)] if compared else [])


def _compared(result: Result, rows: Sequence[Row]) -> Table:
    """The ratios to each client, beside the marks."""
    marks = [result.settings["claimed"], result.settings["next_marks"]]
    loops = list(dict.fromkeys(row["loop"] for row in rows))
    cells = []
    for way, callers in dict.fromkeys((row["over"], row["callers"]) for row in rows):
        some = select(rows, over=way, callers=callers)
        times, cpu = (
            [figure(row, name) for loop in loops for row in select(some, loop=loop)]
            for name in ("times", "cpu_times")
        )
        claimed = [str(each.get(way, {}).get(str(callers), "")) for each in marks]
        cells.append((way, str(callers), *times, *claimed, *cpu))
    return Table(
        "aiosessions beside each client: times as many loads, and its share of the CPU for a load",
        (
            "client",
            "callers",
            *(f"times its loads, {loop}" for loop in loops),
            "claimed",
            "next mark",
            *(f"share of its CPU, {loop}" for loop in loops),
        ),
        cells,
        "Medians of the ratios within each round. The next mark is an aim, not a claim.",
    )


def _arrivals(result: Result) -> list[Table]:
    return [
        _open_loops(rows, f"Loads that arrive at random, {result.settings['server']}, {loop}")
        for loop in dict.fromkeys(row["loop"] for row in result.rows)
        if (rows := [row for row in select(result.rows, loop=loop) if "rate" in row])
    ]


def _open_loops(rows: Sequence[Row], title: str) -> Table:
    rates = sorted({row["rate"] for row in rows})
    heads = ("{:,} a second: p50 / p99 ms", "CPU us (with the generator)")
    return Table(
        title,
        ("client", *(head.format(rate) for rate in rates for head in heads)),
        [
            (
                way,
                *(
                    cell
                    for rate in rates
                    for row in select(rows, way=way, rate=rate)
                    for cell in _arrived(row)
                ),
            )
            for way in dict.fromkeys(row["way"] for row in rows)
        ],
        "Latency counts from the scheduled arrival. CPU is that of the client's process for a "
        "load, less the CPU of the same arrivals with no client, which the last row shows; in "
        "brackets, all of it. A client cannot keep up if it has answered less than "
        f"{_KEEPS_UP:.0%} of the loads at the last arrival, or fails loads.",
    )


def keeps_up(row: Row) -> bool:
    """Whether a client answers loads as fast as they arrive."""
    return bool(row["answered"]["median"] >= _KEEPS_UP and not row["failed"]["median"])


def _arrived(row: Row) -> tuple[str, str]:
    """The cells of a client at a rate."""
    if not keeps_up(row):
        return f"cannot keep up: {median(row, 'throughput')} a second", ""
    net = number(max(0.0, row["net_cpu_us"]["median"]))
    return f"{median(row, 'p50_ms')} / {median(row, 'p99_ms')}", f"{net} ({median(row, 'cpu_us')})"


def _tls(result: Result) -> list[Table]:
    made = []
    for loop in dict.fromkeys(row["loop"] for row in result.rows):
        rows = [row for row in select(result.rows, loop=loop) if "callers" in row]
        made += _closed_loops(rows, f"{result.settings['server']}, TLS, {loop}")
    return made + _arrivals(result)


def _memory(result: Result) -> list[Table]:
    rows = result.rows
    shown = [rows[place] for place in sorted({len(rows) * tenth // 10 for tenth in range(10)})]
    shown.append(rows[-1])
    return [
        Table(
            "The process's memory",
            ("loads", "resident MB"),
            [(f"{row['loads']:,}", f"{row['rss_mb']:.2f}") for row in shown],
        )
    ]


_TABLES: dict[str, Callable[[Result], list[Table]]] = {
    "load": _load,
    "rtt": _rtt,
    "server": _server,
    "peers": _peers,
    "local": _local,
    "codecs": _codecs,
    "cas": _cas,
    "shared": _shared,
    "arrivals": _arrivals,
    "tls": _tls,
    "memory": _memory,
}

"""A load by every alternative, over round-trip times up to 20 ms."""

import asyncio
import socket
import statistics
import time
from typing import Any

from aiosessions import Session

from ..alternatives import ALTERNATIVES, LOCAL, OURS, connected
from ..loops import CALLERS
from ..measure import Bench, Cell
from ..measure import rows as rows_of
from ..relay import RelayProcess, relaying
from ..results import Claim, Result, Row, judge, select, stat
from ..servers import MeasuredServer, targets
from ..wire import slope
from ..workload import sessions

DELAYS_MS = (0.0, 0.25, 0.5, 1.0, 5.0, 20.0)
PING = "ping"
_HIT_RATIO = 0.9


def run(bench: Bench) -> Result:
    """Measure on one server, through the relay."""
    stored = sessions()
    with targets(bench.settings) as (target, *_):
        rows, claims = asyncio.run(_run(bench, target, stored))
    return bench.result(
        "rtt",
        rows,
        claims=claims,
        facts=_facts(rows),
        rounds=_rounds(bench),
        labels={way.name: way.label for way in ALTERNATIVES},
    )


def _rounds(bench: Bench) -> int:
    """At most three rounds, because there are six delays to measure."""
    return min(bench.settings.rounds, 3)


async def _run(
    bench: Bench, target: MeasuredServer, stored: list[Session[Any]]
) -> tuple[list[Row], list[Claim]]:
    ids = [session.id for session in stored]
    rows: list[Row] = []
    medians: dict[str, list[list[float]]] = {way.name: [] for way in ALTERNATIVES}
    links: list[float] = []
    with relaying(*target.address) as relay:
        async with connected(target.through(relay.port), stored) as clients:
            for delay in DELAYS_MS:
                relay.delay(delay / 1000)
                link = _ping(relay)
                links.append(statistics.median(link))
                labels = {"server": target.label, "rtt_ms": delay}
                rows.append(labels | {"way": PING, "p50_ms": stat(link)})
                measured = await bench.interleaved(
                    f"load over {delay} ms",
                    [
                        Cell(
                            labels | {"way": way.name},
                            way.make(clients),
                            ids,
                            callers,
                            warm_up=0.1 + delay / 100,
                        )
                        for way in ALTERNATIVES
                        for callers in CALLERS
                    ],
                    range(_rounds(bench)),
                )
                rows += rows_of(measured)
                for row, samples in measured:
                    if row["callers"] == 1:
                        medians[row["way"]].append([sample.p50 for sample in samples])
            relay.delay(0)
    return rows, [
        judge(
            f"{way.label}: latency grows with the round-trip time",
            f"by {way.round_trips} for 1",
            [slope(links, each) for each in zip(*medians[way.name], strict=True)],
            lambda found, expected=way.round_trips: abs(found - expected) < 0.1,  # type: ignore[misc]  # a default binds it
        )
        for way in ALTERNATIVES
        if way.remote
    ]


def _ping(relay: RelayProcess) -> list[float]:
    """Time round trips through the relay on a plain socket, in milliseconds."""
    times: list[float] = []
    with socket.create_connection(("127.0.0.1", relay.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(25):
            start = time.perf_counter()
            connection.sendall(b"PING\r\n")
            connection.recv(64)
            times.append((time.perf_counter() - start) * 1000)
    return times[5:]


def _facts(rows: list[Row]) -> dict[str, str]:
    """The time that a near cache would save, and its parts."""

    def p50(way: str, delay: float) -> float:
        row = select(rows, way=way, rtt_ms=delay)[0]  # the ping, or 1 caller
        return float(row["p50_ms"]["median"])

    hit = p50(LOCAL.name, 0.0)
    overhead = statistics.median(p50(OURS.name, delay) - p50(PING, delay) for delay in DELAYS_MS)
    facts = {
        "hit_ms": f"{hit:.3f}",
        "hit_ratio": f"{_HIT_RATIO:.0%}",
        "overhead_ms": f"{overhead:.2f}",
        "rtt_that_saves_1_ms": f"{max(0.0, 1 / _HIT_RATIO - overhead + hit):.2f}",
    }
    for delay in DELAYS_MS:
        facts[f"saved_ms_at_{delay:g}"] = f"{_HIT_RATIO * (delay + overhead - hit):.2f}"
    return facts

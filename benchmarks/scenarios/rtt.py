"""A load by every alternative, over round-trip times up to 20 ms."""

import socket
import statistics
import time
from contextlib import ExitStack

from tests.support.proxy_process import ProxyProcess, proxy_process

from ..client_process import Job
from ..loops import CALLERS, ClosedLoop
from ..measure import Bench, Samples, merged
from ..measure import rows as rows_of
from ..results import Result, Row, judge, select, stat
from ..servers import stored, targets
from ..ways import ALTERNATIVES, LOCAL, SHARED_GETEX

DELAYS_MS = (0.0, 0.25, 0.5, 1.0, 5.0, 20.0)
PING = "a bare ping"
_HIT_RATIO = 0.9


def run(bench: Bench) -> Result:
    """Measure on one server, through a proxy."""
    rounds = min(bench.rounds, 3)
    samples: Samples = []
    rows: list[Row] = []
    runs = [ClosedLoop(bench.seconds, callers) for callers in CALLERS]
    with (
        targets(bench) as (target, *_),
        target.client() as client,
        stored(client) as ids,
        ExitStack() as stack,
    ):
        host, port = target.address
        # A proxy for each way, because one has too few sockets for all pools.
        proxies = [stack.enter_context(proxy_process(port, host)) for _ in ALTERNATIVES]
        jobs = [
            Job(way, target.label, target.through(proxy.port), ids)
            for way, proxy in zip(ALTERNATIVES, proxies, strict=True)
        ]
        for number in range(rounds):
            for proxy in proxies:
                proxy.set()
            with bench.clients(jobs) as clients:
                for delay in DELAYS_MS:
                    for proxy in proxies:
                        proxy.set(round_trip=delay / 1000)
                    samples += bench.round(clients, runs, number, rtt_ms=delay)
        for delay in DELAYS_MS:
            proxies[0].set(round_trip=delay / 1000)
            labels = {"server": target.label, "way": PING, "rtt_ms": delay, "callers": 1}
            rows.append(labels | {"p50_ms": stat(_ping(proxies[0]))})
    samples = merged(samples)
    links = [row["p50_ms"]["median"] for row in rows]
    rows = rows_of(samples) + rows
    claims = [
        judge(
            "Latency grows with the round-trip time",
            f"by {way.round_trips} for 1",
            [statistics.linear_regression(links, each).slope for each in _latencies(samples, name)],
            lambda slope, expected=way.round_trips: abs(slope - expected) < 0.1,  # type: ignore[misc]
            name,
        )
        for name, way in ALTERNATIVES.items()
        if way.round_trips
    ]
    return bench.result("rtt", rows, claims=claims, facts=_facts(rows), rounds=rounds)


def _latencies(samples: Samples, way: str) -> list[tuple[float, ...]]:
    """The latencies of one caller over all delays, for each round."""
    found = [some for row, some in samples if row["way"] == way and row["callers"] == 1]
    return list(zip(*([each.p50_ms for each in some] for some in found), strict=True))


def _ping(proxy: ProxyProcess) -> list[float]:
    """Time round trips through the proxy on a plain socket, in milliseconds."""
    times: list[float] = []
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
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
        (row,) = select(rows, way=way, rtt_ms=delay, callers=1)
        return float(row["p50_ms"]["median"])

    hit = p50(LOCAL, 0.0)
    overhead = statistics.median(p50(SHARED_GETEX, delay) - p50(PING, delay) for delay in DELAYS_MS)
    facts = {
        "hit_ms": f"{hit:.3f}",
        "hit_ratio": f"{_HIT_RATIO:.0%}",
        "overhead_ms": f"{overhead:.2f}",
    }
    for delay in DELAYS_MS:
        facts[f"saved_ms_at_{delay:g}"] = f"{_HIT_RATIO * (delay + overhead - hit):.2f}"
    return facts

"""A load by every alternative, over round-trip times up to 20 ms."""

import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from tests.support.proxy_process import ProxyProcess, proxy_process

from ..client import Job
from ..measure import Bench, Group, rows_of
from ..results import Result, Row, judge, stat
from ..servers import targets
from ..ways import ALTERNATIVES

_DELAYS_MS: Final = (0.0, 0.25, 0.5, 1.0, 5.0, 20.0)
_PING: Final = "a bare ping"


def rtt(bench: Bench) -> Result:
    """Measure on one server, through proxies."""
    rounds = min(bench.rounds, 3)
    rows: list[Row] = []
    with targets(bench.url) as (target, *_), ExitStack() as stack:
        host, port = target.address
        # A proxy for each way, because one has too few sockets for all pools.
        proxies = [stack.enter_context(proxy_process(port, host)) for _ in ALTERNATIVES]
        jobs = [
            Job(way, target.label, target.through(proxy.port), target.ids)
            for way, proxy in zip(ALTERNATIVES, proxies, strict=True)
        ]

        def delayed(delay: float) -> Callable[[], None]:
            def delay_all() -> None:
                for proxy in proxies:
                    proxy.set(round_trip=delay / 1000)

            return delay_all

        groups = [
            Group(jobs, bench.closed(), {"rtt_ms": delay}, delayed(delay)) for delay in _DELAYS_MS
        ]
        samples = bench.measure(groups, rounds)
        for delay in _DELAYS_MS:
            delayed(delay)()
            labels = {"server": target.label, "way": _PING, "rtt_ms": delay, "callers": 1}
            rows.append(labels | {"p50_ms": stat(_ping(proxies[0]))})
    links = [row["p50_ms"]["median"] for row in rows]
    rows = rows_of(samples) + rows
    claims = []
    for name, way in ALTERNATIVES.items():
        some = [x for row, x in samples if row["way"] == name and row["callers"] == 1]
        latencies = zip(*([each.p50_ms for each in delay] for delay in some), strict=True)
        slopes = [statistics.linear_regression(links, each).slope for each in latencies]
        if expected := way.round_trips:
            claim, target_text = "Latency grows with the round-trip time", f"by {expected} for 1"
            claims.append(judge(claim, target_text, slopes, _within_a_tenth(expected), name))
    return bench.result("rtt", rows, claims=claims, rounds=rounds)


def _within_a_tenth(expected: int) -> Callable[[float], bool]:
    return lambda slope: abs(slope - expected) < 0.1


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

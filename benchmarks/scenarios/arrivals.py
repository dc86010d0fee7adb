"""Open loops, as requests reach a proxy, and closed and open loops over TLS.

All clients get the same arrivals in a round. The CPU of the same arrivals without a client is
subtracted; the results have both figures. aiofastnet replaces the TLS transport of an event loop,
for the storage, redis.asyncio and coredis. valkey-glide does its own TLS.
"""

from typing import Final

from ..client import AIOFASTNET, Job, Run
from ..measure import Bench, Group, Samples, rows_of
from ..results import Result, Row, stat
from ..servers import MeasuredServer, over_tls, targets
from ..ways import GLIDE, IDLE, ON_ONE_SERVER, PACKAGES
from .closed import PROXY_CALLERS

RATES: Final = (500, 2_000, 8_000)
"""Arrivals a second."""

_ENOUGH_ARRIVALS: Final = 1_000
_KEEPS_UP: Final = 0.95
"""The least share of the arrivals that a client has answered at the last arrival."""


def arrivals(bench: Bench) -> Result:
    """Measure on one server, in turn on each event loop."""
    with targets(bench.url) as (target, *_):
        return _measure(bench, "arrivals", target)


def tls(bench: Bench) -> Result:
    """Measure over TLS, on asyncio's and aiofastnet's transports."""
    with over_tls(bench.url) as target:
        return _measure(bench, "tls", target)


def _measure(bench: Bench, scenario: str, target: MeasuredServer) -> Result:
    rounds = min(bench.rounds, 3)
    runs = bench.closed(PROXY_CALLERS) + _open(bench)
    groups = [
        Group([Job(way, target.label, target.url, target.ids, loop) for way in ways], runs)
        for loop, ways in (
            ("asyncio", (*ON_ONE_SERVER, IDLE)),
            (AIOFASTNET, (*(way for way in ON_ONE_SERVER if way != GLIDE), IDLE)),
        )
    ]
    rows = _rows(bench.measure(groups, rounds))
    packages = [*PACKAGES, "aiofastnet"]
    return bench.result(scenario, rows, packages=packages, rounds=rounds, server=target.label)


def _open(bench: Bench) -> list[Run]:
    """Open loops, each long enough for a 99th percentile."""
    return [
        Run(seconds=bench.seconds if bench.quick else max(0.75, _ENOUGH_ARRIVALS / rate), rate=rate)
        for rate in RATES
    ]


def _rows(samples: Samples) -> list[Row]:
    """Rows with all figures; `net_cpu_us` of an open loop is without the load generator."""
    idle = {(row["loop"], row["rate"]): some for row, some in samples if row["way"] == IDLE}
    made = rows_of(samples)
    for row, (_, some) in zip(made, samples, strict=True):
        if "rate" in row:
            alone = idle[row["loop"], row["rate"]]
            row["net_cpu_us"] = stat(a.cpu_us - b.cpu_us for a, b in zip(some, alone, strict=True))
            answered = stat(each.answered for each in some)["median"] >= _KEEPS_UP
            row["keeps_up"] = answered and not stat(each.failed for each in some)["median"]
    return made

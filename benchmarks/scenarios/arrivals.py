"""Open loops: loads that arrive at random, as requests reach a proxy.

Each client has a fresh process in every round. All clients get the same arrivals in a round. The
CPU of the same arrivals without a client is subtracted; the table shows both figures.
"""

from typing import Final

from ..client_process import Job, OpenLoop
from ..clients import IDLE, ON_ONE_SERVER, PACKAGES
from ..measure import Bench, Measured, merged
from ..results import Result, Row, stat
from ..servers import stored, targets
from ..workload import sessions

LOOPS: Final = ("asyncio", "uvloop")
RATES: Final = (500, 2_000, 8_000)
"""Arrivals a second."""

_ENOUGH_ARRIVALS: Final = 1_000
_MOST_ROUNDS: Final = 3


def run(bench: Bench) -> Result:
    """Measure on one server, in turn on each event loop."""
    found: list[Measured] = []
    rounds = min(bench.settings.rounds, _MOST_ROUNDS)
    with (
        targets(bench.settings) as (target, *_),
        target.client() as client,
        stored(client, sessions()) as ids,
    ):
        for number in range(rounds):
            for loop in LOOPS:
                ways = (*ON_ONE_SERVER, IDLE)
                jobs = [Job(way, loop, target.label, target.url, ids) for way in ways]
                with bench.client_processes(jobs) as clients:
                    what = f"arrivals, round {number + 1}, {loop}"
                    found.append(
                        bench.interleaved_clients(what, clients, runs(bench, number), number)
                    )
    return bench.result(
        "arrivals",
        rows(merged(found)),
        packages=PACKAGES,
        rounds=rounds,
        seconds=None,
        arrivals_seconds={str(rate): seconds(bench, rate) for rate in RATES},
        server=target.label,
    )


def runs(bench: Bench, number: int) -> list[OpenLoop]:
    """The runs of a round."""
    return [OpenLoop(seconds(bench, rate), rate, number) for rate in RATES]


def seconds(bench: Bench, rate: int) -> float:
    """The time of a run: long enough for a 99th percentile."""
    return bench.settings.seconds if bench.settings.quick else max(0.75, _ENOUGH_ARRIVALS / rate)


def rows(measured: Measured) -> list[Row]:
    """Rows with all figures; `net_cpu_us` is without the load generator."""
    idle = {
        (row["loop"], row["rate"]): [sample.cpu_us for sample in samples]
        for row, samples in measured
        if row["way"] == IDLE
    }
    return [
        row
        | {
            "p50_ms": stat(sample.p50 for sample in samples),
            "p99_ms": stat(sample.p99 for sample in samples),
            "cpu_us": stat(sample.cpu_us for sample in samples),
            "net_cpu_us": stat(
                sample.cpu_us - alone
                for sample, alone in zip(samples, idle[row["loop"], row["rate"]], strict=True)
            ),
            "throughput": stat(sample.throughput for sample in samples),
            "answered": stat(sample.answered for sample in samples),
            "failed": stat(sample.failed for sample in samples),
        }
        for row, samples in measured
    ]

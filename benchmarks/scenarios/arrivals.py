"""Open loops: loads that arrive at random, as requests reach a proxy.

All clients get the same arrivals in a round. The CPU of the same arrivals without a client is
subtracted; the results have both figures.
"""

from typing import Final

from ..client_process import Job
from ..loops import OpenLoop
from ..measure import Bench, Samples, merged
from ..measure import rows as rows_of
from ..results import Result, Row, stat
from ..servers import stored, targets
from ..ways import IDLE, ON_ONE_SERVER, PACKAGES
from .shared import LOOPS

RATES: Final = (500, 2_000, 8_000)
"""Arrivals a second."""

_ENOUGH_ARRIVALS: Final = 1_000
_KEEPS_UP: Final = 0.95
"""The least share of the arrivals that a client has answered at the last arrival."""


def run(bench: Bench) -> Result:
    """Measure on one server, in turn on each event loop."""
    samples: Samples = []
    rounds = min(bench.rounds, 3)
    with targets(bench) as (target, *_), target.client() as client, stored(client) as ids:
        for number in range(rounds):
            for loop in LOOPS:
                ways = (*ON_ONE_SERVER, IDLE)
                jobs = [Job(way, target.label, target.url, ids, loop) for way in ways]
                with bench.clients(jobs) as clients:
                    samples += bench.round(clients, runs(bench, number), number)
    return bench.result(
        "arrivals",
        rows(merged(samples)),
        packages=PACKAGES,
        rounds=rounds,
        seconds=None,
        server=target.label,
    )


def runs(bench: Bench, number: int) -> list[OpenLoop]:
    """The runs of a round, each long enough for a 99th percentile."""
    return [
        OpenLoop(bench.seconds if bench.quick else max(0.75, _ENOUGH_ARRIVALS / rate), rate, number)
        for rate in RATES
    ]


def rows(samples: Samples) -> list[Row]:
    """Rows with all figures; `net_cpu_us` is without the load generator."""
    idle = {(row["loop"], row["rate"]): some for row, some in samples if row["way"] == IDLE}
    made = rows_of(samples, "answered", "failed")
    for row, (_, some) in zip(made, samples, strict=True):
        alone = idle[row["loop"], row["rate"]]
        row["net_cpu_us"] = stat(a.cpu_us - b.cpu_us for a, b in zip(some, alone, strict=True))
        answered = row["answered"]["median"] >= _KEEPS_UP
        row["keeps_up"] = answered and not row["failed"]["median"]
    return made

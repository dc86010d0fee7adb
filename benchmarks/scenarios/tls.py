"""Closed and open loops over TLS, on asyncio's and aiofastnet's transports.

aiofastnet replaces the TLS transport of an event loop. redis.asyncio and coredis open their
connections through the event loop, so it serves them as well. valkey-glide does its own TLS.
"""

from typing import Final

from ..client_process import AIOFASTNET, Job
from ..loops import ClosedLoop
from ..measure import Bench, Samples, merged
from ..measure import rows as rows_of
from ..results import Result
from ..servers import over_tls, stored
from ..ways import GLIDE, IDLE, ON_ONE_SERVER, PACKAGES
from . import arrivals
from .shared import PROXY_CALLERS

LOOPS: Final = ("asyncio", AIOFASTNET)


def run(bench: Bench) -> Result:
    """Measure on one server."""
    rounds = min(bench.rounds, 3)
    closed: Samples = []
    opened: Samples = []
    closed_loops = [ClosedLoop(bench.seconds, callers) for callers in PROXY_CALLERS]
    with over_tls(bench) as target, target.client() as client, stored(client) as ids:
        for number in range(rounds):
            for loop in LOOPS:
                ways = [way for way in ON_ONE_SERVER if loop == "asyncio" or way != GLIDE]
                jobs = [Job(way, target.label, target.url, ids, loop) for way in (*ways, IDLE)]
                # One process for both: 256 TLS connections of redis-py take seconds to open.
                with bench.clients(jobs) as clients:
                    loading = [each for each in clients if each.job.way != IDLE]
                    closed += bench.round(loading, closed_loops, number)
                    opened += bench.round(clients, arrivals.runs(bench, number), number)
    return bench.result(
        "tls",
        rows_of(merged(closed)) + arrivals.rows(merged(opened)),
        packages=[*PACKAGES, "aiofastnet"],
        rounds=rounds,
        server=target.label,
    )

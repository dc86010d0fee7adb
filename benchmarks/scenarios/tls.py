"""Closed and open loops over TLS, on asyncio's and aiofastnet's transports.

aiofastnet replaces the TLS transport of an event loop. redis.asyncio and coredis open their
connections through the event loop, so it serves them as well. valkey-glide does its own TLS.
"""

from typing import Final

from ..client_process import AIOFASTNET, ClosedLoop, Job
from ..clients import GLIDE, IDLE, ON_ONE_SERVER, PACKAGES
from ..measure import Bench, Measured, merged
from ..measure import rows as rows_of
from ..results import Result
from ..servers import over_tls, stored
from ..workload import sessions
from . import arrivals
from .shared import PROXY_CALLERS

LOOPS: Final = ("asyncio", AIOFASTNET)
_MOST_ROUNDS: Final = 3


def run(bench: Bench) -> Result:
    """Measure on one server."""
    some = sessions()
    rounds = min(bench.settings.rounds, _MOST_ROUNDS)
    closed: list[Measured] = []
    opened: list[Measured] = []
    closed_loops = [ClosedLoop(bench.settings.seconds, callers) for callers in PROXY_CALLERS]
    with over_tls(bench.settings) as target, target.client() as client, stored(client, some) as ids:
        for number in range(rounds):
            for loop in LOOPS:
                ways = [way for way in ON_ONE_SERVER if loop == "asyncio" or way != GLIDE]
                jobs = [Job(way, loop, target.label, target.url, ids) for way in (*ways, IDLE)]
                what = f"TLS, round {number + 1}, {loop}"
                # One process for both: 256 TLS connections of redis-py take seconds to open.
                with bench.client_processes(jobs) as clients:
                    loading = [each for each in clients if each[0].way != IDLE]
                    closed.append(bench.interleaved_clients(what, loading, closed_loops, number))
                    open_loops = arrivals.runs(bench, number)
                    opened.append(bench.interleaved_clients(what, clients, open_loops, number))
    return bench.result(
        "tls",
        rows_of(merged(closed)) + arrivals.rows(merged(opened)),
        packages=[*PACKAGES, "aiofastnet"],
        rounds=rounds,
        arrivals_seconds={str(rate): arrivals.seconds(bench, rate) for rate in arrivals.RATES},
        server=target.label,
    )

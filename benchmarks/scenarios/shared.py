"""Closed loops: the load of a storage beside those of drivers.

The storage decodes; the drivers return raw bytes. Each client has a fresh process in every round,
on asyncio's event loop and on uvloop. Its user and system time is measured beside its throughput.
On a cluster the storage runs against `RedisCluster`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import redis

from aiosessions import Session

from ..client_process import ClosedLoop, Job
from ..clients import (
    BLOCKING,
    CLUSTER,
    GLIDE,
    NAME,
    ON_ONE_SERVER,
    OURS,
    OURS_ON_CLUSTER,
    PACKAGES,
    PLAIN,
)
from ..loops import CALLERS
from ..measure import Bench, Measured, merged, ratios
from ..measure import rows as rows_of
from ..results import Claim, Result, Row, judge, stat
from ..servers import cluster, stored, targets
from ..tables import who
from ..workload import sessions

ONE_SERVER: Final = "one server"
LOOPS: Final = ("asyncio", "uvloop")
PROXY_CALLERS: Final = (1, 4, 8, 32, 256)
"""A proxy mostly has 1 to 8 loads in flight."""

_OVER: Final = {
    BLOCKING: {1: 1.4, 4: 2.8, 32: 5.0, 256: 9.0},
    PLAIN: {1: 1.2, 4: 2.3, 32: 4.0, 256: 8.0},
    GLIDE: {256: 2.6},
}
_CPU_OF_BLOCKING: Final = {1: 0.55, 4: 0.33}
_NEXT_OVER_BLOCKING: Final = {1: 1.6, 4: 3.5, 32: 7.0, 256: 12.0}
_OVER_CLUSTER: Final = 3.0
_P99_OVER_P50: Final = 2.5


def run(bench: Bench) -> Result:
    """Measure on one server and on a cluster, on each event loop."""
    found: list[Measured] = []
    connections: list[float] = []
    some = sessions()
    with (
        targets(bench.settings) as (target, *_),
        target.client() as client,
        stored(client, some) as ids,
        _cluster(bench, some) as (cluster_url, nodes),
    ):
        for number in range(bench.settings.rounds):
            for loop in LOOPS:
                for server, url, ways, callers, urls in (
                    (ONE_SERVER, target.url, ON_ONE_SERVER, PROXY_CALLERS, [target.url]),
                    ("cluster", cluster_url, (OURS_ON_CLUSTER, CLUSTER), CALLERS, nodes),
                ):
                    if url is None:
                        continue
                    jobs = [Job(way, loop, server, url, ids) for way in ways]
                    runs = [ClosedLoop(bench.settings.seconds, each) for each in callers]
                    with bench.client_processes(jobs) as clients:
                        what = f"round {number + 1} of {server}, {loop}"
                        found.append(bench.interleaved_clients(what, clients, runs, number))
                        connections.append(max(_connections(each) for each in urls))
    measured = merged(found)
    claims = [claim for loop in LOOPS for claim in _judged(loop, measured)]
    claims.append(
        judge(
            "One connection per storage, one per node on a cluster",
            "exactly 1 at 256 callers",
            connections,
            lambda count: count == 1,
        )
    )
    compared = _compared(measured)
    return bench.result(
        "shared",
        rows_of(measured) + compared,
        claims=claims,
        facts=_facts(compared),
        packages=PACKAGES,
        server=target.label,
        claimed={way: _texts(over) for way, over in _OVER.items()},
        next_marks={BLOCKING: _texts(_NEXT_OVER_BLOCKING)},
    )


@contextmanager
def _cluster(bench: Bench, some: Sequence[Session[Any]]) -> Iterator[tuple[str | None, list[str]]]:
    """A cluster with the sessions, and its nodes; or none beside --url."""
    if bench.settings.url is not None:
        bench.missing["cluster"] = "not measured on a server of the user's own"
        yield None, []
        return
    with cluster() as url, redis.RedisCluster.from_url(url) as client, stored(client, some):
        yield url, [f"redis://{node.host}:{node.port}" for node in client.get_primaries()]


def _connections(url: str) -> int:
    """The number of connections that a server has from the storage."""
    with redis.Redis.from_url(url) as client:
        listed: Any = client.client_list()
        return sum(each["name"] == NAME for each in listed)


def _judged(loop: str, measured: Measured) -> list[Claim]:
    ours = {"loop": loop, "way": OURS}
    present = {row["way"] for row, _ in measured if row["loop"] == loop}
    claims = [
        judge(
            f"Faster than {way}, {who(callers)}, {loop}",
            f"at least {over} times",
            ratios(measured, ours, {"loop": loop, "way": way}, callers),
            lambda ratio, over=over: ratio >= over,  # type: ignore[misc]  # a default binds it
            "x",
        )
        for way in _OVER
        if way in present
        for callers, over in _OVER[way].items()
    ]
    claims += [
        judge(
            f"CPU of a load beside {BLOCKING}, {who(callers)}, {loop}",
            f"at most {most} times",
            ratios(measured, ours, {"loop": loop, "way": BLOCKING}, callers, "cpu_us"),
            lambda ratio, most=most: ratio <= most,  # type: ignore[misc]  # a default binds it
            "x",
        )
        for callers, most in _CPU_OF_BLOCKING.items()
    ]
    if CLUSTER in present:
        on_cluster = {"loop": loop, "way": OURS_ON_CLUSTER}
        claims.append(
            judge(
                f"Faster than {CLUSTER}, {who(256)}, {loop}",
                f"at least {_OVER_CLUSTER} times",
                ratios(measured, on_cluster, {"loop": loop, "way": CLUSTER}, 256),
                lambda ratio: ratio >= _OVER_CLUSTER,
                "x",
            )
        )
    wanted = ours | {"callers": 256}
    (samples,) = [each for row, each in measured if wanted.items() <= row.items()]
    claims.append(
        judge(
            f"p99 near p50, {who(256)}, {loop}",
            f"at most {_P99_OVER_P50} times",
            [sample.p99 / sample.p50 for sample in samples],
            lambda ratio: ratio <= _P99_OVER_P50,
            "x",
        )
    )
    return claims


def _compared(measured: Measured) -> list[Row]:
    """Rows of ratios within the rounds: the storage over each client."""
    return [
        {
            "loop": loop,
            "over": way,
            "callers": callers,
            "times": stat(ratios(measured, ours, other, callers)),
            "cpu_times": stat(ratios(measured, ours, other, callers, "cpu_us")),
        }
        for loop in LOOPS
        for way in ON_ONE_SERVER[1:]
        for callers in PROXY_CALLERS
        if any(row["way"] == way and row["loop"] == loop for row, _ in measured)
        for ours, other in [({"loop": loop, "way": OURS}, {"loop": loop, "way": way})]
    ]


def _facts(compared: list[Row]) -> dict[str, str]:
    """Ratios on asyncio's event loop."""
    facts = {}
    for row in compared:
        name = {BLOCKING: "blocking", PLAIN: "plain", GLIDE: "glide"}.get(row["over"])
        if row["loop"] == "asyncio" and name:
            facts[f"over_{name}_{row['callers']}"] = f"{row['times']['median']:.1f}"
            facts[f"cpu_of_{name}_{row['callers']}"] = f"{row['cpu_times']['median']:.2f}"
    return facts


def _texts(marks: dict[int, float]) -> dict[str, float]:
    """JSON has keys of text only."""
    return {str(callers): mark for callers, mark in marks.items()}

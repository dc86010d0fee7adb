"""Closed loops: the load of a storage beside those of drivers.

The storage decodes; the drivers return raw bytes. The client's user and system time is measured
beside its throughput. On a cluster the storage runs against `RedisCluster`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import redis

from tests.support.servers import binaries
from tests.support.topologies import cluster, connections

from ..client_process import Job
from ..drivers import NAME
from ..loops import CALLERS, ClosedLoop
from ..measure import Bench, Samples, merged, ratios
from ..measure import rows as rows_of
from ..results import Claim, Result, Row, judge, stat
from ..servers import stored, targets
from ..ways import (
    BLOCKING,
    CLUSTER,
    GLIDE,
    ON_ONE_SERVER,
    OURS,
    OURS_ON_CLUSTER,
    PACKAGES,
    PLAIN,
)
from ..workload import callers_text

LOOPS: Final = ("asyncio", "uvloop")
PROXY_CALLERS: Final = (1, 4, 8, 32, 256)
"""A proxy mostly has 1 to 8 loads in flight."""

_OVER: Final = {
    BLOCKING: {1: 1.4, 4: 2.8, 32: 5.0, 256: 9.0},
    PLAIN: {1: 1.2, 4: 2.3, 32: 4.0, 256: 8.0},
    GLIDE: {256: 2.6},
    CLUSTER: {256: 3.0},
}
_CPU_OF_BLOCKING: Final = {1: 0.55, 4: 0.33}
_SLUGS: Final = {BLOCKING: "blocking", PLAIN: "plain", GLIDE: "glide"}


def run(bench: Bench) -> Result:
    """Measure on one server and on a cluster, on each event loop."""
    samples: Samples = []
    counted: list[float] = []
    with (
        targets(bench) as (target, *_),
        target.client() as client,
        stored(client) as ids,
        _cluster(bench, ids) as (cluster_url, masters),
    ):
        for number in range(bench.rounds):
            for loop in LOOPS:
                for server, url, ways, callers in (
                    ("one server", target.url, ON_ONE_SERVER, PROXY_CALLERS),
                    ("cluster", cluster_url, (OURS_ON_CLUSTER, CLUSTER), CALLERS),
                ):
                    jobs = [Job(way, server, url, ids, loop) for way in ways if url]
                    runs = [ClosedLoop(bench.seconds, each) for each in callers]
                    with bench.clients(jobs) as clients:
                        samples += bench.round(clients, runs, number)
                        if server == "cluster":
                            counted += [connections(each, NAME) for each in masters]
                        else:
                            listed: Any = client.client_list()
                            counted.append(sum(each["name"] == NAME for each in listed))
    samples = merged(samples)
    claims = [claim for loop in LOOPS for claim in _judged(loop, samples)]
    claims.append(
        judge(
            "One connection per storage, one per node on a cluster",
            "exactly 1 at 256 callers",
            counted,
            lambda count: count == 1,
        )
    )
    compared = [row for loop in LOOPS for row in _compared(loop, samples)]
    facts = {}
    for row in compared:
        if row["loop"] == "asyncio" and (slug := _SLUGS.get(row["over"])):
            facts[f"over_{slug}_{row['callers']}"] = f"{row['times']['median']:.1f}"
            facts[f"cpu_of_{slug}_{row['callers']}"] = f"{row['cpu_times']['median']:.2f}"
    return bench.result(
        "shared",
        rows_of(samples) + compared,
        claims=claims,
        facts=facts,
        packages=PACKAGES,
        server=target.label,
    )


@contextmanager
def _cluster(bench: Bench, ids: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """A cluster with the sessions, and its masters; or none beside --url."""
    if bench.url is not None:
        bench.missing["cluster"] = "not measured on a server of the user's own"
        yield "", []
        return
    with cluster(binaries()["valkey"]) as nodes:
        url = nodes.nodes[0].url
        with redis.RedisCluster.from_url(url) as client, stored(client, ids):
            yield url, nodes.masters()


def _judged(loop: str, samples: Samples) -> list[Claim]:
    ours = {"loop": loop, "way": OURS}
    present = {row["way"] for row, _ in samples if row["loop"] == loop}

    def compare(claim: str, way: str, callers: int, mark: float, figure: str) -> Claim:
        meets: Callable[[float], bool] = mark.__ge__ if figure == "cpu_us" else mark.__le__
        return judge(
            f"{claim}, {callers_text(callers)}",
            f"at {'most' if figure == 'cpu_us' else 'least'} {mark} times",
            ratios(
                samples,
                {"loop": loop, "way": OURS_ON_CLUSTER if way == CLUSTER else OURS},
                {"loop": loop, "way": way},
                callers,
                figure,
            ),
            meets,
            loop,
        )

    claims = [
        compare(f"Faster than {way}", way, callers, mark, "throughput")
        for way, marks in _OVER.items()
        if way in present
        for callers, mark in marks.items()
    ]
    claims += [
        compare(f"CPU of a load beside {BLOCKING}", BLOCKING, callers, mark, "cpu_us")
        for callers, mark in _CPU_OF_BLOCKING.items()
    ]
    wanted = ours | {"callers": 256}
    (some,) = [each for labels, each in samples if wanted.items() <= labels.items()]
    tails = [sample.p99_ms / sample.p50_ms for sample in some]
    claim = judge("p99 near p50, 256 callers", "at most 2.5 times", tails, (2.5).__ge__, loop)
    return [*claims, claim]


def _compared(loop: str, samples: Samples) -> list[Row]:
    """Rows of ratios within the rounds: the storage over each client."""
    ours = {"loop": loop, "way": OURS}
    present = {row["way"] for row, _ in samples if row["loop"] == loop}
    return [
        {
            "loop": loop,
            "over": way,
            "callers": callers,
            "times": stat(ratios(samples, ours, ours | {"way": way}, callers)),
            "cpu_times": stat(ratios(samples, ours, ours | {"way": way}, callers, "cpu_us")),
        }
        for way in ON_ONE_SERVER[1:]
        if way in present
        for callers in PROXY_CALLERS
    ]

"""Closed loops: alternatives, saves, libraries, and drivers beside the storage.

The storage and the alternatives decode; the bare drivers return raw bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import redis

from tests.support.servers import binaries
from tests.support.topologies import cluster, connections

from .. import ways
from ..client import Job, Run
from ..drivers import NAME
from ..measure import CALLERS, Bench, Group, Samples, ratios, rows_of
from ..peers import PACKAGES as LIBRARIES
from ..peers import PEERS
from ..results import CONFIRMED, REFUTED, Claim, Result, Row, judge, select, stat
from ..servers import MeasuredServer, Snapshot, stored, targets
from ..workload import callers_text, key, opened, sealed, session

LOOPS: Final = ("asyncio", "uvloop")
PROXY_CALLERS: Final = (1, 4, 8, 32, 256)
"""A proxy mostly has 1 to 8 loads in flight."""


class Compared(NamedTuple):
    """A claim about the ratio of two ways in each round; a target that begins "at most" bounds it.

    Attributes:
        claim: The statement.
        target: The promise in words.
        over: The way above the line.
        under: The way below it.
        mark: The bound of the ratio.
        callers: The numbers of callers.
        figure: The figure.
    """

    claim: str
    target: str
    over: str
    under: str
    mark: float
    callers: tuple[int, ...]
    figure: str = "throughput"


_SLUGS: Final = {ways.BLOCKING: "blocking", ways.PLAIN: "plain", ways.GLIDE: "glide"}
_LOAD: Final = [
    Compared(claim, f"GETEX at least {target}, same driver", ways.GETEX, other, mark, CALLERS)
    for claim, target, other, mark in (
        ("Renewing inside the load costs nothing", "0.9 times GET", ways.GET, 0.9),
        ("One command is faster than two in turn", "1.2 times that", ways.GET_EXPIRE, 1.2),
        ("One command is faster than a pipeline", "1.2 times that", ways.PIPELINE, 1.2),
    )
]
_CAS: Final = [
    Compared(
        "A compare-and-set save costs little more than an unconditional one",
        "the latter at most 1.3 times as many a second, 32 callers",
        *(ways.ALWAYS, ways.UNCHANGED, 1.3, (32,)),
    )
]
_SHARED: Final = [
    Compared(
        f"Faster than {way}, {callers_text(callers)}",
        f"at least {mark} times",
        *(ways.OURS_ON_CLUSTER if way == ways.CLUSTER else ways.OURS, way, mark, (callers,)),
    )
    for way, marks in {
        ways.BLOCKING: {1: 1.4, 4: 2.8, 32: 5.0, 256: 9.0},
        ways.PLAIN: {1: 1.2, 4: 2.3, 32: 4.0, 256: 8.0},
        ways.GLIDE: {256: 2.6},
        ways.CLUSTER: {256: 3.0},
    }.items()
    for callers, mark in marks.items()
] + [
    Compared(
        f"CPU of a load beside {ways.BLOCKING}, {callers_text(callers)}",
        f"at most {mark} times",
        *(ways.OURS, ways.BLOCKING, mark, (callers,), "cpu_us"),
    )
    for callers, mark in {1: 0.55, 4: 0.33}.items()
]


def judged(samples: Samples, claims: Iterable[Compared], by: str) -> Iterator[Claim]:
    """Judge claims for each value of a label: the server, or the event loop."""
    for value in dict.fromkeys(labels[by] for labels, _ in samples):
        present = {labels["way"] for labels, _ in samples if labels[by] == value}
        for each in claims:
            meets = each.mark.__ge__ if "at most" in each.target else each.mark.__le__
            over, under = ({by: value, "way": way} for way in (each.over, each.under))
            for callers in each.callers if {each.over, each.under} <= present else ():
                measured = ratios(samples, over, under, callers, each.figure)
                condition = value if len(each.callers) == 1 else f"{callers_text(callers)}, {value}"
                yield judge(each.claim, each.target, measured, meets, condition)


def exactly(claim: str, row: Row, count: int = 1) -> Claim:
    """A claim about counted round trips, which are free of noise."""
    return judge(claim, f"exactly {count}", [row["round_trips"]], count.__eq__, row["server"])


def load(bench: Bench) -> Result:
    """Measure every alternative on every server there is."""
    rows: list[Row] = []
    claims: list[Claim] = []
    facts = {"record_bytes": str(len(sealed(session())))}
    with targets(bench.url, every=True) as all_targets:
        for target in all_targets:
            wire = bench.wire(ways.ALTERNATIVES, target)
            jobs = [Job(way, target.label, target.url, target.ids) for way in ways.ALTERNATIVES]
            samples = bench.measure([Group(jobs, bench.closed())], bench.rounds)
            rows += wire + rows_of(samples)
            (ours,) = select(wire, way=ways.SHARED_GETEX)
            (lru,) = select(wire, way=ways.LRU_EXPIRE)
            commands = len(ours["commands"].split(", "))
            is_getex = (ours["commands"], ours["executed"]) == ("GETEX", "getex")
            claims += [
                exactly("A load is one round trip, counted on the wire", ours),
                judge(
                    "A load is one command, on the wire and in commandstats",
                    "GETEX once, and nothing else",
                    [commands],
                    lambda _, is_getex=is_getex: is_getex,  # type: ignore[misc]
                    target.label,
                ),
                exactly("An LRU that still sends EXPIRE does not save a round trip", lru),
                *judged(samples, _LOAD, "server"),
            ]
            facts |= {"round_trips": str(ours["round_trips"]), "commands": str(commands)}
    return bench.result("load", rows, claims=claims, facts=facts)


def peers(bench: Bench) -> Result:
    """Measure libraries and drivers: a load, and a request that changes a field."""
    rows: list[Row] = []
    with targets(bench.url) as (target, *_):
        jobs = [Job(name, target.label, target.url, target.ids) for name in PEERS]
        workloads = ("load", "cycle")
        rows += bench.wire(PEERS, target, [Run(each, times=20) for each in workloads], "workload")
        for workload in workloads:
            group = Group(jobs, bench.closed(operation=workload), {"workload": workload})
            rows += rows_of(bench.measure([group], bench.rounds))
    return bench.result("peers", rows, packages=LIBRARIES)


_WRITERS: Final = 64


def cas(bench: Bench) -> Result:
    """Measure compare-and-set: its cost, and many writers on one session."""
    rows: list[Row] = []
    claims: list[Claim] = []
    increments = _WRITERS * (3 if bench.quick else 20)
    with targets(bench.url, every=True) as all_targets:
        for target in all_targets:
            wire = bench.wire(ways.SAVES, target)
            # They do not share sessions, so that revisions do not conflict.
            jobs = [
                Job(way, target.label, target.url, target.ids[place :: len(ways.SAVES)])
                for place, way in enumerate(ways.SAVES)
            ]
            samples = bench.measure([Group(jobs, bench.closed())], bench.rounds)
            (unchanged,) = select(wire, way=ways.UNCHANGED)
            hot = _hot(bench, target, increments)
            rows += [*wire, *rows_of(samples), hot]
            claims += [
                exactly("A compare-and-set save is one round trip", unchanged),
                *judged(samples, _CAS, "server"),
                Claim(
                    f"{_WRITERS} writers on one session: every increment is counted",
                    f"{increments} of {increments}",
                    target.label,
                    f"{hot['counted']} of {increments}",
                    CONFIRMED if hot["counted"] == increments else REFUTED,
                ),
            ]
    return bench.result("cas", rows, claims=claims, writers=_WRITERS)


def _hot(bench: Bench, target: MeasuredServer, increments: int) -> Row:
    """Let many writers increment one session's counter; a refused one ends the benchmark."""
    counted: list[int] = []
    attempts: list[float] = []
    speed: list[float] = []
    direct = target.direct
    for _ in bench.steps(f"one hot session, {target.label}", range(bench.rounds)):
        with stored(direct, ["hot-session-of-the-benchmark-" + "x" * 14]) as (id,):
            job = Job(ways.OURS, target.label, target.url, [id] * _WRITERS)
            with bench.clients([job]) as (client,):
                before = Snapshot.of(direct)
                measured = client.measure(Run("increment", _WRITERS, times=increments))
                calls = Snapshot(Snapshot.of(direct) - before).calls()
            counted.append(opened(direct.get(key(id)), id).data["counter"])
            # Each attempt makes one conditional write.
            attempts.append(calls["evalsha"] / increments)
            speed.append(measured.throughput)
    figures = {"attempts_per_success": stat(attempts), "throughput": stat(speed)}
    counts = {"writers": _WRITERS, "increments": increments, "counted": min(counted)}
    return {"server": target.label, "hot": True} | counts | figures


def shared(bench: Bench) -> Result:
    """Measure drivers beside one shared connection, on one server and on a cluster."""
    counted: list[float] = []
    with (
        targets(bench.url) as (target, *_),
        sessions_on_cluster(bench, target.ids) as (cluster_url, masters),
    ):

        def count_one() -> None:
            listed: Any = target.direct.client_list()
            counted.append(sum(each["name"] == NAME for each in listed))

        def count_masters() -> None:
            counted.extend(connections(each, NAME) for each in masters)

        groups = [
            Group(
                [Job(way, server, url, target.ids, loop) for way in names],
                bench.closed(callers),
                after=count,
            )
            for loop in LOOPS
            for server, url, names, callers, count in (
                ("one server", target.url, ways.ON_ONE_SERVER, PROXY_CALLERS, count_one),
                ("cluster", cluster_url, ways.ON_CLUSTER, CALLERS, count_masters),
            )
            if url
        ]
        samples = bench.measure(groups, bench.rounds)
    claims = [*judged(samples, _SHARED, "loop")]
    for labels, some in samples:
        if labels["way"] == ways.OURS and labels["callers"] == 256:
            tails = [sample.p99_ms / sample.p50_ms for sample in some]
            claim, target_text = "p99 near p50, 256 callers", "at most 2.5 times"
            claims.append(judge(claim, target_text, tails, (2.5).__ge__, labels["loop"]))
    claim = "One connection per storage, one per node on a cluster"
    claims.append(judge(claim, "exactly 1 at 256 callers", counted, (1).__eq__))
    compared = [*_compared(samples)]
    facts = {}
    for row in select(compared, loop="asyncio"):
        if slug := _SLUGS.get(row["over"]):
            facts[f"over_{slug}_{row['callers']}"] = f"{row['times']['median']:.1f}"
            facts[f"cpu_of_{slug}_{row['callers']}"] = f"{row['cpu_times']['median']:.2f}"
    return bench.result(
        "shared",
        rows_of(samples) + compared,
        claims=claims,
        facts=facts,
        packages=ways.PACKAGES,
        server=target.label,
    )


@contextmanager
def sessions_on_cluster(bench: Bench, ids: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """A cluster with the sessions, and its masters; or none beside --url."""
    if bench.url is not None:
        bench.missing["cluster"] = "not measured on a server of the user's own"
        yield "", []
        return
    with cluster(binaries()["valkey"]) as nodes:
        url = nodes.nodes[0].url
        with redis.RedisCluster.from_url(url) as client, stored(client, ids):
            yield url, nodes.masters()


def _compared(samples: Samples) -> Iterator[Row]:
    """Rows of ratios within the rounds: the storage over each client."""
    for labels, _ in samples:
        if labels["server"] != "cluster" and labels["way"] != ways.OURS:
            loop, callers = labels["loop"], labels["callers"]
            ours, other = ({"loop": loop, "way": way} for way in (ways.OURS, labels["way"]))
            yield {
                "loop": loop,
                "over": labels["way"],
                "callers": callers,
                "times": stat(ratios(samples, ours, other, callers)),
                "cpu_times": stat(ratios(samples, ours, other, callers, "cpu_us")),
            }

"""Sessions with a principal beside sessions without, and the calls that need an index."""

import timeit
from collections.abc import Iterator
from functools import partial
from typing import Final

from aiosessions import session_digest

from .. import owned
from ..client import Job, Run
from ..measure import Bench, Group, Samples, rows_of
from ..results import Claim, Result, Row, judge, select, stat
from ..servers import MeasuredServer, targets
from ..ways import LOCAL
from .closed import Compared, exactly, judged, sessions_on_cluster

_SERVER: Final = "one server"
_CLUSTER: Final = "cluster"
_MANY: Final = 256
_INDEXED: Final = (*map(owned.list_of, owned.LISTS), owned.COUNT)
_REVOKE: Final = Run(owned.REVOKE_ALL, times=1, first=owned.FILL)
_OPERATIONS: Final[dict[str, tuple[str, ...]]] = {
    "load": (owned.WITHOUT, owned.WITH, owned.CHECKED),
    "save": (owned.WITHOUT, owned.WITH),
    "create": (owned.WITHOUT, owned.WITH, owned.CHECKED),
} | dict.fromkeys(_INDEXED, (owned.WITH,))
_COMPARED: Final = (
    ("load", "A load with a principal", owned.WITH, owned.WITHOUT),
    ("load", "A load with a check of the owner", owned.CHECKED, owned.WITH),
    ("save", "A save with a principal", owned.WITH, owned.WITHOUT),
)


def principals(bench: Bench) -> Result:
    """Measure on one server and, except on --url, on a cluster."""
    rounds = 1 if bench.quick else bench.rounds
    digests: list[float] = []
    with (
        targets(bench.url) as (target, *_),
        sessions_on_cluster(bench, target.ids) as (cluster_url, _),
    ):
        wire = [*_wire(bench, target)]
        groups = [*_groups(bench, _SERVER, target.url, target.ids)]
        if cluster_url:
            groups += _groups(bench, _CLUSTER, owned.ON_CLUSTER + cluster_url, target.ids)
        jobs = [
            Job(LOCAL, "none", "", target.ids),
            Job(owned.WITH, _SERVER, target.url, target.ids),
        ]
        before = partial(_time_digest, target.ids[0], digests)
        groups += [Group(jobs, bench.closed((_MANY,)), {"operation": "load"}, before)]
        samples = bench.measure(groups, rounds)
    digest = [*_digest(samples, digests)]
    rows = rows_of(samples)
    facts = {"digest_us": f"{stat(digests)['median']:.2f}"}
    for row in digest:
        facts[f"digest_{row['storage']}"] = f"{row['percent']['median']:.0f}"
    for operation in (owned.list_of(100), owned.REVOKE_ALL):
        (row,) = select(rows, server=_SERVER, operation=operation, callers=1)
        facts[operation.split()[0] + "_ms"] = f"{row['p50_ms']['median']:.1f}"
    return bench.result(
        "principals",
        wire + rows + digest,
        claims=[*_counted(wire), *_timed(samples)],
        facts=facts,
        rounds=rounds,
        server=target.label,
    )


def _wire(bench: Bench, target: MeasuredServer) -> Iterator[Row]:
    for way in owned.OWNED:
        runs = [Run(name, times=20) for name, ways in _OPERATIONS.items() if way in ways]
        runs += [_REVOKE] if way == owned.WITH else []
        yield from bench.wire({way: owned.OWNED[way]}, target, runs)


def _groups(bench: Bench, server: str, url: str, ids: list[str]) -> Iterator[Group]:
    # The clients do not share sessions, so that revisions do not conflict.
    count = len(owned.OWNED)
    jobs = [Job(way, server, url, ids[place::count]) for place, way in enumerate(owned.OWNED)]
    for name, ways in _OPERATIONS.items():
        if server == _SERVER or name not in ("load", "save", owned.COUNT):
            yield Group(jobs, bench.closed((1, 32), name), {"operation": name}, ways=ways)
    yield Group(jobs, [_REVOKE], {"operation": owned.REVOKE_ALL}, ways=(owned.WITH,))


def _time_digest(id: str, digests: list[float]) -> None:
    """Append the microseconds that the digest of an id takes at least."""
    digests.append(min(timeit.repeat(partial(session_digest, id), number=10_000)) * 100)


def _digest(samples: Samples, digests: list[float]) -> Iterator[Row]:
    """The share of the digest in the CPU time of a load by many callers."""
    for labels, some in samples:
        if labels["callers"] == _MANY:
            shares = [100 * us / each.cpu_us for us, each in zip(digests, some, strict=True)]
            yield {
                "storage": "local" if labels["way"] == LOCAL else "redis",
                "digest_us": stat(digests),
                "load_us": stat(each.cpu_us for each in some),
                "percent": stat(shares),
            }


def _counted(wire: list[Row]) -> Iterator[Claim]:
    """Claims about counted round trips and commands."""

    def find(operation: str, way: str = owned.WITH) -> Row:
        return select(wire, operation=operation, way=way)[0]

    for name in ("load", "save", "create"):
        yield exactly(f"A {name} with a principal is one round trip on one server", find(name))
    yield exactly("A list of 100 sessions is two round trips", find(owned.list_of(100)), 2)
    for name in ("load", "save"):
        same = find(name)["executed"] == find(name, owned.WITHOUT)["executed"]
        claim = f"A {name} makes the same calls on the server with a principal and without"
        yield judge(claim, "no other command", [0 if same else 1], (0).__eq__)


def _timed(samples: Samples) -> Iterator[Claim]:
    target = "at least 0.9 times as many a second"
    for operation, what, over, under in _COMPARED:
        some = [each for each in samples if each[0]["operation"] == operation]
        claim = Compared(f"{what} is as fast as without", target, over, under, 0.9, (1, 32))
        yield from judged(some, [claim], "server")

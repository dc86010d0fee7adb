"""The shared connection, decoding included, against drivers that return raw bytes.

In one run, on the same server and records, on asyncio's own event loop and on uvloop: a load beside
`redis.asyncio` with a blocking pool of 64 and with a plain pool that has a connection for every
caller, which is faster; beside valkey-glide; and on a cluster beside `RedisCluster`. Nothing but
our own loads decodes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import redis
import uvloop
from redis.asyncio import Redis, RedisCluster

from aiosessions import RedisStorage, Session

from ..alternatives import NAME, connected
from ..measure import CALLERS, Bench, Cell, Operation, Sample, ratios
from ..measure import rows as rows_of
from ..peers import glide_client
from ..results import Claim, Result, Row, judge
from ..servers import Target, cluster, targets
from ..tables import who
from ..workload import CODEC, PREFIX, TTL, TTL_MS, key, sealed, sessions

_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
_BLOCKING = "redis.asyncio, blocking pool of 64"
_PLAIN = "redis.asyncio, plain pool of 256"
_OVER_RAW = {1: 1.2, 32: 4.5, 256: 7.0}
_OVER_GLIDE = 2.4
_OVER_CLUSTER = 3.0
_P99_OVER_P50 = 2.5

Measured = list[tuple[Cell, list[Sample]]]


@dataclass(frozen=True)
class _Servers:
    """What to measure on, and what to load."""

    target: Target
    cluster_url: str | None
    stored: list[Session[Any]]


def run(bench: Bench) -> Result:
    """Measure on one server and on a cluster, in turn on each event loop."""
    stored = sessions()
    found: dict[str, list[Measured]] = {name: [] for name in _LOOPS}
    connections: list[float] = []
    with targets(bench.settings) as (target, *_), _cluster(bench) as cluster_url:
        servers = _Servers(target, cluster_url, stored)
        for number in range(bench.settings.rounds):
            for name, make_loop in _LOOPS.items():
                with asyncio.Runner(loop_factory=make_loop) as runner:
                    measured, most = runner.run(_round(bench, servers, name, number))
                found[name].append(measured)
                connections.append(float(most))
    rows: list[Row] = []
    claims: list[Claim] = []
    for name, rounds in found.items():
        merged = _merged(rounds)
        rows += rows_of(merged)
        claims += _judged(name, merged)
    claims.append(
        judge(
            "One connection per storage, one per node on a cluster",
            "exactly 1 at 256 callers",
            [max(connections)],
            lambda most: most == 1,
        )
    )
    return bench.result(
        "shared", rows, claims=claims, packages=["valkey-glide", "uvloop"], server=target.label
    )


@contextmanager
def _cluster(bench: Bench) -> Iterator[str | None]:
    """A cluster, unless the user's own server is measured."""
    if bench.settings.url is not None:
        bench.missing["cluster"] = "not measured on a server of the user's own"
        yield None
        return
    with cluster() as url:
        yield url


async def _round(bench: Bench, servers: _Servers, loop: str, number: int) -> tuple[Measured, int]:
    """Measure everything once; and the most connections that a storage of ours had to a server."""
    target, cluster_url, stored = servers.target, servers.cluster_url, servers.stored
    ids = [session.id for session in stored]
    labels = {"loop": loop, "server": "one server"}
    async with (
        connected(target.url, stored) as clients,
        Redis.from_url(target.url, max_connections=max(CALLERS)) as plain,
        _glide(bench, target) as glide,
    ):

        async def blocking_load(id: str) -> object:
            return await clients.pool.getex(key(id), px=TTL_MS)

        async def plain_load(id: str) -> object:
            return await plain.getex(key(id), px=TTL_MS)

        ways: dict[str, Operation] = {
            "aiosessions": clients.storage.load,
            _BLOCKING: blocking_load,
            _PLAIN: plain_load,
        }
        if glide is not None:
            ways["valkey-glide"] = glide
        measured = await bench.interleaved(
            f"round {number + 1} on {loop}",
            [
                Cell(labels | {"way": way}, operation, ids, callers)
                for way, operation in ways.items()
                for callers in CALLERS
            ],
            [number],
        )
        connections = _connections(target.url)
    if cluster_url is not None:
        labels = {"loop": loop, "server": "cluster"}
        async with _on_cluster(cluster_url, stored) as (ours, raw_cluster):
            measured += await bench.interleaved(
                f"round {number + 1} on a cluster, {loop}",
                [
                    Cell(labels | {"way": way}, operation, ids, callers)
                    for way, operation in (("aiosessions", ours), ("RedisCluster", raw_cluster))
                    for callers in CALLERS
                ],
                [number],
            )
            with redis.RedisCluster.from_url(cluster_url) as asking:
                nodes = [f"redis://{node.host}:{node.port}" for node in asking.get_primaries()]
            connections = max(connections, *(_connections(node) for node in nodes))
    return measured, connections


@asynccontextmanager
async def _glide(bench: Bench, target: Target) -> AsyncIterator[Operation | None]:
    """A raw load with valkey-glide, if there is one."""
    try:
        from glide import ExpiryGetEx, ExpiryTypeGetEx  # noqa: PLC0415 - it may be missing
    except ImportError as error:
        bench.missing["valkey-glide"] = f"cannot be imported: {error}"
        yield None
        return
    async with glide_client(target.url) as client:
        renewed = ExpiryGetEx(ExpiryTypeGetEx.MILLSEC, TTL_MS)

        async def load(id: str) -> object:
            return await client.getex(key(id), renewed)

        yield load


@asynccontextmanager
async def _on_cluster(
    url: str, stored: list[Session[Any]]
) -> AsyncIterator[tuple[Operation, Operation]]:
    """A load with a storage of ours, and a raw one with the driver."""
    # Not entered, which would have it connect: it is only borrowed for its settings.
    borrowed = RedisCluster.from_url(url, client_name=NAME)
    async with (
        aclosing(borrowed),
        # It raises MaxConnectionsError rather than wait, and its default is less than our callers.
        RedisCluster.from_url(url, max_connections=max(CALLERS)) as raw,
        RedisStorage(borrowed, ttl=TTL, codec=CODEC, key_prefix=PREFIX, timeout=30.0) as storage,
    ):
        for session in stored:
            await storage.store(session)
            # From one caller first: its nodes' connections are not made for a crowd.
            await raw.set(key(session.id), sealed(session), px=TTL_MS)

        async def load(id: str) -> object:
            return await raw.getex(key(id), px=TTL_MS)

        yield storage.load, load


def _connections(url: str) -> int:
    """How many connections of our storages a server has."""
    with redis.Redis.from_url(url) as client:
        listed: Any = client.client_list()
        return sum(each["name"] == NAME for each in listed)


def _merged(rounds: list[Measured]) -> Measured:
    """One list of samples for each cell, over all rounds."""
    return [
        (cells[0][0], [sample for _, samples in cells for sample in samples])
        for cells in zip(*rounds, strict=True)
    ]


def _judged(loop: str, measured: Measured) -> list[Claim]:
    one = {"server": "one server", "way": "aiosessions"}
    many = {"server": "cluster", "way": "aiosessions"}
    present = {cell.labels["way"] for cell, _ in measured}
    targets_by_way = [
        (way, one, callers, over)
        for way in (_BLOCKING, _PLAIN)
        for callers, over in _OVER_RAW.items()
    ]
    targets_by_way.append(("valkey-glide", one, 256, _OVER_GLIDE))
    targets_by_way.append(("RedisCluster", many, 256, _OVER_CLUSTER))
    claims = [
        judge(
            f"Faster than {way}, {who(callers)}, {loop}",
            f"at least {over} times",
            ratios(measured, ours, {"way": way}, callers),
            lambda ratio, over=over: ratio >= over,  # type: ignore[misc]  # a default binds it
            "x",
        )
        for way, ours, callers, over in targets_by_way
        if way in present
    ]
    (tail,) = [
        [sample.p99 / sample.p50 for sample in samples]
        for cell, samples in measured
        if cell.callers == 256 and one.items() <= cell.labels.items()
    ]
    claims.append(
        judge(
            f"p99 near p50, 256 callers, {loop}",
            f"at most {_P99_OVER_P50} times",
            tail,
            lambda ratio: ratio <= _P99_OVER_P50,
            "x",
        )
    )
    return claims

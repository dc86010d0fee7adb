"""The ways to load a session: the storage, the alternatives to GETEX, and bare drivers.

An alternative decodes the same record with the same codec and checks the id. "Pool" in a name means
one `redis.asyncio` client with a blocking pool of 64 connections.
"""

# ruff: noqa: ARG001 - all openers have the same parameters

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, cast

from redis.asyncio import Redis, RedisCluster

from aiosessions import LocalStorage, Session, SessionManager, When
from aiosessions.redis._commands import Template
from aiosessions.redis._routing import Router

from .drivers import (
    PLAIN_POOL,
    POOL,
    Open,
    Operations,
    Way,
    blocking,
    coredis_client,
    glide_client,
    nothing,
    ours_on_cluster,
    plain,
    raw,
    storage_of,
)
from .loops import Operation
from .workload import CODEC, TTL, TTL_MS, key, opened, sealed, session


def _data(loaded: Session[Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", loaded.data)


@asynccontextmanager
async def _storage(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
    async with storage_of(url) as storage, SessionManager(storage) as manager:
        loaded: dict[str, Session[Any]] = {}

        async def cycle(id: str) -> None:
            session = await storage.load(id)
            _data(session)["counter"] += 1
            await storage.store(session, when=When.UNCHANGED)

        async def save(id: str, when: When) -> None:
            if id not in loaded:
                loaded[id] = await storage.load(id)
            await storage.store(loaded[id], when=when)

        def increment(session: Session[Any]) -> None:
            _data(session)["counter"] += 1

        yield {
            "load": storage.load,
            "cycle": cycle,
            "always": lambda id: save(id, When.ALWAYS),
            "unchanged": lambda id: save(id, When.UNCHANGED),
            "increment": lambda id: manager.mutate(id, increment),
        }


def _only(operation: str) -> Open:
    """Open one operation of the storage in place of its load."""

    @asynccontextmanager
    async def open(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
        async with _storage(url, ids) as operations:
            yield {"load": operations[operation]}

    return open


def _on_pool(make: Callable[["Redis"], Operation]) -> Open:
    """Open an operation on a `redis.asyncio` client with a blocking pool."""

    @asynccontextmanager
    async def open(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
        async with blocking(url) as client:
            yield {"load": make(client)}

    return open


def _decoded(read: Callable[["Redis", str], Awaitable[Any]]) -> Open:
    """Open a load that reads a record, decodes it and checks the id."""

    def make(client: "Redis") -> Operation:
        async def load(id: str) -> Session[Any]:
            return opened(await read(client, key(id)), id)

        return load

    return _on_pool(make)


async def _get_expire(client: "Redis", key: str) -> Any:
    record = await client.get(key)
    await client.pexpire(key, TTL_MS)
    return record


async def _pipeline(client: "Redis", key: str, *, transaction: bool = False) -> Any:
    async with client.pipeline(transaction=transaction) as pipeline:
        _ = pipeline.get(key), pipeline.pexpire(key, TTL_MS)  # queued
        return (await pipeline.execute())[0]


_GET_AND_RENEW: Final = """
local record = redis.call('GET', KEYS[1])
if record then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return record
"""


def _lua(client: "Redis") -> Operation:
    script = client.register_script(_GET_AND_RENEW)

    async def load(id: str) -> Session[Any]:
        return opened(await script(keys=[key(id)], args=[TTL_MS]), id)

    return load


def _set_again(client: "Redis") -> Operation:
    async def load(id: str) -> Session[Any]:
        session = opened(await client.get(key(id)), id)
        await client.set(key(id), sealed(session), px=TTL_MS)
        return session

    return load


def _lru_expire(client: "Redis") -> Operation:
    records: OrderedDict[str, Any] = OrderedDict()

    async def load(id: str) -> Session[Any]:
        record = records.get(id)
        if record is None:
            record = records[id] = await client.getex(key(id), px=TTL_MS)
            if len(records) > 10_000:
                records.popitem(last=False)
        elif await client.pexpire(key(id), TTL_MS):
            records.move_to_end(id)
        else:
            record = records.pop(id) and None
        return opened(record, id)

    return load


def _raw_set(client: "Redis") -> Operation:
    made = session()

    async def save(id: str) -> None:
        made.id = id
        # Under another key, because the storage compares the revision under its own.
        await client.set(key(f"raw:{id}"), sealed(made), px=TTL_MS)

    return save


_GET: Final = Template(b"GET", None, replies=(bytes, type(None)), retryable=True, bulky=True)
_PEXPIRE: Final = Template(b"PEXPIRE", None, b"%d" % TTL_MS, replies=(int,))


@asynccontextmanager
async def _shared_get_expire(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
    async with Redis.from_url(url) as client:
        router = Router(client, 30.0, 1)

        async def load(id: str) -> Session[Any]:
            record = await router.call(_GET.fill(router.deadline(), key(id).encode()))
            await router.call(_PEXPIRE.fill(router.deadline(), key(id).encode()))
            return opened(record, id)

        async with aclosing(router):
            yield {"load": load}


@asynccontextmanager
async def _local(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
    storage = LocalStorage[Any](ttl=TTL, codec=CODEC, max_sessions=len(ids))
    for id in ids:
        await storage.store(session(id=id))
    yield {"load": storage.load}


OURS: Final = "aiosessions"
BLOCKING: Final = f"redis.asyncio, blocking pool of {POOL}"
PLAIN: Final = f"redis.asyncio, plain pool of {PLAIN_POOL}"
COREDIS: Final = "coredis"
GLIDE: Final = "valkey-glide"
OURS_ON_CLUSTER: Final = "aiosessions over RedisCluster"
CLUSTER: Final = "RedisCluster"
IDLE: Final = "no client"
"""Loads nothing, and so shows the CPU and the latency of the load generator alone."""

GETEX: Final = "GETEX, pool"
GET: Final = "GET, pool (no renewal)"
GET_EXPIRE: Final = "GET, then EXPIRE, pool"
PIPELINE: Final = "GET and EXPIRE in a pipeline, pool"
LRU_EXPIRE: Final = "LRU in front, EXPIRE on each hit, pool"
SET_AGAIN: Final = "GET, and SET it all again, pool"
LOCAL: Final = "LocalStorage (no server)"
SHARED_GETEX: Final = "aiosessions: GETEX, one shared connection"

ALTERNATIVES: Final[dict[str, Way]] = {
    SHARED_GETEX: Way(_storage, "read and renewal are one atomic command"),
    GETEX: Way(
        _decoded(lambda client, key: client.getex(key, px=TTL_MS)),
        "the same command, over the driver's pool",
    ),
    GET: Way(
        _decoded(lambda client, key: client.get(key)),
        "renews nothing: an active session dies after one TTL. The floor for the others",
    ),
    GET_EXPIRE: Way(
        _decoded(_get_expire),
        "not atomic: a session can die between the two, and a reader that dies there renews "
        "nothing",
        round_trips=2,
    ),
    "GET, then EXPIRE, one shared connection": Way(
        _shared_get_expire,
        "as above; separates the cost of the second round trip from that of the pool",
        round_trips=2,
    ),
    PIPELINE: Way(
        _decoded(_pipeline),
        "one round trip, two commands; other clients' commands can come in between",
    ),
    "GET and EXPIRE in MULTI, pool": Way(
        _decoded(lambda client, key: _pipeline(client, key, transaction=True)),
        "atomic, with four commands",
    ),
    "Lua script, pool": Way(
        _on_pool(_lua),
        "atomic; the script must be in the server's cache, and runs three commands there",
    ),
    SET_AGAIN: Way(
        _on_pool(_set_again),
        "the last writer wins, even without a change, and a deleted session comes back",
        round_trips=2,
    ),
    LRU_EXPIRE: Way(
        _on_pool(_lru_expire),
        "hides writes of other replicas while the entry lasts; saves bytes, not a round trip",
    ),
    LOCAL: Way(_local, "this process only; the least cost of a hit in a near cache", round_trips=0),
}
"""The ways to load a session and renew its TTL, with the guarantees of each."""

ALWAYS: Final = "store, When.ALWAYS: a plain SET"
UNCHANGED: Final = "store, When.UNCHANGED: compare and set"
SAVES: Final[dict[str, Way]] = {
    "SET, redis.asyncio, pool": Way(_on_pool(_raw_set)),
    ALWAYS: Way(_only("always")),
    UNCHANGED: Way(_only("unchanged")),
}
"""The ways to save a session."""

WAYS: Final[dict[str, Way]] = (
    ALTERNATIVES
    | SAVES
    | {
        OURS: Way(_storage, "nothing"),
        BLOCKING: Way(raw(blocking)),
        PLAIN: Way(raw(plain)),
        COREDIS: Way(raw(coredis_client)),
        GLIDE: Way(raw(glide_client)),
        OURS_ON_CLUSTER: Way(ours_on_cluster),
        CLUSTER: Way(raw(lambda url: RedisCluster.from_url(url, max_connections=PLAIN_POOL))),
        IDLE: Way(nothing),
    }
)
ON_ONE_SERVER: Final = (OURS, BLOCKING, PLAIN, COREDIS, GLIDE)
PACKAGES: Final = ("coredis", "valkey-glide", "uvloop")

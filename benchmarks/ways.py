"""The ways to load a session: the storage, the alternatives to GETEX, and bare drivers.

An alternative decodes the same record with the same codec and checks the id. "Pool" in a name means
one `redis.asyncio` client with a blocking pool of 64 connections.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final, cast

from redis.asyncio import Redis, RedisCluster

from aiosessions import LocalStorage, RedisStorage, Session, SessionManager, When

from .drivers import (
    PLAIN_POOL,
    POOL,
    Operations,
    Way,
    blocking,
    coredis_client,
    glide_client,
    ours_on_cluster,
    plain,
    raw,
    storage_of,
)
from .workload import CODEC, SESSIONS, TTL, TTL_MS, key, opened, sealed, session


def _storage(storage: RedisStorage[Any]) -> Operations:
    manager = SessionManager(storage)
    loaded: dict[str, Session[Any]] = {}

    def increment(session: Session[Any]) -> None:
        cast("dict[str, Any]", session.data)["counter"] += 1

    async def cycle(id: str) -> None:
        session = await storage.load(id)
        increment(session)
        await storage.store(session, when=When.UNCHANGED)

    async def save(id: str, when: When) -> None:
        if id not in loaded:
            loaded[id] = await storage.load(id)
            loaded[id].principal = None  # else it writes an index, too
        await storage.store(loaded[id], when=when)

    return {
        "load": storage.load,
        "cycle": cycle,
        "always": lambda id: save(id, When.ALWAYS),
        "unchanged": lambda id: save(id, When.UNCHANGED),
        "increment": lambda id: manager.mutate(id, increment),
    }


def _decoded(read: Callable[["Redis", str], Awaitable[Any]]) -> Callable[["Redis"], Operations]:
    """A load that reads a record, decodes it and checks the id."""

    def operations(client: "Redis") -> Operations:
        async def load(id: str) -> Session[Any]:
            return opened(await read(client, key(id)), id)

        return {"load": load}

    return operations


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


def _lua(client: "Redis") -> Operations:
    script = client.register_script(_GET_AND_RENEW)

    async def load(id: str) -> Session[Any]:
        return opened(await script(keys=[key(id)], args=[TTL_MS]), id)

    return {"load": load}


def _set_again(client: "Redis") -> Operations:
    async def load(id: str) -> Session[Any]:
        session = opened(await client.get(key(id)), id)
        await client.set(key(id), sealed(session), px=TTL_MS)
        return session

    return {"load": load}


def _lru_expire(client: "Redis") -> Operations:
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

    return {"load": load}


def _raw_set(client: "Redis") -> Operations:
    made = session()
    made.principal = None

    async def save(id: str) -> None:
        made.id = id
        # Under another key, because the storage compares the revision under its own.
        await client.set(key(f"raw:{id}"), sealed(made), px=TTL_MS)

    return {"load": save}


def _local(_: None) -> Operations:
    storage = LocalStorage[Any](ttl=TTL, codec=CODEC, max_sessions=SESSIONS)
    return {"prepare": lambda id: storage.store(session(id=id)), "load": storage.load}


async def _return(id: str) -> str:
    return id


def _no_client(_: str) -> AbstractAsyncContextManager[None]:
    return nullcontext()


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
    SHARED_GETEX: Way(storage_of, _storage, "read and renewal are one atomic command"),
    GETEX: Way(
        blocking,
        _decoded(lambda client, key: client.getex(key, px=TTL_MS)),
        "the same command, over the driver's pool",
    ),
    GET: Way(
        blocking,
        _decoded(lambda client, key: client.get(key)),
        "renews nothing: an active session dies after one TTL. The floor for the others",
    ),
    GET_EXPIRE: Way(
        blocking,
        _decoded(_get_expire),
        "not atomic: a session can die between the two, and a reader that dies there renews "
        "nothing",
        round_trips=2,
    ),
    PIPELINE: Way(
        blocking,
        _decoded(_pipeline),
        "one round trip, two commands; other clients' commands can come in between",
    ),
    "GET and EXPIRE in MULTI, pool": Way(
        blocking,
        _decoded(lambda client, key: _pipeline(client, key, transaction=True)),
        "atomic, with four commands",
    ),
    "Lua script, pool": Way(
        blocking,
        _lua,
        "atomic; the script must be in the server's cache, and runs three commands there",
    ),
    SET_AGAIN: Way(
        blocking,
        _set_again,
        "the last writer wins, even without a change, and a deleted session comes back",
        round_trips=2,
    ),
    LRU_EXPIRE: Way(
        blocking,
        _lru_expire,
        "hides writes of other replicas while the entry lasts; saves bytes, not a round trip",
    ),
    LOCAL: Way(
        _no_client,
        _local,
        "this process only",
        round_trips=0,
    ),
}
"""The ways to load a session and renew its TTL, with the guarantees of each."""

ALWAYS: Final = "store, When.ALWAYS"
UNCHANGED: Final = "store, When.UNCHANGED: compare and set"
SAVES: Final[dict[str, Way]] = {
    "SET, redis.asyncio, pool": Way(blocking, _raw_set),
    ALWAYS: Way(storage_of, lambda storage: {"load": _storage(storage)["always"]}),
    UNCHANGED: Way(storage_of, lambda storage: {"load": _storage(storage)["unchanged"]}),
}
"""The ways to save a session."""

WAYS: Final[dict[str, Way]] = (
    ALTERNATIVES
    | SAVES
    | {
        OURS: Way(storage_of, _storage, "nothing"),
        BLOCKING: Way(blocking, raw),
        PLAIN: Way(plain, raw),
        COREDIS: Way(coredis_client, raw),
        GLIDE: Way(glide_client, raw),
        OURS_ON_CLUSTER: Way(ours_on_cluster, _storage),
        CLUSTER: Way(lambda url: RedisCluster.from_url(url, max_connections=PLAIN_POOL), raw),
        IDLE: Way(_no_client, lambda _: {"load": _return}),
    }
)
ON_ONE_SERVER: Final = (OURS, BLOCKING, PLAIN, COREDIS, GLIDE)
ON_CLUSTER: Final = (OURS_ON_CLUSTER, CLUSTER)
PACKAGES: Final = ("coredis", "valkey-glide", "uvloop")

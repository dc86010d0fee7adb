"""The ways to load a session, with the guarantees of each.

All of them decode the same record with the same codec and check the id. A label with "pool" means
one `redis.asyncio` client with a blocking pool of 64 connections. A plain pool with a connection
for every caller is faster by a fifth for all of them: see the scenario `shared`.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

import aiosessions
from aiosessions import LocalStorage, RedisStorage, Session, Storage
from aiosessions.redis._commands import Template
from aiosessions.redis._routing import Router

from .clients import blocking_client, storage_of
from .loops import Operation
from .workload import CODEC, TTL, TTL_MS, key, opened, sealed

_GET = Template(b"GET", None, replies=(bytes, type(None)), retryable=True, bulky=True)
_PEXPIRE = Template(b"PEXPIRE", None, b"%d" % TTL_MS, replies=(int,))
_GET_AND_RENEW = """
local record = redis.call('GET', KEYS[1])
if record then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return record
"""


@dataclass(frozen=True)
class Alternative:
    """A way to load a session and renew its TTL.

    Attributes:
        name: Its name in JSON.
        label: Its name in tables.
        semantics: Its guarantees, and its lack of them.
        make: Makes the operation from the clients.
        remote: Whether it asks the server.
        round_trips: The round trips that one load should take.
    """

    name: str
    label: str
    semantics: str
    make: Callable[["Clients"], Operation]
    remote: bool = True
    round_trips: int = 1


@dataclass
class Clients:
    """The clients that the alternatives use.

    Attributes:
        pool: A client of `redis.asyncio` with a pool of connections.
        storage: The storage under test.
        shared: A connection like that of the storage, for any command.
        local: A storage in this process, with the same sessions.
    """

    pool: "Redis"
    storage: RedisStorage[Any]
    shared: Router
    local: LocalStorage[Any]


@asynccontextmanager
async def connected(url: str, sessions: Sequence[Session[Any]]) -> AsyncIterator[Clients]:
    """Connect clients and store the sessions; remove the sessions with the block."""
    async with AsyncExitStack() as stack:
        pool = blocking_client(url)
        stack.push_async_callback(pool.aclose)
        storage = await stack.enter_async_context(storage_of(url))
        shared = Router(pool, 30.0, 1)
        stack.push_async_callback(shared.aclose)
        local = LocalStorage[Any](ttl=TTL, codec=CODEC, max_sessions=len(sessions))
        for session in sessions:
            await local.store(session)
            await storage.store(session)  # last, so that the revision is that on the server
        stack.push_async_callback(pool.unlink, *(key(session.id) for session in sessions))
        yield Clients(pool, storage, shared, local)


def _ours(clients: Clients) -> Operation:
    return clients.storage.load


def _get(clients: Clients) -> Operation:
    async def load(id: str) -> Session[Any]:
        return opened(await clients.pool.get(key(id)), id)

    return load


def _getex(clients: Clients) -> Operation:
    async def load(id: str) -> Session[Any]:
        return opened(await clients.pool.getex(key(id), px=TTL_MS), id)

    return load


def _get_expire(clients: Clients) -> Operation:
    async def load(id: str) -> Session[Any]:
        record = await clients.pool.get(key(id))
        await clients.pool.pexpire(key(id), TTL_MS)
        return opened(record, id)

    return load


def _pipeline(clients: Clients, *, transaction: bool) -> Operation:
    async def load(id: str) -> Session[Any]:
        async with clients.pool.pipeline(transaction=transaction) as pipeline:
            _ = pipeline.get(key(id)), pipeline.pexpire(key(id), TTL_MS)  # queued
            record, _ = await pipeline.execute()
        return opened(record, id)

    return load


def _lua(clients: Clients) -> Operation:
    script = clients.pool.register_script(_GET_AND_RENEW)

    async def load(id: str) -> Session[Any]:
        return opened(await script(keys=[key(id)], args=[TTL_MS]), id)

    return load


def _set_again(clients: Clients) -> Operation:
    async def load(id: str) -> Session[Any]:
        session = opened(await clients.pool.get(key(id)), id)
        await clients.pool.set(key(id), sealed(session), px=TTL_MS)
        return session

    return load


def _lru_expire(clients: Clients) -> Operation:
    records: OrderedDict[str, Any] = OrderedDict()

    async def load(id: str) -> Session[Any]:
        record = records.get(id)
        if record is None:
            record = await clients.pool.getex(key(id), px=TTL_MS)
            if record is not None:
                records[id] = record
            if len(records) > 10_000:
                records.popitem(last=False)
        elif await clients.pool.pexpire(key(id), TTL_MS):
            records.move_to_end(id)
        else:
            record = records.pop(id, None) and None
        return opened(record, id)

    return load


def _shared_get_expire(clients: Clients) -> Operation:
    router = clients.shared

    async def load(id: str) -> Session[Any]:
        record = await router.call(_GET.fill(router.deadline(), key(id).encode()))
        await router.call(_PEXPIRE.fill(router.deadline(), key(id).encode()))
        return opened(record, id)

    return load


def _near_cache(clients: Clients) -> Operation:
    make: Callable[..., Storage[Any]] = vars(aiosessions)["NearCache"]
    return make(clients.storage, max_staleness=1.0).load


def _local(clients: Clients) -> Operation:
    return clients.local.load


OURS = Alternative(
    "aiosessions",
    "aiosessions: GETEX, one shared connection",
    "read and renewal are one atomic command",
    _ours,
)
GETEX = Alternative("getex", "GETEX, pool", "the same command, over the driver's pool", _getex)
GET = Alternative(
    "get",
    "GET, pool (no renewal)",
    "renews nothing: an active session dies after one TTL. The floor for the others",
    _get,
)
GET_EXPIRE = Alternative(
    "get-expire",
    "GET, then EXPIRE, pool",
    "not atomic: a session can die between the two, and a reader that dies there renews nothing",
    _get_expire,
    round_trips=2,
)
SHARED_GET_EXPIRE = Alternative(
    "shared-get-expire",
    "GET, then EXPIRE, one shared connection",
    "as above; separates the cost of the second round trip from that of the pool",
    _shared_get_expire,
    round_trips=2,
)
SET_AGAIN = Alternative(
    "set-again",
    "GET, and SET it all again, pool",
    "the last writer wins, even without a change, and a deleted session comes back",
    _set_again,
    round_trips=2,
)
LRU_EXPIRE = Alternative(
    "lru-expire",
    "LRU in front, EXPIRE on each hit, pool",
    "hides writes of other replicas while the entry lasts; saves bytes, not a round trip",
    _lru_expire,
)
LOCAL = Alternative(
    "local",
    "LocalStorage (no server)",
    "this process only; the least cost of a hit in a near cache",
    _local,
    remote=False,
    round_trips=0,
)
_NEAR_CACHE = Alternative(
    "near-cache",
    "NearCache, at most 1 s stale",
    "shows writes of other replicas after max_staleness at the latest",
    _near_cache,
    round_trips=0,
)

ALTERNATIVES = (
    OURS,
    GETEX,
    GET,
    GET_EXPIRE,
    SHARED_GET_EXPIRE,
    Alternative(
        "pipeline",
        "GET and EXPIRE in a pipeline, pool",
        "one round trip, two commands; other clients' commands can come in between",
        lambda clients: _pipeline(clients, transaction=False),
    ),
    Alternative(
        "multi",
        "GET and EXPIRE in MULTI, pool",
        "atomic, with four commands",
        lambda clients: _pipeline(clients, transaction=True),
    ),
    Alternative(
        "lua",
        "Lua script, pool",
        "atomic; the script must be in the server's cache, and runs three commands there",
        _lua,
    ),
    SET_AGAIN,
    LRU_EXPIRE,
    *([_NEAR_CACHE] if hasattr(aiosessions, "NearCache") else []),
    LOCAL,
)

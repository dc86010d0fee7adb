"""A way to use sessions, the storage, and drivers.

Libraries are imported when a client is opened, so that a missing library does not disturb the
others.
"""

# ruff: noqa: PLC0415 - see above

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster

from aiosessions import RedisStorage

from .workload import CODEC, PREFIX, TTL, TTL_MS, key, opened, sealed

POOL: Final = 64
PLAIN_POOL: Final = 256
NAME: Final = "aiosessions-bench"
"""The name of our storages' connections on the server."""

_PATIENT: Final[dict[str, Any]] = {"socket_connect_timeout": 30.0}
"""For 256 TLS connections at once: redis-py reads all authorities of the system for each."""

Operation = Callable[[str], Awaitable[object]]
"""Does something with the session of an id."""

Operations = dict[str, Operation]
"""By name. "prepare", if there is one, runs once for each session before the others."""

Connect = Callable[[str], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True)
class Way:
    """A way to use sessions.

    Attributes:
        connect: Opens a client for a URL.
        operations: Makes the operations of a client.
        note: The guarantees of the operations, and those that they lack.
        round_trips: The round trips that one load should take.
    """

    connect: Connect
    operations: Callable[[Any], Operations]
    note: str = ""
    round_trips: int = 1

    @asynccontextmanager
    async def open(self, url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
        """Connect a client to a server, for the sessions of some ids."""
        async with self.connect(url) as client:
            operations = self.operations(client)
            if prepare := operations.pop("prepare", None):
                # One caller opens the connections; many at once fail in RedisCluster.
                for id in ids:
                    await prepare(id)
            yield operations


def storage_of(url: str, ttl: float = TTL) -> RedisStorage[Any]:
    """Make a storage with the benchmark's names for keys and connections."""
    named = f"{url}{'&' if '?' in url else '?'}client_name={NAME}"
    return RedisStorage.from_url(named, ttl=ttl, codec=CODEC, key_prefix=PREFIX, timeout=30.0)


def raw(client: Any) -> Operations:
    """A load by a driver, which returns raw bytes."""
    return {
        "prepare": lambda id: client.get(key(id)),
        "load": lambda id: client.getex(key(id), px=TTL_MS),
    }


def decoded(client: Any) -> Operations:
    """A load and a request by a driver that keeps the same record as the storage."""

    async def load(id: str) -> Any:
        return opened(await client.getex(key(id), px=TTL_MS), id)

    async def cycle(id: str) -> None:
        loaded = await load(id)
        loaded.data["counter"] += 1
        await client.set(key(id), sealed(loaded), px=TTL_MS)

    return {"load": load, "cycle": cycle}


def blocking(url: str) -> "Redis":
    """A client of `redis.asyncio` with a blocking pool."""
    pool = BlockingConnectionPool.from_url(url, max_connections=POOL, **_PATIENT)
    return Redis.from_pool(pool)


def plain(url: str, **options: Any) -> "Redis":
    """A client of `redis.asyncio` with a connection for each caller."""
    return Redis.from_url(url, max_connections=PLAIN_POOL, **_PATIENT, **options)


def coredis_client(url: str) -> Any:
    """A coredis client."""
    import coredis

    return coredis.Redis.from_url(url)


@asynccontextmanager
async def glide_client(url: str) -> AsyncIterator[Any]:
    """A valkey-glide client with `getex`, `get` and `set` as in redis-py."""
    import glide

    parts = urlsplit(url)
    settings: dict[str, Any] = Redis.from_url(url).connection_pool.connection_kwargs
    password, authority = settings.get("password"), settings.get("ssl_ca_certs")
    pem = authority and await asyncio.to_thread(Path(authority).read_bytes)
    login = glide.ServerCredentials(password, settings.get("username")) if password else None
    client = await glide.GlideClient.create(
        glide.GlideClientConfiguration(
            [glide.NodeAddress(parts.hostname or "localhost", parts.port or 6379)],
            use_tls=parts.scheme == "rediss",
            credentials=login,
            database_id=settings.get("db", 0),
            request_timeout=30_000,
            advanced_config=glide.AdvancedGlideClientConfiguration(
                tls_config=glide.TlsAdvancedConfiguration(root_pem_cacerts=pem) if pem else None
            ),
        )
    )
    renewed = glide.ExpiryGetEx(glide.ExpiryTypeGetEx.MILLSEC, TTL_MS)
    expiry = glide.ExpirySet(glide.ExpiryType.MILLSEC, TTL_MS)

    class _Glide:
        get = staticmethod(client.get)

        @staticmethod
        def getex(key: str, px: int) -> Any:  # noqa: ARG004 - as in redis-py
            return client.getex(key, renewed)

        @staticmethod
        def set(key: str, value: bytes, px: int) -> Any:  # noqa: ARG004 - see above
            return client.set(key, value, expiry=expiry)

    try:
        yield _Glide
    finally:
        await client.close()


@asynccontextmanager
async def ours_on_cluster(url: str, ttl: float = TTL) -> AsyncIterator[RedisStorage[Any]]:
    """A storage over RedisCluster."""
    # Not entered, because entering connects it: the storage borrows its settings only.
    borrowed = RedisCluster.from_url(url, client_name=NAME)
    async with (
        aclosing(borrowed),
        RedisStorage(borrowed, ttl=ttl, codec=CODEC, key_prefix=PREFIX, timeout=30.0) as storage,
    ):
        yield storage

"""The storage and bare drivers, which return raw bytes.

Libraries are imported when a client is opened, so that a missing library does not disturb the
others.
"""

# ruff: noqa: PLC0415, ARG001, ARG004 - see above; all openers have the same parameters

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster

from aiosessions import RedisStorage

from .loops import Operation
from .workload import CODEC, PREFIX, TTL, TTL_MS, key

POOL: Final = 64
PLAIN_POOL: Final = 256
NAME: Final = "aiosessions-bench"
"""The name of our storages' connections on the server."""

_PATIENT: Final[dict[str, Any]] = {"socket_connect_timeout": 30.0}
"""For 256 TLS connections at once: redis-py reads all authorities of the system for each."""

Operations = dict[str, Operation]
Open = Callable[[str, Sequence[str]], AbstractAsyncContextManager[Operations]]


@dataclass(frozen=True)
class Way:
    """A way to use sessions.

    Attributes:
        open: Connects a client to the server of a URL, for the sessions of some ids.
        note: Its guarantees, and the guarantees that it lacks.
        round_trips: The round trips that one load should take.
    """

    open: Open
    note: str = ""
    round_trips: int = 1


def storage_of(url: str) -> RedisStorage[Any]:
    """Make a storage with the benchmark's names for keys and connections."""
    named = f"{url}{'&' if '?' in url else '?'}client_name={NAME}"
    return RedisStorage.from_url(named, ttl=TTL, codec=CODEC, key_prefix=PREFIX, timeout=30.0)


def raw(connect: Callable[[str], Any]) -> Open:
    """Open a load by a driver, which returns raw bytes."""

    @asynccontextmanager
    async def open(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
        async with connect(url) as client:
            # One caller opens the connections; many at once fail in RedisCluster.
            for id in ids[:100]:
                await client.get(key(id))
            yield {"load": lambda id: client.getex(key(id), px=TTL_MS)}

    return open


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
        def getex(key: str, px: int) -> Any:
            return client.getex(key, renewed)

        @staticmethod
        def set(key: str, value: bytes, px: int) -> Any:
            return client.set(key, value, expiry=expiry)

    try:
        yield _Glide
    finally:
        await client.close()


@asynccontextmanager
async def ours_on_cluster(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
    """Open a storage over RedisCluster."""
    # Not entered, because entering connects it: the storage borrows its settings only.
    borrowed = RedisCluster.from_url(url, client_name=NAME)
    async with (
        aclosing(borrowed),
        RedisStorage(borrowed, ttl=TTL, codec=CODEC, key_prefix=PREFIX, timeout=30.0) as storage,
    ):
        yield {"load": storage.load}


@asynccontextmanager
async def nothing(url: str, ids: Sequence[str]) -> AsyncIterator[Operations]:
    """Open a load that does nothing."""

    async def load(id: str) -> object:
        return id

    yield {"load": load}

"""The clients that the scenarios `shared`, `arrivals` and `tls` compare.

Only `aiosessions` decodes a record and checks its id; the drivers return raw bytes. Libraries are
imported when a client is opened, so that a missing library does not disturb the others.
"""

# ruff: noqa: PLC0415 - see above

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
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

OURS: Final = "aiosessions"
BLOCKING: Final = f"redis.asyncio, blocking pool of {POOL}"
PLAIN: Final = f"redis.asyncio, plain pool of {PLAIN_POOL}"
COREDIS: Final = "coredis"
GLIDE: Final = "valkey-glide"
OURS_ON_CLUSTER: Final = "aiosessions over RedisCluster"
CLUSTER: Final = "RedisCluster"
IDLE: Final = "no client"
"""Loads nothing, and so shows the CPU and the latency of the load generator alone."""

ON_ONE_SERVER: Final = (OURS, BLOCKING, PLAIN, COREDIS, GLIDE)
_PATIENT: Final[dict[str, Any]] = {"socket_connect_timeout": 30.0}
"""For 256 TLS connections at once: redis-py reads all authorities of the system for each."""

PACKAGES: Final = ("coredis", "valkey-glide", "uvloop")


def storage_of(url: str) -> RedisStorage[Any]:
    """Make a storage with the benchmark's names for keys and connections."""
    named = f"{url}{'&' if '?' in url else '?'}client_name={NAME}"
    return RedisStorage.from_url(named, ttl=TTL, codec=CODEC, key_prefix=PREFIX, timeout=30.0)


def blocking_client(url: str) -> "Redis":
    """A client of redis.asyncio over a blocking pool."""
    pool = BlockingConnectionPool.from_url(url, max_connections=POOL, **_PATIENT)
    return Redis.from_pool(pool)


def redis_settings(url: str) -> dict[str, Any]:
    """The settings in a URL, as redis-py reads them."""
    settings: dict[str, Any] = Redis.from_url(url).connection_pool.connection_kwargs
    return settings


@asynccontextmanager
async def glide_client(url: str) -> AsyncIterator[Any]:
    """A valkey-glide client.

    Raises:
        ImportError: It is not installed.
    """
    from glide import (
        AdvancedGlideClientConfiguration,
        GlideClient,
        GlideClientConfiguration,
        NodeAddress,
        ServerCredentials,
        TlsAdvancedConfiguration,
    )

    parts = urlsplit(url)
    settings = redis_settings(url)
    password, authority = settings.get("password"), settings.get("ssl_ca_certs")
    pem = authority and await asyncio.to_thread(Path(authority).read_bytes)
    client = await GlideClient.create(
        GlideClientConfiguration(
            [NodeAddress(parts.hostname or "localhost", parts.port or 6379)],
            use_tls=parts.scheme == "rediss",
            credentials=ServerCredentials(password, settings.get("username")) if password else None,
            database_id=settings.get("db", 0),
            request_timeout=30_000,
            advanced_config=AdvancedGlideClientConfiguration(
                tls_config=TlsAdvancedConfiguration(root_pem_cacerts=pem) if pem else None
            ),
        )
    )
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def _ours(url: str) -> AsyncIterator[Operation]:
    async with storage_of(url) as storage:
        yield storage.load


@asynccontextmanager
async def _blocking(url: str) -> AsyncIterator[Operation]:
    async with blocking_client(url) as client:

        async def load(id: str) -> object:
            return await client.getex(key(id), px=TTL_MS)

        yield load


@asynccontextmanager
async def _plain(url: str) -> AsyncIterator[Operation]:
    async with Redis.from_url(url, max_connections=PLAIN_POOL, **_PATIENT) as client:

        async def load(id: str) -> object:
            return await client.getex(key(id), px=TTL_MS)

        yield load


@asynccontextmanager
async def _coredis(url: str) -> AsyncIterator[Operation]:
    import coredis

    async with coredis.Redis.from_url(url) as client:

        async def load(id: str) -> object:
            return await client.getex(key(id), px=TTL_MS)

        yield load


@asynccontextmanager
async def _glide(url: str) -> AsyncIterator[Operation]:
    from glide import ExpiryGetEx, ExpiryTypeGetEx

    async with glide_client(url) as client:
        renewed = ExpiryGetEx(ExpiryTypeGetEx.MILLSEC, TTL_MS)

        async def load(id: str) -> object:
            return await client.getex(key(id), renewed)

        yield load


@asynccontextmanager
async def _ours_on_cluster(url: str) -> AsyncIterator[Operation]:
    # Not entered, because entering connects it: the storage borrows its settings only.
    borrowed = RedisCluster.from_url(url, client_name=NAME)
    async with (
        aclosing(borrowed),
        RedisStorage(borrowed, ttl=TTL, codec=CODEC, key_prefix=PREFIX, timeout=30.0) as storage,
    ):
        yield storage.load


@asynccontextmanager
async def _cluster(url: str) -> AsyncIterator[Operation]:
    # Its pools raise MaxConnectionsError instead of waiting.
    async with RedisCluster.from_url(url, max_connections=PLAIN_POOL) as client:
        # One caller opens the connections; many at once fail in redis-py.
        for number in range(100):
            await client.get(key(str(number)))

        async def load(id: str) -> object:
            return await client.getex(key(id), px=TTL_MS)

        yield load


@asynccontextmanager
async def _idle(url: str) -> AsyncIterator[Operation]:
    del url

    async def load(id: str) -> object:
        return id

    yield load


CLIENTS: Final[dict[str, Callable[[str], AbstractAsyncContextManager[Operation]]]] = {
    OURS: _ours,
    BLOCKING: _blocking,
    PLAIN: _plain,
    COREDIS: _coredis,
    GLIDE: _glide,
    OURS_ON_CLUSTER: _ours_on_cluster,
    CLUSTER: _cluster,
    IDLE: _idle,
}
"""By name: opens a client of a server and yields its load."""

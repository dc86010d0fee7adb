"""Other libraries that keep sessions, and the drivers under them.

Each is used as its documentation shows, with two operations. `load` returns the decoded data of a
session and renews its TTL in the way of the library. `cycle` is a request: load, change one field,
save. Libraries over `redis.asyncio` get a plain pool with a connection for every caller. A library
is imported when it is opened, so that a missing library does not disturb the others.

The missing guarantees come from the sources of the versions that the results name.
"""

# ruff: noqa: PLC0415 - see above

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from redis.asyncio import Redis

from aiosessions import Session, When

from .clients import glide_client, storage_of
from .loops import CALLERS, Operation
from .workload import PREFIX, TTL, TTL_MS, key, opened, sealed

Sessions = Sequence[Session[Any]]


@dataclass(frozen=True)
class Calls:
    """The operations of a connected peer that has the sessions."""

    load: Operation
    cycle: Operation


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        name: Its name in JSON.
        label: Its name in tables.
        package: Its distribution, for the version.
        lacks: The guarantees that it lacks, used as it is here.
        open: Connects it to a server and stores the sessions in its own form.
    """

    name: str
    label: str
    package: str
    lacks: str
    open: Callable[[str, Sessions], AbstractAsyncContextManager[Calls]]


@asynccontextmanager
async def _pool(url: str, **options: Any) -> AsyncIterator["Redis"]:
    client = Redis.from_url(url, max_connections=max(CALLERS), **options)
    try:
        yield client
    finally:
        await client.aclose()


def _change(data: Any) -> None:
    data["counter"] += 1


@asynccontextmanager
async def _aiosessions(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    async with storage_of(url) as storage:
        for session in sessions:
            await storage.store(session)

        async def cycle(id: str) -> None:
            session = await storage.load(id)
            _change(session.data)
            await storage.store(session, when=When.UNCHANGED)

        yield Calls(storage.load, cycle)


@asynccontextmanager
async def _litestar(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    from litestar.serialization import decode_json, encode_json
    from litestar.stores.redis import RedisStore

    async with _pool(url) as client:
        store = RedisStore(client, namespace=f"{PREFIX}litestar")
        for session in sessions:
            await store.set(session.id, encode_json(_plain(session)), expires_in=int(TTL))

        async def load(id: str) -> Any:
            return decode_json(_there(await store.get(id, renew_for=int(TTL))))

        async def cycle(id: str) -> None:
            data = await load(id)
            _change(data)
            await store.set(id, encode_json(data), expires_in=int(TTL))

        yield Calls(load, cycle)


@asynccontextmanager
async def _starsessions(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    from starsessions import JsonSerializer
    from starsessions.stores.redis import RedisStore

    async with _pool(url) as client:
        # The steps of its middleware with rolling=True around a request, without the cookies.
        store = RedisStore(connection=client, prefix=f"{PREFIX}starsessions:")
        serializer = JsonSerializer()
        lifetime = int(TTL)

        async def read(id: str) -> Any:
            return serializer.deserialize(await store.read(id, lifetime))

        async def write(id: str, data: Any) -> None:
            await store.write(id, serializer.serialize(data), lifetime, lifetime)

        for session in sessions:
            await write(session.id, _plain(session))

        async def load(id: str) -> Any:
            data = await read(id)
            await write(id, data)
            return data

        async def cycle(id: str) -> None:
            data = await read(id)
            _change(data)
            await write(id, data)

        yield Calls(load, cycle)


@asynccontextmanager
async def _aiohttp_session(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    from aiohttp.web import Request, Response
    from aiohttp_session import Session as Kept
    from aiohttp_session.redis_storage import RedisStorage

    async with _pool(url) as client:
        name = f"{PREFIX}aiohttp"
        storage = RedisStorage(client, cookie_name=name, max_age=int(TTL))
        for session in sessions:
            # The age counts from `created` and must not end the session.
            data = {"created": int(time.time()), "session": _plain(session)}
            await client.set(f"{name}_{session.id}", json.dumps(data), ex=int(TTL))

        async def read(id: str) -> Kept:
            # It reads only the cookies of a request.
            request = cast("Request", SimpleNamespace(cookies={name: id}))
            return await storage.load_session(request)

        async def write(kept: Kept) -> None:
            await storage.save_session(cast("Request", None), Response(), kept)

        async def load(id: str) -> Kept:
            kept = await read(id)
            await write(kept)
            return kept

        async def cycle(id: str) -> None:
            kept = await read(id)
            kept["counter"] = kept["counter"] + 1
            await write(kept)

        yield Calls(load, cycle)


@asynccontextmanager
async def _py_key_value(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    from key_value.aio.stores.redis import RedisStore

    async with _pool(url, decode_responses=True) as client:
        collection = f"{PREFIX}py-key-value"
        async with RedisStore(client=client, default_collection=collection) as store:
            for session in sessions:
                await store.put(session.id, _plain(session), ttl=TTL)

            async def load(id: str) -> Any:
                data = _there(await store.get(id))
                await store.put(id, data, ttl=TTL)
                return data

            async def cycle(id: str) -> None:
                data = _there(await store.get(id))
                _change(data)
                await store.put(id, data, ttl=TTL)

            yield Calls(load, cycle)


@asynccontextmanager
async def _redis_asyncio(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    async with _pool(url) as client:
        for session in sessions:
            await client.set(key(session.id), sealed(session), px=TTL_MS)

        async def load(id: str) -> Session[Any]:
            return opened(await client.getex(key(id), px=TTL_MS), id)

        async def cycle(id: str) -> None:
            session = await load(id)
            _change(session.data)
            await client.set(key(id), sealed(session), px=TTL_MS)

        yield Calls(load, cycle)


@asynccontextmanager
async def _coredis(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    import coredis

    client = coredis.Redis.from_url(url)
    async with client:
        for session in sessions:
            await client.set(key(session.id), sealed(session), px=TTL_MS)

        async def load(id: str) -> Session[Any]:
            return opened(await client.getex(key(id), px=TTL_MS), id)

        async def cycle(id: str) -> None:
            session = await load(id)
            _change(session.data)
            await client.set(key(id), sealed(session), px=TTL_MS)

        yield Calls(load, cycle)


@asynccontextmanager
async def _glide(url: str, sessions: Sessions) -> AsyncIterator[Calls]:
    from glide import ExpiryGetEx, ExpirySet, ExpiryType, ExpiryTypeGetEx

    async with glide_client(url) as client:
        renewed = ExpiryGetEx(ExpiryTypeGetEx.MILLSEC, TTL_MS)
        expiry = ExpirySet(ExpiryType.MILLSEC, TTL_MS)
        for session in sessions:
            await client.set(key(session.id), sealed(session), expiry=expiry)

        async def load(id: str) -> Session[Any]:
            return opened(await client.getex(key(id), renewed), id)

        async def cycle(id: str) -> None:
            session = await load(id)
            _change(session.data)
            await client.set(key(id), sealed(session), expiry=expiry)

        yield Calls(load, cycle)


def _plain(session: Session[Any]) -> dict[str, Any]:
    """The same content for a library that keeps dictionaries."""
    return {
        "kind": session.kind,
        "principal": session.principal,
        "metadata": session.metadata,
        "created": session.created_at.isoformat(),
        **cast("dict[str, Any]", session.data),
    }


def _there(data: Any) -> Any:
    if data is None:
        raise LookupError("a session of the benchmark is gone")
    return data


_DRIVER = "lost updates; deleted sessions come back; ids and formats are the caller's to check"

PEERS = (
    Peer("aiosessions", "aiosessions", "aiosessions", "", _aiosessions),
    Peer(
        "litestar",
        "litestar RedisStore",
        "litestar",
        "lost updates; deleted sessions come back; whole seconds, not renewed in the last 0.5 s",
        _litestar,
    ),
    Peer(
        "starsessions",
        "starsessions",
        "starsessions",
        "a read renews nothing, so all is written on every request: lost updates even by readers; "
        "deleted sessions come back; whole seconds",
        _starsessions,
    ),
    Peer(
        "aiohttp-session",
        "aiohttp-session",
        "aiohttp-session",
        "a read renews nothing; lost updates; deleted sessions come back; what cannot be decoded "
        "is an empty session; whole seconds",
        _aiohttp_session,
    ),
    Peer(
        "py-key-value",
        "py-key-value RedisStore",
        "py-key-value-aio",
        "a read renews nothing; lost updates; deleted entries come back; what cannot be decoded "
        "is an absent entry; whole seconds",
        _py_key_value,
    ),
    Peer("redis", "redis.asyncio", "redis", _DRIVER, _redis_asyncio),
    Peer("coredis", "coredis", "coredis", _DRIVER, _coredis),
    Peer("glide", "valkey-glide", "valkey-glide", _DRIVER, _glide),
)

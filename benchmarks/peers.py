"""Other libraries that keep sessions, and the drivers under them.

Each is used as its documentation shows, with two operations. `load` returns the decoded data of a
session and renews its TTL in the way of the library. `cycle` is a request: load, change one field,
save. Libraries over `redis.asyncio` get a plain pool with a connection for every caller.

The missing guarantees come from the sources of the versions that the results name.
"""

# ruff: noqa: PLC0415 - a missing library must not disturb the others

import json
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Final, cast

from .drivers import Operations, Way, coredis_client, decoded, glide_client, plain
from .ways import OURS, WAYS
from .workload import PREFIX, TTL, session

_SECONDS = int(TTL)


def _contents(id: str) -> dict[str, Any]:
    """The content of a session, for a library that keeps dictionaries."""
    made = session(id=id)
    return {
        "kind": made.kind,
        "principal": made.principal,
        "metadata": made.metadata,
        "created": made.created_at.isoformat(),
        **cast("dict[str, Any]", made.data),
    }


def _there(data: Any) -> Any:
    if data is None:
        raise LookupError("a session of the benchmark is gone")
    return data


def _operations(
    read: Callable[[str], Awaitable[Any]],
    write: Callable[[str, Any], Awaitable[Any]],
    *,
    read_renews: bool = False,
) -> Operations:
    """Operations from a read and a write of dictionaries."""

    async def load(id: str) -> Any:
        data = _there(await read(id))
        if not read_renews:
            await write(id, data)
        return data

    async def cycle(id: str) -> None:
        data = _there(await read(id))
        data["counter"] += 1
        await write(id, data)

    return {"prepare": lambda id: write(id, _contents(id)), "load": load, "cycle": cycle}


def _litestar(client: Any) -> Operations:
    from litestar.serialization import decode_json, encode_json
    from litestar.stores.redis import RedisStore

    store = RedisStore(client, namespace=f"{PREFIX}litestar")

    async def read(id: str) -> Any:
        return decode_json(_there(await store.get(id, renew_for=_SECONDS)))

    async def write(id: str, data: Any) -> None:
        await store.set(id, encode_json(data), expires_in=_SECONDS)

    return _operations(read, write, read_renews=True)


def _starsessions(client: Any) -> Operations:
    from starsessions import JsonSerializer
    from starsessions.stores.redis import RedisStore

    # The steps of its middleware with rolling=True around a request, without the cookies.
    store = RedisStore(connection=client, prefix=f"{PREFIX}starsessions:")
    serializer = JsonSerializer()

    async def read(id: str) -> Any:
        return serializer.deserialize(await store.read(id, _SECONDS))

    async def write(id: str, data: Any) -> None:
        await store.write(id, serializer.serialize(data), _SECONDS, _SECONDS)

    return _operations(read, write)


def _aiohttp_session(client: Any) -> Operations:
    from aiohttp.web import Request, Response
    from aiohttp_session.redis_storage import RedisStorage

    name = f"{PREFIX}aiohttp"
    storage = RedisStorage(client, cookie_name=name, max_age=_SECONDS)

    async def read(id: str) -> Any:
        # It reads only the cookies of a request.
        request = cast("Request", SimpleNamespace(cookies={name: id}))
        return await storage.load_session(request)

    async def write(id: str, kept: Any) -> None:
        if isinstance(kept, dict):
            # The age counts from `created` and must not end the session.
            data = {"created": int(time.time()), "session": kept}
            await client.set(f"{name}_{id}", json.dumps(data), ex=_SECONDS)
        else:
            await storage.save_session(cast("Request", None), Response(), kept)

    return _operations(read, write)


def _py_key_value(client: Any) -> Operations:
    from key_value.aio.stores.redis import RedisStore

    store = RedisStore(client=client, default_collection=f"{PREFIX}py-key-value")

    async def write(id: str, data: Any) -> None:
        await store.put(id, data, ttl=TTL)

    return _operations(store.get, write)


_LACKS = "lost updates; deleted sessions come back; ids and formats are the caller's to check"

PEERS: Final[dict[str, Way]] = {
    OURS: WAYS[OURS],
    "litestar RedisStore": Way(
        plain,
        _litestar,
        "lost updates; deleted sessions come back; whole seconds, not renewed in the last 0.5 s",
    ),
    "starsessions": Way(
        plain,
        _starsessions,
        "a read renews nothing, so all is written on every request: lost updates even by readers; "
        "deleted sessions come back; whole seconds",
    ),
    "aiohttp-session": Way(
        plain,
        _aiohttp_session,
        "a read renews nothing; lost updates; deleted sessions come back; what cannot be decoded "
        "is an empty session; whole seconds",
    ),
    "py-key-value RedisStore": Way(
        lambda url: plain(url, decode_responses=True),
        _py_key_value,
        "a read renews nothing; lost updates; deleted entries come back; what cannot be decoded "
        "is an absent entry; whole seconds",
    ),
    "redis.asyncio": Way(plain, decoded, _LACKS),
    "coredis, decoded": Way(coredis_client, decoded, _LACKS),
    "valkey-glide, decoded": Way(glide_client, decoded, _LACKS),
}
PACKAGES: Final = (
    *("litestar", "starsessions", "aiohttp-session"),
    *("py-key-value-aio", "coredis", "valkey-glide"),
)

"""The near cache: ways to load through it, and measurements that run in fresh processes."""

import asyncio
import gc
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import msgspec
import psutil

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    NearCache,
    RedisStorage,
    Session,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.record import encode
from aiosessions.redis import _scripts as scripts
from aiosessions.redis._commands import Script
from aiosessions.testing import FakeClock

from .drivers import Operations, Way, storage_of
from .micro import Data
from .owned import connect
from .results import Row
from .ways import SAVES, UNCHANGED
from .workload import SESSIONS, TTL, session, sessions

NO_CACHE: Final = "no cache"
SILENT: Final = "compare and set, no PUBLISH"
_HOT: Final = 8
_SLOTS: Final = 100  # the hot sessions, and the latest of the others
_ANNOUNCE: Final = "announce(KEYS[1], string.sub(record, 2, 17))"


def way_of(hits: float) -> str:
    """The name of the way to load through a cache with this share of hits."""
    return f"near cache, {hits:.4g} % hits"


def _mixed(hits: float, client: NearCache[Any] | RedisStorage[Any]) -> Operations:
    """Load a few hot sessions, and in between others, which were evicted since their last load."""
    ids: list[str] = []
    every = round(100 / (100 - hits)) if hits < 100 else 0
    hot = cold = count = 0

    async def prepare(id: str) -> None:
        ids.append(id)
        if len(ids) <= _HOT:
            await client.load(id)

    async def load(_: str) -> Session[Any]:
        nonlocal hot, cold, count
        count += 1
        if every and count % every == 0:
            cold += 1
            return await client.load(ids[_HOT + cold % (len(ids) - _HOT)])
        hot += 1
        return await client.load(ids[hot % _HOT])

    return {"prepare": prepare, "load": load}


def _cache(url: str) -> NearCache[Any]:
    return NearCache(storage_of(url), max_staleness=TTL / 2, max_sessions=_SLOTS)


def _without_publish(url: str) -> RedisStorage[Any]:
    source = scripts._STORE.replace(_ANNOUNCE, "")  # noqa: SLF001 - the same script, for comparison
    if source == scripts._STORE:  # noqa: SLF001 - see above
        raise RuntimeError("the script that stores a session announces in another way")
    scripts.STORE_UNCHANGED.plain = Script(source, 5, retryable=True)
    return storage_of(url)


SHARES: Final = (0, 90, 99.5, 100)
"""Percentages of hits."""

MISS: Final = way_of(0)
HIT: Final = way_of(100)
THROUGH: Final[dict[str, Way]] = {
    NO_CACHE: Way(storage_of, partial(_mixed, 0)),
    **{way_of(hits): Way(_cache, partial(_mixed, hits)) for hits in SHARES},
}
"""The ways to load through a cache, and without one."""

CACHED: Final = THROUGH | {SILENT: Way(_without_publish, SAVES[UNCHANGED].operations)}


# Each of the following functions runs in a process of its own.


def hits(seconds: float, seed: int) -> list[Row]:
    """Count hits a second, and what bounds them, for each codec."""
    return asyncio.run(_hits(seconds, seed))


async def _hits(seconds: float, seed: int) -> list[Row]:
    typed = msgspec.convert(session().data, Data)
    codecs: dict[str, tuple[Codec[Any], Any]] = {
        "JsonCodec": (JsonCodec(), session().data),
        "JsonCodec(Data)": (JsonCodec(Data), typed),
        "MsgpackCodec": (MsgpackCodec(), session().data),
        "MsgpackCodec(Data)": (MsgpackCodec(Data), typed),
    }
    rows: list[Row] = []
    cells: list[tuple[Row, str, Callable[[], Awaitable[None]]]] = []
    for name, (codec, data) in codecs.items():
        storage = LocalStorage[Any](ttl=TTL, codec=codec)
        cache = NearCache(storage, max_staleness=TTL / 2)
        ids, payloads = [new_session_id() for _ in range(SESSIONS)], []
        made = session()
        made.data = data
        for made.id in ids:
            await cache.store(made)
            payloads.append(encode(made, codec)[0])
        rows.append({"codec": name, "bytes": len(payloads[0])})
        for figure, run in {
            "hits": partial(_each, cache.load, ids),
            "local_loads": partial(_each, storage.load, ids),
            "decodes": partial(_decode, codec.decode, payloads),
        }.items():
            cells.append((rows[-1], figure, run))
    for row, figure, run in random.Random(seed).sample(cells, len(cells)):  # noqa: S311
        await run()
        gc.collect()
        start, runs = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            await run()
            runs += 1
        row[figure] = runs * SESSIONS / elapsed
    return rows


async def _each(load: Callable[[str], Awaitable[object]], ids: list[str]) -> None:
    for id in ids:
        await load(id)


async def _decode(decode: Callable[[bytes], object], payloads: list[bytes]) -> None:
    for payload in payloads:
        decode(payload)


class _Counting(LocalStorage[Any]):
    loads = 0

    async def load(self, id: str) -> Session[Any]:
        self.loads += 1
        return await super().load(id)


def remote_calls(staleness: float, rate: float, requests: int, seed: int) -> float:
    """Count remote calls per thousand Poisson requests for one session, on a fake clock."""

    async def count() -> float:
        clock, made, draw = FakeClock(), session(), random.Random(seed)  # noqa: S311
        storage = _Counting(ttl=TTL, clock=clock)
        cache = NearCache(storage, max_staleness=staleness, clock=clock)
        await storage.store(made)
        for _ in range(requests):
            clock.advance(draw.expovariate(rate))
            await cache.load(made.id)
        return 1000 * storage.loads / requests

    return asyncio.run(count())


class _Discarding(LocalStorage[Any]):
    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:  # noqa: ARG002
        session.revision = new_session_id()[:16]  # as from a server, not shared


def memory(count: int) -> float:
    """Measure the bytes of memory that a copy takes."""

    async def fill() -> float:
        storage = _Discarding(ttl=TTL)
        cache = NearCache(storage, max_staleness=TTL / 2, max_sessions=count, max_bytes=2**40)
        made = session()
        await cache.store(made)
        gc.collect()
        empty = psutil.Process().memory_info().rss
        for _ in itertools.repeat(None, count):
            made.id = new_session_id()
            await cache.store(made)
        return (psutil.Process().memory_info().rss - empty) / count

    return asyncio.run(fill())


def refuse(url: str, staleness: float, announces: bool, pipe: Any) -> None:  # noqa: FBT001
    """Be a replica: cache each session, load it until it is gone, and send the time of that."""
    ids = pipe.recv()

    async def poll() -> None:
        if not announces:
            RedisStorage.listen = None  # type: ignore[assignment, method-assign]
        async with connect(url) as storage:
            cache = NearCache(storage, max_staleness=staleness)
            await cache.load(ids[0])
            while announces and not cache.statistics().announced:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for id in ids:
                await cache.load(id)
                pipe.send("cached")
                while await _lives(cache, id):  # noqa: ASYNC110
                    await asyncio.sleep(0)  # a hit does not yield
                pipe.send(time.monotonic())

    asyncio.run(poll())


async def _lives(cache: NearCache[Any], id: str) -> bool:
    try:
        await cache.load(id)
    except SessionNotFound:
        return False
    return True


async def delete(url: str, count: int, pipe: Any) -> list[float]:
    """Delete sessions, and measure the milliseconds until the replica refuses each of them.

    The pipe first sends the replica the ids.
    """
    delays = []
    async with connect(url) as storage:
        made = sessions()[:count]
        for each in made:
            await storage.store(each)
        pipe.send([each.id for each in made])
        for each in made:
            pipe.recv()
            await storage.delete(each.id)
            acknowledged = time.monotonic()
            delays.append((pipe.recv() - acknowledged) * 1000)
    return delays

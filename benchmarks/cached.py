"""The near cache: ways to load through it, and measurements outside of a client process."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
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
    Storage,
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
    count = 0

    async def prepare(id: str) -> None:
        ids.append(id)
        if len(ids) <= _HOT:
            await client.load(id)

    async def load(_: str) -> Session[Any]:
        nonlocal count
        count += 1
        if every and count % every == 0:
            return await client.load(ids[_HOT + count // every % (len(ids) - _HOT)])
        return await client.load(ids[count % _HOT])

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


def hits(seconds: float) -> list[Row]:
    """Count hits, loads from `LocalStorage` and decoded payloads a second, for each codec."""
    plain = session().data
    typed = msgspec.convert(plain, Data)
    codecs: dict[str, tuple[Codec[Any], Any]] = {
        "JsonCodec": (JsonCodec(), plain),
        "JsonCodec(Data)": (JsonCodec(Data), typed),
        "MsgpackCodec": (MsgpackCodec(), plain),
        "MsgpackCodec(Data)": (MsgpackCodec(Data), typed),
    }
    return [
        {"codec": name} | asyncio.run(_hits(codec, data, seconds))
        for name, (codec, data) in codecs.items()
    ]


async def _hits(codec: Codec[Any], data: Any, seconds: float) -> Row:
    storage = LocalStorage[Any](ttl=TTL, codec=codec)
    cache = NearCache(storage, max_staleness=TTL / 2)
    made = sessions()
    for each in made:
        each.data = data
        await cache.store(each)
    payloads = [encode(each, codec)[0] for each in made]

    async def load(through: Storage[Any]) -> None:
        for each in made:
            await through.load(each.id)

    async def decode() -> None:
        for payload in payloads:
            codec.decode(payload)

    row: Row = {"bytes": len(payloads[0])}
    runs: dict[str, Callable[[], Awaitable[None]]] = {
        "hits": partial(load, cache),
        "local_loads": partial(load, storage),
        "decodes": decode,
    }
    for figure, run in runs.items():
        await run()
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            await run()
            count += SESSIONS
        row[figure] = count / elapsed
    return row


class _Counting(LocalStorage[Any]):
    loads = 0

    async def load(self, id: str) -> Session[Any]:
        self.loads += 1
        return await super().load(id)


def remote_calls(staleness: float, rate: float, requests: int, seed: int) -> float:
    """Count remote calls per thousand Poisson requests for one session, on a fake clock."""

    async def count() -> float:
        clock, made, draw = FakeClock(), session(), random.Random(f"{staleness} {rate} {seed}")  # noqa: S311
        storage = _Counting(ttl=TTL, clock=clock)
        cache = NearCache(storage, max_staleness=staleness, clock=clock)
        await storage.store(made)
        latest = 0
        for number in range(requests):
            clock.advance(draw.expovariate(rate))
            before = storage.loads
            await cache.load(made.id)
            if storage.loads > before:
                latest = number
        # From the first remote call to the latest, which are whole periods.
        return 1000 * (storage.loads - 1) / latest

    return asyncio.run(count())


def memory(count: int) -> float:
    """Measure the bytes of memory that a copy takes."""

    async def fill() -> float:
        storage = LocalStorage[Any](ttl=TTL, max_sessions=1)
        cache = NearCache(storage, max_staleness=TTL / 2, max_sessions=count, max_bytes=2**40)
        made = session()
        await cache.store(made)
        empty: int = psutil.Process().memory_info().rss
        for _ in range(count):
            made.id = new_session_id()
            await cache.store(made)
        full: int = psutil.Process().memory_info().rss
        return (full - empty) / count

    return asyncio.run(fill())


def refuse(url: str, staleness: float, announces: bool, pipe: Any) -> None:  # noqa: FBT001
    """Be a replica: cache each session, and load it until it is gone.

    It then sends the time of the refusal, and that at which the last accepted load began.
    """
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
                accepted = start = time.monotonic()
                with suppress(SessionNotFound):
                    while True:
                        start = time.monotonic()
                        await cache.load(id)
                        accepted = start
                        await asyncio.sleep(0)  # a hit does not yield
                pipe.send((time.monotonic(), accepted))

    asyncio.run(poll())


async def delete(url: str, count: int, pipe: Any) -> list[list[float]]:
    """Delete sessions that a replica has cached.

    Returns:
        For each, the milliseconds from the acknowledgement to the two times that the replica sends.
    """
    delays = []
    async with connect(url) as storage:
        made = sessions()[:count]
        for each in made:
            await storage.store(each)
        pipe.send([each.id for each in made])
        for id in [each.id for each in made]:
            pipe.recv()
            await storage.delete(id)
            acknowledged = time.monotonic()
            delays.append([(each - acknowledged) * 1000 for each in pipe.recv()])
    return delays

"""`LocalStorage` with up to a million sessions: time, memory and pauses.

Every size has a separate process, because the memory of a process includes earlier sizes.
"""

import asyncio
import gc
import math
import multiprocessing
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import anyio.lowlevel
import psutil

from aiosessions import LocalStorage, new_session_id

from ..measure import Bench
from ..results import Result, Row, stat
from ..workload import CODEC, TTL, sealed, session

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_MOST_LOADS = 100_000
_FEW = 500


class _Clock:
    """The real clock, with an offset."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def time(self) -> float:
        return time.time() + self.ahead


def run(bench: Bench) -> Result:
    """Measure every size in turn, the largest once."""
    sizes = SIZES[:2] if bench.settings.quick else SIZES
    # The largest takes minutes, and its figures vary least.
    order = [
        size
        for number in range(min(bench.settings.rounds, 3))
        for size in sizes
        if size < SIZES[-1] or number == 0
    ]
    found: dict[int, list[Row]] = {}
    for size in bench.steps("local storage", order):
        bench.steadiness.probe()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found.setdefault(size, []).append(process.submit(_measure, size).result())
    rows = [
        {"sessions": size, "measured": len(rounds)}
        | {figure: stat(each[figure] for each in rounds) for figure in rounds[0]}
        for size, rounds in found.items()
    ]
    return bench.result(
        "local",
        rows,
        packages=["psutil"],
        facts={"record_bytes": str(len(sealed(session())))},
        rounds=min(bench.settings.rounds, 3),
        seconds=None,
    )


def _measure(size: int) -> Row:
    return asyncio.run(_run(size))


async def _run(size: int) -> Row:
    clock = _Clock()
    template = session()
    storage = LocalStorage[Any](ttl=TTL, max_sessions=size, codec=CODEC, clock=clock)
    await storage.store(template)
    await storage.delete(template.id)
    await anyio.lowlevel.checkpoint()  # the first one imports a backend
    gc.collect()
    empty = psutil.Process().memory_info().rss
    ids = [new_session_id() for _ in range(size)]

    async def store(some: list[str]) -> None:
        for id in some:
            template.id = id
            await storage.store(template)

    async def load() -> None:
        for id in sample:
            await storage.load(id)

    storing = await _timed(lambda: store(ids[:_FEW]))
    clock.ahead += TTL / 2
    storing += await _timed(lambda: store(ids[_FEW:]))
    full = psutil.Process().memory_info().rss
    sample = random.Random(size).sample(ids, min(size, _MOST_LOADS))  # noqa: S311 - no secret
    clock.ahead += TTL / 2
    few = await _timed(storage.delete_expired)
    none = await _timed(storage.delete_expired)
    await store(ids[:_FEW])
    loading = await _timed(load)
    clock.ahead += TTL
    idle, _ = await _pauses(lambda: asyncio.sleep(0.2))
    pauses, sweeping = await _pauses(storage.delete_expired)
    return {
        "store_us": storing * 1e6 / size,
        "load_us": loading * 1e6 / len(sample),
        "sweep_us": sweeping * 1e6 / size,
        "sweep_few_us": few * 1e6 / _FEW,
        "sweep_none_us": none * 1e6,
        "bytes": (full - empty) / size,
        "pause_p99_ms": _p99(pauses) * 1000,
        "pause_ms": max(pauses) * 1000,
        "idle_pause_ms": max(idle) * 1000,
    }


async def _timed(action: Callable[[], Awaitable[object]]) -> float:
    gc.collect()
    start = time.perf_counter()
    await action()
    return time.perf_counter() - start


async def _pauses(action: Callable[[], Awaitable[object]]) -> tuple[Sequence[float], float]:
    """Measure the waits of another task while an action runs.

    The turns of the other task make the action a little longer.
    """
    # Allocated before, because an allocation changes when memory returns to the system.
    waits = array("d", bytes(8 * 1_000_000))
    turns = 0

    async def watch() -> None:
        nonlocal turns
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            waits[turns] = now - last
            turns += 1
            last = now

    gc.collect()
    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    start = time.perf_counter()
    await action()
    elapsed = time.perf_counter() - start
    await asyncio.sleep(0)
    watcher.cancel()
    await asyncio.wait([watcher])
    return waits[:turns], elapsed


def _p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]

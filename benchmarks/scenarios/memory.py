"""Memory over many loads: growth would end a service."""

import asyncio
import gc
from typing import Any

import psutil

from aiosessions import Session

from ..clients import storage_of
from ..measure import Bench
from ..results import Result, Row, judge
from ..servers import MeasuredServer, targets
from ..workload import sessions

_CALLERS = 256
_READINGS = 100
_GROWTH_MB = 2.0


def run(bench: Bench) -> Result:
    """Load for minutes, and read the memory of the process at intervals."""
    loads = min(bench.settings.loads, 100_000) if bench.settings.quick else bench.settings.loads
    with targets(bench.settings) as (target, *_):
        rows = asyncio.run(_run(bench, target, sessions(), loads))
    # The first tenth fills caches, free lists and buffers.
    settled = rows[len(rows) // 10 :]
    growth = settled[-1]["rss_mb"] - settled[0]["rss_mb"]
    claim = judge(
        f"Memory is flat over {loads:,} loads",
        f"grows by at most {_GROWTH_MB} MB after the first tenth",
        [growth],
        lambda megabytes: megabytes <= _GROWTH_MB,
        " MB",
    )
    return bench.result(
        "memory",
        rows,
        claims=[claim],
        facts={"loads": f"{loads:,}", "growth_mb": f"{growth:.2f}"},
        packages=["psutil"],
        loads=loads,
        callers=_CALLERS,
        rounds=1,
        seconds=None,
    )


async def _run(
    bench: Bench, target: MeasuredServer, stored: list[Session[Any]], loads: int
) -> list[Row]:
    ids = [session.id for session in stored]
    process = psutil.Process()
    rows: list[Row] = []
    async with storage_of(target.url) as storage:
        for session in stored:
            await storage.store(session)

        async def call(number: int, times: int) -> None:
            mine = ids[number::_CALLERS]
            for each in range(times):
                await storage.load(mine[each % len(mine)])

        share = max(1, loads // _READINGS // _CALLERS)
        done = 0
        for _ in bench.steps(f"{loads:,} loads", range(max(1, loads // (share * _CALLERS)))):
            bench.steadiness.probe()
            await asyncio.gather(*(call(number, share) for number in range(_CALLERS)))
            done += share * _CALLERS
            gc.collect()
            rss = process.memory_info().rss / 1e6
            rows.append({"loads": done, "rss_mb": round(rss, 3)})
        for session in stored:
            await storage.delete(session.id)
    return rows

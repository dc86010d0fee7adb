"""Compare-and-set: its cost, and many writers on one session."""

import asyncio
import time
from typing import Any, cast

from aiosessions import Session, SessionConflict, SessionManager, When

from ..alternatives import Clients, connected
from ..clients import storage_of
from ..loops import CALLERS, Operation
from ..measure import Bench, Cell, ratios
from ..measure import rows as rows_of
from ..relay import relaying
from ..results import Claim, Result, Row, judge, stat
from ..servers import MeasuredServer, targets
from ..wire import count
from ..workload import TTL_MS, key, sealed, session, sessions

_WRITERS = 64


def run(bench: Bench) -> Result:
    """Measure on every server there is."""
    rows: list[Row] = []
    claims: list[Claim] = []
    increments = 3 if bench.settings.quick else 20
    with targets(bench.settings, every=True) as all_targets:
        for target in all_targets:
            for found, judged in (
                asyncio.run(_saves(bench, target, sessions())),
                asyncio.run(_hot(bench, target, increments)),
            ):
                rows += found
                claims += judged
    return bench.result("cas", rows, claims=claims, writers=_WRITERS, increments_each=increments)


def _operations(clients: Clients, stored: list[Session[Any]]) -> dict[str, Operation]:
    """The ways to save; each session has one writer."""
    by_id = {each.id: each for each in stored}

    async def raw_set(id: str) -> None:
        # Under another key, because the storage compares the revision under its own.
        await clients.pool.set(key(f"raw:{id}"), sealed(by_id[id]), px=TTL_MS)

    async def always(id: str) -> None:
        await clients.storage.store(by_id[id])

    async def unchanged(id: str) -> None:
        await clients.storage.store(by_id[id], when=When.UNCHANGED)

    return {"raw-set": raw_set, "always": always, "unchanged": unchanged}


async def _saves(
    bench: Bench, target: MeasuredServer, stored: list[Session[Any]]
) -> tuple[list[Row], list[Claim]]:
    ids = [each.id for each in stored]
    server = {"server": target.label}
    wire: list[Row] = []
    with relaying(*target.address) as relay:
        async with connected(target.through(relay.port), stored) as clients:
            for save, operation in _operations(clients, stored).items():
                costs = await count(operation, ids, relay, target)
                wire.append(server | {"save": save} | costs)
    async with connected(target.url, stored) as clients:
        measured = await bench.interleaved(
            f"saves, {target.label}",
            [
                Cell(server | {"save": save}, operation, ids, callers)
                for save, operation in _operations(clients, stored).items()
                for callers in CALLERS
            ],
        )
    (unchanged,) = [row for row in wire if row["save"] == "unchanged"]
    return wire + rows_of(measured), [
        judge(
            f"A compare-and-set save is one round trip ({target.label})",
            "exactly 1",
            [float(unchanged["round_trips"])],
            lambda turns: turns == 1,
        ),
        judge(
            f"A compare-and-set save costs little more than a plain SET ({target.label})",
            "SET at most 1.3 times as many a second, 32 callers",
            ratios(measured, {"save": "always"}, {"save": "unchanged"}, 32),
            lambda ratio: ratio <= 1.3,
            "x",
        ),
    ]


def _data(loaded: Session[Any]) -> dict[str, Any]:
    """A session's data, which is a dictionary here."""
    return cast("dict[str, Any]", loaded.data)


async def _hot(
    bench: Bench, target: MeasuredServer, increments: int
) -> tuple[list[Row], list[Claim]]:
    """Let many writers increment one session's counter, each several times."""
    counted: list[float] = []
    attempts: list[float] = []
    speed: list[float] = []
    async with storage_of(target.url) as storage, SessionManager(storage) as manager:
        for _ in bench.steps(f"one hot session, {target.label}", range(bench.settings.rounds)):
            bench.steadiness.probe()
            hot = session()
            await storage.store(hot)
            tried = 0

            def increment(loaded: Session[Any]) -> None:
                nonlocal tried
                tried += 1
                _data(loaded)["counter"] += 1

            async def write(id: str) -> int:
                done = 0
                for _ in range(increments):
                    try:
                        await manager.mutate(id, increment)
                        done += 1
                    except SessionConflict:  # reported, so not counted
                        pass
                return done

            start = time.perf_counter()
            done = sum(await asyncio.gather(*(write(hot.id) for _ in range(_WRITERS))))
            elapsed = time.perf_counter() - start
            stored = _data(await storage.load(hot.id))["counter"]
            await storage.delete(hot.id)
            counted.append(stored / (_WRITERS * increments) if stored == done else -1.0)
            attempts.append(tried / done)
            speed.append(done / elapsed)
    row = {
        "server": target.label,
        "hot": "one session",
        "writers": _WRITERS,
        "increments": _WRITERS * increments,
        "counted": stat(counted),
        "attempts_per_success": stat(attempts),
        "throughput": stat(speed),
    }
    claim = judge(
        f"{_WRITERS} writers on one session: every increment is counted ({target.label})",
        f"1 of all, which are {_WRITERS * increments}",
        [min(counted)],
        lambda share: share == 1.0,
        " of all",
    )
    return [row], [claim]

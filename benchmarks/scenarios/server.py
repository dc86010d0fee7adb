"""The cost of a load for the server: CPU, and bytes written."""

import asyncio
import statistics
from contextlib import ExitStack
from typing import Any

from aiosessions import Session
from tests.support.servers import binaries

from ..alternatives import ALTERNATIVES, connected
from ..loops import Operation
from ..measure import Bench
from ..results import Result, Row, stat
from ..servers import MeasuredServer, Snapshot, embedded, label, replica, targets
from ..workload import sessions

_CALLERS = 32
# Without rewrites, which would shrink the file during a measurement.
_DURABLE = (
    *("--appendonly", "yes", "--appendfsync", "everysec"),
    *("--auto-aof-rewrite-percentage", "0"),
)


def run(bench: Bench) -> Result:
    """Measure with a replica and an append-only file, except on --url."""
    settings = bench.settings
    stored = sessions()
    rows: list[Row] = []
    loads = 1_000 if settings.quick else 10_000
    names = [settings.server] if settings.server else list(binaries())
    for name in [""] if settings.url else names:
        with ExitStack() as stack:
            if settings.url:
                (target,) = stack.enter_context(targets(settings))
            else:
                server = stack.enter_context(embedded(name, *_DURABLE))
                stack.enter_context(replica(name, server))
                target = MeasuredServer(label(server), server.url, embedded=True)
            rows += asyncio.run(_run(bench, target, stored, loads))
    return bench.result(
        "server",
        rows,
        facts=_facts(rows),
        loads=loads,
        callers=_CALLERS,
        seconds=None,
        labels={way.name: way.label for way in ALTERNATIVES},
    )


async def _run(
    bench: Bench, target: MeasuredServer, stored: list[Session[Any]], loads: int
) -> list[Row]:
    ids = [session.id for session in stored]
    found: dict[str, list[Row]] = {}
    async with connected(target.url, stored) as clients:
        ways = [way for way in ALTERNATIVES if way.remote]
        operations = {way.name: way.make(clients) for way in ways}
        for operation in operations.values():
            await _load(operation, ids, len(ids))
        order = [name for _ in range(bench.settings.rounds) for name in operations]
        with target.client() as client:
            for name in bench.steps(f"what {target.label} pays", order):
                bench.steadiness.probe()
                before = Snapshot.of(client)
                await _load(operations[name], ids, loads)
                await asyncio.sleep(0.05)  # the log and the replica receive their bytes
                found.setdefault(name, []).append(_per_load(Snapshot.of(client), before, loads))
    return [
        {"server": target.label, "way": name}
        | {
            figure: stat(row[figure] for row in rounds)
            for figure in rounds[0]
            if rounds[0][figure] is not None
        }
        for name, rounds in found.items()
    ]


def _per_load(after: Snapshot, before: Snapshot, loads: int) -> Row:
    spent = after.since(before)
    return {
        "executing_us": spent.microseconds / loads,
        "cpu_us": spent.cpu_seconds * 1e6 / loads,
        "executions": sum(spent.calls.values()) / loads,
        "replicated_bytes": None if spent.replicated is None else spent.replicated / loads,
        "appended_bytes": None if spent.appended is None else spent.appended / loads,
    }


async def _load(operation: Operation, ids: list[str], loads: int) -> None:
    """Make an exact number of loads."""
    share = loads // _CALLERS

    async def call(number: int) -> None:
        mine = ids[number::_CALLERS]
        for each in range(share + (number < loads % _CALLERS)):
            await operation(mine[each % len(mine)])

    await asyncio.gather(*(call(number) for number in range(_CALLERS)))


def _facts(rows: list[Row]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for figure, digits in (("executing_us", 2), ("replicated_bytes", 0), ("appended_bytes", 0)):
        for way in ("get", "getex", "set-again"):
            medians = [row[figure]["median"] for row in rows if row["way"] == way and figure in row]
            if medians:
                facts[f"{way}_{figure}"] = f"{statistics.mean(medians):.{digits}f}"
    return facts

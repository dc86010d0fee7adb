"""Other libraries and drivers: a load, and a request that changes a field."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from aiosessions import Session

from ..loops import CALLERS
from ..measure import Bench, Cell
from ..measure import rows as rows_of
from ..peers import PEERS
from ..relay import relaying
from ..results import Result, Row
from ..servers import MeasuredServer, targets
from ..wire import count
from ..workload import sessions

WORKLOADS = ("load", "cycle")


def run(bench: Bench) -> Result:
    """Measure on one server."""
    stored = sessions()
    with targets(bench.settings) as (target, *_):
        rows = asyncio.run(_run(bench, target, stored))
    return bench.result(
        "peers",
        rows,
        packages=[peer.package for peer in PEERS],
        labels={peer.name: peer.label for peer in PEERS},
        lacks={peer.name: peer.lacks for peer in PEERS},
    )


async def _run(bench: Bench, target: MeasuredServer, stored: list[Session[Any]]) -> list[Row]:
    ids = [session.id for session in stored]
    rows: list[Row] = []
    cells: list[Cell] = []
    usable = []
    with relaying(*target.address) as relay:
        for peer in bench.steps("on the wire", PEERS):
            labels = {"server": target.label, "peer": peer.name}
            try:
                async with peer.open(target.through(relay.port), stored) as calls:
                    for workload in WORKLOADS:
                        costs = await count(getattr(calls, workload), ids, relay, target)
                        rows.append(labels | {"workload": workload} | costs)
            except ImportError as error:
                bench.missing[peer.label] = f"cannot be imported: {error}"
            else:
                usable.append(peer)
    async with AsyncExitStack() as stack:
        for peer in usable:
            calls = await stack.enter_async_context(peer.open(target.url, stored))
            cells += [
                Cell(
                    {"server": target.label, "peer": peer.name, "workload": workload},
                    getattr(calls, workload),
                    ids,
                    callers,
                )
                for workload in WORKLOADS
                for callers in CALLERS
            ]
        rows += rows_of(await bench.interleaved("peers", cells))
    return rows

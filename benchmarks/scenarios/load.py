"""A load by every alternative: its cost on the wire, its speed."""

import asyncio
from typing import Any

from aiosessions import Session

from ..alternatives import ALTERNATIVES, GET, GET_EXPIRE, GETEX, LRU_EXPIRE, OURS, connected
from ..loops import CALLERS
from ..measure import Bench, Cell, ratios
from ..measure import rows as rows_of
from ..relay import relaying
from ..results import Claim, Result, Row, judge
from ..servers import MeasuredServer, targets
from ..tables import who
from ..wire import count
from ..workload import sealed, sessions


def run(bench: Bench) -> Result:
    """Measure on every server there is."""
    rows: list[Row] = []
    claims: list[Claim] = []
    stored = sessions()
    with targets(bench.settings, every=True) as all_targets:
        for target in all_targets:
            found, judged = asyncio.run(_run(bench, target, stored))
            rows += found
            claims += judged
    ours = next(row for row in rows if row["way"] == OURS.name and "round_trips" in row)
    facts = {
        "record_bytes": str(len(sealed(stored[0]))),
        "round_trips": str(ours["round_trips"]),
        "commands": str(sum(ours["commands"].values())),
    }
    return bench.result(
        "load",
        rows,
        claims=claims,
        facts=facts,
        labels={way.name: way.label for way in ALTERNATIVES},
        semantics={way.name: way.semantics for way in ALTERNATIVES},
    )


async def _run(
    bench: Bench, target: MeasuredServer, stored: list[Session[Any]]
) -> tuple[list[Row], list[Claim]]:
    ids = [session.id for session in stored]
    server = {"server": target.label}
    with relaying(*target.address) as relay:
        async with connected(target.through(relay.port), stored) as clients:
            wire = [
                server | {"way": way.name} | await count(way.make(clients), ids, relay, target)
                for way in bench.steps("on the wire", ALTERNATIVES)
            ]
    async with connected(target.url, stored) as clients:
        measured = await bench.interleaved(
            f"load, {target.label}",
            [
                Cell(server | {"way": way.name}, way.make(clients), ids, callers)
                for way in ALTERNATIVES
                for callers in CALLERS
            ],
        )
    return wire + rows_of(measured), [
        *_counted(wire, target),
        *(
            judge(
                f"Renewing inside the load costs nothing ({who(callers)}, {target.label})",
                "GETEX at least 0.9 times GET, same driver",
                ratios(measured, {"way": GETEX.name}, {"way": GET.name}, callers),
                lambda ratio: ratio >= 0.9,
                "x",
            )
            for callers in CALLERS
        ),
        *(
            judge(
                f"One command is faster than {what} ({who(callers)}, {target.label})",
                "GETEX at least 1.2 times that, same driver",
                ratios(measured, {"way": GETEX.name}, {"way": other}, callers),
                lambda ratio: ratio >= 1.2,
                "x",
            )
            for what, other in (("two in turn", GET_EXPIRE.name), ("a pipeline", "pipeline"))
            for callers in CALLERS
        ),
    ]


def _counted(wire: list[Row], target: MeasuredServer) -> list[Claim]:
    """Claims about counted figures, which are free of noise."""
    by_way = {row["way"]: row for row in wire}
    ours, lru = by_way[OURS.name], by_way[LRU_EXPIRE.name]
    return [
        judge(
            f"A load is one round trip, counted on the wire ({target.label})",
            "exactly 1",
            [float(ours["round_trips"])],
            lambda turns: turns == 1,
        ),
        judge(
            f"A load is one command, on the wire and in commandstats ({target.label})",
            "GETEX once, and nothing else",
            [float(sum(ours["commands"].values()))],
            lambda _: ours["commands"] == {"GETEX": 1} and ours["executed"] == {"getex": 1},
        ),
        judge(
            f"An LRU that still sends EXPIRE does not save a round trip ({target.label})",
            "exactly 1",
            [float(lru["round_trips"])],
            lambda turns: turns == 1,
        ),
    ]

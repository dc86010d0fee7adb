"""A load by every alternative: its cost on the wire, its speed."""

from ..client_process import Job
from ..loops import CALLERS, ClosedLoop
from ..measure import Bench, Samples, ratios
from ..measure import rows as rows_of
from ..results import Claim, Result, Row, judge
from ..servers import stored, targets
from ..ways import ALTERNATIVES, GET, GET_EXPIRE, GETEX, LRU_EXPIRE, PIPELINE, SHARED_GETEX
from ..workload import callers_text, sealed, session


def run(bench: Bench) -> Result:
    """Measure on every server there is."""
    rows: list[Row] = []
    claims: list[Claim] = []
    facts = {"record_bytes": str(len(sealed(session())))}
    runs = [ClosedLoop(bench.seconds, callers) for callers in CALLERS]
    with targets(bench, every=True) as all_targets:
        for target in all_targets:
            with target.client() as client, stored(client) as ids:
                wire = bench.wire(ALTERNATIVES, target, ids)
                jobs = [Job(way, target.label, target.url, ids) for way in ALTERNATIVES]
                samples = bench.rounds_of(jobs, runs, bench.rounds)
            rows += wire + rows_of(samples)
            claims += _counted(wire, target.label) + _compared(samples, target.label)
            (ours,) = [row for row in wire if row["way"] == SHARED_GETEX]
            facts["round_trips"] = str(ours["round_trips"])
            facts["commands"] = str(len(ours["commands"].split(", ")))
    return bench.result("load", rows, claims=claims, facts=facts)


def _counted(wire: list[Row], server: str) -> list[Claim]:
    """Claims about counted figures, which are free of noise."""
    by_way = {row["way"]: row for row in wire}
    ours, lru = by_way[SHARED_GETEX], by_way[LRU_EXPIRE]
    is_getex = (ours["commands"], ours["executed"]) == ("GETEX", "getex")
    return [
        judge(claim, target, [figure], lambda _, met=met: met, server)  # type: ignore[misc]
        for claim, target, figure, met in (
            (
                "A load is one round trip, counted on the wire",
                "exactly 1",
                ours["round_trips"],
                ours["round_trips"] == 1,
            ),
            (
                "A load is one command, on the wire and in commandstats",
                "GETEX once, and nothing else",
                len(ours["commands"].split(", ")),
                is_getex,
            ),
            (
                "An LRU that still sends EXPIRE does not save a round trip",
                "exactly 1",
                lru["round_trips"],
                lru["round_trips"] == 1,
            ),
        )
    ]


def _compared(samples: Samples, server: str) -> list[Claim]:
    return [
        judge(
            claim,
            f"GETEX at least {least} times {what}, same driver",
            ratios(samples, {"way": GETEX}, {"way": other}, callers),
            lambda ratio, least=least: ratio >= least,  # type: ignore[misc]
            f"{callers_text(callers)}, {server}",
        )
        for claim, what, other, least in (
            ("Renewing inside the load costs nothing", "GET", GET, 0.9),
            ("One command is faster than two in turn", "that", GET_EXPIRE, 1.2),
            ("One command is faster than a pipeline", "that", PIPELINE, 1.2),
        )
        for callers in CALLERS
    ]

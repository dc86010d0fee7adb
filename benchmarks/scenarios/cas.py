"""Compare-and-set: its cost, and many writers on one session."""

from ..client_process import Job
from ..loops import CALLERS, ClosedLoop, Repeat
from ..measure import Bench, ratios
from ..measure import rows as rows_of
from ..results import CONFIRMED, REFUTED, Claim, Result, Row, judge, stat
from ..servers import MeasuredServer, Snapshot, stored, targets
from ..ways import ALWAYS, OURS, SAVES, UNCHANGED
from ..workload import key, opened

_WRITERS = 64


def run(bench: Bench) -> Result:
    """Measure on every server there is."""
    rows: list[Row] = []
    claims: list[Claim] = []
    increments = _WRITERS * (3 if bench.quick else 20)
    runs = [ClosedLoop(bench.seconds, callers) for callers in CALLERS]
    with targets(bench, every=True) as all_targets:
        for target in all_targets:
            with target.client() as client, stored(client) as ids:
                wire = bench.wire(SAVES, target, ids)
                # They do not share sessions, so that revisions do not conflict.
                jobs = [
                    Job(way, target.label, target.url, ids[place :: len(SAVES)])
                    for place, way in enumerate(SAVES)
                ]
                samples = bench.rounds_of(jobs, runs, bench.rounds)
            (unchanged,) = [row for row in wire if row["way"] == UNCHANGED]
            hot = _hot(bench, target, increments)
            rows += [*wire, *rows_of(samples), hot]
            claims += [
                judge(
                    "A compare-and-set save is one round trip",
                    "exactly 1",
                    [unchanged["round_trips"]],
                    lambda count: count == 1,
                    target.label,
                ),
                judge(
                    "A compare-and-set save costs little more than a plain SET",
                    "SET at most 1.3 times as many a second, 32 callers",
                    ratios(samples, {"way": ALWAYS}, {"way": UNCHANGED}, 32),
                    lambda ratio: ratio <= 1.3,
                    target.label,
                ),
                Claim(
                    f"{_WRITERS} writers on one session: every increment is counted",
                    f"{increments} of {increments}",
                    target.label,
                    f"{hot['counted']} of {increments}",
                    CONFIRMED if hot["counted"] == increments else REFUTED,
                ),
            ]
    return bench.result("cas", rows, claims=claims, writers=_WRITERS)


def _hot(bench: Bench, target: MeasuredServer, increments: int) -> Row:
    """Let many writers increment one session's counter; a refused one ends the benchmark."""
    counted: list[int] = []
    attempts: list[float] = []
    speed: list[float] = []
    with target.client() as direct:
        for _ in bench.steps(f"one hot session, {target.label}", range(bench.rounds)):
            with stored(direct, ["hot-session-of-the-benchmark-" + "x" * 14]) as (id,):
                job = Job(OURS, target.label, target.url, [id] * _WRITERS)
                with bench.clients([job]) as (client,):
                    before = Snapshot.of(direct)
                    measured = client.measure(Repeat(increments, _WRITERS, "increment"))
                    calls = Snapshot(Snapshot.of(direct) - before).calls()
                counted.append(opened(direct.get(key(id)), id).data["counter"])
                # Each attempt loads the session.
                attempts.append(calls["getex"] / increments)
                speed.append(measured.throughput)
    return {
        "server": target.label,
        "hot": True,
        "writers": _WRITERS,
        "increments": increments,
        "counted": min(counted),
        "attempts_per_success": stat(attempts),
        "throughput": stat(speed),
    }

"""Other libraries and drivers: a load, and a request that changes a field."""

from ..client_process import Job
from ..loops import CALLERS, ClosedLoop
from ..measure import Bench
from ..measure import rows as rows_of
from ..peers import PACKAGES, PEERS
from ..results import Result, Row
from ..servers import stored, targets


def run(bench: Bench) -> Result:
    """Measure on one server."""
    rows: list[Row] = []
    with targets(bench) as (target, *_), target.client() as client, stored(client) as ids:
        jobs = [Job(name, target.label, target.url, ids) for name in PEERS]
        for workload in ("load", "cycle"):
            wire = bench.wire(PEERS, target, ids, workload, workload=workload)
            runs = [ClosedLoop(bench.seconds, callers, workload) for callers in CALLERS]
            rows += wire
            rows += rows_of(bench.rounds_of(jobs, runs, bench.rounds, workload=workload))
    return bench.result("peers", rows, packages=PACKAGES)

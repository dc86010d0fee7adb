"""The cost of a load for the server: CPU, and bytes written."""

import statistics
import time
from contextlib import ExitStack

from tests.support.servers import binaries

from ..client import Job, Run
from ..measure import Bench
from ..results import Result, Row, stat
from ..servers import MeasuredServer, Snapshot, embedded, measured, replica, targets
from ..ways import ALTERNATIVES, GET, GETEX, SET_AGAIN

# Without rewrites, which would shrink the file during a measurement.
_DURABLE = ("--appendonly", "yes", "--auto-aof-rewrite-percentage", "0")


def server(bench: Bench) -> Result:
    """Measure with a replica and an append-only file, except on --url."""
    loads = 1_000 if bench.quick else 10_000
    rows: list[Row] = []
    for name in [""] if bench.url else binaries():
        with ExitStack() as stack:
            if bench.url:
                (target,) = stack.enter_context(targets(bench.url))
            else:
                primary = stack.enter_context(embedded(name, *_DURABLE))
                stack.enter_context(replica(name, primary))
                target = stack.enter_context(measured(primary.url))
            jobs = [
                Job(name, target.label, target.url, target.ids)
                for name, way in ALTERNATIVES.items()
                if way.round_trips
            ]
            rows += costs(bench, target, jobs, loads)
    facts: dict[str, str] = {}
    for figure in ("executing_us", "replicated_bytes", "appended_bytes"):
        for way, slug in ((GET, "get"), (GETEX, "getex"), (SET_AGAIN, "set-again")):
            medians = [r[figure]["median"] for r in rows if r["way"] == way and figure in r]
            if medians:
                digits = 2 if figure == "executing_us" else 0
                facts[f"{slug}_{figure}"] = f"{statistics.mean(medians):.{digits}f}"
    return bench.result("server", rows, facts=facts, loads=loads, callers=32, seconds=None)


def costs(bench: Bench, target: MeasuredServer, jobs: list[Job], times: int) -> list[Row]:
    """The costs of one operation of each client, by 32 callers."""
    found: dict[str, list[dict[str, float]]] = {}
    direct = target.direct
    with bench.clients(jobs) as clients:
        for client in clients:
            client.measure(Run(callers=32, times=len(target.ids)))
        for client in bench.steps(f"what {target.label} pays", clients * bench.rounds):
            before = Snapshot.of(direct)
            client.measure(Run(callers=32, times=times))
            time.sleep(0.05)  # the log and the replica receive their bytes
            spent = Snapshot(Snapshot.of(direct) - before)
            figures = {
                "executing_us": spent.executing(),
                "cpu_us": spent["cpu"],
                "executions": sum(spent.calls().values()),
            }
            for name in ("replicated", "appended"):
                if name in before:
                    figures[f"{name}_bytes"] = spent[name]
            each = {name: value / times for name, value in figures.items()}
            found.setdefault(client.job.way, []).append(each)
    return [
        {"server": target.label, "way": way}
        | {figure: stat(each[figure] for each in rounds) for figure in rounds[0]}
        for way, rounds in found.items()
    ]

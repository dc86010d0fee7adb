"""Measures clients side by side.

- Clients are interleaved: every round runs each of them once, in another order, so that slow
  moments of the machine hit all of them. Ratios are taken within a round.
- Each client has a fresh process in every round. A closed loop is warmed up first.
"""

import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Any, TypeVar

from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from tests.support.machine import Steadiness, environment
from tests.support.proxy_process import ProxyProcess, proxy_process

from .client import ClientProcess, Job, Measurement, Run, client_process
from .drivers import Way
from .results import Claim, Result, Row, stat
from .servers import MeasuredServer, Snapshot
from .ways import IDLE

T = TypeVar("T")
Samples = list[tuple[Row, list[Measurement]]]
"""Labels, with a measurement for each round."""
_Found = dict[tuple[Any, ...], tuple[Row, list[Measurement]]]

CALLERS = (1, 32, 256)
_COUNTED = Run(times=20)
# So long that a whole request arrives before its reply can leave.
_ROUND_TRIP = 0.004
_FIGURES = ("throughput", "p50_ms", "p99_ms", "cpu_us")


@dataclass(frozen=True)
class Group:
    """Clients that are measured in turn, while all of them are open.

    Attributes:
        jobs: The clients.
        runs: The runs of each. `IDLE` makes open loops only.
        labels: More labels for the rows.
        before: Called before the first run. Neighbours with equal clients share the processes.
        after: Called after the last run.
        ways: The names of the clients that make the runs, or empty for all.
    """

    jobs: Sequence[Job]
    runs: Sequence[Run]
    labels: Row = field(default_factory=dict)
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    ways: Sequence[str] = ()


@dataclass
class Bench:
    """The options of the command line, and the measurements that follow them.

    Attributes:
        console: Where progress is shown.
        quick: Whether to measure little, for a first look.
        rounds: The number of rounds.
        url: The user's own server, or None for embedded servers.
        missing: The parts that were not measured, with the reasons.
        steadiness: A check of the machine.
    """

    console: Console
    quick: bool
    rounds: int
    url: str | None
    missing: dict[str, str] = field(default_factory=dict)
    steadiness: Steadiness = field(default_factory=Steadiness)

    @property
    def seconds(self) -> float:
        """The duration of a closed loop."""
        return 0.1 if self.quick else 0.3

    def closed(self, callers: Sequence[int] = CALLERS, operation: str = "load") -> list[Run]:
        """Closed loops, one for each number of callers."""
        return [Run(operation, each, self.seconds) for each in callers]

    def steps(self, what: str, items: Sequence[T]) -> Iterator[T]:
        """Go through items under a progress bar, and check the machine before each."""
        hidden = not self.console.is_terminal
        # A thread that draws would take time from the measurements.
        bar: dict[str, Any] = {"auto_refresh": False, "transient": True, "disable": hidden}
        for item in track(items, what, console=self.console, **bar):
            self.steadiness.probe()
            yield item

    @contextmanager
    def clients(self, jobs: Iterable[Job]) -> Iterator[list[ClientProcess]]:
        """Open each client in a separate process; leave out missing clients."""
        with ExitStack() as stack:
            present = []
            for client in [stack.enter_context(client_process(job)) for job in jobs]:
                if reason := client.missing():
                    self.missing[f"{client.job.way} ({client.job.loop})"] = reason
                else:
                    present.append(client)
            yield present

    def measure(self, groups: Sequence[Group], rounds: int) -> Samples:
        """Measure groups of clients in several rounds, with fresh processes in each."""
        found: _Found = {}
        for number in range(rounds):
            for jobs, some_groups in groupby(groups, lambda group: group.jobs):
                with self.clients(jobs) as clients:
                    for group in some_groups:
                        group.before()
                        self._round(group, clients, number, found)
                        group.after()
        return list(found.values())

    def _round(
        self, group: Group, clients: Sequence[ClientProcess], number: int, found: _Found
    ) -> None:
        """Make every run once with each client, in random order."""
        cells = []
        for client, run in product(clients, group.runs):
            way = client.job.way
            if (way != IDLE or run.rate) and way in (group.ways or (way,)):
                labels = client.job.labels | group.labels | run.labels
                _, some = found.setdefault(tuple(labels.items()), (labels, []))
                cells.append((client, replace(run, seed=number), some))
        order = random.Random(number).sample(cells, len(cells))  # noqa: S311
        for client, run, some in self.steps(f"round {number + 1}", order):
            client.prepare(run)
            some.append(client.measure(run))

    def wire(
        self,
        ways: dict[str, Way],
        target: MeasuredServer,
        runs: Sequence[Run] = (_COUNTED,),
        label: str = "operation",
    ) -> list[Row]:
        """Count round trips, commands and bytes of each operation of each way.

        Raises:
            RuntimeError: The operations differ from each other, so one does not stand for all.
        """
        found: list[Row] = []
        host, port = target.address
        with proxy_process(port, host) as proxy:
            for name, way in ways.items():
                ids = target.ids[: _COUNTED.times]
                job = Job(name, target.label, target.through(proxy.port), ids)
                with self.clients([job]) as clients:
                    for client, run in product(clients, runs):
                        row = {"server": target.label, "way": name, "note": way.note}
                        found.append(
                            row | {label: run.operation} | _count(client, run, proxy, target)
                        )
        return found

    def result(
        self,
        scenario: str,
        rows: list[Row],
        *,
        claims: Sequence[Claim] = (),
        facts: dict[str, str] | None = None,
        packages: Iterable[str] = (),
        **settings: Any,
    ) -> Result:
        """Put a result together; `settings` adds to rounds and seconds, or replaces them."""
        every = {"quick": self.quick, "rounds": self.rounds, "seconds": self.seconds} | settings
        return Result(
            scenario,
            environment(*packages),
            every,
            self.steadiness.noise(),
            rows,
            list(claims),
            facts or {},
            self.missing,
        )


def _count(client: ClientProcess, run: Run, proxy: ProxyProcess, target: MeasuredServer) -> Row:
    """The traffic of one operation: on the wire, and in the statistics of the server."""
    client.prepare(run)
    client.measure(run)  # connects, and fills caches
    client.prepare(run)
    before = Snapshot.of(target.direct)
    proxy.set(round_trip=_ROUND_TRIP, inspects=True)
    client.measure(run)
    counts = proxy.counts()
    executed = Snapshot(Snapshot.of(target.direct) - before).calls()
    proxy.set()
    if any(each % run.times for each in [counts.round_trips, *counts.requests.values()]):
        raise RuntimeError(f"operations differ: {counts}, {executed}")
    return {
        "round_trips": counts.round_trips // run.times,
        "bytes_sent": round(counts.bytes_in / run.times),
        "bytes_received": round(counts.bytes_out / run.times),
        "commands": _listed(counts.requests, run.times),
        "executed": _listed(executed, run.times),
    }


def _listed(counts: dict[str, int], times: int) -> str:
    """Commands with the number of their calls in one operation."""
    each = {name: count / times for name, count in counts.items()}
    return ", ".join(name + (f" x{count:g}" if count != 1 else "") for name, count in each.items())


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def rows_of(samples: Samples) -> list[Row]:
    """Rows with throughput, latency and CPU."""
    return [
        labels | {name: stat(getattr(each, name) for each in some) for name in _FIGURES}
        for labels, some in samples
    ]


def ratios(
    samples: Samples, over: Row, under: Row, callers: int, figure: str = "throughput"
) -> list[float]:
    """The ratio of a figure of two clients, in each round."""

    def find(wanted: Row) -> list[float]:
        wanted = wanted | {"callers": callers}
        (some,) = [each for labels, each in samples if wanted.items() <= labels.items()]
        return [getattr(each, figure) for each in some]

    return [a / b for a, b in zip(find(over), find(under), strict=True)]

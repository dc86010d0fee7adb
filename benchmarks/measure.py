"""Measures clients side by side.

- Clients are interleaved: every round runs each of them once, in another order, so that slow
  moments of the machine hit all of them. Ratios are taken within a round.
- Each client has a fresh process in every round. A closed loop is warmed up first.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from tests.support.machine import Steadiness, environment
from tests.support.proxy_process import proxy_process

from .client_process import ClientProcess, Job, client_process
from .drivers import Way
from .loops import ClosedLoop, Measurement, OpenLoop, Repeat
from .results import Claim, Result, Row, stat
from .servers import MeasuredServer, Snapshot

T = TypeVar("T")
Samples = list[tuple[Row, list[Measurement]]]
"""Labels, with a measurement for each round."""

_COUNTED = 20
# So long that a whole request arrives before its reply can leave.
_ROUND_TRIP = 0.004


@dataclass
class Bench:
    """The options of the command line, and the measurements that follow them.

    Attributes:
        console: Where progress is shown.
        quick: Whether to measure little, for a first look.
        rounds: The number of rounds.
        seconds: The duration of one closed loop.
        url: The user's own server, or None for embedded servers.
        server: The embedded server, or None for the choice of the scenario.
        loads: The number of loads in the memory scenario.
        missing: The parts that were not measured, with the reasons.
        steadiness: A check of the machine.
    """

    console: Console
    quick: bool
    rounds: int
    seconds: float
    url: str | None
    server: str | None
    loads: int
    missing: dict[str, str] = field(default_factory=dict)
    steadiness: Steadiness = field(default_factory=Steadiness)

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

    def round(
        self,
        clients: Sequence[ClientProcess],
        runs: Sequence[ClosedLoop] | Sequence[OpenLoop],
        number: int,
        **labels: Any,
    ) -> Samples:
        """Make every run once with each client, in random order."""
        cells = [(client, run) for client in clients for run in runs]
        order = random.Random(number).sample(range(len(cells)), len(cells))  # noqa: S311
        measured: dict[int, Measurement] = {}
        for place in self.steps(f"round {number + 1}", order):
            client, run = cells[place]
            measured[place] = client.measure(run)
        return [
            (client.job.labels | labels | run.labels, [measured[place]])
            for place, (client, run) in enumerate(cells)
        ]

    def rounds_of(
        self, jobs: Sequence[Job], runs: Sequence[ClosedLoop], rounds: int, **labels: Any
    ) -> Samples:
        """Measure clients in several rounds, with fresh processes in each."""
        found: Samples = []
        for number in range(rounds):
            with self.clients(jobs) as clients:
                found += self.round(clients, runs, number, **labels)
        return merged(found)

    def wire(
        self,
        ways: dict[str, Way],
        target: MeasuredServer,
        ids: list[str],
        operation: str = "load",
        **labels: Any,
    ) -> list[Row]:
        """Count round trips, commands and bytes of one operation of each way.

        Raises:
            RuntimeError: The operations differ from each other, so one does not stand for all.
        """
        found: list[Row] = []
        host, port = target.address
        with proxy_process(port, host) as proxy, target.client() as direct:
            for name, way in ways.items():
                job = Job(name, target.label, target.through(proxy.port), ids[:_COUNTED])
                with self.clients([job]) as clients:
                    for client in clients:
                        run = Repeat(_COUNTED, operation=operation)
                        client.measure(run)  # connects, and fills caches
                        before = Snapshot.of(direct)
                        proxy.set(round_trip=_ROUND_TRIP, inspects=True)
                        client.measure(run)
                        counts = proxy.counts()
                        executed = Snapshot(Snapshot.of(direct) - before).calls()
                        proxy.set()
                        figures = {"round_trips": counts.round_trips} | {
                            "bytes_sent": counts.bytes_in,
                            "bytes_received": counts.bytes_out,
                        }
                        exact = [counts.round_trips, *counts.requests.values(), *executed.values()]
                        if any(each % _COUNTED for each in exact):
                            raise RuntimeError(f"operations differ: {counts}, {executed}")
                        row = {"server": target.label, "way": name, "note": way.note} | labels
                        row |= {each: round(count / _COUNTED) for each, count in figures.items()}
                        row["commands"] = _listed(counts.requests)
                        row["executed"] = _listed(executed)
                        found.append(row)
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


def _listed(counts: dict[str, int]) -> str:
    """Commands with the number of their calls in one operation."""
    each = {name: count // _COUNTED for name, count in counts.items()}
    return ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in each.items())


def merged(found: Samples) -> Samples:
    """Join the measurements of all rounds."""
    joined: dict[tuple[Any, ...], tuple[Row, list[Measurement]]] = {}
    for labels, samples in found:
        joined.setdefault(tuple(labels.items()), (labels, []))[1].extend(samples)
    return list(joined.values())


def rows(samples: Samples, *more: str) -> list[Row]:
    """Rows with throughput, latency, CPU and `more` figures."""
    figures = ("throughput", "p50_ms", "p99_ms", "cpu_us", *more)
    return [
        labels | {name: stat(getattr(each, name) for each in some) for name in figures}
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

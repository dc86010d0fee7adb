"""Measures alternatives side by side.

Rules:

- Alternatives are interleaved: every round runs each of them once, in another order, so that slow
  moments of the machine hit all of them. Ratios are taken within a round.
- Each measurement is warmed up first. The reported figure is the median of the rounds, with the
  lowest and the highest.
- Most scenarios measure in one process. Clients that are compared with others by their CPU have a
  fresh process for each round.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .client_process import ClientProcess, Job, Run, client_process
from .loops import Measurement, Operation, closed_loop
from .machine import Steadiness, environment
from .results import Claim, Result, Row, stat

T = TypeVar("T")

Measured = list[tuple[Row, list[Measurement]]]
"""Rows without figures, each with its measurement in every round."""


@dataclass(frozen=True)
class BenchSettings:
    """The options of the command line.

    Attributes:
        quick: Whether to measure little, for a first look.
        rounds: The number of rounds.
        seconds: The duration of one measurement.
        url: The user's own server, or None for embedded servers.
        server: The embedded server, or None for the choice of the scenario.
        loads: The number of loads in the memory scenario.
    """

    quick: bool
    rounds: int
    seconds: float
    url: str | None = None
    server: str | None = None
    loads: int = 10_000_000


@dataclass(frozen=True)
class Cell:
    """One measurement in this process.

    Attributes:
        labels: The labels of its row.
        operation: The operation.
        ids: The sessions for it. Callers do not share any.
        callers: The number of callers.
        warm_up: The least duration of the warm-up; long round trips need more.
    """

    labels: Row
    operation: Operation
    ids: Sequence[str]
    callers: int
    warm_up: float = 0.05


class Bench(AbstractContextManager["Bench"]):
    """Settings, a progress bar, and a check of the machine, for a scenario.

    Args:
        settings: The options of the command line.
        console: The console for the progress bar.
    """

    def __init__(self, settings: BenchSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.missing: dict[str, str] = {}
        self.steadiness = Steadiness()
        # Refreshed by hand: a thread that draws would take time from the measurements.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def steps(self, what: str, items: Sequence[T]) -> "Iterable[T]":
        """Go through items under a progress bar."""
        task = self._progress.add_task(what, total=len(items))
        for item in items:
            self._progress.refresh()
            yield item
            self._progress.advance(task)
        self._progress.remove_task(task)

    async def interleaved(
        self, what: str, cells: Sequence[Cell], rounds: Iterable[int] | None = None
    ) -> Measured:
        """Measure each cell once a round, in this process."""
        numbers = list(range(self.settings.rounds) if rounds is None else rounds)
        samples: list[list[Measurement]] = [[] for _ in cells]
        order = [place for number in numbers for place in _shuffled(len(cells), number)]
        for place in self.steps(what, order):
            self.steadiness.probe()
            cell = cells[place]
            samples[place].append(
                await closed_loop(
                    cell.operation, cell.ids, cell.callers, self.settings.seconds, cell.warm_up
                )
            )
        return [
            (cell.labels | {"callers": cell.callers}, measured)
            for cell, measured in zip(cells, samples, strict=True)
        ]

    @contextmanager
    def client_processes(self, jobs: Sequence[Job]) -> Iterator[list[tuple[Job, ClientProcess]]]:
        """Open each client in a separate process; leave out missing clients."""
        with ExitStack() as stack:
            started = [(job, stack.enter_context(client_process(job))) for job in jobs]
            present = []
            for job, process in started:
                if reason := process.missing():
                    self.missing[f"{job.way} ({job.loop})"] = reason
                else:
                    present.append((job, process))
            yield present

    def interleaved_clients(
        self,
        what: str,
        clients: Sequence[tuple[Job, ClientProcess]],
        runs: Sequence[Run],
        number: int,
    ) -> Measured:
        """Make every run once with each client, in random order."""
        cells = [(job, process, run) for job, process in clients for run in runs]
        measured: Measured = [(job.labels | run.labels, []) for job, _, run in cells]
        for place in self.steps(what, _shuffled(len(cells), number)):
            self.steadiness.probe()
            _, process, run = cells[place]
            measured[place][1].append(process.measure(run))
        return measured

    def result(
        self,
        scenario: str,
        rows: list[Row],
        *,
        claims: Sequence[Claim] = (),
        facts: dict[str, str] | None = None,
        packages: Sequence[str] = (),
        **settings: Any,
    ) -> Result:
        """The result of a scenario, with the machine and the settings."""
        ours = self.settings
        return Result(
            scenario=scenario,
            environment=environment(*packages),
            settings={
                "quick": ours.quick,
                "rounds": ours.rounds,
                "seconds": ours.seconds,
                **settings,
            },
            noise=self.steadiness.noise(),
            rows=rows,
            claims=list(claims),
            facts=facts or {},
            missing=self.missing,
        )


def _shuffled(count: int, number: int) -> list[int]:
    """The order of a round."""
    return random.Random(number).sample(range(count), count)  # noqa: S311 - not a secret


def merged(rounds: Iterable[Measured]) -> Measured:
    """One list of measurements for each row, over all rounds."""
    rows: dict[str, tuple[Row, list[Measurement]]] = {}
    for measured in rounds:
        for labels, samples in measured:
            rows.setdefault(repr(labels), (labels, []))[1].extend(samples)
    return list(rows.values())


def rows(measured: Measured) -> list[Row]:
    """Rows with the figures of all rounds."""
    return [
        labels
        | {
            "throughput": stat(sample.throughput for sample in samples),
            "p50_ms": stat(sample.p50 for sample in samples),
            "p99_ms": stat(sample.p99 for sample in samples),
            "cpu_us": stat(sample.cpu_us for sample in samples),
        }
        for labels, samples in measured
    ]


def ratios(
    measured: Measured, one: Row, other: Row, callers: int, figure: str = "throughput"
) -> list[float]:
    """The figure of `one` over that of `other`, in each round."""

    def of(wanted: Row) -> list[float]:
        wanted = wanted | {"callers": callers}
        (samples,) = [each for labels, each in measured if wanted.items() <= labels.items()]
        return [getattr(sample, figure) for sample in samples]

    return [first / second for first, second in zip(of(one), of(other), strict=True)]

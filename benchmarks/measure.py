"""Runs operations under load, and keeps the machine's moods out of comparisons, as well as can be.

Rules:

- Alternatives are interleaved: every round runs each of them once, in another order, so that a slow
  moment hits all alike. Ratios are taken within a round.
- Each measurement is warmed up first. What is reported is the median of the rounds, with the
  lowest and the highest.
- The load is a closed loop: so many callers, each of which waits for its answer and asks again.
"""

import asyncio
import gc
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
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

from .machine import Steadiness, environment
from .results import Claim, Result, Row, stat

Operation = Callable[[str], Awaitable[object]]
"""Does something with the session of an id."""

CALLERS = (1, 32, 256)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        quick: Little, for a first look.
        rounds: How often each measurement is repeated.
        seconds: How long one takes.
        url: The user's own server, or None for embedded ones.
        server: Which embedded server, or None for a scenario's own choice.
        loads: How many loads the memory scenario makes.
    """

    quick: bool
    rounds: int
    seconds: float
    url: str | None = None
    server: str | None = None
    loads: int = 10_000_000


@dataclass(frozen=True)
class Sample:
    """One measurement: operations a second, and latencies in milliseconds."""

    throughput: float
    p50: float
    p99: float
    operations: int


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        labels: What tells its row from others.
        operation: What to do.
        ids: The sessions to do it with. Callers share none of them.
        callers: How many do it at once.
        warm_up: Seconds at least; what has long round trips needs more.
    """

    labels: Row
    operation: Operation
    ids: Sequence[str]
    callers: int
    warm_up: float = 0.05


class Bench(AbstractContextManager["Bench"]):
    """What a scenario measures with: settings, a progress bar, and an eye on the machine.

    Args:
        settings: How much to measure.
        console: Where the progress is shown.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.missing: dict[str, str] = {}
        self.steadiness = Steadiness()
        # Refreshed by hand: a thread that draws would take time from what is measured.
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
    ) -> list[tuple[Cell, list[Sample]]]:
        """Measure each cell once a round; the samples of a cell are in the order of the rounds."""
        numbers = list(range(self.settings.rounds) if rounds is None else rounds)
        samples: list[list[Sample]] = [[] for _ in cells]
        order = [
            place
            for number in numbers
            for place in random.Random(number).sample(range(len(cells)), len(cells))  # noqa: S311
        ]
        for place in self.steps(what, order):
            self.steadiness.probe()
            samples[place].append(await closed_loop(cells[place], self.settings.seconds))
        return list(zip(cells, samples, strict=True))

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
        """What was found, with where and how."""
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


async def closed_loop(cell: Cell, seconds: float) -> Sample:
    """Run an operation for some seconds, from all callers at once."""
    await _run(cell, max(cell.warm_up, 0.2 * seconds))
    gc.collect()
    latencies, elapsed = await _run(cell, seconds)
    milliseconds = [latency * 1000 for latency in latencies]
    # With a caller and a slow link there may be only a few.
    percentiles = statistics.quantiles(milliseconds * 2, n=100, method="inclusive")
    return Sample(
        throughput=len(latencies) / elapsed,
        p50=statistics.median(milliseconds),
        p99=percentiles[98],
        operations=len(latencies),
    )


async def _run(cell: Cell, seconds: float) -> tuple[list[float], float]:
    clock = time.perf_counter
    operation = cell.operation
    latencies: list[float] = []

    async def call(ids: Iterable[str]) -> None:
        began = clock()
        for id in ids:
            await operation(id)
            now = clock()
            latencies.append(now - began)
            began = now
            if now >= end:
                break

    mine = [itertools.cycle(cell.ids[number :: cell.callers]) for number in range(cell.callers)]
    start = clock()
    end = start + seconds
    await asyncio.gather(*(call(ids) for ids in mine))
    return latencies, clock() - start


def rows(measured: Iterable[tuple[Cell, list[Sample]]]) -> list[Row]:
    """The rows of what was measured."""
    return [
        cell.labels
        | {"callers": cell.callers}
        | {"throughput": stat(sample.throughput for sample in samples)}
        | {"p50_ms": stat(sample.p50 for sample in samples)}
        | {"p99_ms": stat(sample.p99 for sample in samples)}
        for cell, samples in measured
    ]


def ratios(
    measured: Iterable[tuple[Cell, list[Sample]]], one: Row, other: Row, callers: int
) -> list[float]:
    """How many times the throughput of `other` that of `one` is, in each round."""
    found = {}
    for cell, samples in measured:
        for labels in (one, other):
            if cell.callers == callers and labels.items() <= cell.labels.items():
                found[id(labels)] = samples
    pairs = zip(found[id(one)], found[id(other)], strict=True)
    return [first.throughput / second.throughput for first, second in pairs]

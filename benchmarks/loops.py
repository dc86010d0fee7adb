"""Runs an operation: a number of times, in a closed loop, or in an open loop.

- In a closed loop each of some callers waits for its reply and asks again.
- In an open loop loads arrive at times that were drawn before the run. Latency counts from the
  scheduled arrival, so a client that falls behind cannot hide the time that loads wait for it.
- CPU is the user and system time of this process, all threads included, divided by the loads.
- Every open loop ends: loads without a reply soon after the last arrival are cancelled.
"""

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import msgspec
import psutil

from .arrivals import arrivals
from .results import Row

Operation = Callable[[str], Awaitable[object]]
"""Does something with the session of an id."""

CALLERS: Final = (1, 32, 256)
_DRAIN: Final = 0.5
_WARM_UP_CALLERS: Final = 256


class Measurement(msgspec.Struct, frozen=True):
    """The figures of one run.

    Attributes:
        throughput: Operations a second. In an open loop, those that had ended at the last arrival.
        p50_ms: The median latency.
        p99_ms: The 99th percentile of the latencies.
        cpu_us: CPU time of the process for each operation.
        rss_mb: Memory of the process after the run.
        answered: The share of the arrivals that had ended at the last arrival.
        failed: Arrivals that failed, or were cancelled at the end of an open loop.
    """

    throughput: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    rss_mb: float
    answered: float = 1.0
    failed: int = 0


class Repeat(msgspec.Struct, frozen=True, tag=True):
    """An exact number of operations, shared among callers."""

    times: int
    callers: int = 1
    operation: str = "load"

    async def run(self, operation: Operation, ids: list[str]) -> Measurement:
        """Run the operations."""
        clock, latencies = time.perf_counter, list[float]()

        async def call(number: int) -> None:
            mine = itertools.cycle(ids[number :: self.callers])
            for _ in range(self.times // self.callers + (number < self.times % self.callers)):
                began = clock()
                await operation(next(mine))
                latencies.append(clock() - began)

        start, cpu = clock(), time.process_time()
        await asyncio.gather(*map(call, range(self.callers)))
        elapsed, cpu = clock() - start, time.process_time() - cpu
        return _measurement(latencies, self.times, self.times / elapsed, cpu)


class ClosedLoop(msgspec.Struct, frozen=True, tag=True):
    """Callers that do not share sessions, for some seconds after a warm-up."""

    seconds: float
    callers: int
    operation: str = "load"

    @property
    def labels(self) -> Row:
        """The labels of its row."""
        return {"callers": self.callers}

    async def run(self, operation: Operation, ids: list[str]) -> Measurement:
        """Run the operations."""
        await _loop(operation, ids, self.callers, max(0.05, 0.2 * self.seconds))
        gc.collect()
        cpu = time.process_time()
        latencies, elapsed = await _loop(operation, ids, self.callers, self.seconds)
        cpu = time.process_time() - cpu
        return _measurement(latencies, len(latencies), len(latencies) / elapsed, cpu)


class OpenLoop(msgspec.Struct, frozen=True, tag=True):
    """A Poisson process of operations, each in a new task. Equal seeds give equal arrivals."""

    seconds: float
    rate: int
    seed: int
    operation: str = "load"

    @property
    def labels(self) -> Row:
        """The labels of its row."""
        return {"rate": self.rate}

    async def run(self, operation: Operation, ids: list[str]) -> Measurement:
        """Run the operations."""
        await _loop(operation, ids, _WARM_UP_CALLERS, 0.1)  # opens the connections of a pool
        latencies: list[float] = []
        failed = 0

        async def call(id: str, scheduled: float) -> None:
            nonlocal failed
            try:
                await operation(id)
            except Exception:  # noqa: BLE001 - each client has its own errors; all count
                failed += 1
            else:
                latencies.append(time.monotonic() - scheduled)

        tasks: list[asyncio.Task[None]] = []
        create_task = asyncio.get_running_loop().create_task
        next_id = itertools.cycle(ids).__next__
        with arrivals(self.rate, self.seconds, self.seed) as arriving:
            gc.collect()
            cpu = time.process_time()
            await arriving.deliver(lambda at: tasks.append(create_task(call(next_id(), at))))
            answered = len(latencies)
            _, late = await asyncio.wait(tasks, timeout=_DRAIN)
            cpu = time.process_time() - cpu
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_DRAIN)
        return msgspec.structs.replace(
            _measurement(latencies or [_DRAIN], len(tasks), answered / self.seconds, cpu),
            answered=answered / len(tasks),
            failed=failed + len(late),
        )


Run = Repeat | ClosedLoop | OpenLoop


async def _loop(
    operation: Operation, ids: Sequence[str], callers: int, seconds: float
) -> tuple[list[float], float]:
    """The latencies, and the time until the last caller ended."""
    clock = time.perf_counter
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

    start = clock()
    end = start + seconds
    await asyncio.gather(
        *(call(itertools.cycle(ids[number::callers])) for number in range(callers))
    )
    return latencies, clock() - start


def _measurement(
    latencies: Sequence[float], operations: int, throughput: float, cpu: float
) -> Measurement:
    milliseconds = [latency * 1000 for latency in latencies]
    # One caller over a slow link has few operations; `quantiles` needs two.
    percentiles = statistics.quantiles(milliseconds * 2, n=100, method="inclusive")
    return Measurement(
        throughput=throughput,
        p50_ms=statistics.median(milliseconds),
        p99_ms=percentiles[98],
        cpu_us=cpu * 1e6 / operations,
        rss_mb=psutil.Process().memory_info().rss / 1e6,
    )

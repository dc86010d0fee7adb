"""Runs an operation in a closed loop or in an open loop.

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

from .arrivals import arrivals

Operation = Callable[[str], Awaitable[object]]
"""Does something with the session of an id."""

CALLERS: Final = (1, 32, 256)
_DRAIN: Final = 0.5
_WARM_UP_CALLERS: Final = 256


class Measurement(msgspec.Struct, frozen=True):
    """The figures of one run.

    Attributes:
        throughput: Operations a second. In an open loop, those that had ended at the last arrival.
        p50: The median latency in milliseconds.
        p99: The 99th percentile of the latencies in milliseconds.
        cpu_us: CPU microseconds of the process for each operation.
        operations: The number of operations; in an open loop, of arrivals.
        answered: The share of the arrivals that had ended at the last arrival.
        failed: Arrivals that failed, or were cancelled at the end of an open loop.
    """

    throughput: float
    p50: float
    p99: float
    cpu_us: float
    operations: int
    answered: float = 1.0
    failed: int = 0


async def closed_loop(
    operation: Operation,
    ids: Sequence[str],
    callers: int,
    seconds: float,
    warm_up: float = 0.05,
) -> Measurement:
    """Run an operation from some callers at once.

    Args:
        operation: The operation.
        ids: The sessions for it. Callers do not share any.
        callers: The number of callers.
        seconds: The duration.
        warm_up: The least duration of the warm-up. Each caller makes at least one call in it.
    """
    await _run(operation, ids, callers, max(warm_up, 0.2 * seconds))
    gc.collect()
    cpu = time.process_time()
    latencies, elapsed = await _run(operation, ids, callers, seconds)
    cpu = time.process_time() - cpu
    return _measurement(latencies, len(latencies), len(latencies) / elapsed, cpu)


async def _run(
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


async def open_loop(
    operation: Operation, ids: Sequence[str], rate: float, seconds: float, seed: int
) -> Measurement:
    """Run an operation at random times, each time in a new task.

    Args:
        operation: The operation.
        ids: The sessions for it, in turn.
        rate: Arrivals a second: a Poisson process.
        seconds: The time in which operations arrive.
        seed: Draws the arrivals. Equal seeds give equal arrivals.
    """
    await _run(operation, ids, _WARM_UP_CALLERS, 0.1)  # opens the connections of a pool
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

    def arrive(scheduled: float) -> None:
        tasks.append(create_task(call(next_id(), scheduled)))

    with arrivals(rate, seconds, seed) as arriving:
        gc.collect()
        cpu = time.process_time()
        await arriving.deliver(arrive)
        answered = len(latencies)
        _, late = await asyncio.wait(tasks, timeout=_DRAIN)
        cpu = time.process_time() - cpu
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_DRAIN)
    return msgspec.structs.replace(
        _measurement(latencies or [_DRAIN], len(tasks), answered / seconds, cpu),
        answered=answered / len(tasks),
        failed=failed + len(late),
    )


def _measurement(
    latencies: Sequence[float], operations: int, throughput: float, cpu: float
) -> Measurement:
    milliseconds = [latency * 1000 for latency in latencies]
    # One caller over a slow link has few operations; `quantiles` needs two.
    percentiles = statistics.quantiles(milliseconds * 2, n=100, method="inclusive")
    return Measurement(
        throughput=throughput,
        p50=statistics.median(milliseconds),
        p99=percentiles[98],
        cpu_us=cpu * 1e6 / operations,
        operations=operations,
    )

"""A process of the load: python -m tests.faults.worker SETTINGS, where SETTINGS is JSON.

It prints "ready" when it is connected, begins when it reads a line, and ends when it reads another
line or its input ends. Then it writes its history. With `WorkerSettings.sample` it prints its
resource usage instead, one JSON object a line.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import msgspec

from aiosessions import SessionNotFound
from tests.support.loops import LOOPS

from . import history
from .checker import cause
from .history import Event
from .recording import LoopLag
from .workload import LoadClient, WorkerSettings, open_storage


class UsageSample(msgspec.Struct):
    """The resource usage of a process at one time.

    Attributes:
        at: Seconds since the start of the load.
        memory: Resident bytes.
        objects: Objects that the garbage collector tracks.
        tasks: Tasks of the event loop.
        files: Open file descriptors, connections included.
        calls: Calls that have ended so far.
        errors: How many of them were unavailable, by cause.
        flaws: The flaws of all calls so far.
    """

    at: float
    memory: int
    objects: int
    tasks: int
    files: int
    calls: int
    errors: dict[str, int]
    flaws: list[str]


class _Tally:
    """Counts events instead of keeping them."""

    def __init__(self) -> None:
        self.calls = 0
        self.errors: Counter[str] = Counter()
        self.flaws: list[str] = []

    def __call__(self, event: Event) -> None:
        self.calls += 1
        if event.unavailable:
            self.errors[cause(event.message)] += 1
        self.flaws += event.flaws

    def sample(self, epoch: float) -> UsageSample:
        """The resource usage of the process now."""
        return UsageSample(
            at=time.monotonic() - epoch,
            memory=_resident_bytes(),
            objects=len(gc.get_objects()),
            tasks=len(asyncio.all_tasks()),
            files=len(os.listdir("/dev/fd")),  # noqa: PTH208 - only the number is of interest
            calls=self.calls,
            errors=dict(self.errors),
            flaws=self.flaws,
        )


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:  # not Linux: take the maximum so far, which does not hide growth
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


class _SteppedClock:
    """Replaces `time.time` by a clock that can be stepped."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._time = time.time

    def time(self) -> float:
        """See `time.time`."""
        return self._time() + self.offset

    def step(self, offset: float) -> None:
        """Set the offset to the real time."""
        self.offset = offset


@contextlib.contextmanager
def _stepped(steps: list[tuple[float, float]]) -> Iterator[None]:
    """Step the clock of this process at the given times."""
    clock = _SteppedClock()
    loop = asyncio.get_running_loop()
    with mock.patch.object(time, "time", clock.time):
        for after, offset in steps:
            loop.call_later(after, clock.step, offset)
        yield


async def main(settings: WorkerSettings) -> None:
    """Run the clients of this process."""
    events: list[Event] = []
    tally = _Tally()
    lag = LoopLag()
    measuring = asyncio.create_task(lag.measure())
    async with open_storage(
        settings.endpoint,
        timeout=settings.timeout,
        ttl=settings.ttl,
        connections=settings.connections,
    ) as storage:
        with contextlib.suppress(SessionNotFound):
            await storage.load("connect")
        record = tally if settings.sample else events.append
        clients = [
            LoadClient(settings, number, storage, record, lag) for number in range(settings.clients)
        ]
        print("ready", flush=True)  # noqa: T201 - the protocol of this process
        await asyncio.to_thread(sys.stdin.readline)
        done = asyncio.Event()
        with _stepped(settings.steps):
            async with asyncio.TaskGroup() as tasks:
                for client in clients:
                    tasks.create_task(client.run(done))
                if settings.sample:
                    tasks.create_task(_print_samples(tally, settings, done))
                await asyncio.to_thread(sys.stdin.readline)
                done.set()
    measuring.cancel()
    if settings.history:
        history.write(events, Path(settings.history))


async def _print_samples(tally: _Tally, settings: WorkerSettings, done: asyncio.Event) -> None:
    while not done.is_set():
        gc.collect()  # so that garbage does not count
        line = msgspec.json.encode(tally.sample(settings.epoch)).decode()
        print(line, flush=True)  # noqa: T201 - the protocol of this process
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), settings.sample)


def run(settings: WorkerSettings) -> None:
    """Run `main` on the event loop that the settings name."""
    with asyncio.Runner(loop_factory=LOOPS[settings.loop]) as runner:
        runner.run(main(settings))


if __name__ == "__main__":
    run(msgspec.json.decode(sys.argv[1], type=WorkerSettings))

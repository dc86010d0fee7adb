"""A process of the load: python -m tests.faults.worker SETTINGS, as JSON.

It says "ready" when it is connected, begins when it reads a line, and ends, leaving its journal,
when it reads another one or its input ends. With `Settings.sample` it says what it uses up, one
JSON object a line, and leaves no journal.
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

from . import journal
from .checker import cause
from .journal import Event
from .witness import Pulse
from .workload import Caller, Settings, opened


class Sample(msgspec.Struct):
    """What a process uses up at a moment.

    Attributes:
        at: Seconds since the epoch of the run.
        memory: Resident bytes.
        objects: What the garbage collector keeps an eye on.
        tasks: Of the event loop.
        files: Open file descriptors, hence connections.
        verbs: Verbs that have ended so far.
        errors: Of them, those that were unavailable, by message.
        flaws: What was wrong with any, so far.
    """

    at: float
    memory: int
    objects: int
    tasks: int
    files: int
    verbs: int
    errors: dict[str, int]
    flaws: list[str]


class _Tally:
    """Counts events instead of keeping them."""

    def __init__(self) -> None:
        self.verbs = 0
        self.errors: Counter[str] = Counter()
        self.flaws: list[str] = []

    def __call__(self, event: Event) -> None:
        self.verbs += 1
        if event.unknown:
            self.errors[cause(event.message)] += 1
        self.flaws += event.flaws

    def sample(self, epoch: float) -> Sample:
        """What the process uses up now."""
        return Sample(
            at=time.monotonic() - epoch,
            memory=_resident_bytes(),
            objects=len(gc.get_objects()),
            tasks=len(asyncio.all_tasks()),
            files=len(os.listdir("/dev/fd")),  # noqa: PTH208 - no path is wanted
            verbs=self.verbs,
            errors=dict(self.errors),
            flaws=self.flaws,
        )


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:  # no Linux: the most it ever was, which does not hide growth
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


class _Clock:
    """Makes this process believe that it is another time than it is."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._time = time.time

    def time(self) -> float:
        """Takes the place of `time.time`."""
        return self._time() + self.offset

    def step(self, offset: float) -> None:
        """Set the clock."""
        self.offset = offset


@contextlib.contextmanager
def _stepped(steps: list[tuple[float, float]]) -> Iterator[None]:
    """Steps the clock when it is time."""
    clock = _Clock()
    loop = asyncio.get_running_loop()
    with mock.patch.object(time, "time", clock.time):
        for after, offset in steps:
            loop.call_later(after, clock.step, offset)
        yield


async def main(settings: Settings) -> None:
    """Run the load."""
    events: list[Event] = []
    tally = _Tally()
    pulse = Pulse()
    beating = asyncio.create_task(pulse.beat())
    async with opened(settings.target, timeout=settings.timeout, ttl=settings.ttl) as storage:
        with contextlib.suppress(SessionNotFound):
            await storage.load("nobody")
        callers = [
            Caller(settings, number, storage, tally if settings.sample else events.append, pulse)
            for number in range(settings.callers)
        ]
        print("ready", flush=True)  # noqa: T201 - that is how it talks
        await asyncio.to_thread(sys.stdin.readline)
        done = asyncio.Event()
        with _stepped(settings.steps):
            async with asyncio.TaskGroup() as tasks:
                for caller in callers:
                    tasks.create_task(caller.work(done))
                if settings.sample:
                    tasks.create_task(_keep_sampling(tally, settings, done))
                await asyncio.to_thread(sys.stdin.readline)
                done.set()
    beating.cancel()
    if settings.journal:
        journal.write(events, Path(settings.journal))


async def _keep_sampling(tally: _Tally, settings: Settings, done: asyncio.Event) -> None:
    while not done.is_set():
        gc.collect()  # so that what is sampled is what is held, not what waits to be collected
        line = msgspec.json.encode(tally.sample(settings.epoch)).decode()
        print(line, flush=True)  # noqa: T201 - as above
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), settings.sample)


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Settings)))

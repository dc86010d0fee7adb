"""A process of the load: python -m tests.faults.worker SETTINGS, where SETTINGS is JSON.

It prints "ready" when it is connected, begins when it reads a line, and ends when it reads another
line or its input ends. Then it prints its history, one event a line. With `WorkerSettings.sample`
it prints its resource usage now and then instead.
"""

import asyncio
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from aiosessions import IndexedStorage, NearCache, SessionNotFound
from tests.support.loops import LOOPS

from .client import Endpoint, LoopLag, RecordingStorage, open_storage
from .history import CLIENTS, Event, cause
from .workload import LoadClient, LoadForm, WorkerSettings

_ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0


class WorkerError(Exception):
    """A process of the load failed. Its error output has the reason."""


class UsageSample(msgspec.Struct):
    """The resource usage of a process, and a count of its events."""

    memory: int = 0  # resident bytes
    objects: int = 0  # that the garbage collector tracks
    tasks: int = 0
    files: int = 0  # open file descriptors, connections included
    calls: int = 0
    errors: dict[str, int] = {}  # `StorageUnavailable`, by cause
    flaws: list[str] = []

    def count(self, event: Event) -> None:
        """Count an event instead of keeping it."""
        self.calls += 1
        if event.unavailable:
            why = cause(event.message)
            self.errors[why] = self.errors.get(why, 0) + 1
        self.flaws += event.flaws

    def measure(self) -> None:
        """Measure the resource usage of this process, which runs on Linux."""
        gc.collect()  # so that garbage does not count
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        self.memory = pages * os.sysconf("SC_PAGE_SIZE")
        self.objects = len(gc.get_objects())
        self.tasks = len(asyncio.all_tasks())
        self.files = sum(1 for _ in Path("/proc/self/fd").iterdir())


@asynccontextmanager
async def workers(
    form: LoadForm, endpoint: Endpoint, receive: Callable[[int, bytes], None], **settings: Any
) -> AsyncIterator[None]:
    """Processes of a load. They begin together, and end with the block.

    `receive` gets the number of a process and each line that it prints. `settings` are more of the
    `WorkerSettings`.

    Raises:
        WorkerError: A process failed.
    """
    base = WorkerSettings(
        endpoint=endpoint, form=form, epoch=time.monotonic(), worker=0, **settings
    )
    processes: list[asyncio.subprocess.Process] = []
    try:
        for number in range(form.workers):
            each = msgspec.json.encode(msgspec.structs.replace(base, worker=number)).decode()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.faults.worker", each),
                cwd=_ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            processes.append(process)
        for process in processes:
            if await _output(process).readline() != b"ready\n":
                raise WorkerError
        readers = [
            asyncio.create_task(_read(process, partial(receive, number)))
            for number, process in enumerate(processes)
        ]
        _send_line(processes)
        yield
        _send_line(processes)
        await asyncio.wait_for(asyncio.gather(*readers), _PATIENCE)
        if any([await process.wait() for process in processes]):
            raise WorkerError
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    return process.stdout


async def _read(process: asyncio.subprocess.Process, receive: Callable[[bytes], None]) -> None:
    async for line in _output(process):
        receive(line)


def _send_line(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")


@contextmanager
def _stepped(steps: list[tuple[float, float]]) -> Iterator[None]:
    """Step the clock of this process at the given times."""
    real, offset = time.time, 0.0

    def step(seconds: float) -> None:
        nonlocal offset
        offset = seconds

    for after, seconds in steps:
        asyncio.get_running_loop().call_later(after, step, seconds)
    with mock.patch.object(time, "time", lambda: real() + offset):  # noqa: PT008 - it changes
        yield


async def main(settings: WorkerSettings) -> None:
    """Run the clients of this process."""
    events: list[Event] = []
    usage = UsageSample()
    record = usage.count if settings.sample else events.append
    lag = LoopLag()
    measuring = asyncio.create_task(lag.measure())
    connections = 2 if settings.worker == settings.form.workers - 1 else 1
    timeout, ttl = settings.timeout, settings.ttl
    async with open_storage(
        settings.endpoint, timeout=timeout, ttl=ttl, connections=connections
    ) as remote:
        storage: IndexedStorage[Any] = remote
        if settings.max_staleness:
            cache = NearCache[Any](remote, max_staleness=settings.max_staleness)
            assert isinstance(cache, IndexedStorage)
            storage = cache
        with suppress(SessionNotFound):
            await storage.load("connect")
        first = settings.worker * CLIENTS
        clients = [
            LoadClient(
                settings, RecordingStorage(storage, record, number, timeout, lag, settings.secrets)
            )
            for number in range(first, first + settings.form.clients)
        ]
        _print(b"ready")
        await asyncio.to_thread(sys.stdin.readline)
        done = asyncio.Event()
        with _stepped(settings.steps if settings.worker == 0 else []):
            async with asyncio.TaskGroup() as tasks:
                for client in clients:
                    tasks.create_task(client.run(done))
                if settings.sample:
                    tasks.create_task(_print_samples(usage, settings.sample, done))
                await asyncio.to_thread(sys.stdin.readline)
                done.set()
        await storage.aclose()
    measuring.cancel()
    _print(*map(msgspec.json.encode, events))


def _print(*lines: bytes) -> None:
    sys.stdout.buffer.writelines(line + b"\n" for line in lines)
    sys.stdout.flush()


async def _print_samples(usage: UsageSample, every: float, done: asyncio.Event) -> None:
    while not done.is_set():
        usage.measure()
        _print(msgspec.json.encode(usage))
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), every)


if __name__ == "__main__":
    chosen = msgspec.json.decode(sys.argv[1], type=WorkerSettings)
    loops = chosen.form.loops
    with asyncio.Runner(loop_factory=LOOPS[loops[chosen.worker % len(loops)]]) as runner:
        runner.run(main(chosen))

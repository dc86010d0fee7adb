"""A client in a separate process, with its own event loop, heap and CPU clock.

- In a closed loop each of some callers waits for its reply and asks again.
- In an open loop loads arrive at times that were drawn before the run. Latency counts from the
  scheduled arrival, so a client that falls behind cannot hide the time that loads wait for it.
- CPU is the user and system time of the process, all threads included, divided by the loads.
- Every open loop ends: loads without a reply soon after the last arrival are cancelled.

`client_process` starts this module. A `Job` opens a client; each `Run` that follows is answered by
a `Measurement`, on a line of JSON.
"""

import asyncio
import gc
import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Final

import msgspec
import psutil
import uvloop

from .arrivals import arrivals
from .browser import WEB
from .cached import CACHED
from .drivers import Operation
from .owned import OWNED
from .peers import PEERS
from .results import Row
from .ways import WAYS

AIOFASTNET: Final = "asyncio, aiofastnet"
_ENDS_WITHIN: Final = 120
_DRAIN: Final = 0.5


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


class Run(msgspec.Struct, frozen=True):
    """A closed loop, an exact number of operations, or an open loop.

    Attributes:
        operation: The name of the operation.
        callers: The callers, which do not share sessions.
        seconds: The duration of a loop. A closed loop is warmed up first.
        times: The exact number of operations of all callers, or 0 for a loop.
        rate: The arrivals a second of an open loop, or 0. Each is a new task.
        seed: The seed of the arrivals. Equal seeds give equal arrivals.
        first: The name of an operation to make once before the run, or "".
    """

    operation: str = "load"
    callers: int = 1
    seconds: float = 1e9
    times: int = 0
    rate: int = 0
    seed: int = 0
    first: str = ""

    @property
    def labels(self) -> Row:
        """The labels of its row."""
        return {"rate": self.rate} if self.rate else {"callers": self.callers}

    async def measure(self, operation: Operation, ids: list[str]) -> Measurement:
        """Run the operations."""
        if self.rate:
            return await self._open_loop(operation, ids)
        if not self.times:
            await _loop(operation, ids, self.callers, max(0.05, 0.2 * self.seconds))
        gc.collect()
        start, cpu = time.perf_counter(), time.process_time()
        latencies = await _loop(operation, ids, self.callers, self.seconds, self.times)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        return _measurement(latencies, len(latencies), len(latencies) / elapsed, cpu)

    async def _open_loop(self, operation: Operation, ids: list[str]) -> Measurement:
        await _loop(operation, ids, 256, 0.1)  # opens the connections of a pool
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


async def _loop(
    operation: Operation, ids: Sequence[str], callers: int, seconds: float, times: int = 0
) -> list[float]:
    """Let callers run an operation for some seconds, or some times, and return the latencies."""
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

    def share(number: int) -> Iterable[str]:
        mine = itertools.cycle(ids[number::callers])
        if not times:
            return mine
        return itertools.islice(mine, times // callers + (number < times % callers))

    end = clock() + seconds
    await asyncio.gather(*(call(share(number)) for number in range(callers)))
    return latencies


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


class Job(msgspec.Struct, frozen=True):
    """A client to measure: its name in one of the tables of ways, a URL, and ids."""

    way: str
    server: str
    url: str
    ids: list[str]
    loop: str = "asyncio"

    @property
    def labels(self) -> Row:
        """The labels of its rows."""
        return {"loop": self.loop, "server": self.server, "way": self.way}


class ClientProcess:
    """A process with an open client. `client_process` starts one."""

    def __init__(self, process: "subprocess.Popen[bytes]", job: Job) -> None:
        self._process = process
        self.job = job
        self._send(job)

    def missing(self) -> str:
        """Wait for the client, and return why it cannot be measured, or ""."""
        return msgspec.json.decode(self._reply(), type=str)

    def prepare(self, run: Run) -> None:
        """Make the operation that precedes a run."""
        if run.first:
            self.measure(Run(run.first, times=1))

    def measure(self, run: Run) -> Measurement:
        """Make a run.

        Raises:
            RuntimeError: The process ended; a run that takes two minutes ends it.
        """
        self._send(run)
        return msgspec.json.decode(self._reply(), type=Measurement)

    def _send(self, request: msgspec.Struct) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()

    def _reply(self) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.job.way} failed, or a run of it did not end")
        return line


@contextmanager
def client_process(job: Job) -> Iterator[ClientProcess]:
    """A process with an open client, which ends with the block."""
    with subprocess.Popen(  # noqa: S603 - this module
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield ClientProcess(process, job)
        finally:
            process.communicate()  # closes its input, which ends it


async def _serve(job: Job) -> None:
    async with AsyncExitStack() as stack:
        opened = (WAYS | PEERS | OWNED | CACHED | WEB)[job.way].open(job.url, job.ids)
        operations = await stack.enter_async_context(opened)
        _answer("")
        # In a thread, so that the client's tasks run between the measurements.
        while line := await asyncio.to_thread(sys.stdin.readline):
            signal.alarm(_ENDS_WITHIN)  # its default action ends the process
            run = msgspec.json.decode(line, type=Run)
            _answer(await run.measure(operations[run.operation], job.ids))
            signal.alarm(0)


def _answer(reply: str | Measurement) -> None:
    print(msgspec.json.encode(reply).decode(), flush=True)


def _with_aiofastnet() -> asyncio.AbstractEventLoop:
    import aiofastnet  # noqa: PLC0415 - it may be missing

    return aiofastnet.patch_loop(asyncio.new_event_loop())


LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    AIOFASTNET: _with_aiofastnet,
}


def _main() -> None:
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    try:
        with asyncio.Runner(loop_factory=LOOPS[job.loop]) as runner:
            runner.run(_serve(job))
    except ImportError as error:
        _answer(f"cannot be imported: {error}")


if __name__ == "__main__":
    _main()

"""Measures a client in a separate process.

The process gives each client its own event loop, heap and CPU clock.

`client_process` starts this module. A `Job` opens one of the `clients`; each `ClosedLoop` or
`OpenLoop` that follows is one run, and a line of JSON answers it.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import IO, Final, cast

import msgspec
import uvloop

from .clients import CLIENTS
from .loops import Measurement, Operation, closed_loop, open_loop
from .results import Row

AIOFASTNET: Final = "asyncio, aiofastnet"
_ENDS_WITHIN: Final = 60


class Job(msgspec.Struct, frozen=True):
    """A client to measure.

    Attributes:
        way: Its name in `CLIENTS`.
        loop: Its event loop, one of `LOOPS`.
        server: The label of the server in rows.
        url: The URL of the server.
        ids: The stored sessions.
    """

    way: str
    loop: str
    server: str
    url: str
    ids: list[str]

    @property
    def labels(self) -> Row:
        """The labels of its rows."""
        return {"loop": self.loop, "server": self.server, "way": self.way}


class ClosedLoop(msgspec.Struct, frozen=True, tag=True):
    """A run of `loops.closed_loop`."""

    seconds: float
    callers: int

    @property
    def labels(self) -> Row:
        """The labels of its row."""
        return {"callers": self.callers}

    async def run(self, operation: Operation, ids: list[str]) -> Measurement:
        """Measure an operation."""
        return await closed_loop(operation, ids, self.callers, self.seconds)


class OpenLoop(msgspec.Struct, frozen=True, tag=True):
    """A run of `loops.open_loop`."""

    seconds: float
    rate: int
    seed: int

    @property
    def labels(self) -> Row:
        """The labels of its row."""
        return {"rate": self.rate}

    async def run(self, operation: Operation, ids: list[str]) -> Measurement:
        """Measure an operation."""
        return await open_loop(operation, ids, self.rate, self.seconds, self.seed)


Run = ClosedLoop | OpenLoop


class _Ready(msgspec.Struct):
    """The first reply; `missing` says why the client cannot be measured."""

    missing: str = ""


class ClientProcess:
    """A process with an open client. `client_process` starts one."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._requests = cast("IO[bytes]", process.stdin)
        self._replies = cast("IO[bytes]", process.stdout)

    def missing(self) -> str:
        """Wait for the client, and return why it is missing, or ""."""
        return msgspec.json.decode(self._reply(), type=_Ready).missing

    def measure(self, run: Run) -> Measurement:
        """Make a run.

        Raises:
            RuntimeError: The process ended; a run that takes a minute ends it.
        """
        self.send(run)
        return msgspec.json.decode(self._reply(), type=Measurement)

    def send(self, request: msgspec.Struct) -> None:
        """Send a line of JSON."""
        self._requests.write(msgspec.json.encode(request) + b"\n")
        self._requests.flush()

    def _reply(self) -> bytes:
        line = self._replies.readline()
        if not line:
            raise RuntimeError("the client failed, or a run of it did not end")
        return line


@contextmanager
def client_process(job: Job) -> Iterator[ClientProcess]:
    """Start a process that opens a client; end it with the block."""
    process = subprocess.Popen(  # noqa: S603 - this module
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        made = ClientProcess(process)
        made.send(job)
        yield made
    finally:
        process.communicate()  # closes its input, which ends it


async def _serve(job: Job) -> None:
    async with AsyncExitStack() as stack:
        try:
            operation = await stack.enter_async_context(CLIENTS[job.way](job.url))
        except ImportError as error:
            _answer(_Ready(f"cannot be imported: {error}"))
            return
        _answer(_Ready())
        # In a thread, so that the client's tasks run between the measurements.
        while line := await asyncio.to_thread(sys.stdin.readline):
            signal.alarm(_ENDS_WITHIN)  # its default action ends the process
            run = msgspec.json.decode(line, type=Run)
            _answer(await run.run(operation, job.ids))
            signal.alarm(0)


def _answer(reply: msgspec.Struct) -> None:
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
        runner = asyncio.Runner(loop_factory=LOOPS[job.loop])
        with runner:
            runner.run(_serve(job))
    except ImportError as error:
        _answer(_Ready(f"cannot be imported: {error}"))


if __name__ == "__main__":
    _main()

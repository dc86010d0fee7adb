"""A client in a separate process, with its own event loop, heap and CPU clock.

`client_process` starts this module. A `Job` opens one of the `WAYS`; each `Run` that follows is
answered by a line of JSON.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Final

import msgspec
import uvloop

from .loops import Measurement, Run
from .peers import PEERS
from .results import Row
from .ways import WAYS

AIOFASTNET: Final = "asyncio, aiofastnet"
_ENDS_WITHIN: Final = 120


class Job(msgspec.Struct, frozen=True):
    """A client to measure: its name in `WAYS`, a URL, and the stored sessions."""

    way: str
    server: str
    url: str
    ids: list[str]
    loop: str = "asyncio"

    @property
    def labels(self) -> Row:
        """The labels of its rows."""
        return {"loop": self.loop, "server": self.server, "way": self.way}


class _Ready(msgspec.Struct):
    """The first reply; `missing` says why the client cannot be measured."""

    missing: str = ""


class ClientProcess:
    """A process with an open client. `client_process` starts one."""

    def __init__(self, process: "subprocess.Popen[bytes]", job: Job) -> None:
        self._process = process
        self.job = job
        self._send(job)

    def missing(self) -> str:
        """Wait for the client, and return why it is missing, or ""."""
        return msgspec.json.decode(self._reply(), type=_Ready).missing

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
        opened = (WAYS | PEERS)[job.way].open(job.url, job.ids)
        operations = await stack.enter_async_context(opened)
        _answer(_Ready())
        # In a thread, so that the client's tasks run between the measurements.
        while line := await asyncio.to_thread(sys.stdin.readline):
            signal.alarm(_ENDS_WITHIN)  # its default action ends the process
            run = msgspec.json.decode(line, type=Run)
            _answer(await run.run(operations[run.operation], job.ids))
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
        with asyncio.Runner(loop_factory=LOOPS[job.loop]) as runner:
            runner.run(_serve(job))
    except ImportError as error:
        _answer(_Ready(f"cannot be imported: {error}"))


if __name__ == "__main__":
    _main()

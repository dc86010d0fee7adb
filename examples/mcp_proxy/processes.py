"""Child processes, which never outlive the block that started them."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Service:
    """A running script of this directory, and the URL that it serves."""

    process: asyncio.subprocess.Process
    url: str

    async def kill(self) -> int:
        """SIGKILL: no goodbye, no clean-up. Returns the exit status."""
        self.process.kill()
        return await self.process.wait()


@asynccontextmanager
async def running(script: str, *arguments: str) -> AsyncIterator[Service]:
    """Start a script that prints its URL when it is ready (see `serve`), and stop it at the end.

    Raises:
        RuntimeError: It ended, or said nothing for 20 seconds.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / script),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        process_group=0,  # so that Ctrl-C reaches the demo alone, which then stops all in order
    )
    try:
        yield Service(process, await _first_line(process, script))
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def free_port() -> int:
    """A loopback port that nobody uses, picked at random by the system."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _first_line(process: asyncio.subprocess.Process, script: str) -> str:
    line = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(20):
            if process.stdout is not None:
                line = await process.stdout.readline()
    if not line:
        message = f"{script} did not start"
        raise RuntimeError(message)
    return line.decode().strip()

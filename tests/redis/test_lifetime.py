"""The life of a `RedisStorage`: event loops, processes, and storages that are never closed."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest
from redis.asyncio import Redis

from aiosessions import Session, StorageClosed, StorageMisused
from tests.support.clients import Storage, our_tasks, storage_at, stored, use
from tests.support.loops import LOOPS
from tests.support.proxy import FaultProxy, hold, until
from tests.support.secrets import VERBS
from tests.support.servers import Server
from tests.support.topologies import eventually

NewConnections = Callable[[], set[str]]
NewLoop = Callable[[], asyncio.AbstractEventLoop]


# Event loops.


@pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS)
def test_storage_moves_on_when_its_loop_is_closed(
    valkey: Server, new_loop: NewLoop, new_connections: NewConnections
) -> None:
    """A storage works on one event loop after another, and leaves nothing on the closed ones."""
    storage = storage_at(valkey.url)
    for _ in range(2):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(use(storage, callers=5))
    gc.collect()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(storage.aclose())
        with pytest.raises(StorageClosed):
            runner.run(storage.load("absent"))
    eventually(lambda: not new_connections())


@pytest.mark.every_loop
async def test_second_running_loop_is_misuse(valkey: Server) -> None:
    """On another event loop every verb fails at once, and the first loop is not disturbed."""
    async with storage_at(valkey.url) as storage:

        async def misuse() -> None:
            calls = [verb(storage, Session(id="x")) for verb in VERBS.values()]
            for call in (*calls, storage.delete_expired(), storage.ping(), storage.aclose()):
                with pytest.raises(StorageMisused, match="in use by another event loop"):
                    await call

        await use(storage)
        await asyncio.to_thread(asyncio.run, misuse())
        await use(storage)


def test_trio_is_misuse(valkey: Server) -> None:
    """Without an event loop of asyncio, the error says that the storage needs one."""
    storage = storage_at(valkey.url)

    async def main() -> None:
        with pytest.raises(StorageMisused, match="runs under asyncio"):
            await storage.load("absent")

    anyio.run(main, backend="trio")


# Processes.

PROGRAM = """
import asyncio, gc, os, sys
from aiosessions import RedisStorage, Session, StorageMisused
from tests.support.loops import LOOPS

async def use(storage):
    await storage.store(Session(id="parent"))
    await asyncio.gather(*(storage.load("parent") for _ in range(10)))

async def misuse(storage):
    for verb in (storage.load("a"), storage.delete("a"), storage.store(Session(id="a"))):
        try:
            await verb
        except StorageMisused as error:
            assert "forked" in str(error), error
        else:
            raise AssertionError("no error")
    await storage.aclose()

def run_in_child(coroutine):
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(coroutine)
        os._exit(0)
    finally:
        os._exit(1)

for new_loop in LOOPS.values():
    used, unused = (RedisStorage.from_url(sys.argv[1], ttl=60) for _ in range(2))
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(use(used))
        for coroutine in (misuse(used), use(unused)):
            run_in_child(coroutine)
            coroutine.close()
        for storage in (used, unused):
            runner.run(use(storage))
            runner.run(storage.aclose())
    gc.collect()
"""


def test_forked_process_cannot_use_open_storage(valkey: Server) -> None:
    """A child may use only storages that were unused; the parent is not disturbed."""
    process = subprocess.run(  # noqa: S603 - a program of this test
        [sys.executable, "-W", "error", "-c", PROGRAM, valkey.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


# Storages that are closed, or never closed.


@pytest.mark.every_loop
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "borrowed"])
async def test_closing_leaves_no_connection_or_task(
    valkey: Server, new_connections: NewConnections, *, owned: bool
) -> None:
    """`aclose` closes the connections and ends the tasks of the storage."""
    tasks = asyncio.all_tasks()
    async with Redis.from_url(valkey.url) as client:
        storage = storage_at(valkey.url) if owned else Storage(client, ttl=60)
        await use(storage, callers=10)
        assert new_connections()
        await storage.aclose()

        assert asyncio.all_tasks() == tasks
        await until(lambda: not new_connections())


@pytest.mark.every_loop
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "borrowed"])
async def test_dropped_storage_warns_once(proxy: FaultProxy, *, owned: bool) -> None:
    """A storage that is dropped without `aclose` warns, and leaves no task or socket."""
    async with Redis.from_url(proxy.url) as client:
        storages = [storage_at(proxy.url) if owned else Storage(client, ttl=60)]
        await stored(storages[0])
        with pytest.warns(ResourceWarning, match="was not closed: use `async with`") as caught:
            storages.clear()

        assert len(caught) == 1
        await until(lambda: not our_tasks() and not proxy.tunnels)
        gc.collect()


@pytest.mark.every_loop
async def test_storage_may_be_dropped_in_another_thread(proxy: FaultProxy) -> None:
    """The garbage collector may run in any thread; the event loop closes the connections."""
    asyncio.get_running_loop().set_debug(True)  # it refuses calls from other threads
    storages = [storage_at(proxy.url)]
    await stored(storages[0])
    with pytest.warns(ResourceWarning, match="was not closed"):
        await asyncio.to_thread(storages.clear)

    await until(lambda: not our_tasks() and not proxy.tunnels)


@pytest.mark.every_loop
async def test_dropped_storage_stops_connecting(proxy: FaultProxy) -> None:
    """A storage that is dropped while it connects leaves no task or socket either."""
    handshake = proxy.on_request("*", hold(asyncio.Event()))
    storages = [storage_at(proxy.url)]
    loading = asyncio.create_task(storages[0].load("absent"))
    await handshake.hit.wait()
    loading.cancel()
    await asyncio.wait([loading])
    del loading
    with pytest.warns(ResourceWarning, match="was not closed"):
        storages.clear()

    await until(lambda: not our_tasks())
    proxy.cut()
    await until(lambda: not proxy.tunnels)


@pytest.mark.every_loop
async def test_dropped_unused_storage_does_not_warn(valkey: Server) -> None:
    """A storage without connections has nothing to close."""
    assert storage_at(valkey.url).statistics().connected == 0
    gc.collect()


async def use_many(server: Server, stack: AsyncExitStack) -> None:
    """Open a storage for each of 40 calls, and close them with the stack."""
    for _ in range(40):
        storage = await stack.enter_async_context(storage_at(server.url))
        await storage.delete("absent")


@pytest.mark.every_loop
async def test_many_open_storages_warn_once(valkey: Server) -> None:
    """The warning names the line of the call, and says that one storage per process is enough."""
    async with AsyncExitStack() as stack:
        with pytest.warns(RuntimeWarning, match="make one per process") as caught:
            await use_many(valkey, stack)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.every_loop
async def test_closed_storages_do_not_count(valkey: Server) -> None:
    """Storages that are used and closed one after another cause no warning."""
    storages = [storage_at(valkey.url) for _ in range(40)]
    for storage in storages:
        async with storage:
            await storage.delete("absent")

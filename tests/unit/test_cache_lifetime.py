"""`NearCache`: closing, event loops and forks."""

import asyncio
import gc
import os
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from aiosessions import Session, SessionNotFound, StorageClosed, new_session_id
from tests.support.caches import RemoteStorage
from tests.support.loops import on_both


@on_both
async def test_close_ends_the_loads() -> None:
    """Callers that wait get `StorageClosed`, and so does each later call."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())
    await cache.store(session)
    errors: list[StorageClosed] = []

    async def load() -> None:
        with pytest.raises(StorageClosed) as caught:
            await cache.load(new_session_id())
        errors.append(caught.value)

    async with anyio.create_task_group() as tasks, storage.held("before load") as gate:
        tasks.start_soon(load)
        tasks.start_soon(load)
        await gate.reached.wait()
        await anyio.wait_all_tasks_blocked()
        await cache.aclose()
        assert not cache._loads._all
        assert storage.closed

    assert len(errors) == 2
    await cache.aclose()
    for call in (
        cache.load(session.id),
        cache.store(session),
        cache.delete(session.id),
        cache.delete_expired(),
    ):
        with pytest.raises(StorageClosed):
            await call


@on_both
async def test_cancelled_close_ends_loads_and_storage() -> None:
    """Leaving an `async with` in a cancelled scope leaves nothing behind."""
    storage = RemoteStorage()
    cache = storage.cache()
    begun = anyio.Event()

    async def end_slowly(_: int, __: str) -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(10):
                    await checkpoint()

    async def load() -> None:
        with pytest.raises(StorageClosed):
            await cache.load(new_session_id())

    storage.intercept(end_slowly)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(load)
        await begun.wait()
        with anyio.CancelScope() as scope:
            async with cache:
                scope.cancel()
        assert storage.closed
        assert not cache._loads._all


@pytest.mark.every_loop
async def test_native_cancellation_closes_the_storage() -> None:
    """`asyncio.Task.cancel` passes every shield, so the loads may end later."""
    storage = RemoteStorage()
    cache = storage.cache()
    async with storage.held("before load") as gate:
        load = asyncio.create_task(cache.load(new_session_id()))
        await gate.reached.wait()
        close = asyncio.create_task(cache.aclose())
        asyncio.get_running_loop().call_soon(close.cancel)
        await asyncio.wait([close, load])

    assert storage.closed
    assert not cache._loads._all
    assert isinstance(load.exception(), StorageClosed)


@pytest.mark.every_loop
async def test_write_that_ends_after_the_close_leaves_no_copy() -> None:
    """So no load of a closed cache is a hit."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())

    async with storage.held("after store always") as gate:
        store = asyncio.create_task(cache.store(session))
        await gate.reached.wait()
        await cache.aclose()
    await store

    with pytest.raises(StorageClosed):
        await cache.load(session.id)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_load_of_a_lost_event_loop_is_not_joined(backend: str) -> None:
    """It never ends, because its event loop was closed while it waited."""
    storage = RemoteStorage()
    cache = storage.cache()
    id = new_session_id()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!"

    async def hold(_: int, __: str) -> None:
        await asyncio.get_running_loop().create_future()

    storage.intercept(hold)
    caller = loop.create_task(cache.load(id))
    for _ in range(5):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    storage.intercept()

    async def main() -> None:
        async with cache:
            with pytest.raises(SessionNotFound):
                await cache.load(id)

    anyio.run(main, backend=backend)
    del caller
    cache._loads._all.clear()
    gc.collect()


def test_load_without_event_loop_leaves_nothing() -> None:
    """The error of the event loop that does not run is enough."""
    cache = RemoteStorage().cache()
    load = cache.load(new_session_id())

    with pytest.raises(RuntimeError):
        load.send(None)
    assert not cache._loads._all
    assert not cache._copies._pending


def test_trio_runs_as_a_guest_of_asyncio() -> None:
    """The event loop of asyncio runs too, but not for the caller."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())

    async def guest() -> Session[Any]:
        await storage.inner.store(session)
        return await cache.load(session.id)

    async def host() -> Any:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        return (await done).unwrap()

    assert asyncio.run(host()) == session


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_forked_process_has_no_copies() -> None:
    """It hears of no change, so each load asks the storage."""
    storage = RemoteStorage()
    cache = storage.cache()
    await cache.store(Session[Any](id=new_session_id()))

    if not (pid := os.fork()):
        os._exit(cache.statistics().sessions)
    _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - the child ends at once
    assert status == 0
    assert cache.statistics().sessions == 1

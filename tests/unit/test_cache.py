"""`NearCache`: arguments, hits and shared loads."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest

from aiosessions import (
    IndexedStorage,
    JsonCodec,
    LocalStorage,
    NearCache,
    Session,
    SessionNotFound,
    StorageUnavailable,
    new_session_id,
)
from aiosessions.testing import FakeClock
from tests.support.caches import RemoteStorage, loads, stored
from tests.support.loops import on_both
from tests.support.secrets import locals_in, secretive
from tests.support.storages import ReferenceStorage, unavailable_at


class Bare(ReferenceStorage):
    """A storage that publishes nothing."""

    def __init__(self) -> None:
        """Make one without attributes."""


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"max_staleness": 30.001}, ValueError, "at most half the TTL of the storage, 60.0 s"),
        ({"max_staleness": 0}, ValueError, "max_staleness must be at least one millisecond"),
        ({"max_staleness": "10"}, TypeError, "max_staleness is a number of seconds or a timedelta"),
        ({"serve_stale_for": 0}, ValueError, "serve_stale_for must be at least one millisecond"),
        ({"serve_stale_for": timedelta(0)}, ValueError, "serve_stale_for must be at least"),
        ({"max_sessions": 0}, ValueError, "max_sessions must be at least 1, not 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes is an int, not float"),
        ({"storage": LocalStorage}, TypeError, "not the class LocalStorage"),
        ({"storage": Bare()}, TypeError, "has the attributes codec and ttl; Bare has not"),
        ({"storage": RemoteStorage().cache()}, TypeError, "a NearCache over another one"),
    ],
)
def test_constructor_explains_refusal(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    """A wrong argument is named, with the bound that it misses."""
    storage: Any = options.pop("storage", None) or LocalStorage[Any](ttl=60)

    with pytest.raises(error, match=reason):
        NearCache(storage, **{"max_staleness": 10} | options)


def test_cache_has_the_index_of_its_storage() -> None:
    """`isinstance` tells, and a subclass keeps its type."""

    class Mine(NearCache[Any]):
        pass

    plain = ReferenceStorage(backend=None, ttl=0.06, codec=JsonCodec(), clock=None)  # type: ignore[arg-type]
    indexed = LocalStorage[Any](ttl=60)

    assert isinstance(NearCache(indexed, max_staleness=10), IndexedStorage)
    assert isinstance(NearCache(storage=indexed, max_staleness=10), IndexedStorage)
    assert not isinstance(NearCache(plain, max_staleness=10), IndexedStorage)
    assert type(Mine(indexed, max_staleness=10)) is Mine


async def test_repr_reveals_no_session() -> None:
    """It names the storage and the bound."""
    cache = NearCache(LocalStorage[Any](ttl=60), max_staleness=10)
    await cache.store(secretive())

    assert repr(cache) == "NearCache(LocalStorage(ttl=60.0, sessions=1), max_staleness=10.0)"


@on_both
async def test_hit_makes_no_remote_call() -> None:
    """Until a copy is `max_staleness` old, counted from the start of its load."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    async with anyio.create_task_group() as tasks, storage.held("after load") as gate:
        tasks.start_soon(cache.load, session.id)
        await gate.reached.wait()
        storage.clock.advance(4)
    storage.clock.advance(5.999)
    assert await cache.load(session.id) == session
    assert loads(storage) == 1

    storage.clock.advance(0.001)
    assert await cache.load(session.id) == session
    assert loads(storage) == 2


async def test_callers_share_no_object() -> None:
    """A caller that changes its session changes no copy."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    for _ in range(3):
        found = await cache.load(session.id)
        assert found.data == {"n": [1]}
        found.data["n"].append(2)


@on_both
async def test_concurrent_misses_share_one_load() -> None:
    """Each caller gets its own object."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache, found = storage.cache(), list[Any]()

    async def load() -> None:
        found.append(await cache.load(session.id))

    async with anyio.create_task_group() as tasks, storage.held("before load") as gate:
        for _ in range(10):
            tasks.start_soon(load)
        await gate.reached.wait()
        await anyio.wait_all_tasks_blocked()

    assert found == [session] * 10
    assert len({id(each.data["n"]) for each in found}) == 10
    assert (cache.statistics().misses, cache.statistics().coalesced, loads(storage)) == (1, 9, 1)


@on_both
@pytest.mark.parametrize("cancelled", [1, 2], ids=["one", "all"])
async def test_load_outlives_cancelled_callers(cancelled: int) -> None:
    """The others get the session, and so does the next caller."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache, found = storage.cache(), list[Any]()
    scopes = [anyio.CancelScope() for _ in range(2)]

    async def load(scope: anyio.CancelScope) -> None:
        with scope:
            found.append(await cache.load(session.id))

    async with anyio.create_task_group() as tasks, storage.held("before load") as gate:
        for scope in scopes:
            tasks.start_soon(load, scope)
        await gate.reached.wait()
        await anyio.wait_all_tasks_blocked()
        for scope in scopes[:cancelled]:
            scope.cancel()
        await anyio.wait_all_tasks_blocked()
    await anyio.wait_all_tasks_blocked()

    assert len(found) == 2 - cancelled
    assert await cache.load(session.id) == session
    assert loads(storage) == 1


@pytest.mark.every_loop
async def test_caller_after_a_write_does_not_join_an_older_load() -> None:
    """The older load leaves no copy either."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    async with storage.held("after load") as gate:
        older = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        session.data["n"].append(2)
        await cache.store(session)
        await cache.delete_expired(storage.clock.now())  # drops the copy of the write
        await storage.inner.store(session)
        newer = asyncio.create_task(cache.load(session.id))
        await anyio.wait_all_tasks_blocked()
        assert loads(storage) == 2

    assert (await older).data == {"n": [1]}
    assert (await newer).data == {"n": [1, 2]}
    assert (await cache.load(session.id)).data == {"n": [1, 2]}


async def test_overtaken_load_leaves_no_copy() -> None:
    """A load that took longer than `max_staleness` does not replace the copy of a later one."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache(serve_stale_for=100)

    async with storage.held("after load") as gate:
        slow = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(10)
        storage.intercept_nothing()
        await storage.inner.store(session)
        assert await cache.load(session.id) == session
    assert (await slow).revision != session.revision

    assert (await cache.load(session.id)).revision == session.revision
    assert loads(storage) == 2
    storage.clock.advance(10)
    storage.intercept(unavailable_at())
    assert (await cache.load(session.id)).revision == session.revision


async def test_absence_is_not_cached() -> None:
    """A session that another replica creates is found at once."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())

    with pytest.raises(SessionNotFound):
        await cache.load(session.id)
    await storage.inner.store(session)

    assert await cache.load(session.id) == session


async def test_deadline_is_exact_on_hits() -> None:
    """A late answer of the storage does not carry a session past it."""
    storage = RemoteStorage()
    deadline = storage.clock.now() + timedelta(seconds=3)
    session = await stored(storage, expires_at=deadline)
    cache = storage.cache(serve_stale_for=100)

    async with storage.held("after load") as gate:
        late = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(2.999)
    assert await late == await cache.load(session.id) == session
    await cache.delete_expired(storage.clock.now() - timedelta(days=1))  # drops the copy

    async with storage.held("after load") as gate:
        late = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(0.001)
    with pytest.raises(SessionNotFound):
        await late
    storage.intercept(unavailable_at())
    with pytest.raises(StorageUnavailable):
        await cache.load(session.id)


class PickyError(Exception):
    """An error that cannot be copied."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} {two}")


@on_both
@pytest.mark.parametrize(
    "make", [lambda: StorageUnavailable("down", in_doubt=True), lambda: PickyError("so", "sad")]
)
async def test_error_of_a_shared_load_reaches_each_caller(make: Callable[[], Exception]) -> None:
    """With its attributes, its cause and the frames of the load."""
    storage = RemoteStorage()
    cache, errors = storage.cache(), list[Any]()
    id = new_session_id()

    async def fail(_: int, __: str) -> None:
        await anyio.wait_all_tasks_blocked()
        raise make() from KeyError("cause")

    async def load(private: str) -> None:
        assert private
        try:
            await cache.load(id)
        except Exception as error:  # noqa: BLE001 - that is the question
            errors.append(error)

    storage.intercept(fail)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(load, f"private-{number}")

    assert (len(errors), loads(storage)) == (3, 1)
    for error in errors:
        assert type(error) is type(make())
        assert (str(error), vars(error)) == (str(make()), vars(make()))
        assert isinstance(error.__cause__, KeyError)
        assert "in fail" in locals_in(error)
        if isinstance(error, StorageUnavailable):
            assert locals_in(error).count("private-") == 1


async def test_storage_judges_deadlines_of_fresh_loads() -> None:
    """A process whose clock is ahead ends no session that lives for the others."""
    storage, ahead = RemoteStorage(), FakeClock()
    session = await stored(storage, expires_at=storage.clock.now() + timedelta(seconds=20))
    ahead.advance(30)
    cache = NearCache(storage, max_staleness=10, clock=ahead)

    assert await cache.load(session.id) == session


async def test_load_cancelled_before_its_first_step_is_begun_anew() -> None:
    """An application may cancel all tasks that it does not know."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    caller = asyncio.create_task(cache.load(session.id))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {caller, asyncio.current_task()}:
        task.cancel()
    with contextlib.suppress(StorageUnavailable):
        await caller

    assert await cache.load(session.id) == session
    assert not cache._copies._pending

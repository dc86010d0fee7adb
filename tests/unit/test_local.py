"""`LocalStorage` beyond the contract: checkpoints, atomic verbs, sweeps, and its settings."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from aiosessions import (
    CorruptSession,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    Session,
    SessionError,
    SessionNotFound,
    StorageClosed,
    When,
)
from aiosessions.local import LocalStatistics
from aiosessions.testing import FakeClock
from aiosessions.testing._spoiling import SpoilingCodec
from tests.support.loops import on_both

Storage = LocalStorage[Any]
Verb = Callable[[Storage], Coroutine[Any, Any, object]]

# Each verb on the session "x", which is stored.
VERBS: dict[str, Verb] = {
    "store": lambda storage: storage.store(Session(id="x", data="new")),
    "load": lambda storage: storage.load("x"),
    "delete": lambda storage: storage.delete("x"),
    "delete_expired": lambda storage: storage.delete_expired(FakeClock().now() + timedelta(days=1)),
    "aclose": lambda storage: storage.aclose(),
}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
each_cancellable_verb = pytest.mark.parametrize(
    "verb", [VERBS[name] for name in VERBS if name != "aclose"], ids=list(VERBS)[:-1]
)


async def storage_with(*ids: str, clock: FakeClock | None = None, **fields: Any) -> Storage:
    """A storage with a TTL of 60 seconds, and with a session under each id."""
    storage = Storage(ttl=60, clock=clock or FakeClock())
    for id in ids:
        await storage.store(Session(id=id, **fields))
    return storage


async def data_of(storage: Storage, id: str) -> object:
    """Return the data of a session, or the class of the error that loading it raises."""
    try:
        return (await storage.load(id)).data
    except SessionError as error:
        return type(error)


@on_both
@each_verb
async def test_verb_lets_another_task_run(verb: Verb) -> None:
    """A loop of verbs does not keep the event loop for itself."""
    storage = await storage_with("x")
    turns: list[str] = []

    async def other() -> None:
        turns.append("other")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        for _ in range(2):  # the first turn of trio may come before that of the other task
            await verb(storage)
        turns.append("verb")

    assert turns == ["other", "verb"]


@on_both
@each_cancellable_verb
async def test_verb_in_a_cancelled_scope_does_nothing(verb: Verb) -> None:
    """It raises the cancellation, and the stored session is as before."""
    clock = FakeClock()
    storage = await storage_with("x", clock=clock, data="old")
    clock.advance(30)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await verb(storage)

    assert scope.cancelled_caught
    clock.advance(29.999)
    assert storage.statistics().sessions == 1
    assert await data_of(storage, "x") == "old"


@on_both
async def test_cancelled_load_does_not_renew() -> None:
    """The TTL runs on from the last load that returned."""
    clock = FakeClock()
    storage = await storage_with("x", clock=clock)
    clock.advance(30)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await storage.load("x")

    clock.advance(30)
    assert await data_of(storage, "x") is SessionNotFound


@pytest.mark.parametrize("delay", range(4))
async def test_task_that_has_written_returns(delay: int) -> None:
    """A native cancellation of asyncio comes before the write or after the return."""
    storage = await storage_with("x", data="old")
    session = Session[Any](id="x", data="new")
    task = asyncio.create_task(storage.store(session))
    for _ in range(delay):
        await asyncio.sleep(0)

    task.cancel()
    await asyncio.wait([task])

    assert await data_of(storage, "x") == ("old" if task.cancelled() else "new")
    assert bool(session.revision) == (not task.cancelled())


@each_verb
async def test_verb_yields_once_before_it_acts(verb: Verb) -> None:
    """No other task can run between its decision and its action."""
    storage = await storage_with("x", data="old")
    coroutine = verb(storage)

    coroutine.send(None)
    with pytest.raises(StopIteration):
        coroutine.send(None)


@each_cancellable_verb
async def test_verb_at_its_checkpoint_is_refused_after_closing(verb: Verb) -> None:
    """It raises `StorageClosed`, and a closed storage stores nothing."""
    storage = await storage_with("x")
    coroutine = verb(storage)
    coroutine.send(None)

    await storage.aclose()

    with pytest.raises(StorageClosed):
        coroutine.send(None)
    assert storage.statistics() == LocalStatistics(sessions=0, bytes=0, evictions=0)


@on_both
async def test_closing_in_a_cancelled_scope_masks_no_error() -> None:
    """The error that ends an `async with` comes out of it, and the storage is closed."""
    storage = await storage_with("x")

    async def fail_in_a_cancelled_scope() -> None:
        with anyio.CancelScope() as scope:
            async with storage:
                scope.cancel()
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_in_a_cancelled_scope()
    with pytest.raises(StorageClosed):
        await storage.load("x")


async def test_load_past_the_deadline_does_not_renew() -> None:
    """The TTL of a session past its deadline runs on, as a wall clock that steps back shows."""
    clock = FakeClock()
    deadline = clock.now() + timedelta(seconds=10)
    storage = await storage_with("x", clock=clock, expires_at=deadline)
    clock.advance(30)
    assert await data_of(storage, "x") is SessionNotFound

    clock.set_back(30)
    clock.advance(30)

    assert await data_of(storage, "x") is SessionNotFound


async def test_load_of_an_unreadable_record_does_not_renew() -> None:
    """The record expires one TTL after its last use, to the millisecond."""
    clock, codec = FakeClock(), SpoilingCodec()
    storage = LocalStorage(ttl=60, codec=codec, clock=clock)
    await storage.store(Session(id="x"))
    codec.refusal = CorruptSession()
    clock.advance(59.999)
    assert await data_of(storage, "x") is CorruptSession
    clock.advance(0.001)

    codec.refusal = None

    assert await data_of(storage, "x") is SessionNotFound


EXPIRED = 3_000  # many more than one batch of a sweep


async def expired_storage(*live: str) -> Storage:
    """A storage with expired sessions, named by numbers, and with live ones."""
    clock = FakeClock()
    storage = await storage_with(*(f"{n}" for n in range(EXPIRED)), clock=clock)
    clock.advance(60)
    for id in live:
        await storage.store(Session(id=id))
    return storage


@on_both
async def test_long_sweep_lets_others_run() -> None:
    """Other tasks run between its batches, and a session that they recreate stays."""
    storage = await expired_storage()
    last = f"{EXPIRED - 1}"
    finished = anyio.Event()
    turns = 0

    async def others() -> None:
        nonlocal turns
        await storage.store(Session(id=last), when=When.ABSENT)
        while not finished.is_set():
            turns += 1
            await storage.load(last)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        removed = await storage.delete_expired()
        finished.set()

    assert turns > 10
    assert removed == EXPIRED - 1
    assert (await storage.load(last)).id == last


@on_both
async def test_cancelled_sweep_can_be_continued() -> None:
    """The next sweep removes the sessions that a cancelled one has left."""
    storage = await expired_storage("live")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(storage.delete_expired)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()

    assert 0 < await storage.delete_expired() < EXPIRED
    assert storage.statistics().sessions == 1


@on_both
async def test_concurrent_sweeps_count_each_session_once() -> None:
    """The counts of two sweeps add up to the expired sessions."""
    storage = await expired_storage()
    counts: list[int] = []

    async def sweep() -> None:
        counts.append(await storage.delete_expired())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sweep)
        tasks.start_soon(sweep)

    assert sum(counts) == EXPIRED
    assert min(counts) > 0


@on_both
async def test_closing_ends_a_sweep() -> None:
    """A sweep in flight returns the number of sessions that it has removed."""
    storage = await expired_storage()
    removed: list[int] = []

    async def sweep() -> None:
        removed.append(await storage.delete_expired())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sweep)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        await storage.aclose()

    assert 0 < removed[0] < EXPIRED


async def test_statistics_count_sessions_bytes_and_evictions() -> None:
    """An expired session counts until it is swept, and is not an eviction."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, max_sessions=2, clock=clock)
    assert storage.statistics() == LocalStatistics(sessions=0, bytes=0, evictions=0)
    await storage.store(Session(id="a", data="x" * 1_000))
    await storage.store(Session(id="b"))
    await storage.store(Session(id="c"))
    clock.advance(60)

    statistics = storage.statistics()

    assert (statistics.sessions, statistics.evictions) == (2, 1)
    assert 100 < statistics.bytes < 500
    await storage.delete_expired()
    assert storage.statistics() == LocalStatistics(sessions=0, bytes=0, evictions=1)


async def test_least_recently_used_session_is_evicted() -> None:
    """A load is use, and a refused write is not."""
    storage = LocalStorage[Any](ttl=60, max_sessions=2, clock=FakeClock())
    await storage.store(Session(id="a"))
    await storage.store(Session(id="b"))
    await storage.load("a")
    for when in (When.PRESENT, When.UNCHANGED):
        with pytest.raises(SessionNotFound):
            await storage.store(Session(id="c"), when=when)
    with pytest.raises(SessionError):
        await storage.store(Session(id="b"), when=When.ABSENT)

    await storage.store(Session(id="d"))

    assert [await data_of(storage, id) for id in "abd"] == [None, SessionNotFound, None]


def test_settings_are_public() -> None:
    """The codec is the given object, and the TTL is in seconds."""
    codec = MsgpackCodec[int](int)
    storage = LocalStorage(ttl=timedelta(milliseconds=1_500), codec=codec)

    assert storage.codec is codec
    assert storage.ttl == 1.5
    assert repr(storage) == "LocalStorage(ttl=1.5, sessions=0)"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ttl": 0}, ValueError, "ttl"),
        ({"ttl": "60"}, TypeError, "ttl"),
        ({"max_sessions": 0}, ValueError, "max_sessions must be at least 1, not 0"),
        ({"max_sessions": 1e5}, TypeError, "max_sessions is an int, not float"),
        ({"max_sessions": True}, TypeError, "max_sessions is an int, not bool"),
        ({"codec": JsonCodec}, TypeError, r"codec=JsonCodec\(\)"),
        ({"codec": dict}, TypeError, r"codec=JsonCodec\(dict\)"),
        ({"codec": None}, TypeError, "NoneType is not a codec"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The constructor raises, and the message names the setting and its mend."""
    with pytest.raises(error, match=message):
        LocalStorage(**{"ttl": 60, **settings})

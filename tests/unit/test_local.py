"""`LocalStorage` beyond the contract: checkpoints, atomic verbs, sweeps, and its settings."""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    Session,
    SessionError,
    SessionNotFound,
    StorageClosed,
    When,
    session_digest,
)
from aiosessions.local import LocalStatistics
from aiosessions.testing import FakeClock
from tests.support.loops import on_both

Storage = LocalStorage[Any]
Verb = Callable[[Storage], Coroutine[Any, Any, object]]

# Each verb on the session "x" of alice, which is stored.
CANCELLABLE: dict[str, Verb] = {
    "store": lambda storage: storage.store(Session(id="x", data="new")),
    "load": lambda storage: storage.load("x"),
    "delete": lambda storage: storage.delete("x"),
    "list": lambda storage: storage.list("alice"),
    "count": lambda storage: storage.count("alice"),
    "revoke": lambda storage: storage.revoke("alice", session_digest("x")),
    "revoke_all": lambda storage: storage.revoke_all("alice"),
    "trim": lambda storage: storage.trim("alice", 1, keep="y"),
    "delete_expired": lambda storage: storage.delete_expired(FakeClock().now() + timedelta(days=1)),
}
VERBS: dict[str, Verb] = CANCELLABLE | {"aclose": lambda storage: storage.aclose()}


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


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_verb_yields_once_before_it_acts(verb: Verb) -> None:
    """Other tasks can run before its decision, but not between its decision and its action."""
    storage = await storage_with("x", "y", data="old", principal="alice")
    coroutine = verb(storage)

    coroutine.send(None)
    with pytest.raises(StopIteration):
        coroutine.send(None)


@pytest.mark.parametrize("verb", CANCELLABLE.values(), ids=CANCELLABLE)
@pytest.mark.parametrize(("wait", "expected"), [(29.999, "old"), (30, SessionNotFound)])
@on_both
async def test_verb_in_a_cancelled_scope_does_nothing(
    verb: Verb, wait: float, expected: object
) -> None:
    """It raises the cancellation, and neither changes nor renews the stored session."""
    clock = FakeClock()
    storage = await storage_with("x", "y", clock=clock, data="old", principal="alice")
    clock.advance(30)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await verb(storage)

    assert scope.cancelled_caught
    clock.advance(wait)
    assert storage.statistics().sessions == 2
    assert await data_of(storage, "x") == expected


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
    """The TTL runs on, as a wall clock that steps back shows."""
    clock = FakeClock()
    deadline = clock.now() + timedelta(seconds=10)
    storage = await storage_with("x", clock=clock, expires_at=deadline)
    clock.advance(30)
    assert await data_of(storage, "x") is SessionNotFound

    clock.set_back(30)
    clock.advance(30)

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


@pytest.mark.parametrize("how", ["cancel", "close"])
@on_both
async def test_sweep_can_be_interrupted(how: str) -> None:
    """The next sweep removes the rest; closing ends a sweep early."""
    storage = await expired_storage("live")
    removed: list[int] = []

    async def sweep() -> None:
        removed.append(await storage.delete_expired())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sweep)
        for _ in range(5):
            await checkpoint()
        if how == "close":
            await storage.aclose()
        else:
            tasks.cancel_scope.cancel()

    if how == "cancel":
        removed.append(await storage.delete_expired())
        assert storage.statistics().sessions == 1
    assert 0 < removed[0] < EXPIRED


async def test_statistics_count_sessions_bytes_and_evictions() -> None:
    """An expired session counts until it is swept, and is not an eviction."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, max_sessions=2, clock=clock)
    for id, data in (("a", "x" * 1_000), ("b", ""), ("c", "")):
        await storage.store(Session(id=id, data=data))
    clock.advance(60)

    statistics = storage.statistics()

    assert (statistics.sessions, statistics.evictions) == (2, 1)
    assert 100 < statistics.bytes < 500
    await storage.delete_expired()
    assert storage.statistics() == LocalStatistics(sessions=0, bytes=0, evictions=1)
    await storage.store(Session(id="d"))
    await storage.aclose()
    assert storage.statistics() == LocalStatistics(sessions=0, bytes=0, evictions=1)


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

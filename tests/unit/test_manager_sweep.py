"""The sweeps of a manager, and entering and leaving it."""

import asyncio
import contextvars
import gc
import logging
import weakref
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import CorruptSession, SessionManager, SessionNotFound, StorageUnavailable
from tests.support.loops import on_both
from tests.support.storages import Replicas


class Sweeps:
    """An interception that counts sweeps, and lets a test wait for them.

    Attributes:
        count: The number of sweeps so far.
        error: The error of each further sweep, or None.
    """

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self._wanted = 0
        self._reached = anyio.Event()

    async def __call__(self, _: int, name: str) -> None:
        """Count the call if it is a sweep."""
        if name == "before delete_expired":
            self.count += 1
            if self.count >= self._wanted:
                self._reached.set()
            if self.error is not None:
                raise self.error

    async def more(self, count: int) -> None:
        """Wait for a number of further sweeps."""
        self._wanted = self.count + count
        self._reached = anyio.Event()
        await self._reached.wait()


def sweeping(**options: Any) -> tuple[Replicas, Sweeps]:
    """Replicas of which the first one sweeps all the time."""
    r = Replicas(sweep_interval=0.001, **options)
    sweeps = Sweeps()
    r.storage.intercept(sweeps)
    return r, sweeps


def running() -> int:
    """The number of tasks."""
    return len(anyio.get_running_tasks())


# Sweeps


@on_both
async def test_sweeps_remove_expired_sessions() -> None:
    """Expired sessions are removed while the manager is entered; live ones stay."""
    r, sweeps = sweeping(ttl=60)

    async with r.sessions:
        for _ in range(2):
            dead = await r.sessions.create()
            r.clock.advance(60)
            alive = await r.sessions.create()
            await sweeps.more(2)
            assert r.storage.inner.statistics().sessions == 1
            assert await r.sessions.get(alive.id) == alive
            with pytest.raises(SessionNotFound):
                await r.sessions.get(dead.id)


@on_both
async def test_sweeps_end_with_the_manager() -> None:
    """Leaving the manager leaves no task, and no sweep comes later."""
    r, sweeps = sweeping()
    before = running()

    async with r.sessions:
        await sweeps.more(1)
    tasks, count = running(), sweeps.count
    for _ in range(20):
        await checkpoint()

    assert tasks == before
    assert sweeps.count == count


@on_both
async def test_leaving_cancels_a_hanging_sweep() -> None:
    """Leaving the manager does not wait for a storage that does not answer."""
    r = Replicas(sweep_interval=0.001)
    begun = anyio.Event()

    async def hang(_: int, __: str) -> None:
        begun.set()
        await anyio.sleep_forever()

    r.storage.intercept(hang)
    async with r.sessions:
        await begun.wait()


@on_both
async def test_nothing_runs_without_an_interval() -> None:
    """A manager without sweeps starts no task, and need not be entered."""
    r = Replicas()
    before = running()

    async with r.sessions as entered:
        assert entered is r.sessions
        assert running() == before

    assert await r.sessions.get((await r.sessions.create()).id)
    assert "delete_expired" not in r.storage.calls


@pytest.mark.parametrize(
    "error", [StorageUnavailable, CorruptSession, OSError], ids=lambda error: error.__name__
)
@on_both
async def test_sweeps_survive_errors(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure and the next success are logged, without an id or a payload."""
    caplog.set_level(logging.INFO)
    r, sweeps = sweeping()
    session = await r.sessions.create(principal="alice", data="payload")
    text = f"no answer for {session.id} of alice" if error is OSError else "no answer"
    sweeps.error = error(text)

    async with r.sessions:
        await sweeps.more(3)
        sweeps.error = None
        await sweeps.more(3)
        assert await r.rival.get(session.id) == session

    records = [record for record in caplog.records if record.name.startswith("aiosessions")]
    assert [record.levelno for record in records] == [logging.WARNING, logging.INFO]
    assert (error.__name__ if error is OSError else text) in records[0].message
    for secret in (session.id, "alice", "payload"):
        assert secret not in caplog.text


@on_both
async def test_sweeps_do_not_hold_the_context_of_their_creator() -> None:
    """The value of a context variable is freed, although the sweeps go on."""

    class Request:
        pass

    request: contextvars.ContextVar[Request] = contextvars.ContextVar("request")
    r, sweeps = sweeping()
    value = Request()
    reference = weakref.ref(value)
    token = request.set(value)
    await r.sessions.__aenter__()
    request.reset(token)
    del value, token

    await sweeps.more(2)
    gc.collect()
    assert reference() is None
    await r.sessions.__aexit__(None, None, None)


# Entering and leaving


@pytest.mark.parametrize("interval", [None, 0.001])
@on_both
async def test_manager_is_entered_once_at_a_time(interval: float | None) -> None:
    """Entering it twice is a `RuntimeError`; entering it again later works."""
    r = Replicas(sweep_interval=interval)
    before = running()

    for _ in range(2):
        async with r.sessions:
            with pytest.raises(RuntimeError, match="entered already"):
                await r.sessions.__aenter__()

    assert running() == before
    assert "aclose" not in r.storage.calls  # the storage is borrowed
    assert await r.sessions.create()


@on_both
async def test_manager_can_be_left_in_another_task() -> None:
    """A manager may be entered in one task and left in another, as test fixtures do."""
    r, sweeps = sweeping()
    before = running()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(r.sessions.__aenter__)
    await sweeps.more(2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(r.sessions.__aexit__, None, None, None)

    assert running() == before


def test_manager_can_be_left_after_its_loop_was_closed() -> None:
    """The sweeps have ended with their loop, and the manager can be entered in a new one."""
    r = Replicas(sweep_interval=60)

    for _ in range(2):
        asyncio.run(r.sessions.__aenter__())
        asyncio.run(r.sessions.__aexit__(None, None, None))


async def fail_within(sessions: SessionManager[Any]) -> None:
    """Raise an error while the manager is entered."""
    async with sessions:
        await checkpoint()
        raise ZeroDivisionError


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_errors_leave_the_manager_unchanged(interval: float | None) -> None:
    """An error is neither wrapped in a group nor replaced."""
    r = Replicas(sweep_interval=interval)

    with pytest.raises(ZeroDivisionError):
        await fail_within(r.sessions)


@on_both
async def test_error_is_not_masked_by_a_cancellation() -> None:
    """An error that leaves a cancelled manager is reported."""
    r, sweeps = sweeping()
    before = running()

    async def fail() -> None:
        async with r.sessions:
            await sweeps.more(1)
            scope.cancel()
            raise ZeroDivisionError

    with anyio.CancelScope() as scope, pytest.raises(ZeroDivisionError):
        await fail()

    assert running() == before


async def test_error_is_not_masked_by_a_cancelled_asyncio_task() -> None:
    """The same holds for `asyncio.Task.cancel`; without an error the task is cancelled."""
    r = Replicas(sweep_interval=60)

    async def leave(error: Exception | None) -> None:
        async with r.sessions:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        await asyncio.create_task(leave(ZeroDivisionError()))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(leave(None))
    await checkpoint()

    assert running() == 1


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_cancellation_passes_through_the_manager(interval: float | None) -> None:
    """A manager inside a cancelled scope ends with it."""
    r = Replicas(sweep_interval=interval)
    before = running()
    after = False

    with anyio.CancelScope() as scope:
        async with r.sessions:
            scope.cancel()
            await checkpoint()
        after = True

    assert scope.cancelled_caught
    assert not after
    assert running() == before


async def test_manager_can_be_left_after_its_sweeps_were_cancelled() -> None:
    """A shutdown helper that cancels all tasks does not disturb the manager."""
    r = Replicas(sweep_interval=60)

    async with r.sessions:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others)

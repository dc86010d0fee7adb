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

from aiosessions import SessionManager, SessionNotFound, StorageUnavailable
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


every_interval = pytest.mark.parametrize("interval", [None, 60])


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


@pytest.mark.parametrize("cancelled", [False, True])
@on_both
async def test_leaving_cancels_a_sweep_and_awaits_it(*, cancelled: bool) -> None:
    """A sweep that hangs is cancelled. Leaving waits for its end, even in a cancelled scope."""
    r = Replicas(sweep_interval=0.001)
    before = running()
    begun = anyio.Event()
    ended = False

    async def hang(_: int, name: str) -> None:
        nonlocal ended
        if name == "before delete_expired":
            begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    for _ in range(5):
                        await checkpoint()
                ended = True

    r.storage.intercept(hang)
    with anyio.CancelScope() as scope:
        async with r.sessions:
            await begun.wait()
            if cancelled:
                scope.cancel()
                await checkpoint()

    assert scope.cancelled_caught is cancelled
    assert ended
    assert running() == before


@pytest.mark.parametrize("error", [StorageUnavailable, OSError])
@on_both
async def test_sweeps_survive_errors(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure and the next success are logged, without foreign texts."""
    caplog.set_level(logging.INFO)
    r, sweeps = sweeping()
    sweeps.error = error("no answer")

    async with r.sessions:
        await sweeps.more(3)
        sweeps.error = None
        await sweeps.more(3)

    logged = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    reason = "OSError" if error is OSError else "no answer"
    assert [line for line in logged if line[0] == "aiosessions"] == [
        ("aiosessions", "WARNING", f"sweeps fail: {reason}"),
        ("aiosessions", "INFO", "sweeps succeed again"),
    ]


@on_both
async def test_sweeps_do_not_hold_their_creators_context() -> None:
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


@every_interval
@on_both
async def test_manager_is_entered_once_at_a_time(interval: float | None) -> None:
    """Entering it twice is a `RuntimeError`; entering it again later works."""
    r = Replicas(sweep_interval=interval)
    before = running()

    for _ in range(2):
        async with r.sessions as entered:
            assert entered is r.sessions
            assert running() == before + (interval is not None)
            with pytest.raises(RuntimeError, match="entered already"):
                await r.sessions.__aenter__()

    assert running() == before
    assert r.storage.calls == []  # the storage is borrowed, and stays open
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


def test_manager_can_be_left_after_its_loop() -> None:
    """The sweeps end with their loop, and the manager can be entered again."""
    r = Replicas(sweep_interval=60)

    for _ in range(2):
        asyncio.run(r.sessions.__aenter__())
        asyncio.run(r.sessions.__aexit__(None, None, None))


@pytest.mark.parametrize("cancelled", [False, True])
@every_interval
@on_both
async def test_error_leaves_the_manager_unchanged(
    interval: float | None, *, cancelled: bool
) -> None:
    """An error is neither wrapped in a group nor replaced, even in a cancelled scope."""
    r = Replicas(sweep_interval=interval)
    before = running()

    async def fail(sessions: SessionManager[Any], scope: anyio.CancelScope) -> None:
        async with sessions:
            await checkpoint()
            if cancelled:
                scope.cancel()
            raise ZeroDivisionError

    with anyio.CancelScope() as scope, pytest.raises(ZeroDivisionError):
        await fail(r.sessions, scope)

    assert running() == before


async def test_error_is_not_masked_by_task_cancellation() -> None:
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


async def test_manager_can_be_left_after_cancelled_sweeps() -> None:
    """A shutdown helper that cancels all tasks does not disturb the manager."""
    r = Replicas(sweep_interval=60)

    async with r.sessions:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others)

"""The manager's sweep, and what entering and leaving a manager does."""

import logging
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    CorruptSession,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
)
from tests.backends import on_both
from tests.hooked import Setting


class Sweeps:
    """A hook that counts sweeps, and lets the test wait for some."""

    def __init__(self, *, failing: Exception | None = None) -> None:
        self.count = 0
        self._failing = failing
        self._wanted = 0
        self._reached = anyio.Event()

    async def __call__(self, _: int, name: str) -> None:
        """Count it, if it is one."""
        if name == "before delete_expired":
            self.count += 1
            if self.count >= self._wanted:
                self._reached.set()
            if self._failing is not None:
                raise self._failing

    async def more(self, count: int) -> None:
        """Wait for so many more."""
        self._wanted = self.count + count
        self._reached = anyio.Event()
        await self._reached.wait()


@on_both
async def test_the_sweep_removes_what_has_expired() -> None:
    """Again and again while the manager is entered; what is alive stays."""
    s = Setting(ttl=60, sweep_interval=0.001)
    sweeps = Sweeps()
    s.storage.watch(sweeps)

    async with s.sessions:
        for _ in range(2):
            dead = await s.sessions.create()
            s.clock.advance(60)
            alive = await s.sessions.create()
            await sweeps.more(2)
            assert await s.storage.inner.delete_expired() == 0
            assert await s.sessions.get(alive.id) == alive
            with pytest.raises(SessionNotFound):
                await s.sessions.get(dead.id)


@on_both
async def test_the_sweep_ends_with_the_manager() -> None:
    """Leaving the manager leaves no task behind, and no sweep comes later."""
    s = Setting(sweep_interval=0.001)
    sweeps = Sweeps()
    s.storage.watch(sweeps)
    before = len(anyio.get_running_tasks())

    async with s.sessions:
        await sweeps.more(1)
    tasks, count = len(anyio.get_running_tasks()), sweeps.count
    for _ in range(20):
        await checkpoint()

    assert tasks == before
    assert sweeps.count == count


@on_both
async def test_a_sweep_that_hangs_is_ended_too() -> None:
    """Leaving the manager does not wait for a storage that does not answer."""
    s = Setting(sweep_interval=0.001)
    begun = anyio.Event()

    async def hang(_: int, __: str) -> None:
        begun.set()
        await anyio.sleep_forever()

    s.storage.watch(hang)
    async with s.sessions:
        await begun.wait()


@on_both
async def test_without_an_interval_nothing_runs() -> None:
    """A manager is then nothing but its methods, and may be used without being entered."""
    s = Setting()
    before = len(anyio.get_running_tasks())

    async with s.sessions as entered:
        assert entered is s.sessions
        assert len(anyio.get_running_tasks()) == before

    assert await s.sessions.get((await s.sessions.create()).id)
    assert "delete_expired" not in s.storage.calls


@pytest.mark.parametrize(
    "error", [StorageUnavailable, CorruptSession, OSError], ids=lambda error: error.__name__
)
@on_both
async def test_the_sweep_outlives_an_outage(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next sweep is tried; the application goes on.

    The log says what was wrong, and no id: not even if what somebody's storage raised, which is
    no error of ours, quotes one.
    """
    caplog.set_level(logging.DEBUG)
    s = Setting(sweep_interval=0.001)
    session = await s.sessions.create(principal="alice", data="payload")
    reason = f"no answer for {session.id} of alice" if error is OSError else "no answer"
    sweeps = Sweeps(failing=error(reason))
    s.storage.watch(sweeps)

    async with s.sessions:
        await sweeps.more(3)
        assert await s.rival.get(session.id) == session

    records = [record for record in caplog.records if record.name.startswith("aiosessions")]
    assert len(records) >= 2
    assert all(record.levelno >= logging.WARNING for record in records)
    assert error.__name__ in caplog.text or reason in caplog.text
    for secret in (session.id, "alice", "payload"):
        assert secret not in caplog.text


async def fail_within(sessions: SessionManager[Any]) -> None:
    """Raise something while the manager is entered."""
    async with sessions:
        await checkpoint()
        raise ZeroDivisionError


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_errors_pass_through_the_manager(interval: float | None) -> None:
    """What is raised inside comes out as it is, sweep or not: no group is wrapped around it."""
    s = Setting(sweep_interval=interval)

    with pytest.raises(ZeroDivisionError):
        await fail_within(s.sessions)


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_cancellation_passes_through_the_manager(interval: float | None) -> None:
    """A manager inside a scope that is cancelled ends with it, and swallows nothing else."""
    s = Setting(sweep_interval=interval)
    before = len(anyio.get_running_tasks())
    after = False

    with anyio.CancelScope() as scope:
        async with s.sessions:
            scope.cancel()
            await checkpoint()
        after = True

    assert scope.cancelled_caught
    assert not after
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.parametrize("interval", [None, 0.001])
@on_both
async def test_the_storage_is_borrowed(interval: float | None) -> None:
    """Leaving the manager leaves the storage open; a manager may be entered again."""
    s = Setting(sweep_interval=interval)
    session = await s.sessions.create()

    for _ in range(2):
        async with s.sessions:
            pass

    assert "aclose" not in s.storage.calls
    assert await s.sessions.get(session.id) == session

"""`SessionManager.mutate`: load, change, save; and again, if somebody else was faster."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    InvalidSession,
    Session,
    SessionConflict,
    SessionNotFound,
    StorageUnavailable,
)
from tests.backends import on_both
from tests.hooked import Setting, unavailable


def increment(session: Session[Any]) -> None:
    """Add one."""
    session.data = (session.data or 0) + 1


@on_both
async def test_mutate_changes_what_is_stored() -> None:
    """It loads, changes and saves, and returns the session as saved, with its dates stamped."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.clock.advance(1)
    s.storage.watch()

    changed = await s.sessions.mutate(session.id, increment)

    assert changed.data == 2
    assert changed.updated_at == s.clock.now()
    assert s.storage.calls == ["load", "store unchanged"]
    assert await s.sessions.get(session.id) == changed
    assert session.data == 1


@on_both
async def test_mutate_takes_an_async_change() -> None:
    """A coroutine function is awaited."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await checkpoint()
        increment(session)

    changed = await s.sessions.mutate(session.id, change)

    assert changed.data == 2
    assert await s.sessions.get(session.id) == changed


@pytest.mark.parametrize("value", [0, False, "", [], "tea"], ids=repr)
@on_both
async def test_mutate_returns_what_the_change_returned(value: object) -> None:
    """Anything but None comes back beside the session, however false it is."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> object:
        increment(session)
        return value

    async def change_slowly(session: Session[Any]) -> Any:
        await checkpoint()
        return change(session)

    first, returned = await s.sessions.mutate(session.id, change)
    mutate: Any = s.sessions.mutate  # checkers cannot tell an awaitable from any object
    second, awaited = await mutate(session.id, change_slowly)

    assert (first.data, returned) == (2, value)
    assert (second.data, awaited) == (3, value)


@on_both
async def test_a_change_that_raises_abandons_the_write() -> None:
    """Its exception comes out as it is, and nothing is stored; nor is it tried again."""
    s = Setting()
    session = await s.sessions.create(data=1)
    runs = 0

    def change(session: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        session.data = 99
        raise ZeroDivisionError

    async def change_slowly(session: Session[Any]) -> None:
        await checkpoint()
        change(session)

    s.storage.watch()
    for each in (change, change_slowly):
        with pytest.raises(ZeroDivisionError):
            await s.sessions.mutate(session.id, each)

    assert runs == 2
    assert s.storage.calls == ["load", "load"]
    assert await s.sessions.get(session.id) == session


@on_both
async def test_a_conflict_of_the_changes_own_is_not_retried() -> None:
    """A `SessionConflict` that the change itself raises abandons the write, like any exception."""
    s = Setting()
    session = await s.sessions.create(data=1)
    runs = 0

    def change(_: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        message = "two windows"
        raise SessionConflict(message)

    with pytest.raises(SessionConflict, match="two windows"):
        await s.sessions.mutate(session.id, change)

    assert runs == 1


def interfere(s: Setting, id: str, times: float) -> Callable[[int, str], Any]:
    """A hook: somebody else writes before we do, so many times."""

    async def hook(_: int, name: str) -> None:
        nonlocal times
        if name == "before store unchanged" and times > 0:
            times -= 1
            other = await s.rival.get(id)
            other.metadata["seen"] = f"{int(other.metadata.get('seen', 0)) + 1}"
            await s.rival.save(other)

    return hook


@on_both
async def test_after_a_conflict_the_change_is_redone() -> None:
    """On a fresh copy, so that neither change is lost; the last run's value is returned."""
    s = Setting()
    session = await s.sessions.create(data=1)
    seen: list[Session[Any]] = []

    def change(session: Session[Any]) -> int:
        seen.append(session)
        increment(session)
        return len(seen)

    s.storage.watch(interfere(s, session.id, 3))
    changed, value = await s.sessions.mutate(session.id, change)

    assert (changed.data, changed.metadata, value) == (2, {"seen": "3"}, 4)
    assert len({id(each) for each in seen}) == 4
    assert s.storage.calls == ["load", "store unchanged"] * 4
    assert await s.sessions.get(session.id) == changed


@pytest.mark.parametrize("attempts", [1, 2, 5])
@on_both
async def test_attempts_are_bounded(attempts: int) -> None:
    """After so many conflicts `SessionConflict` comes out; what others wrote is stored."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=attempts)

    assert s.storage.calls == ["load", "store unchanged"] * attempts
    stored = await s.rival.get(session.id)
    assert (stored.data, stored.metadata) == (1, {"seen": str(attempts)})


@on_both
async def test_the_time_for_attempts_is_bounded() -> None:
    """However many are allowed: `SessionConflict` once the time is over."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=10**9, timeout=0.02)
    tried = len(s.storage.calls)
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, timeout=0)

    assert tried >= 2
    assert len(s.storage.calls) == tried + 2


@on_both
async def test_thousands_of_attempts_end_like_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between them do not grow without bound, nor out of what a float can hold."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=1_100, timeout=600)


@on_both
async def test_concurrent_changes_all_count() -> None:
    """Many callers that change the same session at once lose nothing."""
    s = Setting()
    session = await s.sessions.create(data=0)

    async def change(session: Session[Any]) -> None:
        value = session.data or 0
        await checkpoint()
        session.data = value + 1

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(s.sessions.mutate, session.id, change)

    assert (await s.sessions.get(session.id)).data == 12


@on_both
async def test_a_change_leaves_the_id_alone() -> None:
    """A change that sets another id is `InvalidSession`: nothing is stored under either."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> None:
        session.id = "another"

    with pytest.raises(InvalidSession):
        await s.sessions.mutate(session.id, change)

    assert await s.sessions.get(session.id) == session
    with pytest.raises(SessionNotFound):
        await s.sessions.get("another")


@on_both
async def test_a_change_to_what_cannot_be_stored_is_refused() -> None:
    """`InvalidSession`, at once, and the session is as it was."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> None:
        session.data = object()

    s.storage.watch()
    with pytest.raises(InvalidSession):
        await s.sessions.mutate(session.id, change)

    assert s.storage.calls == ["load", "store unchanged"]
    assert await s.sessions.get(session.id) == session


@on_both
async def test_a_session_that_goes_while_it_is_changed_stays_gone() -> None:
    """`SessionNotFound`, whether it was there at the beginning or not."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await s.rival.delete(session.id)

    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await s.sessions.mutate(session.id, change)


@pytest.mark.parametrize("failing", range(4))
@on_both
async def test_an_outage_in_mutate_is_not_retried(failing: int) -> None:
    """At whatever step: the change might be applied twice, so the caller decides."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def fail(point: int, name: str) -> None:
        if point == failing:
            await unavailable(point, name)

    s.storage.watch(fail)
    with pytest.raises(StorageUnavailable):
        await s.sessions.mutate(session.id, increment)

    assert (await s.rival.get(session.id)).data == (2 if failing == 3 else 1)


@on_both
async def test_a_cancelled_mutate_stores_nothing() -> None:
    """A caller who gives up while the change runs has changed nothing."""
    s = Setting()
    session = await s.sessions.create(data=1)
    scope = anyio.CancelScope()

    async def change(session: Session[Any]) -> None:
        session.data = 99
        scope.cancel()
        await checkpoint()

    with scope:
        await s.sessions.mutate(session.id, change)

    assert scope.cancelled_caught
    assert await s.sessions.get(session.id) == session

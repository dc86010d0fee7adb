"""`SessionManager.mutate`: load, change and save; after a conflict, again."""

from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    InvalidSession,
    Session,
    SessionConflict,
    SessionNotFound,
    SessionRotated,
    StorageUnavailable,
)
from tests.support.loops import on_both
from tests.support.storages import Intercept, Replicas, fields, unavailable_at


def increment(session: Session[Any]) -> None:
    """Add one."""
    session.data = (session.data or 0) + 1


@pytest.mark.parametrize("by", ["id", "session"])
@on_both
async def test_mutate_changes_the_stored_session(by: str) -> None:
    """It returns the saved session. A session that was passed instead of an id is unchanged."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    before = fields(session)
    r.clock.advance(1)
    r.storage.intercept()

    changed = await r.sessions.mutate(session.id if by == "id" else session, increment)

    assert changed.data == 2
    assert changed.updated_at == r.clock.now()
    assert r.storage.calls == ["load", "store unchanged"]
    assert await r.sessions.get(session.id) == changed
    assert fields(session) == before


@on_both
async def test_mutate_changes_a_fresh_copy() -> None:
    """Unsaved changes of a session that was passed are not stored."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    await r.rival.mutate(session, increment)
    session.principal = "unsaved"

    changed = await r.sessions.mutate(session, increment)

    assert (changed.data, changed.principal) == (3, None)


@pytest.mark.parametrize("result", [None, 0, "tea"])
@on_both
async def test_result_of_a_change_is_ignored(result: object) -> None:
    """`mutate` returns the session, not the result of a plain or an async change."""
    r = Replicas()
    session = await r.sessions.create(data=1)

    def change(session: Session[Any]) -> object:
        increment(session)
        return result

    async def change_slowly(session: Session[Any]) -> object:
        await checkpoint()
        return change(session)

    first = await r.sessions.mutate(session.id, change)
    second = await r.sessions.mutate(session.id, change_slowly)

    assert (first.data, second.data) == (2, 3)
    assert await r.sessions.get(session.id) == second


@pytest.mark.parametrize("error", [ZeroDivisionError, SessionConflict])
@on_both
async def test_error_of_a_change_abandons_the_write(error: type[Exception]) -> None:
    """The exception leaves `mutate` without another attempt, even if it is a `SessionConflict`."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    runs = 0

    def change(session: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        session.data = 99
        raise error

    async def change_slowly(session: Session[Any]) -> None:
        await checkpoint()
        change(session)

    r.storage.intercept()
    for each in (change, change_slowly):
        with pytest.raises(error):
            await r.sessions.mutate(session.id, each)

    assert runs == 2
    assert r.storage.calls == ["load", "load"]
    assert await r.sessions.get(session.id) == session


def interfere(r: Replicas, id: str, times: float) -> Intercept:
    """Another replica writes before each of the first `times` saves."""

    async def intercept(_: int, name: str) -> None:
        nonlocal times
        if name == "before store unchanged" and times > 0:
            times -= 1
            other = await r.rival.get(id)
            other.metadata["seen"] = f"{int(other.metadata.get('seen', 0)) + 1}"
            await r.rival.save(other)

    return intercept


@on_both
async def test_change_is_redone_after_a_conflict() -> None:
    """Each attempt changes a fresh copy, so neither replica's change is lost."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    seen: list[Session[Any]] = []

    def change(session: Session[Any]) -> None:
        seen.append(session)
        increment(session)

    r.storage.intercept(interfere(r, session.id, 3))
    changed = await r.sessions.mutate(session.id, change)

    assert (changed.data, changed.metadata) == (2, {"seen": "3"})
    assert len({id(each) for each in seen}) == 4
    assert r.storage.calls == ["load", "store unchanged"] * 4
    assert await r.sessions.get(session.id) == changed


@pytest.mark.parametrize("attempts", [1, 2, 5])
@on_both
async def test_attempts_are_bounded(attempts: int) -> None:
    """The last conflict is a `SessionConflict`; the other replica's changes stay."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept(interfere(r, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await r.sessions.mutate(session.id, increment, attempts=attempts)

    assert r.storage.calls.count("store unchanged") == attempts
    stored = await r.rival.get(session.id)
    assert (stored.data, stored.metadata) == (1, {"seen": str(attempts)})


@on_both
async def test_attempts_are_positive() -> None:
    """Zero attempts are a `ValueError`."""
    with pytest.raises(ValueError, match="attempts"):
        await Replicas().sessions.mutate("x", increment, attempts=0)


@on_both
async def test_time_for_attempts_is_bounded() -> None:
    """After `timeout`, no further attempt begins."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept(interfere(r, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await r.sessions.mutate(session.id, increment, attempts=10**9, timeout=0.02)
    assert r.storage.calls.count("store unchanged") >= 2

    r.storage.intercept(interfere(r, session.id, float("inf")))
    with pytest.raises(SessionConflict):
        await r.sessions.mutate(session.id, increment, timeout=0)
    assert r.storage.calls.count("store unchanged") == 1


@on_both
async def test_pauses_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The growing pauses between thousands of attempts stay within the range of a float."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept(interfere(r, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await r.sessions.mutate(session.id, increment, attempts=1_100, timeout=600)


@on_both
async def test_concurrent_changes_all_count() -> None:
    """Many callers change the same session at once, and no change is lost."""
    r = Replicas()
    session = await r.sessions.create(data=0)

    async def change(session: Session[Any]) -> None:
        value = session.data or 0
        await checkpoint()
        session.data = value + 1

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(r.sessions.mutate, session.id, change)

    assert (await r.sessions.get(session.id)).data == 12


def set_another_id(session: Session[Any]) -> None:
    """A change that `mutate` refuses."""
    session.id = "another"


def set_unencodable_data(session: Session[Any]) -> None:
    """A change that the codec refuses."""
    session.data = object()


@pytest.mark.parametrize("change", [set_another_id, set_unencodable_data])
@on_both
async def test_invalid_change_is_refused(change: Any) -> None:
    """`InvalidSession`, without another attempt; the stored session stays as it was."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept()

    with pytest.raises(InvalidSession):
        await r.sessions.mutate(session.id, change)

    assert r.storage.calls.count("load") == 1
    assert await r.sessions.get(session.id) == session
    assert await r.count() == 1


@on_both
async def test_mutate_does_not_restore_a_deleted_session() -> None:
    """`SessionNotFound`, if the session is deleted during the change and if it never was."""
    r = Replicas()
    session = await r.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await r.rival.delete(session.id)

    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await r.sessions.mutate(session.id, change)


@pytest.mark.parametrize("attempts", [1, 100])
@on_both
async def test_rotation_during_a_change_ends_the_attempts(attempts: int) -> None:
    """`SessionRotated`: the id never accepts a write again."""
    r = Replicas()
    session = await r.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await r.rival.rotate(session.id)

    with pytest.raises(SessionRotated):
        await r.sessions.mutate(session.id, change, attempts=attempts)


@pytest.mark.parametrize("point", range(4))
@on_both
async def test_mutate_is_not_retried_after_an_outage(point: int) -> None:
    """The change may have been saved, so another attempt might apply it twice."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept(unavailable_at(point, in_doubt=point == 3))

    with pytest.raises(StorageUnavailable):
        await r.sessions.mutate(session.id, increment)

    assert (await r.rival.get(session.id)).data == (2 if point == 3 else 1)


@on_both
async def test_cancelled_mutate_stores_nothing() -> None:
    """A caller that is cancelled during its change has changed nothing."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    scope = anyio.CancelScope()

    async def change(session: Session[Any]) -> None:
        session.data = 99
        scope.cancel()
        await checkpoint()

    with scope:
        await r.sessions.mutate(session.id, change)

    assert scope.cancelled_caught
    assert await r.sessions.get(session.id) == session

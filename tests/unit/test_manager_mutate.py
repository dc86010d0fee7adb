"""`SessionManager.mutate`: load, change and save; after a conflict, again."""

from datetime import timedelta
from typing import Any

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
from aiosessions._retry import Retry
from tests.support.loops import on_both
from tests.support.storages import Intercept, Replicas, fields, unavailable_at


def increment(session: Session[Any]) -> str:
    """Add one. The result is ignored."""
    session.data += 1
    return "ignored"


async def increment_slowly(session: Session[Any]) -> str:
    """The same as a coroutine function."""
    await checkpoint()
    return increment(session)


@pytest.mark.parametrize("change", [increment, increment_slowly])
@pytest.mark.parametrize("by", ["id", "session"])
@on_both
async def test_mutate_changes_the_stored_session(by: str, change: Any) -> None:
    """It returns the saved session. A session that was passed is neither read nor changed."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    await r.rival.mutate(session, increment)
    session.principal = "unsaved"
    before = fields(session)
    r.clock.advance(1)
    r.storage.intercept()

    changed = await r.sessions.mutate(session.id if by == "id" else session, change)

    assert (changed.data, changed.principal) == (3, None)
    assert changed.updated_at == r.clock.now()
    assert r.storage.calls == ["load", "store unchanged"]
    assert await r.sessions.get(session.id) == changed
    assert fields(session) == before


@pytest.mark.parametrize("error", [ZeroDivisionError, SessionConflict])
@on_both
async def test_error_of_a_change_abandons_the_write(error: type[Exception]) -> None:
    """The exception leaves `mutate` without another attempt, even if it is a `SessionConflict`."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept()

    async def change(session: Session[Any]) -> None:
        session.data = 99
        await checkpoint()
        raise error

    with pytest.raises(error):
        await r.sessions.mutate(session.id, change)

    assert r.storage.calls == ["load"]


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

    r.storage.intercept(interfere(r, session.id, 3))
    changed = await r.sessions.mutate(session.id, increment)

    assert (changed.data, changed.metadata) == (2, {"seen": "3"})
    assert r.storage.calls == ["load", "store unchanged"] * 4
    assert await r.sessions.get(session.id) == changed


@pytest.mark.parametrize(
    ("bounds", "writes"),
    [({"attempts": 1}, 1), ({"attempts": 3}, 3), ({"timeout": 0}, 1)],
    ids=str,
)
@on_both
async def test_attempts_are_bounded(bounds: dict[str, Any], writes: int) -> None:
    """The last conflict is a `SessionConflict`; the other replica's changes stay."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept(interfere(r, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await r.sessions.mutate(session.id, increment, **bounds)

    assert r.storage.calls.count("store unchanged") == writes
    stored = await r.rival.get(session.id)
    assert (stored.data, stored.metadata) == (1, {"seen": str(writes)})


@pytest.mark.parametrize("timeout", [0.2, timedelta(seconds=0.2)])
async def test_pauses_grow_until_the_timeout(
    monkeypatch: pytest.MonkeyPatch, timeout: float | timedelta
) -> None:
    """The longest random pauses double up to 64 ms, and no pause ends after the timeout."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(round(seconds, 3))

    monkeypatch.setattr("random.uniform", lambda low, high: high if low == 0 else None)
    monkeypatch.setattr("anyio.sleep", sleep)
    monkeypatch.setattr("anyio.current_time", lambda: sum(pauses))
    retry = Retry(10**6, timeout)

    while await retry.wait():
        pass
    with pytest.raises(ValueError, match="attempts must be at least 1, not 0"):
        Retry(0)

    assert pauses == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.064]


@pytest.mark.parametrize(("name", "value"), [("id", "another"), ("data", object())])
@on_both
async def test_invalid_change_is_refused(name: str, value: object) -> None:
    """`InvalidSession`, without another attempt; the stored session stays as it was."""
    r = Replicas()
    session = await r.sessions.create(data=1)
    r.storage.intercept()

    with pytest.raises(InvalidSession):
        await r.sessions.mutate(session.id, lambda session: setattr(session, name, value))

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

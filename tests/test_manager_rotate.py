"""`SessionManager.rotate`: what holds after it."""

from datetime import timedelta
from typing import Any

import pytest

from aiosessions import (
    InvalidSession,
    Session,
    SessionConflict,
    SessionManager,
    SessionNotFound,
)
from tests.backends import on_both
from tests.hooked import Setting, fields


@on_both
async def test_the_session_gets_a_new_id() -> None:
    """All else stays: data, kind, principal, metadata, and when it was created and will end."""
    s = Setting(max_lifetime=1_000)
    old = await s.sessions.create(kind="web", principal="alice", metadata={"a": "b"}, data=[1])
    s.clock.advance(5)

    new = await s.sessions.rotate(old)

    moved = {"id", "updated_at", "revision"}
    assert {k: v for k, v in fields(new).items() if k not in moved} == {
        k: v for k, v in fields(old).items() if k not in moved
    }
    assert len({new.id, old.id}) == 2
    assert len(new.id) >= 22
    assert new.updated_at == s.clock.now()
    assert await s.sessions.get(new.id) == new


@on_both
async def test_the_new_session_is_independent() -> None:
    """It can be saved and changed like any other, and its end is its own."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)

    new = await s.sessions.rotate(old)
    new.metadata["c"] = "d"
    await s.sessions.save(new)
    changed = await s.sessions.mutate(new.id, lambda session: session.metadata.pop("a"))
    s.clock.advance(599)

    assert changed[0].metadata == {"c": "d"}
    assert old.metadata == {"a": "b"}
    assert (await s.sessions.get(new.id)).metadata == {"c": "d"}


@on_both
async def test_the_object_that_was_passed_keeps_its_id() -> None:
    """`rotate` returns another object, and leaves the one it was given as it was."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)
    before = fields(old)

    new = await s.sessions.rotate(old)

    assert new is not old
    assert fields(old) == before


@on_both
async def test_a_rotation_carries_changes_that_were_not_saved() -> None:
    """New rights that were set on the object are in the new session, and in it alone."""
    s = Setting()
    rights: list[str] = []
    old = await s.sessions.create(principal=None, data={"rights": rights})
    old.principal = "alice"
    rights.append("admin")
    old.metadata["role"] = "admin"

    new = await s.sessions.rotate(old)
    snapshot = await s.sessions.get(old.id)

    assert (await s.sessions.get(new.id)).principal == "alice"
    assert (await s.sessions.get(new.id)).data == {"rights": ["admin"]}
    assert (snapshot.principal, snapshot.data) == (None, {"rights": []})
    assert "role" not in snapshot.metadata
    assert new.id not in repr(fields(snapshot))


@on_both
async def test_the_old_id_never_gains_what_the_new_one_is_given() -> None:
    """Whatever is saved under the new id later, the old one answers with the old snapshot."""
    s = Setting()
    old = await s.sessions.create(data={"rights": []})
    new = await s.sessions.rotate(old)

    new.data = {"rights": ["admin"]}
    await s.sessions.save(new)
    await s.sessions.mutate(new.id, lambda session: setattr(session, "principal", "alice"))

    snapshot = await s.sessions.get(old.id)
    assert (snapshot.principal, snapshot.data) == (None, {"rights": []})


@pytest.mark.parametrize("waits", [[9, 0.9, 0.099], [0, 0], [2.499]], ids=str)
@on_both
async def test_the_old_id_answers_for_the_grace(waits: list[float]) -> None:
    """Exactly so long, to the millisecond, however often it is asked; the new one lives on."""
    s = Setting(grace=sum(waits) + 0.001)
    old = await s.sessions.create(data=1)

    new = await s.sessions.rotate(old)
    for wait in waits:
        s.clock.advance(wait)
        assert (await s.sessions.get(old.id)).data == 1
    s.clock.advance(0.001)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(old.id)
    assert await s.sessions.get(new.id) == new
    assert await s.storage.inner.delete_expired() == 1


@on_both
async def test_a_grace_may_be_a_timedelta() -> None:
    """Like every duration."""
    s = Setting()
    sessions = SessionManager[Any](s.storage, grace=timedelta(seconds=3), clock=s.clock)
    old = await sessions.create()

    await sessions.rotate(old)
    s.clock.advance(2.999)
    assert await s.lives(old.id)
    s.clock.advance(0.001)

    assert not await s.lives(old.id)


@on_both
async def test_without_grace_the_old_id_is_gone_at_once() -> None:
    """With `grace=0` it is not found when `rotate` returns."""
    s = Setting(grace=0)
    old = await s.sessions.create()

    new = await s.sessions.rotate(old)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(old.id)
    assert await s.sessions.delete(old.id) is False
    with pytest.raises((SessionNotFound, SessionConflict)):
        await s.sessions.save(old)
    assert await s.sessions.get(new.id) == new


@on_both
async def test_no_rotation_moves_the_end() -> None:
    """However often it is rotated, a session ends `max_lifetime` after it was created."""
    s = Setting(max_lifetime=100, grace=50)
    session = old = await s.sessions.create()
    created_at, expires_at = session.created_at, session.expires_at

    for _ in range(3):
        s.clock.advance(30)
        old, session = session, await s.sessions.rotate(session)
        assert (session.created_at, session.expires_at) == (created_at, expires_at)
    s.clock.advance(9.999)
    assert await s.lives(session.id)
    assert await s.lives(old.id)  # for 50 seconds, but not past the end of the session
    s.clock.advance(0.001)

    assert not await s.lives(session.id)
    assert not await s.lives(old.id)


@on_both
async def test_the_end_is_the_stored_one() -> None:
    """An `expires_at` that somebody set on the object does not prolong the session."""
    s = Setting(max_lifetime=100)
    session = await s.sessions.create()
    end = session.expires_at
    session.expires_at = None

    new = await s.sessions.rotate(session)

    assert new.expires_at == end
    assert (await s.sessions.get(new.id)).expires_at == end


@on_both
async def test_nothing_can_be_written_under_the_old_id() -> None:
    """Save, mutate and rotate are `SessionConflict`, for old objects and freshly loaded ones."""
    s = Setting()
    old = await s.sessions.create(data=1)
    new = await s.sessions.rotate(old)

    for session in (old, await s.sessions.get(old.id)):
        before = fields(session)
        with pytest.raises(SessionConflict):
            await s.sessions.save(session)
        with pytest.raises(SessionConflict):
            await s.sessions.rotate(session)
        assert fields(session) == before
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, lambda session: setattr(session, "data", 2))

    assert (await s.sessions.get(old.id)).data == 1
    assert await s.sessions.get(new.id) == new


@pytest.mark.parametrize("how", ["replaced", "cleared"])
@on_both
async def test_changed_metadata_does_not_open_the_old_id(how: str) -> None:
    """Nor can anything be written by whoever sets the metadata of what they loaded anew."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)
    new = await s.sessions.rotate(old)

    def change(session: Session[Any]) -> None:
        session.data = 2
        session.expires_at = None
        if how == "replaced":
            session.metadata = {"c": "d"}
        else:
            session.metadata.clear()

    loaded = await s.sessions.get(old.id)
    change(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.save(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.rotate(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, change)

    assert (await s.sessions.get(old.id)).data == 1
    assert await s.sessions.get(new.id) == new
    s.clock.advance(10)
    assert not await s.lives(old.id)


@on_both
async def test_a_refused_mutate_does_not_wait_for_the_old_id() -> None:
    """A rotated id stays rotated, so the change is not tried again."""
    s = Setting()
    old = await s.sessions.create(data=1)
    await s.sessions.rotate(old)
    s.storage.watch()

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, lambda session: setattr(session, "data", 2))

    assert s.storage.calls.count("load") == 1


@on_both
async def test_deleting_the_old_id_leaves_the_new_one() -> None:
    """What is deleted in its grace is the old answer; the session lives on under its new id."""
    s = Setting()
    old = await s.sessions.create()
    new = await s.sessions.rotate(old)

    assert await s.sessions.delete(old.id) is True

    assert not await s.lives(old.id)
    assert await s.sessions.get(new.id) == new


@on_both
async def test_a_session_is_rotated_from_its_last_revision() -> None:
    """Over what somebody else has written since, it is a `SessionConflict`, and nothing moves."""
    s = Setting()
    session = await s.sessions.create(data=1)
    other = await s.rival.get(session.id)
    other.data = 2
    await s.rival.save(other)
    s.storage.watch()

    with pytest.raises(SessionConflict):
        await s.sessions.rotate(session)

    assert await s.sessions.get(session.id) == other
    assert await s.writable(session.id)
    assert "store absent" not in s.storage.calls


@on_both
async def test_a_session_that_is_gone_is_not_rotated() -> None:
    """`SessionNotFound`: a rotation brings nobody back."""
    s = Setting()
    session = await s.sessions.create()
    await s.sessions.delete(session.id)
    s.storage.watch()

    for missing in (session, Session[Any](id="never-stored")):
        with pytest.raises(SessionNotFound):
            await s.sessions.rotate(missing)

    assert s.storage.calls == ["load", "load"]


@on_both
async def test_a_session_that_cannot_be_stored_is_not_rotated() -> None:
    """`InvalidSession`; the stored session stays as it was, under its id."""
    s = Setting()
    session = await s.sessions.create(data=1)
    session.data = object()

    with pytest.raises(InvalidSession):
        await s.sessions.rotate(session)

    assert (await s.sessions.get(session.id)).data == 1
    assert await s.writable(session.id)


@on_both
async def test_sessions_can_be_rotated_again() -> None:
    """And again, at once: each time the last id is the one that counts."""
    s = Setting()
    session = await s.sessions.create(data=1)
    retired: list[str] = []

    for _ in range(4):
        retired.append(session.id)
        session = await s.sessions.rotate(session)

    assert len({session.id, *retired}) == 5
    assert await s.writable(session.id)
    assert [await s.writable(id) for id in retired] == [False] * 4
    assert [await s.lives(id) for id in retired] == [True] * 4


@pytest.mark.parametrize("grace", [timedelta(days=365 * 9_000), 86_400 * 365 * 9_000])
@on_both
async def test_a_grace_beyond_the_calendar(grace: Any) -> None:
    """It is refused when the manager is made, or works; no rotation fails because of it."""
    s = Setting()
    try:
        sessions = SessionManager[Any](s.storage, grace=grace, clock=s.clock)
    except ValueError:
        return
    session = await sessions.create()

    new = await sessions.rotate(session)

    assert await s.sessions.get(new.id) == new

"""`SessionManager.rotate`: the state after it."""

from datetime import timedelta
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    InvalidSession,
    InvalidSessionId,
    JsonCodec,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    SessionRotated,
)
from aiosessions.manager import ROTATED_KEY
from aiosessions.testing import FakeClock
from tests.support.loops import on_both
from tests.support.storages import Replicas, fields


def sign_in(session: Session[Any]) -> None:
    """A change that gives new rights."""
    session.principal = "alice"
    session.metadata["role"] = "admin"
    session.data["rights"].append("admin")


async def sign_in_slowly(session: Session[Any]) -> None:
    """The same as a coroutine function."""
    await checkpoint()
    sign_in(session)


@on_both
async def test_session_gets_a_new_id() -> None:
    """The other fields stay, and the object that was passed is unchanged."""
    r = Replicas(max_lifetime=1_000)
    old = await r.sessions.create(kind="web", principal="alice", metadata={"a": "b"}, data=[1])
    before = fields(old)
    r.clock.advance(5)
    r.storage.intercept()

    new = await r.sessions.rotate(old)

    assert r.storage.calls == ["load", "store absent", "store unchanged"]
    assert fields(old) == before
    moved = {"id", "updated_at", "revision"}
    assert {k for k, v in fields(new).items() if v != before[k]} == moved
    assert len(new.id) >= 22
    assert new.updated_at == r.clock.now()
    assert await r.sessions.get(new.id) == new


@on_both
async def test_new_session_is_independent() -> None:
    """The new session can be saved, changed and rotated again, and outlives the old id."""
    r = Replicas()
    old = await r.sessions.create(metadata={"a": "b"}, data=1)

    new = await r.sessions.rotate(old)
    new.metadata["c"] = "d"
    await r.sessions.save(new)
    newer = await r.sessions.rotate(new)

    assert old.metadata == {"a": "b"}
    assert [await r.lives(each.id) for each in (old, new, newer)] == [True, True, True]
    assert [await r.writable(each.id) for each in (old, new, newer)] == [False, False, True]
    assert await r.sessions.delete(old.id) is True
    assert await r.lives(new.id)
    r.clock.advance(599)
    assert (await r.sessions.get(newer.id)).metadata == {"a": "b", "c": "d"}


@pytest.mark.parametrize("how", ["unsaved", "change", "async change", "change by id"])
@on_both
async def test_only_the_new_id_gets_a_change(how: str) -> None:
    """The old id answers with the session as it was stored."""
    r = Replicas()
    old = await r.sessions.create(id="old", data={"rights": []})
    if how == "unsaved":
        sign_in(old)
        new = await r.sessions.rotate(old)
    else:
        change = sign_in_slowly if how == "async change" else sign_in
        new = await r.sessions.rotate("old" if how == "change by id" else old, change)

    for _ in range(2):
        snapshot = await r.sessions.get("old")
        assert (snapshot.principal, snapshot.data) == (None, {"rights": []})
        assert snapshot.metadata.keys() == {ROTATED_KEY}
        assert snapshot.revision == ""
        assert new.id not in repr(fields(snapshot))
        stored = await r.sessions.get(new.id)
        assert (stored.principal, stored.data["rights"][0]) == ("alice", "admin")
        assert stored.metadata == {"role": "admin"}
        await r.sessions.mutate(new, sign_in)  # later changes do not reach it either


@on_both
async def test_change_sees_the_new_id() -> None:
    """The change may use the new id, but must not replace it."""
    r = Replicas()
    await r.sessions.create(id="old", data=1)

    def copy_id(session: Session[Any]) -> None:
        session.data = session.id

    new = await r.sessions.rotate("old", copy_id, new_id="new")
    with pytest.raises(InvalidSession):
        await r.sessions.rotate(new, lambda session: setattr(session, "id", "another"))

    assert (new.id, new.data) == ("new", "new")
    assert await r.writable("new")
    assert await r.count() == 2


@on_both
async def test_rotation_by_id_moves_the_stored_session() -> None:
    """Without a change, the stored content moves; a session that was written since is refused."""
    r = Replicas()
    old = await r.sessions.create(data=1)
    await r.rival.mutate(old, lambda session: setattr(session, "data", 2))
    r.storage.intercept()

    with pytest.raises(SessionConflict) as caught:
        await r.sessions.rotate(old)

    assert not isinstance(caught.value, SessionRotated)
    assert r.storage.calls == ["load"]
    assert (await r.sessions.rotate(old.id)).data == 2


@pytest.mark.parametrize(
    ("new_id", "error", "calls"),
    [
        ("", InvalidSessionId, []),
        (1, TypeError, []),
        ("taken", SessionExists, ["load", "store absent"]),
        # A rotation that fails may delete its new id, so it writes nothing under the old one.
        ("old", SessionExists, ["load"]),
    ],
)
@on_both
async def test_unusable_new_id_is_refused(
    new_id: Any, error: type[Exception], calls: list[str]
) -> None:
    """A malformed or used id is an error, and both sessions stay as they were."""
    r = Replicas()
    old = await r.sessions.create(id="old", data=1)
    taken = await r.sessions.create(id="taken", data=2)
    r.storage.intercept()

    with pytest.raises(error):
        await r.sessions.rotate(old, new_id=new_id)

    assert r.storage.calls == calls
    assert await r.sessions.get("old") == old
    assert await r.sessions.get("taken") == taken


# Grace and lifetimes


@on_both
async def test_old_id_answers_for_the_grace() -> None:
    """It answers to the millisecond, and loading it does not prolong it."""
    r = Replicas(grace=timedelta(seconds=2.5))
    old = await r.sessions.create(data=1)

    new = await r.sessions.rotate(old)
    for wait in (2, 0.4, 0.099):
        r.clock.advance(wait)
        assert (await r.sessions.get(old.id)).data == 1
    r.clock.advance(0.001)

    with pytest.raises(SessionNotFound):
        await r.sessions.get(old.id)
    assert await r.sessions.get(new.id) == new
    assert await r.count() == 1


@on_both
async def test_old_record_is_removed_without_grace() -> None:
    """With `grace=0`, the record is gone when `rotate` returns, even if a clock is slow."""
    r = Replicas(grace=0)
    fast = FakeClock()
    fast.advance(3600)
    old = await r.sessions.create()

    new = await SessionManager[Any](r.storage, grace=0, clock=fast).rotate(old)

    assert r.storage.inner.statistics().sessions == 1
    for call in (lambda: r.sessions.save(old), lambda: r.sessions.rotate(old)):
        with pytest.raises(SessionNotFound):
            await call()
    assert await r.sessions.get(new.id) == new


async def test_grace_may_reach_beyond_the_calendar() -> None:
    """A grace that ends after the year 9999 is cut there."""
    r = Replicas(grace=timedelta(days=365 * 9_000))

    new = await r.sessions.rotate(await r.sessions.create())

    assert await r.sessions.get(new.id) == new


@pytest.mark.parametrize(
    ("lifetime", "stored", "given", "expected"),
    [
        (None, None, 50, 50),  # shortened by the caller
        (None, 50, 20, 20),
        (None, 50, 90, 50),  # prolonged by the caller
        (None, 50, None, 50),
        (None, 5, None, 5),  # before the end of the grace
        (100, None, 900, 100),  # stored without a lifetime
        (100, None, None, 100),
    ],
)
@pytest.mark.parametrize("how", ["unsaved", "change"])
async def test_rotation_keeps_the_earliest_deadline(
    lifetime: float | None, stored: float | None, given: float | None, expected: float, how: str
) -> None:
    """The stored `expires_at`, the new one and the lifetime since the creation all bound it."""
    r = Replicas(max_lifetime=lifetime)

    def after(seconds: float | None) -> Any:
        return None if seconds is None else r.clock.now() + timedelta(seconds=seconds)

    created_at = r.clock.now()
    old = Session[Any](id="old", expires_at=after(stored), created_at=created_at)
    await r.storage.store(old)

    def change(session: Session[Any]) -> None:
        session.expires_at = after(given)
        session.created_at += timedelta(seconds=1)

    if how == "change":
        new = await r.sessions.rotate(old, change)
    else:
        change(old)
        new = await r.sessions.rotate(old)

    assert (new.created_at, new.expires_at) == (created_at, after(expected))
    assert (await r.sessions.get(old.id)).expires_at == after(min(10, stored or 10))
    assert await r.sessions.get(new.id) == new


# Refused rotations and writes


@on_both
async def test_old_id_accepts_no_writes() -> None:
    """A write under the old id is `SessionRotated`, for old objects and for loaded ones."""
    r = Replicas()
    old = await r.sessions.create(data=1)
    await r.sessions.rotate(old)
    loaded = await r.sessions.get(old.id)
    cleared = await r.sessions.get(old.id)
    cleared.metadata.clear()
    cleared.expires_at = None

    for session in (old, loaded, cleared):
        before = fields(session)
        for call in (
            lambda session=session: r.sessions.save(session),
            lambda session=session: r.sessions.rotate(session),
            lambda session=session: r.sessions.rotate(session, lambda _: None),
            lambda session=session: r.sessions.mutate(session, lambda _: None),
        ):
            r.storage.intercept()
            with pytest.raises(SessionRotated):
                await call()
            assert r.storage.calls.count("load") == 1
        assert fields(session) == before

    assert (await r.sessions.get(old.id)).data == 1


@pytest.mark.parametrize("grace", [10, 0])
@pytest.mark.parametrize("codec_is", ["public", "private"])
@on_both
async def test_session_without_room_for_mark_is_refused(codec_is: str, grace: float) -> None:
    """`InvalidSession`, before any write if the storage publishes its codec; nothing is left."""
    codec = JsonCodec(str, max_bytes=400)
    r = Replicas(codec=codec, grace=grace)
    if codec_is == "private":
        r.storage.codec = None
    session = await r.sessions.create(data="")
    session.data = "x" * (400 - len(codec.encode(session)))
    await r.sessions.save(session)
    r.storage.intercept()

    with pytest.raises(InvalidSession, match="400"):
        await r.sessions.rotate(session)

    assert r.storage.calls.count("store absent") == (0 if codec_is == "public" else 1)
    assert await r.sessions.get(session.id) == session
    assert await r.count() == 1
